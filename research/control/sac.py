"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905) whose actor is a mixture of experts (PMOE, arXiv
2104.09122).

Twin critics with target copies and a learnt temperature. With one expert every estimator is plain SAC. Entropies are
those of single primitives, as in the paper's code, so the temperature does not price the choice between them.
"""

import functools
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from research.control.environments import Environment
from research.control.networks import ActorConfig, CriticConfig
from research.errors import UserError
from research.modules import gaussian_mixture as mixtures
from research.modules.gaussian_mixture import Draws, Mixture
from research.modules.state import Arrays, apply, initialize
from research.values import SHARE, SIZE, Rule

Positive = Annotated[float, Rule(above=0)]

ESTIMATORS = {
    "frequency": "the frequency loss; every primitive is trained on every state",
    "frequency_best": "the frequency loss; only the primitive whose action the critics find best is trained, as in the "
    "released code",
    "gumbel": "straight-through Gumbel-softmax; the drawn primitive is trained",
    "score": "score ratio (REINFORCE); the drawn primitive is trained",
}
"""Gradient estimator of the router -> what it is. Trained on its best actions alone, a primitive whose actions win
seldom is not moved to where they would win oftener (at a peak the critic has no slope) and the other takes over: on the
bandit of two equal peaks "frequency" finds both at equal weights, "frequency_best" does not (tests/control)."""


@dataclass(frozen=True)
class Sac:
    """Settings of a learner.

    Attributes:
      experts: K, primitives of the policy.
      estimator: of the router's gradient, one of ESTIMATORS.
      hidden, depth: of actor and critics.
      gamma: discount of a step.
      tau: share of the critics that the target copies take over at each update.
      lr: Adam's learning rate, of everything.
      temperature: alpha at the start; rewards here are of the order of 1.
      batch: transitions of an update.
      capacity: transitions that are remembered.
      warmup: steps of uniform actions before the first update.
    """

    experts: Annotated[int, SIZE] = 2
    estimator: Annotated[str, Rule(choices=tuple(ESTIMATORS))] = "frequency"
    hidden: Annotated[int, SIZE] = 64
    depth: Annotated[int, SIZE] = 2
    gamma: Annotated[float, SHARE] = 0.99
    tau: Annotated[float, SHARE] = 0.01
    lr: Positive = 3e-3
    temperature: Positive = 0.1
    batch: Annotated[int, SIZE] = 128
    capacity: Annotated[int, SIZE] = 20_000
    warmup: Annotated[int, SIZE] = 500

    def __post_init__(self):
        if self.estimator not in ESTIMATORS:
            raise UserError(f"unknown estimator {self.estimator!r}; valid: {', '.join(ESTIMATORS)}")
        counts = {"experts": self.experts, "batch": self.batch, "capacity": self.capacity, "warmup": self.warmup}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name}={value}; valid: whole numbers from 1")

    def actor(self, environment: Environment) -> ActorConfig:
        """Returns the policy's config for a task."""
        return ActorConfig(environment.observations, environment.actions, self.experts, self.hidden, self.depth)

    def critic(self, environment: Environment) -> CriticConfig:
        """Returns the config of each critic for a task."""
        return CriticConfig(environment.observations, environment.actions, self.hidden, self.depth)


class Transition(NamedTuple):
    """What one step taught; `terminal` is 1 where nothing is earned afterwards."""

    observation: Float[Array, "*B O"]
    action: Float[Array, "*B A"]
    reward: Float[Array, "*B"]
    following: Float[Array, "*B O"]
    terminal: Float[Array, "*B"]


class Trained(NamedTuple):
    """What the optimizer changes: the actor, both critics (leading axis 2) and the logarithm of the temperature."""

    actor: Arrays
    critics: Arrays
    log_alpha: Float[Array, ""]


class Learner(NamedTuple):
    """Everything that updates change."""

    trained: Trained
    targets: Arrays
    moments: Any


def make_learner(config: Sac, environment: Environment, key: Array) -> Learner:
    """Returns a learner with freshly drawn networks."""
    actor_key, critic_key = jax.random.split(key)
    actor, _ = initialize(config.actor(environment), actor_key)
    critics, _ = jax.vmap(functools.partial(initialize, config.critic(environment)))(jax.random.split(critic_key))
    trained = Trained(actor, critics, jnp.log(config.temperature))
    return Learner(trained, critics, optax.adam(config.lr).init(trained))


def policy(config: Sac, environment: Environment, actor: Arrays, observation: Float[Array, "*B O"]) -> Mixture:
    """Returns the mixture over actions before squashing."""
    return apply(config.actor(environment), actor, {}, observation)[0]


def values(
    config: Sac,
    environment: Environment,
    critics: Arrays,
    observation: Float[Array, "*B O"],
    action: Float[Array, "*B A"],
) -> Float[Array, " 2 *B"]:
    """Returns what each critic thinks of an action."""
    return jax.vmap(lambda params: apply(config.critic(environment), params, {}, observation, action)[0])(critics)


