"""Images made of class-dependent patterns under noise: for tests and benchmarks of any size."""

import numpy as np

from research.data.kinds import IMAGE
from research.data.registry import register
from research.data.source import ArraySource, arrays_to_sources
from research.errors import UserError


@register("synthetic", IMAGE, ready=False)
def load_synthetic(
    *,
    image_size: int = 16,
    channels: int = 3,
    num_classes: int = 10,
    examples: int = 1024,
    test_examples: int = 256,
) -> tuple[ArraySource, ArraySource]:
    """Class-dependent random patterns under noise; a function of the options alone."""
    sizes = (image_size, channels, num_classes, examples, test_examples)
    for option, value in zip(
        ("image_size", "channels", "num_classes", "examples", "test_examples"), sizes, strict=True
    ):
        if value < 1:
            raise UserError(f"synthetic: {option}={value} must be at least 1.")
    shape = (image_size, image_size, channels)
    generators = [np.random.Generator(np.random.Philox(key=np.array([image_size, k], np.uint64))) for k in range(3)]
    patterns = generators[0].integers(64, 192, (num_classes, *shape), dtype=np.uint8)

    def split(stream: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count, dtype=np.int32) % num_classes
        images = patterns[labels]
        images += generators[stream].integers(0, 128, images.shape, dtype=np.uint8) - np.uint8(64)
        return images, labels

    return arrays_to_sources("synthetic", split(1, examples), split(2, test_examples), num_classes)
