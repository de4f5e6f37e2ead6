"""One seed's run of soft actor-critic on a toy task as pure functions, environment and learner in one scan; tables over
seeds."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.control.environments import Environment
from research.control.sac import Learner, Sac, Transition, act, make_learner, policy, update


class Memory(NamedTuple):
    """A ring of the last transitions; `count` have been written."""

    transitions: Transition
    count: Int[Array, ""]  # type: ignore[assignment]  # in place of a tuple's method of this name


class Run(NamedTuple):
    """One seed's run: learner, memory, the episode at hand and the key of what comes."""

    learner: Learner
    memory: Memory
    state: Float[Array, " S"]
    time: Int[Array, ""]
    key: Array


class Numbers(NamedTuple):
    """What a step tells of itself: the loss of its update, its reward, and the temperature after it."""

    loss: Float[Array, "*S"]
    reward: Float[Array, "*S"]
    temperature: Float[Array, "*S"]


@dataclass(frozen=True)
class Evaluation:
    """How every seed stands after `steps` steps of its environment.

    Attributes:
      returns: mean return of some episodes in which primitives play their means.
      used: exponential of the router's mean entropy over the states of these episodes' starts: K when all primitives
        act equally often.
    """

    steps: int
    returns: Float[np.ndarray, " S"]
    used: Float[np.ndarray, " S"]


def start(config: Sac, environment: Environment, key: Array) -> Run:
    """Returns a run that has not begun; `key` is that of its seed."""
    key, learner_key, state_key = jax.random.split(key, 3)
    o, a = jnp.zeros((config.capacity, environment.observations)), jnp.zeros((config.capacity, environment.actions))
    number = jnp.zeros(config.capacity)
    memory = Memory(Transition(o, a, number, o, number), jnp.zeros((), jnp.int32))
    learner = make_learner(config, environment, learner_key)
    return Run(learner, memory, environment.reset(state_key), jnp.zeros((), jnp.int32), key)


def remember(memory: Memory, transition: Transition) -> Memory:
    """Returns the memory with one more transition, the oldest gone where it is full."""
    place = memory.count % len(memory.transitions.reward)
    return Memory(
        jax.tree.map(lambda ring, new: ring.at[place].set(new), memory.transitions, transition), memory.count + 1
    )


def recall(memory: Memory, key: Array, size: int) -> Transition:
    """Draws remembered transitions, with replacement."""
    held = jnp.minimum(memory.count, len(memory.transitions.reward))
    index = jax.random.randint(key, (size,), 0, held)
    return jax.tree.map(lambda ring: ring[index], memory.transitions)


def advance(config: Sac, environment: Environment, run: Run, *, learning: bool) -> tuple[Run, Numbers]:
    """Takes one step in the environment; learning, also one update, else the action is uniform and the loss 0."""
    key, act_key, reset_key, recall_key, update_key = jax.random.split(run.key, 5)
    observation = environment.observe(run.state)
    if learning:
        action = act(policy(config, environment, run.learner.trained.actor, observation), act_key)
    else:
        action = jax.random.uniform(act_key, (environment.actions,), minval=-1.0, maxval=1.0)
    state, reward, terminal = environment.step(run.state, action)
    transition = Transition(observation, action, reward, environment.observe(state), terminal.astype(jnp.float32))
    memory = remember(run.memory, transition)
    over = terminal | (run.time + 1 >= environment.horizon)
    learner, loss = run.learner, jnp.zeros(())
    if learning:
        learner, loss = update(config, environment, learner, recall(memory, recall_key, config.batch), update_key)
    state = jnp.where(over, environment.reset(reset_key), state)
    numbers = Numbers(loss, reward, jnp.exp(learner.trained.log_alpha))
    return Run(learner, memory, state, jnp.where(over, 0, run.time + 1), key), numbers


def advance_all(config: Sac, environment: Environment, run: Run, count: int, *, learning: bool) -> tuple[Run, Numbers]:
    """Takes `count` steps in one scan, see `advance`; the numbers are means over them."""
    body = lambda run, _: advance(config, environment, run, learning=learning)
    run, numbers = jax.lax.scan(body, run, length=count)
    return run, jax.tree.map(lambda x: x.mean(0), numbers)


def episode_return(config: Sac, environment: Environment, learner: Learner, key: Array) -> Float[Array, ""]:
    """Sum of the rewards of one episode, undiscounted; the router draws, the primitives play their means."""

    def body(carry, key):
        state, alive = carry
        mixture = policy(config, environment, learner.trained.actor, environment.observe(state))
        state, reward, terminal = environment.step(state, act(mixture, key, noise=False))
        return (state, alive & ~terminal), jnp.where(alive, reward, 0.0)

    reset_key, step_key = jax.random.split(key)
    keys = jax.random.split(step_key, environment.horizon)
    return jax.lax.scan(body, (environment.reset(reset_key), jnp.array(True)), keys)[1].sum()


def measure(
    config: Sac, environment: Environment, run: Run, episodes: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (mean return of some episodes, primitives in use), see `Evaluation`; the same for the same run."""
    keys = jax.random.split(jax.random.fold_in(run.key, 1), episodes)
    observations = jax.vmap(lambda key: environment.observe(environment.reset(key)))(keys)
    log_weights = policy(config, environment, run.learner.trained.actor, observations).log_weights
    entropy = -(jnp.exp(log_weights) * log_weights).sum(-1).mean()
    returns = jax.vmap(functools.partial(episode_return, config, environment, run.learner))(keys)
    return returns.mean(), jnp.exp(entropy)


def summary(
    name: str, experts: int, estimator: str, seeds: list[int], curve: list[Evaluation], seconds: float
) -> list[dict[str, Any]]:
    """Returns a row per seed: the return at the end, its mean over all evaluations (the area under the curve) and the
    primitives in use."""
    area = np.mean([e.returns for e in curve], 0)
    return [
        {
            "task": name,
            "experts": experts,
            "estimator": estimator,
            "seed": seed,
            "return": float(curve[-1].returns[i]),
            "mean_over_run": float(area[i]),
            "used": float(curve[-1].used[i]),
            "steps": curve[-1].steps,
            "all_seeds_s": round(seconds, 1),
        }
        for i, seed in enumerate(seeds)
    ]


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per (task, experts, estimator): means over the seeds, and the least return among them."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["experts"], row["estimator"]), []).append(row)
    mean = lambda group, key: float(np.mean([row[key] for row in group]))
    return [
        {
            "task": task,
            "experts": experts,
            "estimator": estimator,
            "seeds": len(group),
            "return": mean(group, "return"),
            "least": min(row["return"] for row in group),
            "mean_over_run": mean(group, "mean_over_run"),
            "used": mean(group, "used"),
            "steps": group[0]["steps"],
            "all_seeds_s": group[0]["all_seeds_s"],
        }
        for (task, experts, estimator), group in groups.items()
    ]
