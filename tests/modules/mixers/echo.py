"""The smallest mixer: a decaying sum of the document so far, right or wrong in a way that is asked for."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax

from research.modules.axes import Init, Kind
from research.modules.layers import normal_02
from research.modules.mixers.base import Call, Spec


@dataclass(frozen=True)
class Echo(Spec):
    """`ignores`: nothing, or what a wrong mixer does not read: segments, state, or the state in steps ("steps")."""

    ignores: str = ""

    kind: ClassVar[str] = "echo"
    paper: ClassVar[str] = "arXiv 0000.00000"

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "EchoMixer":
        return EchoMixer(self, dim, scope, init)


class EchoMixer(nnx.Module):
    """out(h), h_t = h_{t - 1} / 2 + x_t within a document; state: `sum` [B, D] and `ids` [B]."""

    def __init__(self, spec: Echo, dim: int, scope: str, init: Init):
        self.spec = spec
        self.out = init.param("out", (dim, dim), ("embed", "embed"), normal_02, Kind.MATRIX)

    def __call__(self, x, call: Call, state=None):
        start = self.init_state(x.shape[0], 0, x.dtype)
        state = start if state is None or self.spec.ignores == "state" else state
        ids = call.segment_ids
        if ids is None or self.spec.ignores == "segments":
            ids = jnp.broadcast_to(state["ids"][:, None], x.shape[:2])

        def step(carry, token):
            (total, last), (one, own) = carry, token
            total = jnp.where((own == last)[:, None], total / 2, 0) + one
            return (total, own), total

        (total, last), sums = lax.scan(
            step, (state["sum"], state["ids"]), (jnp.swapaxes(x, 0, 1), ids.T.astype(jnp.int32))
        )
        return jnp.swapaxes(sums, 0, 1) @ self.out[...], {"sum": total, "ids": last}

    def step(self, x, call: Call, state):
        state = self.init_state(x.shape[0], 0, x.dtype) if self.spec.ignores == "steps" else state
        ids = None if call.segment_ids is None else call.segment_ids[:, None]
        y, state = self(x[:, None], Call(segment_ids=ids), state)
        return y[:, 0], state

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32):
        return {"sum": jnp.zeros((batch, self.out.shape[0]), dtype), "ids": jnp.zeros(batch, jnp.int32)}
