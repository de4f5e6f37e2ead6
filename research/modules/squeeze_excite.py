"""Squeeze-and-excitation (Hu et al. 2018): a gate per channel from the mean over positions."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init
from research.modules.layers import Linear


class SqueezeExcite(nnx.Module):
    """x * sigmoid(W2 relu(W1 mean(x))) with `channels // 4` hidden units."""

    def __init__(self, channels: int, axis: str, hidden_axis: str, init: Init):
        hidden = channels // 4
        self.down = Linear(channels, hidden, (axis, hidden_axis), init.child("down"))
        self.up = Linear(hidden, channels, (hidden_axis, axis), init.child("up"))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        gate = x.mean((1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.up(jax.nn.relu(self.down(gate))))
