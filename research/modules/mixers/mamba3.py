"""Mamba-3 (arXiv 2603.15569, section 3): trapezoidal rule, rotating state, decays from the input, no convolution.

In the single-input form (`mimo_rank` 1) each head writes one outer product a token; with `mimo_rank` R > 1 (section
3.3, MIMO) it writes and reads R of them, from its one input times R learnt vectors. Pairs of state features that rotate
together are neighbours in both; the released MIMO kernel pairs feature i with i + N / 2, which is the same model under
a permutation of the state.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.layers import ones
from research.modules.mixers.base import Call, Spec, State, fused, register
from research.modules.mixers.mamba2 import count_heads
from research.modules.norms import RMSNorm
from research.modules.ssm import dt_bias_init, torch_linear
from research.ops import linear_attention
from research.ops.mamba3 import cumulative_turns, rotate, trapezoidal_scan, trapezoidal_step, wrap
from research.ops.precision import wide


@register
@dataclass(frozen=True)
class Mamba3(Spec):
    """`num_heads` 0: expand * dim / head_dim; `num_rope_angles` 0: pairs in half of the state; `a_floor`: least decay
    rate."""

    d_state: int = 128
    head_dim: int = 64
    num_heads: int = 0
    ngroups: int = 1
    expand: float = 2.0
    num_rope_angles: int = 0
    mimo_rank: int = 1
    a_floor: float = 1e-4

    renamed: ClassVar[dict[str, str]] = {
        "state": "d_state",
        "heads": "num_heads",
        "groups": "ngroups",
        "angles": "num_rope_angles",
        "rank": "mimo_rank",
    }
    kind: ClassVar[str] = "mamba3"
    paper: ClassVar[str] = "arXiv 2603.15569"
    alone: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"d_state": 64, "head_dim": 32}
    tiny: ClassVar[dict[str, Any]] = {"d_state": 8, "head_dim": 8}
    ops: ClassVar[dict[str, tuple[str, ...]]] = {linear_attention.OP: linear_attention.IMPLEMENTATIONS}

    def resolve(self, dim: int) -> Self:
        angles = self.num_rope_angles or self.d_state // 4
        self.require(
            1 <= angles <= self.d_state // 2,
            f"num_rope_angles={self.num_rope_angles}; valid: 1 to {self.d_state // 2}, half of d_state={self.d_state}",
        )
        self.require(self.mimo_rank >= 1, f"mimo_rank={self.mimo_rank}; valid: whole numbers from 1")
        return replace(self, num_heads=count_heads(self, dim), num_rope_angles=angles)

    def shrink(self, width, heads, state) -> "Mamba3":
        heads = elastic.depth_count(float(width) if heads is None else heads, self.num_heads, self.ngroups, "heads")
        smaller = elastic.count(state, self.d_state, "state")
        self.require(smaller > 1, f"state={state} leaves one feature; a rotation needs 2")
        return replace(
            self,
            num_heads=heads,
            d_state=smaller,
            num_rope_angles=max(1, self.num_rope_angles * smaller // self.d_state),
        )

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "Mamba3Mixer":
        return Mamba3Mixer(self, dim, scope, init, implementation)


def heavy(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """1 + x for x >= 0, 1 / (1 - x) below: positive, with a slowly falling tail."""
    return jnp.where(x >= 0, 1 + x, 1 / (1 - jnp.minimum(x, 0)))


class Mamba3Mixer(nnx.Module):
    """out(scan(x, B, C) * silu(z)), B and C normalised, biased and rotated by the angles so far.

    Parameters, with E = H P: d (2 E + 2 G N R + 3 H + S) + 2 N + 2 H R N + 2 H + E d, and 3 H R P with R > 1. State,
    float32: `turns` [B, H, S], the angle of every pair in turns; `ssm` [B, H, P, N]; the last token's `x` [B, H, P] and
    rotated `b` [B, R, H, N].
    """

    def __init__(self, spec: Mamba3, dim: int, scope: str, init: Init, implementation: str):
        self.spec, self.implementation = spec, implementation
        self.inner = (spec.ngroups, spec.num_heads // spec.ngroups, spec.head_dim)
        self.maps = (spec.mimo_rank, spec.ngroups, spec.d_state)
        inner = (f"{scope}/groups", f"{scope}/heads", f"{scope}/head_dim")
        maps = (f"{scope}/rank", f"{scope}/groups", f"{scope}/state")
        heads, linear = self.inner[:2], torch_linear(dim)
        self.z = init.param("z", (dim, *self.inner), ("embed", *inner), linear, Kind.MATRIX)
        self.x = init.param("x", (dim, *self.inner), ("embed", *inner), linear, Kind.MATRIX)
        self.b = init.param("b", (dim, *self.maps), ("embed", *maps), linear, Kind.MATRIX)
        self.c = init.param("c", (dim, *self.maps), ("embed", *maps), linear, Kind.MATRIX)
        self.dt = init.param("dt", (dim, *heads), ("embed", *inner[:2]), linear, Kind.MATRIX)
        self.decay = init.param("decay", (dim, *heads), ("embed", *inner[:2]), linear, Kind.MATRIX)
        self.mix = init.param("mix", (dim, *heads), ("embed", *inner[:2]), linear, Kind.MATRIX)
        self.angle = init.param("angle", (dim, spec.num_rope_angles), ("embed", f"{scope}/angles"), linear, Kind.MATRIX)
        self.b_norm = RMSNorm(spec.d_state, maps[-1], init.child("b_norm"))
        self.c_norm = RMSNorm(spec.d_state, maps[-1], init.child("c_norm"))
        shape, axes = (spec.mimo_rank, *heads, spec.d_state), (maps[0], *inner[:2], maps[-1])
        self.b_bias = init.param("b_bias", shape, axes, ones, Kind.BIAS)
        self.c_bias = init.param("c_bias", shape, axes, ones, Kind.BIAS)
        self.dt_bias = init.param("dt_bias", heads, inner[:2], dt_bias_init, Kind.BIAS, precise=True)
        self.skip = init.param("skip", heads, inner[:2], ones, Kind.CONSTANT, precise=True)
        shape, axes = (spec.mimo_rank, *self.inner), (maps[0], *inner)
        mean = lambda key, shape, dtype: jnp.full(shape, 1 / spec.mimo_rank, dtype)
        several = spec.mimo_rank > 1
        self.spread_x = init.param("spread_x", shape, axes, mean, Kind.GAIN) if several else None
        self.spread_z = init.param("spread_z", shape, axes, ones, Kind.GAIN) if several else None
        self.gather = init.param("gather", shape, axes, mean, Kind.GAIN) if several else None
        fan_in = spec.num_heads * spec.head_dim * init.branches
        self.out = init.param("out", (*self.inner, dim), (*inner, "embed"), torch_linear(fan_in), Kind.MATRIX)

    def _project(self, x: Float[Array, "*B D"]) -> tuple[Array, ...]:
        """Returns (z, x, B, C, delta, log decay, mix, turns of this step): all but z and x in float32 at least."""
        spec, lead = self.spec, x.shape[:-1]
        kernels = self.z, self.x, self.b, self.c, self.dt, self.decay, self.mix, self.angle
        z, x, b, c, dt, decay, mix, angle = fused(
            x, *kernels, implementation=self.implementation, exact=(self.dt, self.decay, self.angle)
        )
        delta = jax.nn.softplus(wide(dt) + self.dt_bias[...].reshape(-1))
        log_decay = -jnp.maximum(heavy(wide(decay)), spec.a_floor) * delta
        turns = jnp.tanh(wide(angle))[..., None, :] * delta[..., None] / 2
        in_heads = lambda a: a.reshape(*lead, spec.num_heads, spec.head_dim)
        b = self._maps(b.reshape(*lead, *self.maps), self.b_norm, self.b_bias)
        c = self._maps(c.reshape(*lead, *self.maps), self.c_norm, self.c_bias)
        return in_heads(z), in_heads(x), b, c, delta, log_decay, jax.nn.sigmoid(wide(mix)), turns

    def _maps(self, b: Float[Array, "*B R G N"], norm: RMSNorm, bias: nnx.Variable) -> Float[Array, "*B R H N"]:
        """Normalised, then each head's own by its bias."""
        own = norm(wide(b))[..., None, :] + bias[...]
        return own.reshape(*own.shape[:-3], self.spec.num_heads, self.spec.d_state)

    def _spread(self, x: Float[Array, "*B H P"], maps: nnx.Variable | None) -> Float[Array, "*B R H P"]:
        x = x[..., None, :, :]
        return x if maps is None else x * maps[...].reshape(self.spec.mimo_rank, *x.shape[-2:])

    def _gated_out(self, y: Float[Array, "*B R H P"], z: Float[Array, "*B H P"]) -> Float[Array, "*B D"]:
        y = y * jax.nn.silu(self._spread(z, self.spread_z))
        y = y[..., 0, :, :] if self.gather is None else (y * self.gather[...].reshape(y.shape[-3:])).sum(-3)
        return y.reshape(*y.shape[:-2], -1) @ self.out[...].reshape(-1, self.out.shape[-1])

    def _inner_state(self, state: State) -> State:
        return {"ssm": state["ssm"], "x": wide(self._spread(state["x"], self.spread_x)), "b": state["b"]}

    def __call__(
        self, x: Float[Array, "B T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        z, x, b, c, delta, log_decay, mix, turns = self._project(x)
        turns = cumulative_turns(turns, None if state is None else state["turns"])
        b, c = (rotate(a, turns[:, :, None]) for a in (b, c))
        y, inner = trapezoidal_scan(
            self._spread(x, self.spread_x),
            *(delta, log_decay, mix, b, c, self.skip[...].reshape(-1)),
            initial_state=None if state is None else self._inner_state(state),
            segment_ids=call.segment_ids,
            implementation=self.implementation,
        )
        return self._gated_out(y, z), {"turns": turns[:, -1], "ssm": inner["ssm"], "x": wide(x[:, -1]), "b": inner["b"]}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        z, x, b, c, delta, log_decay, mix, turns = self._project(x)
        turns = wrap(state["turns"] + turns)
        b, c = (rotate(a, turns[:, None]) for a in (b, c))
        operands = delta, log_decay, mix, b, c, self.skip[...].reshape(-1)
        y, inner = trapezoidal_step(self._spread(x, self.spread_x), *operands, state=self._inner_state(state))
        return self._gated_out(y, z), {"turns": turns, "ssm": inner["ssm"], "x": wide(x), "b": inner["b"]}

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        spec = self.spec
        shapes = {
            "turns": (spec.num_heads, spec.num_rope_angles),
            "ssm": (spec.num_heads, spec.head_dim, spec.d_state),
            "x": (spec.num_heads, spec.head_dim),
            "b": (spec.mimo_rank, spec.num_heads, spec.d_state),
        }
        return {name: jnp.zeros((batch, *shape), jnp.float32) for name, shape in shapes.items()}
