"""What mixers around linear attention share: projections by heads, one call for sequences and steps, joint
convolutions.

In this family `d_state` is the size of a head's keys and `head_dim` that of its values: a head's memory is a matrix
[d_state, head_dim]. Features of keys may be cut (role state), those of values are whole. Functions take x [B, T, ...],
or [B, ...] in a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.layers import normal_02
from research.modules.mixers.base import Call, Spec, State, fused
from research.modules.ssm import ShortConv, short_convs, short_convs_step
from research.ops.linear_attention import linear_attention, linear_attention_step


@dataclass(frozen=True)
class HeadSpec(Spec):
    """Sizes of heads: `d_state` 0 is expand_k * dim / num_heads features of a key, `head_dim` 0 expand_v * dim /
    num_heads features of a value."""

    num_heads: int = 4
    d_state: int = 0
    head_dim: int = 0
    expand_k: float = 1.0
    expand_v: float = 1.0

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads", "state": "d_state"}

    def resolve(self, dim: int) -> Self:
        self.require(self.num_heads >= 1, f"num_heads={self.num_heads}; valid: whole numbers from 1")
        state = self.d_state or int(self.expand_k * dim) // self.num_heads
        head_dim = self.head_dim or int(self.expand_v * dim) // self.num_heads
        fits = state >= 1 and head_dim >= 1
        self.require(
            fits,
            f"dim={dim} gives num_heads={self.num_heads} keys of {state} and values of {head_dim} features; "
            "valid: at least 1",
        )
        return replace(self, d_state=state, head_dim=head_dim)

    def shrink(self, width, heads, state) -> Self:
        kept = elastic.count(heads, self.num_heads, "heads", width)
        return replace(self, num_heads=kept, d_state=elastic.count(state, self.d_state, "state"))


def head_kernel(tag: str, dim: int, heads: int, size: int, axes: tuple[str, str], init: Init) -> nnx.Variable:
    """Returns a kernel [dim, heads, size], N(0, 0.02); `axes` names the last two."""
    return init.param(tag, (dim, heads, size), ("embed", *axes), normal_02, Kind.MATRIX)


def out_kernel(dim: int, heads: int, size: int, axes: tuple[str, str], init: Init) -> nnx.Variable:
    """Returns the kernel [heads, size, dim] that takes heads back to the residual stream, N(0, 0.02)."""
    return init.param("out", (heads, size, dim), (*axes, "embed"), normal_02, Kind.MATRIX)


def project(
    x: Float[Array, "*B D"], *kernels: nnx.Variable, implementation: str, exact: tuple[nnx.Variable | None, ...] = ()
) -> tuple[Array, ...]:
    """Products of x with kernels [D, ...], with their axes after the first one; `exact` as in `fused`."""
    products = fused(x, *kernels, implementation=implementation, exact=exact)
    return tuple(y.reshape(*x.shape[:-1], *kernel.shape[1:]) for y, kernel in zip(products, kernels, strict=True))


def join(y: Float[Array, "*B H V"], kernel: nnx.Variable) -> Float[Array, "*B D"]:
    """The product of all heads with a kernel [H, V, D]."""
    return y.reshape(*y.shape[:-2], -1) @ kernel[...].reshape(-1, kernel.shape[-1])


def attend(
    q: Array, k: Array, v: Array, memory: Array | None, call: Call, implementation: str, **options
) -> tuple[Array, Array]:
    """`linear_attention` of a sequence, or one step of it where q has no axis of time; returns (output, memory)."""
    if q.ndim == 3:
        assert memory is not None  # a step follows on a state
        return linear_attention_step(q, k, v, memory, **options)
    return linear_attention(
        q, k, v, initial_state=memory, segment_ids=call.segment_ids, implementation=implementation, **options
    )


def convolve(
    xs: Sequence[Float[Array, "*B _ _"]], convs: Sequence[ShortConv], state: Array | None, call: Call
) -> tuple[list[Float[Array, "*B _ _"]], Float[Array, "_ S C"]]:
    """Short convolutions without bias, each of one x over all its heads, as one convolution of all channels; returns
    (outputs, state)."""
    lead = xs[0].shape[:-2]
    flat = [x.reshape(*lead, -1) for x in xs]
    if len(lead) == 1:
        assert state is not None  # a step follows on a state
        parts, state = short_convs_step(flat, convs, state)
    else:
        parts, state = short_convs(flat, convs, call.segment_ids, state, implementation=convs[0].implementation)
    return [part.reshape(x.shape) for part, x in zip(parts, xs, strict=True)], state


def empty(batch: int, heads: int, state: int, columns: int) -> State:
    """Returns the memory before the first token."""
    return {"memory": jnp.zeros((batch, heads, state, columns), jnp.float32)}
