"""Prompts of functions: the published sampling rules, read off the prompts by formulas of their own."""

import zlib

import numpy as np
import pytest

from research.data.in_context import BOOLEAN, REGRESSION, InContextBoolean, InContextRegression, load_in_context
from research.data.keyed_random import KeyedRandom
from research.errors import UserError
from tests.data.counted import calls

TASKS = REGRESSION | BOOLEAN
SMALL = {"nearest_neighbour": dict(start=4), "sparse_linear": dict(nonzeros=2)}


def source(task, count=2000, **options):
    return load_in_context(task, train_examples=count, test_examples=2, **options)["train"]


def prompts(task, count=2000, **options):
    """Inputs [B, K, D] and targets [B, K] read off the vectors."""
    block = source(task, count, **options).gather(np.arange(count))
    vectors = block["vectors"]
    np.testing.assert_array_equal(vectors[:, 1::2, 0], block["targets"])
    assert not vectors[:, 1::2, 1:].any()
    return vectors[:, 0::2].astype(np.float64), block["targets"].astype(np.float64)


@pytest.mark.parametrize("task", TASKS)
def test_protocol_and_purity(task):
    options = dict(dims=6, points=9) | SMALL.get(task, {})
    splits = load_in_context(task, train_examples=50, test_examples=7, seed=2, fresh=True, **options)
    assert {split: len(s) for split, s in splits.items()} == {"train": 50, "validation": 7, "test": 7}
    train = splits["train"]
    assert type(train) is (InContextBoolean if task in BOOLEAN else InContextRegression) and train.binary == (
        task in BOOLEAN
    )
    indices, epochs = np.array([7, 3, 49, 3, 3]), np.array([0, 1, 1, 1, 2])
    block = train.gather(indices, epochs)
    assert block["vectors"].shape == (5, 18, 6) and block["targets"].shape == (5, 9)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in block.values())
    for name, array in block.items():
        np.testing.assert_array_equal(array[1], train.gather(indices[1:2], epochs[1:2])[name][0])
        np.testing.assert_array_equal(array[1], array[3])
    assert not np.array_equal(block["vectors"][3], block["vectors"][4])
    blocks = [s.gather(np.arange(7))["vectors"].tobytes() for s in splits.values()]
    assert len(set(blocks)) == 3
    test = splits["test"]
    np.testing.assert_array_equal(
        test.gather(np.arange(3), np.array([1, 2, 3]))["vectors"], test.gather(np.arange(3))["vectors"]
    )
    if task in BOOLEAN:
        assert set(np.unique(block["targets"])) <= {-1, 1} and set(np.unique(block["vectors"][:, 0::2])) == {-1, 1}


def test_golden_prompts():
    """Every number measured in context hangs on these; real ones to six digits, as the C library rounds the last."""
    options = {task: dict(dims=6, points=9) | SMALL.get(task, {}) for task in TASKS}
    boolean = {
        t: zlib.crc32(source(t, **options[t]).gather(np.arange(9))["vectors"].astype(np.int8).tobytes())
        for t in BOOLEAN
    }
    assert boolean == GOLDEN_BOOLEAN
    real = {t: source(t, **options[t]).gather(np.arange(2))["targets"][1, 4] for t in REGRESSION}
    assert real == pytest.approx(GOLDEN_REAL, rel=1e-5)


GOLDEN_BOOLEAN = {
    "conjunction": 1384414823,
    "disjunction": 646859862,
    "sparse_disjunction": 2311409304,
    "dnf": 2447026418,
    "cnf": 1507052708,
    "majority": 638719087,
    "halfspace": 3207027261,
    "sparse_threshold": 3925132054,
    "parity": 4235074077,
    "sparse_parity": 3015393869,
    "nearest_neighbour": 2653956897,
}
GOLDEN_REAL = {
    "linear": -0.6204137,
    "sparse_linear": -1.1214087,
    "noisy_linear": -0.143641,
    "quadratic": -0.9944153,
    "relu_network": -0.8837866,
    "decision_tree": 0.351537,
}


