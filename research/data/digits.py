"""The digits of scikit-learn: 1,797 images of 8x8, which need no download."""

import numpy as np

from research.data.kinds import IMAGE
from research.data.registry import register
from research.data.source import ArraySource
from research.data.splits import stratified_split

_TEST_SEED, _TEST_EXAMPLES = 1797, 360


@register("digits", IMAGE, ready=False)
def load_digits() -> tuple[ArraySource, ArraySource]:
    """The 1797 digits of scikit-learn, 8x8 with values 0..16; 360 of them, by a fixed stratified choice, are the
    test."""
    from sklearn import datasets

    raw = datasets.load_digits()
    # v * 255 / 16 never ends in exactly .5 but at v = 8, where round-half-even gives 128.
    images = np.round(raw.images * 255 / 16).astype(np.uint8)[..., None]
    everything = ArraySource("digits", images, raw.target.astype(np.int32), 10)
    train, test = stratified_split(everything.labels, _TEST_EXAMPLES, _TEST_SEED)
    return everything.subset(train, "digits/train"), everything.subset(test, "digits/test")
