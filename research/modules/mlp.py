"""The feed-forward part of a Transformer block (Vaswani et al. 2017, section 3.3), with the exact GELU."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init
from research.modules.layers import Linear


class Mlp(nnx.Module):
    """y = gelu(x W1 + b1) W2 + b2 over the last axis; `axes` names (channels, hidden units)."""

    def __init__(self, channels: int, hidden: int, axes: tuple[str, str], init: Init):
        self.up = Linear(channels, hidden, axes, init.child("up"))
        self.down = Linear(hidden, channels, axes[::-1], init.child("down"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))
