"""A trained in-context learner beside the algorithms that it might have found: error over the number of examples."""

from typing import Any

import jax
import numpy as np

from research.modules.state import Arrays, apply
from research.tasks import in_context_baselines as baselines


def errors(
    model: tuple[Any, Arrays, Arrays], source: Any, task: Any, *, prompts: int, batch: int = 500
) -> dict[str, np.ndarray]:
    """Returns name -> metric after 0, 1, ..., points - 1 examples, of the model and of each baseline on the same
    prompts.

    Args:
      model: config, params and stats.
      source: where the prompts come from.
      task: the in-context task, whose metric it is.
      prompts: how many, the first of the source.
      batch: prompts at a time.
    """
    config, params, stats = model
    run = jax.jit(lambda p, s, v: task.predictions(apply(config, p, s, v)[0]))
    block = source.gather(np.arange(prompts))
    vectors, y = block["vectors"], block["targets"]
    x = vectors[:, ::2]
    # Penalties and rates are chosen on other prompts than those that are compared.
    other = source.gather(np.arange(prompts, min(prompts + 500, len(source))))
    held_out = other["vectors"][:, ::2], other["targets"]
    predicted = {
        "model": np.concatenate([run(params, stats, vectors[i : i + batch]) for i in range(0, prompts, batch)])
    }
    if task.boolean:
        predicted["nearest neighbour"] = baselines.nearest_neighbours(x, y, neighbours=1)
        predicted["averaging"] = baselines.averaging(x, y)
        predicted["least squares"] = baselines.least_squares(x, y)
    else:
        predicted["least squares"] = baselines.least_squares(x, y)
        predicted["ridge"] = baselines.tuned_ridge(x, y, baselines.best_penalties(*held_out))
        for steps in (1, 10):
            # Against each prompt's own curvature: a step that suits the average prompt diverges on some.
            factors = baselines.best_factors(*held_out, 1 / baselines.curvature(held_out[0]), steps=steps)
            name = f"gradient descent, {steps} step{'s' if steps > 1 else ''}"
            predicted[name] = baselines.gradient_descent(x, y, steps=steps, step_size=factors / baselines.curvature(x))
        predicted["averaging"] = baselines.averaging(x, y)
        predicted["zero"] = np.zeros_like(y)
    # A label of 0 is no answer: half of such guesses are right.
    score = (
        (lambda p: (0.5 + 0.5 * np.sign(p * y)).mean(0))
        if task.boolean
        else (lambda p: np.square(p - y).mean(0) / task.scale)
    )
    return {name: score(np.asarray(p, np.float64)) for name, p in predicted.items()}
