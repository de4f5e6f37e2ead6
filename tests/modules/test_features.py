"""Features: every family names some, they are what the model computes, and reading them changes nothing."""

import jax
import numpy as np
import pytest

from research import create_model
from research.errors import UserError
from research.modules.features import named, reading
from research.modules.state import apply
from tests.models import twins

TWINS = {config.family: config for config in reversed(twins.distinct_twins())}


@pytest.mark.parametrize("family", sorted(TWINS))
def test_every_family_names_features(family):
    config, batch = TWINS[family], 2

    def run(params, stats, x):
        with reading() as found:
            outputs = apply(config, params, stats, x, **twins.beside(config, batch))[0]
        return outputs, found

    shapes = jax.eval_shape(run, *twins.random_arrays(config), twins.images(config, batch))
    assert shapes[1] and all(array.shape[0] == batch for array in shapes[1].values())
    assert len([name for name in shapes[1] if name.startswith("stage")]) == len(getattr(config, "depths", ())) or (
        "hidden" in shapes[1] or family in ("lenet", "customised")
    )


def test_the_embedding_is_what_the_head_reads():
    model = create_model("lenet5")
    x = np.random.default_rng(0).normal(size=(3, 28, 28, 1)).astype(np.float32)
    found = model.features(x)
    assert list(found) == ["stage1", "stage2", "embedding"] and found["stage1"].shape == (3, 14, 14, 6)
    logits = found["embedding"] @ model.params["head/kernel"] + model.params["head/bias"]
    np.testing.assert_allclose(model(x), logits, rtol=1e-5, atol=1e-5)
    assert list(model.features(x, "stage2")) == ["stage2"]
    with pytest.raises(UserError, match="no feature 'stage3'; near: stage"):
        model.features(x, "stage3")


def test_two_features_of_one_name_are_refused():
    with reading(), pytest.raises(ValueError, match="two features 'a'"):
        named("b", named("a", named("a", np.zeros(1))))
    assert named("a", 3) == 3
