"""Classification of images and sequences: label smoothing, mixup and cutmix, cross entropy, accuracy.

A batch is {"image": [B, H, W, C] float, "label": [B] int32}, or "vectors": [B, T, D] float in place of the image, and
for evaluation "mask": [B] float (0 = padding).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.tasks.base import Batch, Task, real_examples
from research.tasks.limits import Limits
from research.tasks.registry import register
from research.tasks.section import TaskSection


@register("classification")
@dataclass(frozen=True)
class Classification(Task):
    """The task; `mixup` and `cutmix` are the alphas of their Beta distributions, 0 switches them off.

    When both are on, each batch takes cutmix with probability `switch` (mixup: arXiv 1710.09412, cutmix: 1905.04899).
    `examples` is what a batch calls them, "image" or "vectors"; sequences have no cutmix.
    """

    num_classes: int
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5
    examples: str = "image"

    name: ClassVar[str] = "classification"
    reads: ClassVar[tuple[str, ...]] = ("label_smoothing", "mixup", "cutmix")
    takes: ClassVar[tuple[str, ...]] = ("image",)
    metric = "accuracy"
    higher_is_better = True
    unit = "images"

    def __post_init__(self) -> None:
        if self.cutmix and self.examples != "image":
            raise UserError(
                f"task.cutmix={self.cutmix} cuts boxes out of images, the data gives {self.examples}; set task.cutmix=0"
            )

    @classmethod
    def entry(cls, shapes: Mapping[str, Any]) -> str:
        return "image" if "image" in shapes else "vectors"

    @classmethod
    def sizes(cls, source: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
        if "image" in shapes:
            return {**image_sizes(shapes), "num_classes": int(source.num_classes)}
        _, length, dim = shapes["vectors"].shape
        return {
            "vocab_size": 0,
            "input_dim": dim,
            "length": length,
            "output_dim": int(source.num_classes),
            "pool": "mean",
        }

    @classmethod
    def make(cls, section: TaskSection, model: Any, source: Any, shapes: Mapping[str, Any]) -> "Classification":
        field = "num_classes" if "image" in shapes else "output_dim"
        classes = model.num_classes if "image" in shapes else model.output_dim
        if classes < source.num_classes:
            raise UserError(
                f"model.{field}={classes} is less than the {source.num_classes} classes of {source.name}; leave it out"
            )
        mixing = section.mixup, section.cutmix, section.switch
        return cls(classes, section.label_smoothing, *mixing, examples=cls.entry(shapes))

    def limits(self, model: Any, shapes: Mapping[str, Any]) -> Limits:
        return Limits({"label": (0, self.num_classes - 1)}, finite=(self.examples,))

    def prepare(self, batch: Batch, key: Array) -> tuple[tuple[Array, ...], Float[Array, "B N"]]:
        image, target = self.mix(batch, key)
        return (image,), target

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        return (batch[self.examples],)

    def real(self, batch: Batch) -> Bool[Array, " B"] | None:
        return real_examples(batch)

    def mix(self, batch: Batch, key: Array) -> tuple[Float[Array, "B *S C"], Float[Array, "B N"]]:
        """Returns (examples, target distributions) after smoothing and mixing; pure in (batch, key)."""
        image = batch[self.examples]
        target = smooth_labels(batch["label"], self.num_classes, self.label_smoothing)
        if not (self.mixup or self.cutmix):
            return image, target
        choose, mix_key, cut_key, box_key = jax.random.split(key, 4)
        plain = _mixup_weight(mix_key, self.mixup, image)
        cut = _cutmix_weight(cut_key, box_key, self.cutmix, image)
        use_cut = jax.random.bernoulli(choose, self.switch if self.mixup else 1.0) & (self.cutmix > 0)
        weight = jnp.where(use_cut, cut, plain)
        share = weight.mean()
        mixed = (image * weight + image[::-1] * (1 - weight)).astype(image.dtype)
        return mixed, target * share + target[::-1] * (1 - share)

    def loss(self, logits: Float[Array, "B N"], target: Float[Array, "B N"]) -> Float[Array, ""]:
        """Mean cross entropy in float32, in nats."""
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return -(target * jax.nn.log_softmax(logits)).sum(-1).mean()

    def distill(
        self, logits: Float[Array, "B N"], teacher: Float[Array, "B N"], target: Any = None
    ) -> Float[Array, ""]:
        """Mean cross entropy to the teacher's distribution (temperature 1); no gradient reaches the teacher."""
        del target
        return self.loss(logits, jax.nn.softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32)))

    def measure(self, logits: Float[Array, "B N"], batch: Batch) -> dict[str, Float[Array, ""]]:
        return {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}

    def zero_sums(self) -> dict[str, float]:
        """Returns the start of a sum of `sums`."""
        return {"correct": 0.0, "nll": 0.0, "count": 0.0}

    def sums(self, logits: Float[Array, "B N"], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns sums over a batch of what `summarize` divides; padded examples do not count."""
        mask = batch.get("mask", jnp.ones(logits.shape[0], jnp.float32))
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(wide), batch["label"][:, None], 1)[:, 0]
        correct = (wide.argmax(-1) == batch["label"]).astype(jnp.float32)
        return {"correct": (correct * mask).sum(), "nll": (nll * mask).sum(), "count": mask.sum()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns {"accuracy": fraction, "loss": nats} from summed `sums`."""
        count = max(float(sums["count"]), 1.0)
        return {"accuracy": float(sums["correct"]) / count, "loss": float(sums["nll"]) / count}


def image_sizes(shapes: Mapping[str, Any]) -> dict[str, int]:
    """Returns the sizes of a model of square images.

    Raises:
      UserError: images that are not square.
    """
    _, height, width, channels = shapes["image"].shape
    if height != width:
        raise UserError(f"images of {height}x{width} are not square; set data.augment.pad_to")
    return {"image_size": height, "in_channels": channels}


def smooth_labels(label: Int[Array, " B"], num_classes: int, smoothing: float) -> Float[Array, "B N"]:
    """One-hot targets with `smoothing` spread evenly over all classes."""
    return jax.nn.one_hot(label, num_classes) * (1 - smoothing) + smoothing / num_classes


def _mixup_weight(key: Array, alpha: float, image: Array) -> Array:
    weight = jax.random.beta(key, alpha, alpha) if alpha else jnp.ones(())
    return jnp.broadcast_to(weight, (1, *image.shape[1:-1], 1))


def _cutmix_weight(key: Array, box_key: Array, alpha: float, image: Array) -> Array:
    if not alpha:
        return jnp.ones((1, *image.shape[1:-1], 1))
    height, width = image.shape[1:3]
    side = jnp.sqrt(1 - jax.random.beta(key, alpha, alpha))
    centre = jax.random.uniform(box_key, (2,)) * jnp.array([height, width])
    rows = jnp.abs(jnp.arange(height) + 0.5 - centre[0]) < side * height / 2
    columns = jnp.abs(jnp.arange(width) + 0.5 - centre[1]) < side * width / 2
    return 1.0 - (rows[:, None] & columns[None, :]).astype(jnp.float32)[None, :, :, None]
