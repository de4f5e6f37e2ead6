"""Training runs of soft actor-critic on a toy task: all seeds at once, environment and learner in one compiled scan."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.control.environments import Environment
from research.control.sac import Learner, Sac, Transition, act, make_learner, policy, update
from research.errors import UserError
from research.seeds import key as key_of

RARELY = {"xla_backend_optimization_level": 1}
"""Compiler options of programs that run a few times only."""


class Memory(NamedTuple):
    """A ring of the last transitions; `count` have been written."""

    transitions: Transition
    count: Int[Array, ""]


class Run(NamedTuple):
    """One seed's run: learner, memory, the episode at hand and the key of what comes."""

    learner: Learner
    memory: Memory
    state: Float[Array, " S"]
    time: Int[Array, ""]
    key: Array


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


def advance(config: Sac, environment: Environment, run: Run, *, learning: bool) -> Run:
    """Takes one step in the environment; learning, also one update, else the action is uniform."""
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
    learner = run.learner
    if learning:
        learner = update(config, environment, learner, recall(memory, recall_key, config.batch), update_key)
    state = jnp.where(over, environment.reset(reset_key), state)
    return Run(learner, memory, state, jnp.where(over, 0, run.time + 1), key)


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


def train(
    config: Sac, environment: Environment, seeds: list[int], steps: int, evaluations: int = 10, episodes: int = 20
) -> Iterator[tuple[Evaluation, Run]]:
    """Trains all seeds side by side and yields, at equal distances, what they earn and where they stand.

    Args:
      config: the learner.
      environment: the task.
      seeds: one run each; a run's numbers depend on its seed alone.
      steps: environment steps of each run after the warm-up, one update each.
      evaluations: how often to evaluate; the last is at the end.
      episodes: episodes of an evaluation.

    Raises:
      UserError: fewer steps than evaluations, or a seed out of range.
    """
    if not 1 <= evaluations <= steps:
        raise UserError(f"steps={steps} must be at least evaluations={evaluations}, and that at least 1")

    def scan(count: int, learning: bool, run: Run) -> Run:
        body = lambda run, _: (advance(config, environment, run, learning=learning), None)
        return jax.lax.scan(body, run, length=count)[0]

    def measure(run: Run) -> tuple[Float[Array, ""], Float[Array, ""]]:
        keys = jax.random.split(jax.random.fold_in(run.key, 1), episodes)
        observations = jax.vmap(lambda key: environment.observe(environment.reset(key)))(keys)
        log_weights = policy(config, environment, run.learner.trained.actor, observations).log_weights
        entropy = -(jnp.exp(log_weights) * log_weights).sum(-1).mean()
        returns = jax.vmap(functools.partial(episode_return, config, environment, run.learner))(keys)
        return returns.mean(), jnp.exp(entropy)

    keys = jnp.stack([key_of(seed) for seed in seeds])
    runs = jax.jit(jax.vmap(functools.partial(start, config, environment)), compiler_options=RARELY)(keys)
    runs = jax.jit(jax.vmap(functools.partial(scan, config.warmup, False)), compiler_options=RARELY)(runs)
    length = steps // evaluations
    learn = jax.jit(jax.vmap(functools.partial(scan, length, True)), donate_argnums=0)
    evaluate = jax.jit(jax.vmap(measure), compiler_options=RARELY)
    for i in range(evaluations):
        runs = learn(runs)
        yield Evaluation((i + 1) * length, *map(np.asarray, evaluate(runs))), runs


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
