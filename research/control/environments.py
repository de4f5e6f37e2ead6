"""Toy control tasks as pure functions of a state array: a bandit with two peaks, a detour round an obstacle, the
pendulum.

Actions lie in [-1, 1]; each task scales them itself. `step` says whether the episode is over for good (nothing is
earned after it); running out of `horizon` is not such an end, the value of the last state still counts.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.errors import UserError


class Environment(Protocol):
    """One task; `observations` and `actions` are sizes, `horizon` the steps after which an episode is cut off."""

    @property
    def observations(self) -> int: ...

    @property
    def actions(self) -> int: ...

    @property
    def horizon(self) -> int: ...

    def reset(self, key: Array) -> Float[Array, " S"]:
        """Returns the state in which an episode starts."""
        ...

    def observe(self, state: Float[Array, " S"]) -> Float[Array, " O"]:
        """Returns what the agent sees of a state."""
        ...

    def step(
        self, state: Float[Array, " S"], action: Float[Array, " A"]
    ) -> tuple[Float[Array, " S"], Float[Array, ""], Bool[Array, ""]]:
        """Returns (next state, reward, whether the episode ends for good)."""
        ...


@dataclass(frozen=True)
class Bandit:
    """One action a in [-2, 2] and one reward: two equal peaks of height 1 and width 0.3 at a = -1 and a = 1."""

    observations: ClassVar[int] = 1
    actions: ClassVar[int] = 1
    horizon: ClassVar[int] = 1
    reach: ClassVar[float] = 2.0
    width: ClassVar[float] = 0.3

    def reset(self, key: Array) -> Float[Array, " S"]:
        return jnp.ones(1)

    def observe(self, state: Float[Array, " S"]) -> Float[Array, " O"]:
        return state

    def reward(self, action: Float[Array, "*B 1"]) -> Float[Array, "*B"]:
        """Reward of an action in [-1, 1], before scaling."""
        distance = jnp.abs(jnp.abs(self.reach * action[..., 0]) - 1)
        return jnp.exp(-0.5 * jnp.square(distance / self.width))

    def step(
        self, state: Float[Array, " S"], action: Float[Array, " A"]
    ) -> tuple[Float[Array, " S"], Float[Array, ""], Bool[Array, ""]]:
        return state, self.reward(action), jnp.array(True)


@dataclass(frozen=True)
class Detour:
    """A point walks in the plane from (-1, 0) to (1, 0); a disc around the origin is in the way, both ways round are
    equally long.

    The reward is the progress towards the goal, minus 0.01 a step, plus 1 at the goal, minus 1 for touching the disc;
    both end the episode. Without noise the shortest way round earns about 2.6.
    """

    observations: ClassVar[int] = 2
    actions: ClassVar[int] = 2
    horizon: ClassVar[int] = 60
    stride: ClassVar[float] = 0.1
    obstacle: ClassVar[float] = 0.4
    goal: ClassVar[float] = 0.15

    def reset(self, key: Array) -> Float[Array, " S"]:
        return jnp.array([-1.0, 0.0]) + jax.random.uniform(key, (2,), minval=-0.05, maxval=0.05)

    def observe(self, state: Float[Array, " S"]) -> Float[Array, " O"]:
        return state

    def step(
        self, state: Float[Array, " S"], action: Float[Array, " A"]
    ) -> tuple[Float[Array, " S"], Float[Array, ""], Bool[Array, ""]]:
        new = jnp.clip(state + self.stride * action, -1.5, 1.5)
        before, after = (jnp.linalg.norm(p - jnp.array([1.0, 0.0])) for p in (state, new))
        arrived, crashed = after < self.goal, jnp.linalg.norm(new) < self.obstacle
        return new, before - after - 0.01 + 1.0 * arrived - 1.0 * crashed, arrived | crashed


@dataclass(frozen=True)
class Pendulum:
    """Swing-up of a pendulum from anywhere by a weak torque in [-2, 2]: the equations and costs of Gymnasium's
    Pendulum-v1.

    State: angle from upright in rad, speed in rad/s. An episode has 200 steps of 0.05 s; about -1,200 at random, -150
      when solved.
    """

    observations: ClassVar[int] = 3
    actions: ClassVar[int] = 1
    horizon: ClassVar[int] = 200
    torque: ClassVar[float] = 2.0
    seconds: ClassVar[float] = 0.05
    gravity: ClassVar[float] = 10.0
    fastest: ClassVar[float] = 8.0

    def reset(self, key: Array) -> Float[Array, " S"]:
        return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0) * jnp.array([jnp.pi, 1.0])

    def observe(self, state: Float[Array, " S"]) -> Float[Array, " O"]:
        return jnp.array([jnp.cos(state[0]), jnp.sin(state[0]), state[1]])

    def step(
        self, state: Float[Array, " S"], action: Float[Array, " A"]
    ) -> tuple[Float[Array, " S"], Float[Array, ""], Bool[Array, ""]]:
        angle, speed = state
        torque = self.torque * action[0]
        wrapped = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2
        # A rod of mass 1 and length 1: inertia 1/3.
        speed = jnp.clip(
            speed + self.seconds * (1.5 * self.gravity * jnp.sin(angle) + 3.0 * torque), -self.fastest, self.fastest
        )
        return jnp.array([angle + self.seconds * speed, speed]), -cost, jnp.array(False)


ENVIRONMENTS: dict[str, Environment] = {"bandit": Bandit(), "detour": Detour(), "pendulum": Pendulum()}


def environment(name: str) -> Environment:
    """Returns the task of this name.

    Raises:
      UserError: there is none.
    """
    if name not in ENVIRONMENTS:
        raise UserError(f"unknown task {name!r}; valid: {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name]
