"""Simple learners against closed forms, against fits of every prefix by NumPy, and against the tasks they solve."""

import numpy as np
import pytest

from research.data.in_context import load_in_context
from research.tasks import in_context_baselines as baselines


def prompts(task, count, **options):
    source = load_in_context(task, train_examples=count, test_examples=1, seed=5, **options)["train"]
    block = source.gather(np.arange(count))
    x, y = baselines.read_prompt(block["vectors"])
    np.testing.assert_array_equal(y, block["targets"])
    return x, y


def error(predictions, y):
    return ((predictions - y) ** 2).mean(0)


def by_prefix(x, y, weights):
    """Predictions from weights(x [i, D], y [i]) of every prefix, one at a time."""
    predictions = np.zeros(y.shape)
    for row in range(len(y)):
        for i in range(1, y.shape[1]):
            predictions[row, i] = x[row, i] @ weights(x[row, :i].astype(np.float64), y[row, :i].astype(np.float64))
    return predictions


ALL = {
    "least_squares": baselines.least_squares,
    "ridge": lambda x, y: baselines.ridge(x, y, penalty=0.3),
    "nearest_neighbours": baselines.nearest_neighbours,
    "averaging": baselines.averaging,
    "gradient_descent": lambda x, y: baselines.gradient_descent(x, y, steps=3),
    "lasso": lambda x, y: baselines.lasso(x, y, alpha=0.1),
}


@pytest.mark.parametrize("name", ALL)
def test_a_prediction_knows_earlier_examples_only(name):
    x, y = prompts("linear", 3, dims=4, points=8)
    first = ALL[name](x, y)
    assert (
        first.shape == (3, 8) and first.dtype == np.float64 and (first[:, 0] == 0).all() and (first[:, 1:] != 0).any()
    )
    x, y = x.copy(), y.copy()
    y[:, 4:] += 3
    x[:, 5:] *= 2
    np.testing.assert_array_equal(ALL[name](x, y)[:, :5], first[:, :5])
    assert np.abs(ALL[name](x, y)[:, 5:] - first[:, 5:]).min(1).max() > 1e-3


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("linear", dict(dims=6, points=15)),
        ("noisy_linear", dict(dims=6, points=15)),
        ("linear", dict(dims=6, points=9, active_dims=3)),
        ("halfspace", dict(dims=5, points=20)),
    ],
)
def test_least_squares_is_numpys_minimum_norm_fit(task, options):
    x, y = prompts(task, 8, **options)
    expected = by_prefix(x, y, lambda a, b: np.linalg.lstsq(a, b, rcond=1e-6)[0])
    np.testing.assert_allclose(baselines.least_squares(x, y), expected, atol=1e-7 * np.abs(expected).max(), rtol=0)


def test_ridge_solves_the_normal_equations():
    x, y = prompts("noisy_linear", 6, dims=5, points=12)
    expected = by_prefix(x, y, lambda a, b: np.linalg.solve(a.T @ a + 0.7 * np.eye(5), a.T @ b))
    np.testing.assert_allclose(baselines.ridge(x, y, penalty=0.7), expected, atol=1e-10)


def test_gradient_descent_and_averaging_by_hand():
    x, y = prompts("linear", 5, dims=4, points=7)

    def descend(a, b):
        w = np.zeros(4)
        for _ in range(5):
            w = w - 0.03 * a.T @ (a @ w - b)
        return w

    np.testing.assert_allclose(
        baselines.gradient_descent(x, y, steps=5, step_size=0.03), by_prefix(x, y, descend), atol=1e-9
    )
    one = by_prefix(x, y, lambda a, b: 0.2 * a.T @ b)
    np.testing.assert_allclose(baselines.gradient_descent(x, y, step_size=0.2), one, atol=1e-10)
    np.testing.assert_allclose(baselines.averaging(x, y), by_prefix(x, y, lambda a, b: a.T @ b / len(b)), atol=1e-10)


def test_many_small_steps_reach_least_squares():
    x, y = prompts("linear", 5, dims=3, points=10)
    close = baselines.gradient_descent(x, y, steps=4000, step_size=0.02)
    np.testing.assert_allclose(close[:, 6:], baselines.least_squares(x, y)[:, 6:], atol=1e-3)


def test_nearest_neighbours_by_hand():
    x, y = prompts("linear", 5, dims=3, points=9)
    found = baselines.nearest_neighbours(x, y, neighbours=2)
    for row in range(5):
        for i in range(1, 9):
            order = np.argsort(np.linalg.norm(x[row, :i] - x[row, i], axis=1))
            assert found[row, i] == pytest.approx(y[row, order[:2]].mean(), abs=1e-6)


