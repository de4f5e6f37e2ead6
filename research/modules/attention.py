"""Softmax attention (Vaswani et al. 2017, section 3.2) with queries, keys, values, heads and head_dim on axes of their
own."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init, Kind
from research.modules.layers import normal_02, zeros
from research.ops.attention import softmax_attention


class ToHeads(nnx.Module):
    """Projects [..., D] to [..., H, K]; kernel (embed, heads, head_dim), bias (heads, head_dim)."""

    def __init__(self, channels: int, heads: int, head_dim: int, axes: tuple[str, str, str], init: Init):
        self.kernel = init.param("kernel", (channels, heads, head_dim), axes, normal_02, Kind.MATRIX)
        self.bias = init.param("bias", (heads, head_dim), axes[1:], zeros, Kind.BIAS)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B H K"]:
        return jnp.einsum("...d,dhk->...hk", x, self.kernel[...]) + self.bias[...]


class FromHeads(nnx.Module):
    """Projects [..., H, K] to [..., D]; kernel (heads, head_dim, embed), bias (embed,)."""

    def __init__(self, channels: int, heads: int, head_dim: int, axes: tuple[str, str, str], init: Init):
        self.kernel = init.param("kernel", (heads, head_dim, channels), axes, normal_02, Kind.MATRIX)
        self.bias = init.param("bias", (channels,), axes[2:], zeros, Kind.BIAS)

    def __call__(self, x: Float[Array, "*B H K"]) -> Float[Array, "*B D"]:
        return jnp.einsum("...hk,hkd->...d", x, self.kernel[...]) + self.bias[...]


class Attention(nnx.Module):
    """Full (bidirectional) multi-head self-attention with biases, 4 D H K + 3 H K + D parameters.

    Logits are float32 (or wider), scaled by 1/sqrt(head_dim): the scale does not depend on how many heads are kept.

    Args:
      embed: name of the channels' axis.
      scope: scope of the axes that belong to this layer alone.
      implementation: of `ops.attention.softmax_attention`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        embed: str,
        scope: str,
        init: Init,
        *,
        implementation: str = "auto",
    ):
        self.implementation = implementation
        matched = (embed, f"{scope}/heads", f"{scope}/qk/head_dim")
        carried = (embed, f"{scope}/heads", f"{scope}/v/head_dim")
        self.query = ToHeads(channels, heads, head_dim, matched, init.child("query"))
        self.key = ToHeads(channels, heads, head_dim, matched, init.child("key"))
        self.value = ToHeads(channels, heads, head_dim, carried, init.child("value"))
        self.out = FromHeads(channels, heads, head_dim, (*carried[1:], embed), init.child("out"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.out(
            softmax_attention(self.query(x), self.key(x), self.value(x), implementation=self.implementation)
        )
