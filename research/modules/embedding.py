"""Token embedding, N(0, 0.02); small vocabularies are read and differentiated as a matrix product."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from research.modules.axes import Init, Kind
from research.modules.layers import normal_02
from research.modules.mesh import on_local_shard
from research.ops.precision import matmul

SMALL = 512
"""Entries up to which the product with one-hot rows costs less than the scattered sum of the gradient."""


class Embedding(nnx.Module):
    """Row `token` of a table [vocab, embed]. Tokens outside the vocabulary are the caller's error: sources check their
    files."""

    def __init__(self, vocab_size: int, channels: int, init: Init):
        self.table = init.param("table", (vocab_size, channels), ("vocab", "embed"), normal_02, Kind.EMBEDDING)

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return on_local_shard(lambda tokens, table, _: self._read(tokens, table), tokens, self.table[...])

    @staticmethod
    def _read(tokens: Int[Array, "*B"], table: Float[Array, "N D"]) -> Float[Array, "*B D"]:
        if table.shape[0] > SMALL:
            return table[tokens]
        return matmul(
            jax.nn.one_hot(tokens, table.shape[0], dtype=table.dtype), table
        )  # the rows themselves, not rounded
