"""What simple learners predict from a prompt: the lines that an in-context learner is measured against.

The baselines of Garg et al. 2022 (arXiv 2208.01066, section 3) and of Bhattamishra et al. 2023 (arXiv 2310.03016): each
takes (x [B, K, D], y [B, K]) and gives float64 predictions [B, K], where prediction i knows the examples before i only
and is 0 for i = 0. For labels -1 and +1 the prediction is the sign. All are linear through the origin but the nearest
neighbours.
"""

import numpy as np
from jaxtyping import Float

Inputs = Float[np.ndarray, "B K D"]
Targets = Float[np.ndarray, "B K"]

# Part of an input's length that must lie outside the span of those before it to count as a new direction.
_NEW_DIRECTION = 1e-7


def read_prompt(vectors: Float[np.ndarray, "B T D"]) -> tuple[Inputs, Targets]:
    """Inputs and targets out of the sequence x1, y1, x2, y2, ... with y in coordinate 0."""
    return vectors[:, 0::2], vectors[:, 1::2, 0]


def least_squares(x: Inputs, y: Targets) -> Targets:
    """Least squares of minimum norm, updated example by example (Greville 1960), O(D^2) a prediction.

    On noiseless linear targets with inputs N(0, I) the mean squared error over D is max(0, 1 - i/D) after i examples.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    batch, points, dims = x.shape
    w = np.zeros((batch, dims))
    outside = np.tile(np.eye(dims), (batch, 1, 1))  # projects onto what the inputs so far do not span
    inverse = np.zeros((batch, dims, dims))  # pseudo-inverse of their Gram matrix
    predictions = np.zeros((batch, points))
    for i in range(points):
        row = x[:, i]
        predictions[:, i] = _dot(w, row)
        new, seen = _apply(outside, row), _apply(inverse, row)
        length, growth = _dot(new, new), 1 + _dot(row, seen)
        is_new = length > _NEW_DIRECTION**2 * _dot(row, row)
        gain = np.where(is_new[:, None], new / np.where(is_new, length, 1)[:, None], seen / growth[:, None])
        w += gain * (y[:, i] - predictions[:, i])[:, None]
        outside -= np.where(is_new, 1, 0)[:, None, None] * _outer(new, gain)
        # In a known direction gain * growth = seen, and only - seen gain^T is left.
        second = np.where(is_new, growth, 0)[:, None, None] * _outer(gain, gain)
        inverse += second - _outer(seen, gain) - np.where(is_new, 1, 0)[:, None, None] * _outer(gain, seen)
    return predictions


def ridge(x: Inputs, y: Targets, *, penalty: float) -> Targets:
    """Ridge regression with penalty * |w|^2; with w ~ N(0, I) and noise of that variance it is the Bayes predictor."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    batch, points, dims = x.shape
    w = np.zeros((batch, dims))
    inverse = np.tile(np.eye(dims) / penalty, (batch, 1, 1))
    predictions = np.zeros((batch, points))
    for i in range(points):
        row = x[:, i]
        predictions[:, i] = _dot(w, row)
        seen = _apply(inverse, row)
        gain = seen / (1 + _dot(row, seen))[:, None]
        w += gain * (y[:, i] - predictions[:, i])[:, None]
        inverse -= _outer(gain, seen)
    return predictions


def nearest_neighbours(x: Inputs, y: Targets, *, neighbours: int = 3) -> Targets:
    """Mean target of the nearest earlier inputs (Euclidean, the earliest of equals); of all while there are fewer.

    With one neighbour and inputs of -1 and +1 it is the rule of the task `nearest_neighbour`.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x * x).sum(-1)
    # Rounding keeps equal distances equal, whatever the order of the sums.
    distances = np.round(squares[:, :, None] + squares[:, None, :] - 2 * x @ x.transpose(0, 2, 1), 9)
    predictions = np.zeros(y.shape)
    for i in range(1, y.shape[1]):
        nearest = np.argsort(distances[:, i, :i], axis=1, kind="stable")[:, :neighbours]
        predictions[:, i] = np.take_along_axis(y, nearest, 1).mean(1)
    return predictions


def averaging(x: Inputs, y: Targets) -> Targets:
    """w = mean of y x: error (D + 1) / i over D after i examples of the linear task."""
    return gradient_descent(x, y, step_size=1 / np.maximum(np.arange(y.shape[1]), 1))


def gradient_descent(x: Inputs, y: Targets, *, steps: int = 1, step_size: float | np.ndarray | None = None) -> Targets:
    """Gradient descent from w = 0 on half the sum of squared errors of the examples before; one step gives w =
    step_size * sum y x.

    Args:
      x: inputs.
      y: targets.
      steps: number of steps.
      step_size: one for all predictions, one for each [K], or one for each of each prompt [B, K]. By default 1 / (i + D
        + 1), the best for one step on the linear task, with error (D + 1) / (i + D + 1) over D after i examples. Above
        2 / `curvature` the steps diverge.

    Returns:
      Predictions.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    points, dims = x.shape[1:]
    rates = np.broadcast_to(single_step_rates(points, dims) if step_size is None else step_size, y.shape)
    gram = x @ x.transpose(0, 2, 1)
    earlier = np.tri(points, points, -1)
    # Row i holds the coefficients of the examples in the weights of prediction i: w_i = sum_j coefficients_ij x_j.
    coefficients = np.zeros_like(gram)
    for _ in range(steps):
        coefficients += rates[:, :, None] * earlier * (y[:, None, :] - coefficients @ gram)
    predictions: np.ndarray = (coefficients * gram).sum(-1)
    return predictions