def fitted(features, y):
    """Weights of the least squares fit of each prompt, and the largest residual."""
    w = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(features, y, strict=True)])
    return w, np.abs(np.einsum("bkd,bd->bk", features, w) - y).max()


def test_linear_weights_and_inputs_are_normal():
    x, y = prompts("linear", 400)
    w, residual = fitted(x, y)
    assert residual < 1e-4
    for sample in (x, w):
        assert abs(sample.mean()) < 4 / np.sqrt(sample.size) and abs(sample.var() - 1) < 4 * np.sqrt(2 / sample.size)
    assert abs((y**2).mean() / 20 - 1) < 0.05


def test_sparse_linear_has_three_weights():
    x, y = prompts("sparse_linear", 400)
    w, residual = fitted(x, y)
    assert residual < 1e-4 and ((np.abs(w) > 1e-4).sum(1) == 3).all()
    np.testing.assert_allclose((np.abs(w) > 1e-4).mean(0), 0.15, atol=4 * np.sqrt(0.15 * 0.85 / 400))


def test_noisy_linear_is_linear_with_noise():
    x, clean = prompts("noisy_linear", 400, noise_std=0)
    again, noisy = prompts("noisy_linear", 400, noise_std=0.5)
    np.testing.assert_array_equal(x, again)
    noise = noisy - clean
    assert abs(noise.std() - 0.5) < 0.02 and abs(noise.mean()) < 0.02
    np.testing.assert_array_equal(clean, prompts("linear", 400)[1])


def test_quadratic_is_linear_in_the_squares():
    x, y = prompts("quadratic", 300)
    w, residual = fitted(x**2, y)
    assert residual < 1e-3 and abs(w.var() * 3 - 1) < 4 * np.sqrt(2 / w.size)


def test_relu_network_against_a_loop():
    network = source("relu_network", 5, hidden=7, dims=4, points=6)
    block = network.gather(np.arange(5))
    for row in range(5):
        random = KeyedRandom.of(0, (0,), np.array([row]))
        first, second = random.normal("first", 4, 7)[0], random.normal("second", 7)[0]
        for point in range(6):
            x = block["vectors"][row, 2 * point]
            expected = sum(max(x @ first[:, unit], 0) * second[unit] for unit in range(7)) * np.sqrt(2 / 7)
            assert block["targets"][row, point] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    _, y = prompts("relu_network", 1000)
    assert y.shape == (1000, 101) and abs((y**2).mean() / 20 - 1) < 0.1


def test_decision_tree_against_a_walk():
    block = source("decision_tree", 20, dims=5, points=30, depth=3).gather(np.arange(20))
    for row in range(20):
        random = KeyedRandom.of(0, (0,), np.array([row]))
        coordinates, leaves = random.integers("coordinates", 5, 7)[0], random.normal("leaves", 8)[0]
        for point in range(30):
            x, leaf, node = block["vectors"][row, 2 * point], 0, 0
            for _ in range(3):
                right = bool(x[coordinates[node]] > 0)
                node, leaf = 2 * node + (2 if right else 1), 2 * leaf + right
            assert block["targets"][row, point] == leaves[leaf]
    _, y = prompts("decision_tree", 1000)
    assert abs(y.var() - 1) < 0.05 and max(len(np.unique(row)) for row in y) <= 16


def test_inactive_coordinates_are_zero():
    x, y = prompts("linear", 300, active_dims=5)
    assert not x[:, :, 5:].any() and (x[:, :, :5] != 0).all() and abs((y**2).mean() / 5 - 1) < 0.15
    full = prompts("linear", 300)[0]
    np.testing.assert_array_equal(x[:, :, :5], full[:, :, :5])


