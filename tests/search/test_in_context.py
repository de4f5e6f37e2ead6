"""A learner beside the algorithms of its task: the same prompts, the baselines' own formulas, ties as guesses."""

import jax
import numpy as np
import pytest

from research.data.in_context import load_in_context
from research.models import registry
from research.modules.state import apply, initialize
from research.search.in_context import errors
from research.tasks import in_context_baselines as baselines
from research.tasks.in_context import InContextLearning

COUNT = 6


@pytest.mark.parametrize("function", [pytest.param("linear", marks=pytest.mark.slow), "conjunction"])
def test_model_and_baselines_are_scored_on_the_same_prompts(function):
    source = load_in_context(function, train_examples=1, test_examples=20, dims=3, points=5)["test"]
    boolean = function == "conjunction"
    task = InContextLearning(points=5, boolean=boolean, scale=source.variance)
    config = registry.model_config(
        "sequence",
        dim=16,
        depth=1,
        pattern="attention",
        attention={"num_heads": 2},
        ffn="mlp",
        vocab_size=0,
        input_dim=3,
        output_dim=1,
        length=10,
    )
    params, stats = initialize(config, jax.random.key(0))
    found = errors((config, params, stats), source, task, prompts=COUNT, batch=4)
    block = source.gather(np.arange(COUNT))
    x, y = block["vectors"][:, ::2], block["targets"]
    read = np.asarray(task.predictions(apply(config, params, stats, block["vectors"])[0]))
    expected = (read * y > 0).mean(0) if boolean else np.square(read - y).mean(0) / source.variance
    np.testing.assert_allclose(found["model"], expected, rtol=1e-5)
    if boolean:
        assert set(found) == {"model", "nearest neighbour", "averaging", "least squares"}
        for name in ("nearest neighbour", "averaging", "least squares"):
            assert found[name][0] == 0.5  # without examples there is nothing to say
        mean = np.asarray(baselines.averaging(x, y))
        tied = mean[:, 1:] == 0
        assert tied.any()
        right = np.where(tied, 0.5, mean[:, 1:] * y[:, 1:] > 0)
        np.testing.assert_allclose(found["averaging"][1:], right.mean(0), atol=1e-12)
    else:
        np.testing.assert_allclose(
            found["least squares"], np.square(baselines.least_squares(x, y) - y).mean(0) / 3, rtol=1e-6
        )
        np.testing.assert_allclose(found["zero"], np.square(y).mean(0) / 3, rtol=1e-6)
        assert {"gradient descent, 1 step", "gradient descent, 10 steps", "ridge", "averaging"} < set(found)
