"""The layers of sequence models and encoders: pre-norm residual branches, a mixer each and an FFN if asked
for."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float

from research.modules import context
from research.modules.axes import Init
from research.modules.dropout import dropout
from research.modules.mixers.base import Call, Spec
from research.modules.mixers.snnk import SnnkMlp
from research.modules.mlp import Glu, Mlp
from research.modules.moe import MoeFfn
from research.modules.moe_options import Moe
from research.modules.norms import RMSNorm

FFNS = {"mlp": Mlp, "glu": Glu, "snnk": SnnkMlp}
MIXTURE = "moe"


class LayerConfig(Protocol):
    """What layers go by in the config of their model; it has their names, as `SequenceConfig` explains them."""

    @property
    def dim(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def implementation(self) -> str: ...
    @property
    def mixture(self) -> Moe: ...
    @property
    def period(self) -> tuple[tuple[str, str], ...]: ...
    def spec(self, kind: str) -> Spec: ...


def _ffn(config: LayerConfig, ffn: str, scope: str, init: Init) -> nnx.Module | None:
    axes = "embed", f"{scope}/mlp"
    if ffn == MIXTURE:
        return MoeFfn(config.mixture, config.dim, axes, scope, init, config.implementation)
    return None if ffn == "none" else FFNS[ffn](config.dim, config.ffn_dim, axes, init)


class Layer(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) where there is one."""

    def __init__(self, config: LayerConfig, kind: str, ffn: str, scope: str, init: Init):
        self.rate, self.carries = config.dropout, config.spec(kind).carries
        self.norm = RMSNorm(config.dim, "embed", init.child("norm"), eps=config.norm_eps)
        self.mixer = config.spec(kind).build(
            config.dim, config.length, scope, init.child("mixer"), config.implementation
        )
        self.ffn_norm = (
            None if ffn == "none" else RMSNorm(config.dim, "embed", init.child("ffn_norm"), eps=config.norm_eps)
        )
        self.ffn = _ffn(config, ffn, scope, init.child("ffn"))

    def _add(self, x: Array, y: Array, call: Call, salt: int) -> Array:
        if self.rate and call.mode == "train" and call.key is not None:
            y = dropout(y, self.rate, jax.random.fold_in(call.key, salt))
        return x + y

    def _feed_forward(self, x: Array, call: Call) -> Array:
        if self.ffn is None or self.ffn_norm is None:
            return x
        normed = self.ffn_norm(x)
        y = self.ffn(normed, call) if isinstance(self.ffn, MoeFfn) else self.ffn(normed)
        return self._add(x, y, call, 1)

    def __call__(self, x: Float[Array, "B T D"], call: Call) -> Float[Array, "B T D"]:
        """From the start of the sequences."""
        return self._feed_forward(
            self._add(x, context.mix(self.mixer, self.norm(x), call, self.carries), call, 0), call
        )

    def extend(self, x: Float[Array, "B T D"], call: Call, state) -> tuple[Float[Array, "B T D"], Any]:
        """From a state."""
        y, state = self.mixer(self.norm(x), call, state)
        return self._feed_forward(self._add(x, y, call, 0), call), state

    def step(self, x: Float[Array, "B D"], call: Call, state) -> tuple[Float[Array, "B D"], Any]:
        y, state = self.mixer.step(self.norm(x), call, state)
        return self._feed_forward(x + y, call), state


class Period(nnx.Module):
    """The layers of one repetition of the pattern; states are a list, one entry a layer."""

    def __init__(self, config: LayerConfig, init: Init):
        self.layers = nnx.List(
            [
                Layer(config, kind, ffn, f"layer/mix{j}", init.child(f"mix{j}"))
                for j, (kind, ffn) in enumerate(config.period)
            ]
        )

    def _calls(self, per_period: Mapping[str, Any], call: Call) -> Iterator[tuple[int, Layer, Call]]:
        for j, layer in enumerate(self.layers):
            index = per_period["index"] * len(self.layers) + j
            key = None if call.key is None else jax.random.fold_in(call.key, index)
            yield j, layer, replace(call, key=key)

    def __call__(self, x: Float[Array, "B T D"], per_period: Mapping[str, Any], call: Call) -> Float[Array, "B T D"]:
        for _, layer, own in self._calls(per_period, call):
            x = layer(x, own)
        return x

    def extend(self, x: Float[Array, "B T D"], per_period: Mapping[str, Any], call: Call):
        states = []
        for j, layer, own in self._calls(per_period, call):
            x, state = layer.extend(x, own, per_period["state"][j])
            states.append(state)
        return x, states

    def step(self, x: Float[Array, "B D"], per_period: Mapping[str, Any], call: Call):
        states = []
        for j, layer, own in self._calls(per_period, call):
            x, state = layer.step(x, own, per_period["state"][j])
            states.append(state)
        return x, states
