"""The FFNs of a Transformer block: GELU between two products, or a gated linear unit."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init, Kind
from research.modules.layers import Linear, normal_02


class Mlp(nnx.Module):
    """y = gelu(x W1 + b1) W2 + b2 over the last axis (Vaswani et al. 2017, section 3.3, with the exact GELU); `axes`
    names (channels, hidden units)."""

    def __init__(self, channels: int, hidden: int, axes: tuple[str, str], init: Init):
        self.up = Linear(channels, hidden, axes, init.child("up"))
        self.down = Linear(hidden, channels, axes[::-1], init.child("down"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Glu(nnx.Module):
    """y = (silu(x W1) * x W2) W3 over the last axis, without biases (SwiGLU, Shazeer 2020, arXiv 2002.05202); `axes` as
    in `Mlp`."""

    def __init__(self, channels: int, hidden: int, axes: tuple[str, str], init: Init):
        self.gate = init.param("gate", (channels, hidden), axes, normal_02, Kind.MATRIX)
        self.up = init.param("up", (channels, hidden), axes, normal_02, Kind.MATRIX)
        self.down = init.param("down", (hidden, channels), axes[::-1], normal_02, Kind.MATRIX)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return (jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]
