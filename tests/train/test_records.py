"""What modules declare for the log becomes lines of metrics.jsonl, whatever the module is."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.models.base import ModelConfig
from research.modules.axes import Init, Kind, Log, StatKind
from research.modules.layers import normal_02, zeros
from research.modules.state import Stack, abstract, apply, initialize
from research.train import records

WIDTH = 4


class Gate(nnx.Module):
    """x sigmoid(x W), which tells how open it is."""

    def __init__(self, init: Init):
        self.weight = init.param("weight", (WIDTH, WIDTH), ("embed", "embed"), normal_02, Kind.MATRIX)
        log = Log("gate", ("mean", "largest"))
        self.open = init.stat("open", (2,), ("layer/observed",), zeros, StatKind.LOG, log=log)
        self.bias = init.stat("bias", (), (), zeros, StatKind.LOG, log=Log("gate", "bias"))
        self.each = init.stat("each", (WIDTH,), ("embed",), zeros, StatKind.LOG, log=Log("gate", "each"))

    def __call__(self, x, per_layer=None):
        gate = jax.nn.sigmoid(x @ self.weight[...])
        self.open[...], self.each[...] = jnp.stack([gate.mean(), gate.max()]), gate.mean(0)
        self.bias[...] = self.weight[0, 0]
        return x * gate


class Gated(nnx.Module):
    def __init__(self, init: Init):
        self.first, self.blocks = Gate(init), Stack(Gate, 2, "layers", init.child("blocks"))

    def __call__(self, x, *, mode="eval", key=None):
        return self.blocks(self.first(x))


@dataclass(frozen=True)
class GatedConfig(ModelConfig):
    """`placed`: whether it says in which order its layers come."""

    placed: bool = True

    family: ClassVar[str] = "gated"

    def build(self, init):
        return Gated(init)

    def input_shape(self):
        return (WIDTH,)

    def layer_places(self):
        return (("blocks/layer", 0), ("blocks/layer", 1)) if self.placed else ()


class Pair(nnx.Module):
    def __init__(self, init: Init):
        self.left, self.right = Gate(init.child("left")), Gate(init.child("right"))

    def __call__(self, x, per_layer=None):
        return self.right(self.left(x))


@dataclass(frozen=True)
class PairConfig(GatedConfig):
    def build(self, init):
        return Stack(Pair, 1, "layers", init)

    def layer_places(self):
        return (("layer", 0),)


def logged(config):
    params, stats = initialize(config, jax.random.key(0))
    stats = apply(config, params, stats, jnp.ones((3, WIDTH)))[1]
    stats = {k: np.asarray(v) for k, v in stats.items() if k in abstract(config).logs}
    return records.logged(config, stats), params, stats


def test_every_number_and_list_that_is_declared_is_logged():
    found, params, stats = logged(GatedConfig())
    assert found.keys() == {
        f"gate/{layer}/{name}"
        for layer in ("first", "layer0", "layer1")
        for name in ("mean", "largest", "bias", "each")
    }
    assert found["gate/first/bias"] == float(params["first/weight"][0, 0])
    for i in range(2):
        assert found[f"gate/layer{i}/bias"] == float(params["blocks/layer/weight"][i, 0, 0])
        assert found[f"gate/layer{i}/mean"] == float(stats["blocks/layer/open"][i, 0])
        assert found[f"gate/layer{i}/largest"] == float(stats["blocks/layer/open"][i, 1]) > 0.5
        assert found[f"gate/layer{i}/each"] == stats["blocks/layer/each"][i].tolist()
    assert found["gate/layer0/each"] != found["gate/layer1/each"]


def test_layers_without_a_place_are_called_by_their_path():
    found = logged(GatedConfig(placed=False))[0]
    assert {key for key in found if key.endswith("/bias")} == {
        "gate/first/bias", "gate/blocks/layer[0]/bias", "gate/blocks/layer[1]/bias"
    }  # fmt: skip


def test_two_modules_of_one_layer_do_not_hide_each_other():
    found, params, _ = logged(PairConfig())
    assert found["gate/layer0/bias"] == float(params["layer/left/weight"][0, 0, 0])
    assert found["gate/layer0/layer/right/bias"] == float(params["layer/right/weight"][0, 0, 0])


@pytest.mark.parametrize(
    "shape, kind, log, said",
    [
        ((2,), StatKind.LOG, None, "needs log="),
        ((2,), StatKind.MOMENT, Log("gate", "open"), "kind MOMENT has no log="),
        ((2,), StatKind.LOG, Log("gate", ("a", "b", "c")), "are of 3 numbers, its shape is"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(shape, kind, log, said):
    with pytest.raises(ValueError, match=f"open: .*{said}"):
        Init(jax.random.key(0)).stat("open", shape, ("layer/observed",) * len(shape), zeros, kind, log=log)