def single_step_rates(points: int, dims: int) -> Float[np.ndarray, " K"]:
    """1 / (i + D + 1): minimises the expected error of one step after i examples of the linear task (E of Wishart
    moments)."""
    return 1 / (np.arange(points) + dims + 1.0)


def curvature(x: Inputs) -> Float[np.ndarray, "B K"]:
    """Largest eigenvalue of sum x x^T over the examples before: what a step size is measured against. Infinite before
    the first."""
    x = x.astype(np.float64)
    summed = np.cumsum(x[:, :, :, None] * x[:, :, None, :], axis=1)
    largest = np.linalg.eigvalsh(summed[:, :-1])[..., -1]
    return np.concatenate([np.full((len(x), 1), np.inf), largest], axis=1)


def best_factors(
    x: Inputs, y: Targets, rates: np.ndarray, *, steps: int, grid: Float[np.ndarray, " G"] | None = None
) -> Float[np.ndarray, " K"]:
    """What to multiply step sizes by for the least mean squared error of each prediction on these prompts: keep them
    apart from the test.

    Args:
      x: inputs.
      y: targets.
      rates: step sizes as `gradient_descent` takes them: `single_step_rates`, or 1 / `curvature`, which is safe for
        every prompt with factors below 2.
      steps: number of steps.
      grid: factors to choose from; by default 17 from 1/8 to 1.9.
    """
    grid = np.geomspace(1 / 8, 1.9, 17) if grid is None else grid
    errors = [((gradient_descent(x, y, steps=steps, step_size=factor * rates) - y) ** 2).mean(0) for factor in grid]
    best: np.ndarray = np.asarray(grid)[np.argmin(errors, axis=0)]
    return best


def best_penalties(x: Inputs, y: Targets, *, grid: Float[np.ndarray, " G"] | None = None) -> Float[np.ndarray, " K"]:
    """The penalty of `ridge` with the least mean squared error of each prediction on these prompts: keep them apart
    from the test.

    Args:
      x: inputs.
      y: targets.
      grid: penalties to choose from; by default 17 from 1e-6 to 100.
    """
    grid = np.geomspace(1e-6, 100, 17) if grid is None else np.asarray(grid)
    errors = [((ridge(x, y, penalty=float(penalty)) - y) ** 2).mean(0) for penalty in grid]
    best: np.ndarray = grid[np.argmin(errors, axis=0)]
    return best


def tuned_ridge(x: Inputs, y: Targets, penalties: Float[np.ndarray, " K"]) -> Targets:
    """`ridge` whose prediction after i examples has the i-th penalty."""
    predictions = np.zeros(y.shape)
    for penalty in np.unique(penalties):
        chosen = penalties == penalty
        predictions[:, chosen] = ridge(x, y, penalty=float(penalty))[:, chosen]
    return predictions


def lasso(x: Inputs, y: Targets, *, alpha: float, max_iter: int = 100_000) -> Targets:
    """Lasso without intercept by scikit-learn: |y - X w|^2 / 2i + alpha |w|_1; a fit for every prediction, so slow.

    Garg et al. give alphas of 1, 0.1, 0.01, 0.001 and 0.0001.
    """
    from sklearn.linear_model import Lasso

    model = Lasso(alpha=alpha, fit_intercept=False, max_iter=max_iter)
    predictions = np.zeros(y.shape)
    for row, (inputs, targets) in enumerate(zip(x.astype(np.float64), y.astype(np.float64), strict=True)):
        for i in range(1, len(targets)):
            predictions[row, i] = model.fit(inputs[:i], targets[:i]).coef_ @ inputs[i]
    return predictions


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product: np.ndarray = (a * b).sum(-1)
    return product


def _apply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    product: np.ndarray = (matrix @ vector[:, :, None])[:, :, 0]
    return product


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product: np.ndarray = a[:, :, None] * b[:, None, :]
    return product