@pytest.mark.slow
def test_closed_forms_on_the_linear_task():
    """Errors over D on 1e4 prompts, D = 20, where the literature gives them."""
    x, y = prompts("linear", 10_000)
    i = np.arange(1, 41)
    zero = error(np.zeros(y.shape), y)[1:] / 20
    np.testing.assert_allclose(zero, 1, atol=0.06)
    averaging = error(baselines.averaging(x, y), y)[1:] / 20
    np.testing.assert_allclose(averaging * i / 21, 1, atol=0.1)
    assert averaging[19] == pytest.approx(1.05, rel=0.03) and averaging[39] == pytest.approx(0.525, rel=0.03)
    step = error(baselines.gradient_descent(x, y), y)[1:] / 20
    np.testing.assert_allclose(step * (i + 21) / 21, 1, atol=0.06)
    squares = error(baselines.least_squares(x[:, :25], y[:, :25]), y[:, :25])[1:] / 20
    # Divided by the zero predictor's own error, most of the sampling noise cancels.
    np.testing.assert_allclose(squares / zero[:24], np.maximum(0, 1 - i[:24] / 20), atol=0.03)
    assert squares[19:].max() < 1e-6 and squares[18] == pytest.approx(0.05, rel=0.06)


def test_ridge_with_the_noise_variance_is_best():
    x, y = prompts("noisy_linear", 2000, dims=8, points=17)
    errors = {
        penalty: error(baselines.ridge(x, y, penalty=penalty), y)[1:].mean() for penalty in (0.1, 0.5, 1.0, 2.0, 10.0)
    }
    assert min(errors, key=errors.get) == 1.0
    assert errors[1.0] < error(baselines.least_squares(x, y), y)[1:].mean()


def test_chosen_step_sizes_find_the_closed_form_and_more_steps_help():
    x, y = prompts("linear", 1500, dims=6, points=13)
    found = baselines.best_factors(x, y, baselines.single_step_rates(13, 6), steps=1)
    assert np.abs(np.log(found[1:])).max() < 0.36  # two places on the grid
    several = baselines.best_factors(x, y, 1 / baselines.curvature(x), steps=8)
    held_out = load_in_context("linear", train_examples=1, test_examples=1500, dims=6, points=13)["test"].gather(
        np.arange(1500)
    )
    x, y = baselines.read_prompt(held_out["vectors"])
    one = error(baselines.gradient_descent(x, y), y)
    many = error(baselines.gradient_descent(x, y, steps=8, step_size=several / baselines.curvature(x)), y)
    assert many[1:].mean() < 0.75 * one[1:].mean() and many[12] < 0.3 * one[12]
    assert (many[1:] <= 1.05 * one[1:]).all()


def test_steps_below_twice_the_inverse_curvature_never_diverge_and_above_it_do():
    x, y = prompts("linear", 300, dims=5, points=11)
    np.testing.assert_allclose(
        baselines.curvature(x)[:, 2], np.linalg.norm(x[:, :2].astype(np.float64), 2, axis=(1, 2)) ** 2, rtol=1e-9
    )
    limit = 2 / baselines.curvature(x)
    assert (
        error(baselines.gradient_descent(x, y, steps=200, step_size=0.95 * limit), y)[1:].max()
        < 5 * error(np.zeros(y.shape), y).max()
    )
    assert error(baselines.gradient_descent(x, y, steps=200, step_size=1.05 * limit), y)[1:].max() > 1e6


def test_lasso_minimises_its_objective_and_finds_sparse_weights():
    x, y = prompts("sparse_linear", 12, dims=12, points=12, nonzeros=2)
    found = error(baselines.lasso(x, y, alpha=0.01), y)[8:].mean()
    assert found < 0.4 * error(baselines.least_squares(x, y), y)[8:].mean()

    def soft_threshold(a, b):
        # Proximal gradient on |b - a w|^2 / 2n + 0.1 |w|_1.
        w, rate = np.zeros(a.shape[1]), len(b) / np.linalg.norm(a, 2) ** 2
        for _ in range(3000):
            w = w - rate * a.T @ (a @ w - b) / len(b)
            w = np.sign(w) * np.maximum(np.abs(w) - 0.1 * rate, 0)
        return w

    x, y = x[:2, :8, :4], y[:2, :8]
    np.testing.assert_allclose(baselines.lasso(x, y, alpha=0.1), by_prefix(x, y, soft_threshold), atol=5e-3)


def test_boolean_lines():
    x, y = prompts("nearest_neighbour", 200)
    np.testing.assert_array_equal(np.sign(baselines.nearest_neighbours(x, y, neighbours=1))[:, 20:], y[:, 20:])
    accuracy = lambda predictions, y: (np.sign(predictions) == y)[:, 40:].mean()
    x, y = prompts("halfspace", 300)
    assert accuracy(baselines.least_squares(x, y), y) > 0.77 and accuracy(baselines.averaging(x, y), y) > 0.73
    x, y = prompts("parity", 300)
    assert abs(accuracy(baselines.least_squares(x, y), y) - 0.5) < 0.05


def test_a_penalty_is_chosen_for_each_number_of_examples():
    """Without noise the least one is best from D examples on; with noise of variance 1 and weights N(0, I) that of
    Bayes, 1."""
    x, y = prompts("linear", 400, dims=4, points=9)
    clean = baselines.best_penalties(x, y)
    assert (clean[4:] == 1e-6).all()
    noisy = baselines.best_penalties(
        x, y + np.random.default_rng(0).normal(size=y.shape), grid=np.array([0.01, 1.0, 100.0])
    )
    assert (noisy[2:] == 1.0).all()
    tuned = baselines.tuned_ridge(x, y, clean)
    for i, penalty in enumerate(clean):
        np.testing.assert_array_equal(tuned[:, i], baselines.ridge(x, y, penalty=float(penalty))[:, i])