def test_the_curriculum_adds_coordinates_and_points_by_the_epoch():
    options = dict(dims=8, points=9, fresh=True)
    plain = source("linear", **options)
    growing = source("linear", **options, curriculum={"every": 2, "dims": (3, 2), "points": (4, 3)})
    indices, epochs = np.arange(6), np.array([0, 1, 2, 4, 5, 40])
    block, full = growing.gather(indices, epochs), plain.gather(indices, epochs)
    x, all_x = block["vectors"][:, ::2], full["vectors"][:, ::2]
    for row, (dims, points) in enumerate([(3, 4), (3, 4), (5, 7), (7, 9), (7, 9), (8, 9)]):
        np.testing.assert_array_equal(x[row, :, :dims], all_x[row, :, :dims])
        assert not x[row, :, dims:].any()
        y = block["targets"][row]
        assert np.isfinite(y[:points]).all() and np.isnan(y[points:]).all()
        np.testing.assert_array_equal(block["vectors"][row, 1::2, 0][:points], y[:points])
        weights, _, rank, _ = np.linalg.lstsq(
            x[row].astype(np.float64), block["vectors"][row, 1::2, 0].astype(np.float64), rcond=None
        )
        assert rank == dims
        np.testing.assert_allclose(x[row] @ weights, block["vectors"][row, 1::2, 0], atol=1e-4)
    np.testing.assert_array_equal(block["targets"][5], full["targets"][5])
    np.testing.assert_array_equal(growing.gather(indices)["targets"], plain.gather(indices)["targets"])
    held_out = load_in_context(
        "linear", train_examples=5, test_examples=5, **options, curriculum={"every": 2, "points": (4, 3)}
    )["test"]
    assert np.isfinite(held_out.gather(indices[:5], epochs[:5])["targets"]).all()


def words_of(task, what, *shape, count=2000):
    return KeyedRandom.of(0, (0,), np.arange(count)).uniform(what, *shape)


def literals(task, absent, *clauses, dims=28):
    """The literals of each prompt, drawn once more from the uniform numbers."""
    u = words_of(task, "literals", *clauses, dims)
    return (u >= absent).astype(int) * np.where(u < (1 + absent) / 2, 1, -1)


def test_conjunctions():
    x, y = prompts("conjunction")
    w = literals("conjunction", 0.7)
    for sign in (1, -1):
        assert abs((w == sign).mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / w.size)
    satisfied = ((x == w[:, None]) | (w == 0)[:, None]).all(-1)
    np.testing.assert_array_equal(y, np.where(satisfied, 1, -1))
    # Forced with probability .3, else true by chance with 2^-literals.
    size = (w != 0).sum(1)
    expected = 0.3 + 0.7 * 2.0**-size
    assert abs((satisfied.mean(1) - expected).mean()) < 4 * np.sqrt(0.21 / y.size)
    many = size >= 12
    assert many.sum() > 100 and abs(satisfied[many].mean() - 0.3) < 4 * np.sqrt(0.21 / (70 * many.sum()))
    # What is no literal stays fair.
    free = np.broadcast_to((w == 0)[:, None], x.shape)
    assert abs(x[free].mean()) < 4 / np.sqrt(free.sum())


def test_teaching_sequences():
    count, dims, points = 500, 8, 12
    x, y = prompts("conjunction", count, dims=dims, points=points, teaching=True)
    w = words_of("conjunction", "literals", dims, count=count) < 0.3
    surplus, size = 0.0, 0
    for row in range(count):
        (places,) = np.nonzero(w[row])
        first = np.where(w[row], 1, -1)
        np.testing.assert_array_equal(x[row, 0], first)
        assert y[row, 0] == 1
        for point, place in enumerate(places, 1):
            turned = first.copy()
            turned[place] = -1
            np.testing.assert_array_equal(x[row, point], turned)
            assert y[row, point] == -1
        np.testing.assert_array_equal(y[row] == 1, (x[row][:, places] == 1).all(-1))
        after = y[row, len(places) + 1 :]
        surplus, size = surplus + (after == 1).sum() - len(after) * (0.4 + 0.6 * 2.0 ** -len(places)), size + len(after)
    # Behind the lesson inputs are positive with probability .4, or by chance.
    assert abs(surplus / size) < 4 * np.sqrt(0.25 / size)


