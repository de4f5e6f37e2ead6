"""Counting by density maps (HMoDE, Du et al. 2023, arXiv 2208.02894): seven maps and an attention mask against one
density.

A batch is {"image": [B, H, W, C] float, "density": [B, H, W] float, which sums to the number of objects}, and for
evaluation "mask": [B] float (0 = padding). The model gives eight maps: seven densities times SCALE, the last of them
its answer, and logits of a mask.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.ops.precision import wide
from research.tasks.base import Batch, Task, real_examples
from research.tasks.classification import image_sizes
from research.tasks.limits import Limits
from research.tasks.registry import register
from research.tasks.section import TaskSection

SCALE = 100.0
"""Densities are multiplied by this before they are learnt."""
WEIGHTS = (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 4.0)
"""Of the seven maps, 2^(j // 3): three experts, three mixtures, the mixture of mixtures."""
PRESENT = 1e-5 * SCALE
"""Scaled density above which a pixel belongs to an object."""
HARD = 9
"""Regions that the relative local counting loss looks at, in each map."""


@register("density_counting")
@dataclass(frozen=True)
class DensityCounting(Task):
    """The task.

    Attributes:
      mean_count: objects of an average training image; the error of always answering it stands beside the model's.
      local: weight of the relative local counting loss, which the released code holds but does not use.
    """

    mean_count: float = 0.0
    local: float = 0.0

    name: ClassVar[str] = "counting by density maps"
    reads: ClassVar[tuple[str, ...]] = ("local_counting",)
    takes: ClassVar[tuple[str, ...]] = ("density",)
    predicts = "density"
    wanted = "density maps"
    metric = "mae"
    higher_is_better = False
    beside = ("mae_of_mean",)
    unit = "images"

    @classmethod
    def entry(cls, shapes: Mapping[str, Any]) -> str:
        return "image"

    @classmethod
    def sizes(cls, source: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
        return dict(image_sizes(shapes))

    @classmethod
    def make(cls, section: TaskSection, model: Any, source: Any, shapes: Mapping[str, Any]) -> "DensityCounting":
        return cls(source.mean_count, section.local_counting)

    def limits(self, model: Any, shapes: Mapping[str, Any]) -> Limits:
        return Limits(finite=("image", "density"), counts=("density",))

    def prepare(self, batch: Batch, key: Array) -> tuple[tuple[Array, ...], Float[Array, "B H W"]]:
        del key
        return self.inputs(batch), SCALE * batch["density"]

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        return (batch["image"],)

    def real(self, batch: Batch) -> Bool[Array, " B"] | None:
        return real_examples(batch)

    def loss(self, outputs: Float[Array, "B H W 8"], target: Float[Array, "B H W"]) -> Float[Array, ""]:
        """Weighted squared errors of the maps and the mask's cross entropy, both summed over pixels, per image."""
        maps, mask = wide(outputs[..., :7]), wide(outputs[..., 7])
        loss = density_loss(maps, target[..., None]) + mask_loss(mask, (target > PRESENT).astype(mask.dtype))
        return loss + self.local * local_counting_loss(maps, target) if self.local else loss

    def distill(
        self, outputs: Float[Array, "B H W 8"], teacher: Float[Array, "B H W 8"], target: Any = None
    ) -> Float[Array, ""]:
        """The same errors towards another network's maps and mask; no gradient reaches it."""
        del target
        teacher = jax.lax.stop_gradient(wide(teacher))
        return density_loss(wide(outputs[..., :7]), teacher[..., :7]) + mask_loss(
            wide(outputs[..., 7]), jax.nn.sigmoid(teacher[..., 7])
        )

    def counts(self, outputs: Float[Array, "B H W 8"]) -> Float[Array, " B"]:
        """Returns how many objects the model sees in each image."""
        return wide(outputs[..., 6]).sum((1, 2)) / SCALE

    def measure(self, outputs: Float[Array, "B H W 8"], batch: Batch) -> dict[str, Float[Array, ""]]:
        return {"mae": jnp.abs(self.counts(outputs) - batch["density"].sum((1, 2))).mean()}

    def zero_sums(self) -> dict[str, float]:
        return {"absolute": 0.0, "square": 0.0, "of_mean": 0.0, "loss": 0.0, "count": 0.0}

    def sums(self, outputs: Float[Array, "B H W 8"], batch: Batch) -> dict[str, Float[Array, ""]]:
        mask = batch.get("mask", jnp.ones(len(outputs), jnp.float32))
        true = batch["density"].sum((1, 2))
        errors = self.counts(outputs) - true
        losses = jax.vmap(lambda o, t: self.loss(o[None], t[None]))(outputs, SCALE * batch["density"])
        rows = {
            "absolute": jnp.abs(errors),
            "square": jnp.square(errors),
            "of_mean": jnp.abs(self.mean_count - true),
            "loss": losses,
        }
        return {name: (row * mask).sum() for name, row in rows.items()} | {"count": mask.sum()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns mean absolute and root mean square error of the count, that of always answering the mean, and the
        loss."""
        mean = {name: float(value) / max(float(sums["count"]), 1.0) for name, value in sums.items()}
        return {
            "mae": mean["absolute"],
            "rmse": mean["square"] ** 0.5,
            "mae_of_mean": mean["of_mean"],
            "loss": mean["loss"],
        }


def density_loss(maps: Float[Array, "B H W 7"], target: Float[Array, "B H W #7"]) -> Float[Array, ""]:
    """Squared errors of the seven maps, summed over pixels and weighted by WEIGHTS, per image."""
    return (jnp.square(maps - target).sum((0, 1, 2)) * jnp.asarray(WEIGHTS, maps.dtype)).sum() / len(maps)


def mask_loss(logits: Float[Array, "B H W"], target: Float[Array, "B H W"]) -> Float[Array, ""]:
    """Cross entropy in nats between the attention mask and where objects are, summed over pixels, per image (released
    code)."""
    return (jax.nn.softplus(logits) - target * logits).sum() / len(logits)


def local_counting_loss(
    maps: Float[Array, "B H W 7"], target: Float[Array, "B H W"], side: int = 16
) -> Float[Array, ""]:
    """The order of the counts in the hardest regions of `side` x `side` pixels, in each map, weighted by WEIGHTS, per
    image.

    Of the nine regions of largest summed squared error of a map's pixels, sorted by true count, descending, every third
    makes a triple of predictions (p0, p1, p2). With d1 = p0 - p1 and d2 = p0 - p2 the loss adds relu(-d1) + relu(-d2) +
    relu(d1 - d2), and the errors of the nine regions, through which the released code sends no gradient. Images of
    fewer than nine regions use whole triples of those they have.

    Raises:
      ValueError: an image has fewer than three regions.
    """
    losses = jax.vmap(lambda density: _local_losses(density, target, side), -1)(maps)
    return (losses * jnp.asarray(WEIGHTS, maps.dtype)).sum() / len(maps)


def _local_losses(density: Float[Array, "B H W"], target: Float[Array, "B H W"], side: int) -> Float[Array, ""]:
    """The local counting loss of one map, summed over images."""
    batch, height, width = density.shape
    rows, columns = height // side, width // side
    hard = min(HARD, rows * columns) // 3 * 3
    if not hard:
        raise ValueError(f"images of {height}x{width} have fewer than three regions of {side}x{side} pixels")
    pool: Callable[[Array], Array] = lambda x: (
        x[:, : rows * side, : columns * side].reshape(batch, rows, side, columns, side).sum((2, 4)).reshape(batch, -1)
    )
    errors, index = jax.lax.top_k(jax.lax.stop_gradient(pool(jnp.square(density - target))), hard)
    pick: Callable[[Array, Array], Array] = lambda x, i: jnp.take_along_axis(x, i, 1)
    order = jnp.argsort(-pick(pool(target), index), 1, stable=True)
    p0, p1, p2 = jnp.split(pick(pick(pool(density), index), order), 3, 1)
    d1, d2 = p0 - p1, p0 - p2
    ranks = jax.nn.relu(-d1) + jax.nn.relu(-d2) + jax.nn.relu(d1 - d2)
    return ranks.sum() + errors.sum()
