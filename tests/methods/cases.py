"""Methods that a paper's would look like, small: they try what the hooks of methods must carry.

Loaded by tests, and by commands as `--plugin=tests/methods/cases.py`.
"""

import dataclasses
import functools
import tempfile
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from research.interop.safetensors_io import save_folder
from research.models import registry
from research.modules.axes import Kind
from research.modules.state import initialize
from research.train.hooks import Brought, Extra, Phase, Reindex, Reshape, Stream, everything
from research.train.method import Method
from research.train.method_registry import register
from tests.methods.tiny import MODEL


@register("halve")
@dataclass(frozen=True)
class Halve(Method):
    """Structured pruning: at one update the hidden units of every FFN are halved, and those of the largest norm over
    all layers stay."""

    paper = "a test"
    at: int = 4

    def reshape_due(self, step):
        return step == self.at

    def reshape(self, step, config, params, arrays):
        del step, arrays
        axis, names = "layer/mlp", [k for k in params if k.endswith("mlp/up/kernel")]
        norms = sum(np.square(params[k]).sum((0, 1)) for k in names)
        kept = np.sort(np.argsort(-norms, kind="stable")[: config.mlp_dim // 2])
        small = dataclasses.replace(config, mlp_dim=config.mlp_dim // 2)
        return Reshape(small, {axis: Reindex(tuple(map(int, kept)))})


@register("widen")
@dataclass(frozen=True)
class Widen(Method):
    """Growth: at one update every FFN gets as many hidden units again, drawn afresh."""

    paper = "a test"
    at: int = 4

    def reshape_due(self, step):
        return step == self.at

    def reshape(self, step, config, params, arrays):
        del step, params, arrays
        old, wide = config.mlp_dim, dataclasses.replace(config, mlp_dim=2 * config.mlp_dim)
        return Reshape(wide, {"layer/mlp": Reindex((*range(old), *(-1,) * old), "fresh")})


@register("darts")
@dataclass(frozen=True)
class Darts(Method):
    """Architecture parameters that weigh the two halves of the classifier's inputs, moved on examples of their own by
    the second-order gradient of DARTS (arXiv 1806.09055, equations 6 to 8), by finite differences."""

    paper = "arXiv 1806.09055"
    rate: float = 0.1
    epsilon: float = 0.01

    def phases(self, model):
        del model
        own = lambda name: name.startswith("darts/")
        return (
            Phase("weights", trains=lambda name: not own(name)),
            Phase("architecture", trains=own, streams=("train", "held"), optim={"lr": 0.3, "weight_decay": 0.0}),
        )

    def streams(self):
        return (Stream("train", 0.0, 0.5), Stream("held", 0.5, 1.0))

    def arrays(self, model):
        del model
        zeros = lambda key, params: jnp.zeros(2)
        return {"alpha": Extra((2,), ("darts/choices",), zeros, Kind.CONSTANT)}

    def weights(self, params, arrays, clock):
        del arrays, clock
        kernel, share = params["head/kernel"], 2 * jax.nn.softmax(params["darts/alpha"])
        scale = jnp.repeat(share, kernel.shape[0] // 2, total_repeat_length=kernel.shape[0])
        return {**params, "head/kernel": kernel * scale[:, None]}

    def gradients(self, inner, phase):
        return inner if phase.name == "weights" else self.second_order

    def second_order(self, loss, params, key):
        """d/dalpha L_held(w - rate dL_train/dw): the gradient at the moved weights, less the rate times the mixed
        second derivative along the gradient of the weights there."""
        del key
        weights = {k: v for k, v in params.items() if k != "darts/alpha"}
        of = lambda moved, stream: jax.value_and_grad(
            lambda own: loss({**own}, stream=stream, trains=everything), has_aux=True
        )({**params, **moved})
        ahead = of(weights, "train")[1]
        moved = {k: v - self.rate * ahead[k] for k, v in weights.items()}
        found, direct = of(moved, "held")
        size = self.epsilon / optax_norm({k: direct[k] for k in weights})
        ends = [of({k: v + sign * size * direct[k] for k, v in weights.items()}, "train")[1] for sign in (1, -1)]
        mixed = (ends[0]["darts/alpha"] - ends[1]["darts/alpha"]) / (2 * size)
        own = direct["darts/alpha"] - self.rate * mixed
        return found, {k: own if k == "darts/alpha" else jnp.zeros_like(v) for k, v in params.items()}


def optax_norm(tree):
    return jnp.sqrt(sum(jnp.square(v).sum() for v in jax.tree.leaves(tree)))


@register("fake_quantisation")
@dataclass(frozen=True)
class FakeQuantisation(Method):
    """Weights rounded to whole multiples of a scale of their own sub-network, straight through in the backward pass
    (Jacob et al. 2018, arXiv 1712.05877); how often a weight was clipped is counted in an array of the method's own."""

    paper = "arXiv 1712.05877"
    bits: int = 4

    def arrays(self, model):
        zeros = lambda key, params: jnp.zeros(())
        return {"updates": Extra((), (), zeros)}

    def weights(self, params, arrays, clock):
        del arrays, clock
        levels = 2 ** (self.bits - 1) - 1

        def rounded(value):
            scale = jnp.maximum(jnp.abs(value).max(), 1e-8) / levels
            return value + jax.lax.stop_gradient(jnp.round(value / scale) * scale - value)

        return {k: rounded(v) if v.ndim > 1 else v for k, v in params.items()}

    def after_update(self, params, arrays, made, clock):
        del made, clock
        return params, {"updates": arrays["updates"] + 1}


@register("head_alone")
@dataclass(frozen=True)
class HeadAlone(Method):
    """A frozen network below a head that is trained: one phase that does not train everything."""

    paper = "a test"
    layers: tuple[int, ...] = (1, 3)

    def phases(self, model):
        del model
        return (Phase("head", trains=lambda name: name.startswith("head/")),)


@register("own_stream")
@dataclass(frozen=True)
class OwnStream(Method):
    """One phase that is trained on a stream of another name than the usual, and takes a second one where it is told
    to."""

    paper = "a test"
    second: bool = False

    def phases(self, model):
        del model
        return (Phase(streams=("own", "held") if self.second else ("own",)),)

    def streams(self):
        return (Stream("own", 0.0, 0.5), Stream("held", 0.5, 1.0)) if self.second else (Stream("own"),)


@register("teacher")
@dataclass(frozen=True)
class Teacher(Method):
    """Distillation from a frozen network that the method brings (Hinton et al. 2015, arXiv 1503.02531)."""

    paper = "arXiv 1503.02531"
    share: float = 0.5
    seed: int = 1

    def brings(self, about):
        del about
        config = registry.model_config(MODEL["name"], **{k: v for k, v in MODEL.items() if k != "name"}, **IMAGES)
        params, stats = initialize(config, jax.random.key(self.seed))
        return Brought(config, params, stats, f"weights of seed {self.seed}")

    def objective(self, inner, task):
        def objective(forward, example):
            outcome = inner(forward, example)
            taught = task.distill(outcome.outputs, forward(*example.inputs, params="teacher"), example.target)
            return outcome._replace(loss=(1 - self.share) * outcome.loss + self.share * taught)

        return objective


IMAGES = {"image_size": 8, "in_channels": 1, "num_classes": 10}


@functools.cache
def source(name=MODEL["name"], **fields):
    """A folder with the random weights of a network that a method starts from, by default the recipe's own."""
    own = fields or {k: v for k, v in MODEL.items() if k != "name"}
    config = registry.model_config(name, **own, **IMAGES)
    folder = tempfile.mkdtemp(prefix="source_")
    save_folder(folder, config, *initialize(config, jax.random.key(2)))
    return folder


NEEDS = {
    "upcycling": lambda: {
        "model.ffn": "mlp moe",
        "model.moe": "{'ffn_dim': 32, 'num_experts': 2}",
        "method.upcycling.source": source(),
    },
    "customisation": lambda: {"method.customisation.source": source()},
}
"""Method -> fields of the recipe `tests/methods/tiny.py` that it needs."""