def act(mixture: Mixture, key: Array, *, noise: bool = True) -> Float[Array, "*B A"]:
    """Draws a primitive by the router, and its action; without noise its mean."""
    choice_key, noise_key = jax.random.split(key)
    actions = mixtures.draw(mixture, noise_key).actions if noise else jnp.tanh(mixture.means)
    index = mixtures.choose(mixture, choice_key)
    return jnp.take_along_axis(actions, index[..., None, None], -2)[..., 0, :]


def critic_loss(
    config: Sac, environment: Environment, critics: Arrays, learner: Learner, batch: Transition, key: Array
) -> Float[Array, ""]:
    """Squared distance of both critics to r + gamma (1 - terminal) (min_j Q'_j(s', a') - alpha log pi_i(a'|s')), i
    drawn by the router."""
    choice_key, noise_key = jax.random.split(key)
    mixture = policy(config, environment, learner.trained.actor, batch.following)
    draws, index = mixtures.draw(mixture, noise_key), mixtures.choose(mixture, choice_key)
    action = jnp.take_along_axis(draws.actions, index[:, None, None], -2)[:, 0]
    entropy = -jnp.exp(learner.trained.log_alpha) * mixtures.of_primitive(draws.log_probs, index)
    future = values(config, environment, learner.targets, batch.following, action).min(0) + entropy
    target = jax.lax.stop_gradient(batch.reward + config.gamma * (1 - batch.terminal) * future)
    return jnp.square(values(config, environment, critics, batch.observation, batch.action) - target).mean(1).sum()


def actor_loss(
    estimator: str, mixture: Mixture, draws: Draws, value_of: Any, alpha: Float[Array, ""], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (loss, mean log density of the primitives that were trained).

    Args:
      estimator: one of ESTIMATORS.
      mixture: of a batch of states.
      draws: one action of every primitive.
      value_of: function from actions [B, *, A] to values [B, *]; no gradient is taken of its parameters.
      alpha: temperature.
      key: of the drawn primitives.
    """
    if estimator == "gumbel":
        choice = mixtures.gumbel_choice(mixture.log_weights, key)
        value = value_of((choice[..., None] * draws.actions).sum(-2, keepdims=True))[..., 0]
        log_prob = (choice * draws.log_probs).sum(-1)
        return (alpha * log_prob - value).mean(), log_prob.mean()
    q = value_of(draws.actions)
    if estimator == "frequency":
        router = mixtures.frequency_loss(mixture.log_weights, q, "mean").mean()
        return (alpha * draws.log_probs - q).mean() + router, draws.log_probs.mean()
    if estimator == "frequency_best":
        index, router = q.argmax(-1), mixtures.frequency_loss(mixture.log_weights, q, "mean")
    else:
        index = mixtures.choose(mixture, key)
        router = mixtures.score_ratio_loss(mixture.log_weights, q - alpha * draws.log_probs, index)
    log_prob = mixtures.of_primitive(draws.log_probs, index)
    return (alpha * log_prob - mixtures.of_primitive(q, index) + router).mean(), log_prob.mean()


def update(
    config: Sac, environment: Environment, learner: Learner, batch: Transition, key: Array
) -> tuple[Learner, Float[Array, ""]]:
    """Returns (the learner after one step of critics, actor and temperature on a batch, and of the target copies after
    them; the loss before it)."""
    critic_key, noise_key, choice_key = jax.random.split(key, 3)
    frozen = jax.lax.stop_gradient(learner.trained)

    def loss(trained: Trained) -> Float[Array, ""]:
        mixture = policy(config, environment, trained.actor, batch.observation)
        draws = mixtures.draw(mixture, noise_key)
        seen = jnp.broadcast_to(batch.observation[:, None], (*draws.log_probs.shape, batch.observation.shape[-1]))
        value_of = lambda a: values(config, environment, frozen.critics, seen[:, : a.shape[1]], a).min(0)
        acting, log_prob = actor_loss(config.estimator, mixture, draws, value_of, jnp.exp(frozen.log_alpha), choice_key)
        surprise = (
            jax.lax.stop_gradient(log_prob) - environment.actions
        )  # target entropy: -1 nat per number of the action
        critics = critic_loss(config, environment, trained.critics, learner._replace(trained=frozen), batch, critic_key)
        return critics + acting - trained.log_alpha * surprise

    value, gradient = jax.value_and_grad(loss)(learner.trained)
    steps, moments = optax.adam(config.lr).update(gradient, learner.moments)
    trained = optax.apply_updates(learner.trained, steps)
    targets = jax.tree.map(lambda old, new: old + config.tau * (new - old), learner.targets, trained.critics)
    return Learner(trained, targets, moments), value