@pytest.mark.parametrize("task", ["disjunction", "sparse_disjunction"])
def test_disjunctions(task):
    x, y = prompts(task)
    if task == "disjunction":
        w = literals(task, 0.7)
    else:
        w = np.zeros((2000, 28), int)
        np.put_along_axis(w, KeyedRandom.of(0, (0,), np.arange(2000)).distinct("literals", 28, 4), 1, 1)
        assert (w.sum(1) == 4).all()
    satisfied = ((x == w[:, None]) & (w != 0)[:, None]).any(-1)
    np.testing.assert_array_equal(y, np.where(satisfied, 1, -1))
    size = np.abs(w).sum(1)
    assert abs((~satisfied).mean() - (0.3 + 0.7 * 2.0**-size).mean()) < 4 * np.sqrt(0.21 / y.size)


def test_clauses():
    for task, share, to in (("dnf", 0.35, 1), ("cnf", 0.3, -1)):
        x, y = prompts(task, 1000)
        w = literals(task, 0.8, 3)[:1000]
        holds = x[:, :, None, :] == w[:, None]
        absent = (w == 0)[:, None]
        if task == "dnf":
            expected = (holds | absent).all(-1).any(-1)
            forced = (holds | absent).all(-1)
        else:
            expected = (holds & ~absent).any(-1).all(-1)
            forced = ~(holds & ~absent).any(-1)
        np.testing.assert_array_equal(y, np.where(expected, 1, -1))
        # One clause of a prompt is forced in a share of its inputs: the largest of the three means.
        large = (np.abs(w).sum(-1) >= 5).all(-1)
        assert large.sum() > 50
        assert abs(forced[large].mean(1).max(-1).mean() - share) < 0.035, task
        assert abs(np.sort(forced[large].mean(1), axis=-1)[:, 1].mean() - 0.04) < 0.04
        clause = forced[large].mean(1).argmax(-1)
        assert (np.bincount(clause, minlength=3) > large.sum() / 6).all()
        assert (y == to).mean() > share


def test_thresholds():
    random = KeyedRandom.of(0, (0,), np.arange(2000))
    majority, y = prompts("majority")
    chosen = random.uniform("weights", 28) < 0.3
    ones, zeros = ((majority == sign) & chosen[:, None] for sign in (1, -1))
    np.testing.assert_array_equal(y == 1, ones.sum(-1) > zeros.sum(-1))
    assert abs(chosen.mean() - 0.3) < 0.01
    x, y = prompts("halfspace")
    w = random.integers("weights", 7, 28) - 3
    np.testing.assert_array_equal(y == 1, np.einsum("bkd,bd->bk", x, w) > 0)
    assert set(np.unique(w)) == set(range(-3, 4))
    x, y = prompts("sparse_threshold")
    t = random.integers("threshold", 6, 1) - 2.5
    np.testing.assert_array_equal(y == 1, np.einsum("bkd,bd->bk", x, literals("sparse_threshold", 0.7)) > t)
    assert set(np.unique(t)) == {-2.5, -1.5, -0.5, 0.5, 1.5, 2.5}


@pytest.mark.parametrize(("task", "dims"), [("parity", 5), ("sparse_parity", 6)])
def test_parity_flips_with_each_chosen_bit(task, dims):
    rule = source(task, dims=dims).rule
    random = KeyedRandom.of(0, (0,), np.arange(300))
    chosen = rule.subset(random)
    x, y = rule.generate(random)
    np.testing.assert_array_equal(y, -np.prod(np.where(chosen[:, None] > 0, -x, 1), -1))
    np.testing.assert_array_equal(y[(x == -1).all(-1)], -1)
    subsets, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(subsets) == (32 if task == "parity" else 15)
    assert abs(counts - 300 / len(subsets)).max() < 5 * np.sqrt(300 / len(subsets))

    class Turned(type(rule)):
        def inputs(self, random):
            x = super().inputs(random).copy()
            x[:, :, 3] *= -1
            return x

    turned = Turned(dims=dims).generate(random)[1]
    np.testing.assert_array_equal(turned, np.where(chosen[:, 3:4] > 0, -y, y))


def test_nearest_neighbour_against_a_loop():
    x, y = prompts("nearest_neighbour", 60, dims=5, points=25, start=8)
    labels = KeyedRandom.of(0, (0,), np.arange(60)).signs("labels", 25)
    for row in range(60):
        for point in range(25):
            distance = [int((x[row, point] != x[row, other]).sum()) for other in range(point)]
            if point >= 8 or 0 in distance:
                assert y[row, point] == y[row, distance.index(min(distance))]
            else:
                assert y[row, point] == labels[row, point]
    assert source("nearest_neighbour", start=9).scored_from == 9 and source("dnf").scored_from == 0


GIVEN = dict(train_examples=5, test_examples=5)


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("linaer", GIVEN, ["'linaer'", "Did you mean linear", "conjunction"]),
        ("linear", GIVEN | dict(noise_std=1), ["'noise_std'", "dims, points, active_dims"]),
        ("linear", GIVEN | dict(train_examples=0), ["train_examples=0"]),
        ("linear", dict(train_examples=5), ["test_examples=None"]),
        ("linear", GIVEN | dict(dims=0), ["dims=0"]),
        ("linear", GIVEN | dict(active_dims=21), ["active_dims=21", "1..20"]),
        ("sparse_linear", GIVEN | dict(nonzeros=21), ["nonzeros=21", "1..20"]),
        ("noisy_linear", GIVEN | dict(noise_std=-1), ["noise_std=-1"]),
        ("relu_network", GIVEN | dict(hidden=0), ["hidden=0"]),
        ("decision_tree", GIVEN | dict(depth=0), ["depth=0"]),
        ("dnf", GIVEN | dict(points=0), ["points=0"]),
        ("conjunction", GIVEN | dict(teaching=True, points=28), ["points=28", "dims=28"]),
        ("sparse_disjunction", GIVEN | dict(literal_count=29), ["literal_count=29", "1..28"]),
        ("sparse_parity", GIVEN | dict(bits=0), ["bits=0", "1..28"]),
        ("linear", GIVEN | dict(curriculum={"dims": (5, 1)}), ["every is needed"]),
        ("linear", GIVEN | dict(curriculum={"every": 2, "size": (5, 1)}), ["'size'", "every, dims, points"]),
        ("linear", GIVEN | dict(curriculum={"every": 2, "dims": (5,)}), ["dims=(5,)", "pair of counts"]),
        ("linear", GIVEN | dict(curriculum={"every": 2, "points": 5}), ["points=5", "pair of counts"]),
        ("linear", GIVEN | dict(curriculum={"every": 0}), ["every=0"]),
        ("linear", GIVEN | dict(curriculum=2), ["curriculum=2", "every, dims, points"]),
        ("dnf", GIVEN | dict(curriculum={"every": 2, "dims": (5, 1)}), ["dnf", "leave dims away"]),
        ("nearest_neighbour", GIVEN | dict(curriculum={"every": 2, "points": (5, 1)}), ["points begin with 5"]),
        ("nearest_neighbour", GIVEN | dict(start=70), ["start=70", "1..69"]),
    ],
)
def test_bad_input_names_cause_and_remedy(task, options, words):
    with pytest.raises(UserError) as caught:
        load_in_context(task, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 400 and "\n" not in message


@pytest.mark.parametrize("task", TASKS)
def test_no_loop_over_prompts(task):
    prompts = source(task, 10**6)
    assert calls(lambda: prompts.gather(np.arange(64))) < 2 * calls(lambda: prompts.gather(np.arange(8)))


@pytest.mark.parametrize("task", REGRESSION)
def test_variance_is_that_of_the_targets(task):
    options = {"dims": 6, "points": 40} | ({"active_dims": 4} if task in ("linear", "sparse_linear") else {})
    prompts_of = source(task, 4000, **options)
    targets = prompts_of.gather(np.arange(4000))["targets"]
    np.testing.assert_allclose(np.square(targets).mean(), prompts_of.variance, rtol=0.06)
