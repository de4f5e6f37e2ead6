"""Every implementation of the grouped matrix product against its definition and the reference implementation, and the
sorting around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops import grouped_implementations
from research.ops.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, permute, sort_by_group, unpermute
from tests.ops.compare import assert_agree, draw

FAST_IMPLEMENTATIONS = ("auto", "cpu", "blocks", "ragged")

# (K, N), group sizes
CASES = [
    ((5, 3), (1,)),
    ((1, 1), (0, 0, 2, 0)),
    ((7, 13), (20, 0, 1, 42)),  # 63 rows; the last block of one row would reach beyond them
    ((8, 5), (17, 16, 0, 15, 1, 48)),  # 97 rows, around the sizes of blocks
    ((3, 11), (0, 512, 513, 0, 1030, 5)),  # several blocks of the largest size
    ((4, 6), (31, 0, 0, 0)),
]


def _operands(widths, sizes, dtype=np.float32, rows=None):
    (k, n), rows = widths, sum(sizes) if rows is None else rows
    return (
        draw((rows, k), 0, dtype),
        draw((len(sizes), k, n), 1, dtype),
        np.array(sizes, np.int32),
        draw((rows, n), 2, dtype),
    )


@functools.partial(jax.jit, static_argnums=4)
def _output_and_grads(x, weights, sizes, dy, implementation):
    y, vjp = jax.vjp(lambda x, weights: grouped_matmul(x, weights, sizes, implementation=implementation), x, weights)
    return y, *vjp(dy)


def _definition(x, weights, sizes, dy):
    """Row by row, in float64."""
    x, weights, dy = (np.asarray(array, np.float64) for array in (x, weights, dy))
    y, dx, dweights = np.zeros((len(x), weights.shape[2])), np.zeros(x.shape), np.zeros(weights.shape)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)[: len(x)]):
        y[row], dx[row] = x[row] @ weights[group], weights[group] @ dy[row]
        dweights[group] += np.outer(x[row], dy[row])
    return y, dx, dweights


@pytest.mark.slow_unless(
    "widths0-sizes0-auto",
    "widths0-sizes0-blocks",
    "widths0-sizes0-cpu",
    "widths1-sizes1-naive",
    "widths2-sizes2-blocks",
    "widths3-sizes3-ragged",
    "widths4-sizes4-ragged",
    "widths5-sizes5-ragged",
)
@pytest.mark.parametrize("implementation", ("naive", *FAST_IMPLEMENTATIONS))
@pytest.mark.parametrize("widths, sizes", CASES)
def test_implementations_are_the_definition(widths, sizes, implementation):
    operands = _operands(widths, sizes)
    actual = _output_and_grads(*operands, implementation)
    assert {array.dtype for array in actual} == {jnp.dtype(jnp.float32)}
    assert_agree(actual, _definition(*operands), 1e-5)
    assert_agree(actual, _output_and_grads(*operands, "naive"), 1e-5)


@pytest.mark.slow_unless("ragged")
@pytest.mark.parametrize("implementation", ("auto", "naive", "blocks", "ragged"))
def test_implementations_agree_in_float64(implementation):
    with jax.enable_x64(True):
        for widths, sizes in CASES[2:4]:
            operands = _operands(widths, sizes, np.float64)
            actual = _output_and_grads(*operands, implementation)
            assert {array.dtype for array in actual} == {jnp.dtype(jnp.float64)}
            assert_agree(actual, _definition(*operands), 1e-10)


@pytest.mark.parametrize("implementation", ("auto", "naive", "blocks", "ragged"))
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(implementation):
    # 1200 rows in one group: a sum in bfloat16 over its blocks would be off by more than one rounding.
    x, weights, sizes, dy = _operands((24, 9), (1200, 0, 3))
    x, weights, dy = (jnp.asarray(array, jnp.bfloat16) for array in (x, weights, dy))
    actual = _output_and_grads(x, weights, sizes, dy, implementation)
    assert {array.dtype for array in actual} == {jnp.dtype(jnp.bfloat16)}
    assert_agree(actual, _definition(x, weights, sizes, dy), 2.0**-8)


def test_mixed_dtypes_give_the_wider_one():
    x, weights, sizes, dy = _operands((6, 5), (4, 0, 9))
    x = jnp.asarray(x, jnp.bfloat16)
    expected_y, _, expected_dweights = _definition(x, weights, sizes, dy)
    for implementation in ("auto", *IMPLEMENTATIONS):
        y, dx, dweights = _output_and_grads(x, weights, sizes, dy, implementation)
        assert (y.dtype, dx.dtype, dweights.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
        assert_agree((y, dweights), (expected_y, expected_dweights), 1e-5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 70)), min_size=1, max_size=9).filter(any),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    implementation=st.sampled_from(("blocks", "ragged")),
)
def test_any_sizes_agree_with_the_definition(sizes, widths, implementation):
    operands = _operands(widths, sizes)
    assert_agree(_output_and_grads(*operands, implementation), _definition(*operands), 1e-5)


def test_one_program_serves_any_sizes():
    rng = np.random.default_rng(0)
    for _ in range(25):
        sizes = rng.multinomial(301, rng.dirichlet(np.full(11, 0.4)))
        operands = _operands((4, 3), sizes)
        assert_agree(_output_and_grads(*operands, "blocks"), _definition(*operands), 1e-5)


@pytest.mark.parametrize("implementation", ("naive", "blocks", "ragged"))
def test_rows_beyond_the_sum_are_zero_and_get_no_gradient(implementation):
    x, weights, sizes, dy = _operands((5, 4), (7, 0, 18), rows=40)
    x[25:], dy[25:] = np.nan, np.nan
    if implementation == "naive":  # zero times NaN is NaN
        x[25:], dy[25:] = 1e3, 1e3
    y, dx, dweights = _output_and_grads(x, weights, sizes, dy, implementation)
    assert not np.any(y[25:]) and not np.any(dx[25:])
    expected = _definition(x[:25], weights, sizes, dy[:25])
    assert_agree((y[:25], dx[:25], dweights), expected, 1e-5)


@pytest.mark.parametrize("implementation", ("naive", "blocks", "ragged"))
def test_traced_sizes_beyond_the_rows_are_cut(implementation):
    x, weights, sizes, dy = _operands((5, 4), (7, 90, 18), rows=33)
    assert_agree(
        _output_and_grads(x, weights, sizes, dy, implementation),
        _definition(x, weights, np.array([7, 26, 0]), dy),
        1e-5,
    )


def test_no_rows_give_no_gradient():
    x, weights, sizes, dy = _operands((5, 4), (0, 0))
    for implementation in IMPLEMENTATIONS:
        y, dx, dweights = _output_and_grads(x, weights, sizes, dy, implementation)
        assert y.shape == (0, 4) and dx.shape == (0, 5) and not np.any(dweights)


def test_groups_do_not_see_each_other():
    x, weights, sizes, _ = _operands((6, 5), (10, 21, 0, 30))
    run = jax.jit(functools.partial(grouped_matmul, implementation="blocks"))
    before, moved = run(x, weights, sizes), x.copy()
    moved[31:] += 1
    np.testing.assert_array_equal(run(moved, weights, sizes)[:31], before[:31])


def test_vmap_agrees_with_a_loop():
    x, weights, _, dy = _operands((4, 3), (12, 25))
    sizes = np.array([[12, 25], [0, 37], [37, 0]], np.int32)
    actual = jax.vmap(lambda sizes: _output_and_grads(x, weights, sizes, dy, "blocks"))(sizes)
    for i in range(3):
        assert_agree([array[i] for array in actual], _definition(x, weights, sizes[i], dy), 1e-5)


def test_sizes_of_blocks_do_not_change_the_result(monkeypatch):
    operands = _operands((6, 7), (90, 3, 0, 30))
    expected = _definition(*operands)
    for block_sizes in ((8,), (1, 2, 64), (100,)):
        monkeypatch.setattr(grouped_implementations, "BLOCK_SIZES", block_sizes)
        jax.clear_caches()
        assert_agree(_output_and_grads(*operands, "blocks"), expected, 1e-5)


@pytest.mark.parametrize("platform, ragged", [("cpu", False), ("cuda", True), ("tpu", True)])
def test_auto_follows_the_platform_of_the_program(platform, ragged):
    operands = _operands((16, 24), (20, 0, 1, 43))
    program = jax.export.export(_output_and_grads, platforms=[platform])(*operands, "auto").mlir_module()
    assert ('"chlo.ragged_dot"' in program) == ragged  # not loops: newer JAX has one in its fallback for cuda


# --- sorting and moving rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, num_groups", [((63,), 5), ((1,), 1), ((17, 3), 64), ((101, 2), 7), ((0,), 3)])
def test_sort_by_group_is_stable(shape, num_groups):
    assignments = np.random.default_rng(0).integers(0, num_groups, shape)
    permutation, inverse, sizes = jax.jit(sort_by_group, static_argnums=1)(assignments, num_groups)
    np.testing.assert_array_equal(permutation, np.argsort(assignments.reshape(-1), kind="stable"))
    np.testing.assert_array_equal(inverse, np.argsort(np.asarray(permutation)))
    np.testing.assert_array_equal(sizes, np.bincount(assignments.reshape(-1), minlength=num_groups))
    assert {array.dtype for array in (permutation, inverse, sizes)} == {jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("choices", [1, 3])
def test_permute_and_unpermute_gather_both_ways(choices):
    assignments = np.random.default_rng(1).integers(0, 5, (23, choices))
    permutation, inverse, _ = sort_by_group(jnp.asarray(assignments), 5)
    x, dy = draw((23, 4), 0), draw((23 * choices, 4), 1)
    rows, transpose = jax.vjp(lambda x: permute(x, permutation, inverse), x)
    np.testing.assert_array_equal(rows, x[np.asarray(permutation) // choices])
    expected = jax.vjp(lambda x: x[permutation // choices], x)[1](dy)
    assert_agree(transpose(dy), expected, 1e-6)

    pairs, transpose = jax.vjp(lambda y: unpermute(y, permutation, inverse), rows)
    np.testing.assert_array_equal(pairs.reshape(23, choices, 4), np.repeat(x[:, None], choices, 1))
    assert_agree(transpose(dy), jax.vjp(lambda y: y[inverse], rows)[1](dy), 1e-6)
    for function in (permute, unpermute):
        argument = x if function is permute else rows
        program = jax.jit(jax.grad(lambda a, f=function: f(a, permutation, inverse).sum())).lower(argument).as_text()
        assert "scatter" not in program


@pytest.mark.slow
def test_a_mixture_of_experts_equals_the_sum_over_its_choices():
    weights, x, dy = draw((6, 8, 5), 0), draw((31, 8), 1), draw((31, 5), 2)
    assignments = np.random.default_rng(2).integers(0, 6, (31, 2))

    def sorted_form(x, weights):
        permutation, inverse, sizes = sort_by_group(jnp.asarray(assignments), 6)
        y = grouped_matmul(permute(x, permutation, inverse), weights, sizes)
        return unpermute(y, permutation, inverse).reshape(31, 2, 5).sum(1)

    def explicit(x, weights):
        return jnp.einsum("tk,tckn->tn", x, weights[assignments])

    for run in (sorted_form, jax.jit(sorted_form)):
        (y, vjp), (expected, expected_vjp) = jax.vjp(run, x, weights), jax.vjp(explicit, x, weights)
        assert_agree((y, *vjp(dy)), (expected, *expected_vjp(dy)), 1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_sorting_lowers_for_accelerators(platform):
    def run(x, assignments):
        permutation, inverse, _ = sort_by_group(assignments, 4)
        return jnp.sum(unpermute(permute(x, permutation, inverse), permutation, inverse) ** 2)

    jax.export.export(jax.jit(jax.grad(run)), platforms=[platform])(jnp.ones((6, 3)), jnp.zeros((6, 2), jnp.int32))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(implementation="fft"), "'fft'.*auto, cpu, naive, ragged, blocks"),
        (dict(sizes=np.array([4, 5])), r"group_sizes is of shape \(2,\) and sum 9; expected sum 10"),
        (dict(sizes=np.array([11, -1])), "group_sizes is .* the least -1; expected none below 0"),
        (dict(sizes=np.array([10])), r"group_sizes has shape \(1,\); expected \[E\] = \(2\)"),
        (dict(sizes=np.array([4.0, 6.0])), "group_sizes is of dtype float64; expected integers"),
        (dict(weights=np.zeros((2, 4, 3))), r"weights has shape \(2, 4, 3\); expected \[E K N\] = \(2, 5, N\)"),
        (dict(x=np.zeros(5)), r"x has shape \(5,\); expected \[T K\]"),
    ],
)
def test_invalid_arguments_are_named(arguments, message):
    options = (
        dict(x=np.zeros((10, 5)), weights=np.zeros((2, 5, 3)), sizes=np.array([4, 6]), implementation="auto")
        | arguments
    )
    with pytest.raises(ValueError, match=message):
        grouped_matmul(options["x"], options["weights"], options["sizes"], implementation=options["implementation"])


def test_invalid_rows_and_assignments_are_named():
    index = jnp.arange(7)
    with pytest.raises(
        ValueError, match=r"sort_by_group: assignments is of shape \(1, 1, 7\); expected \[T\] or \[T, k\]"
    ):
        sort_by_group(index[None, None], 7)
    with pytest.raises(ValueError, match="assignments is of dtype float32; expected integers"):
        sort_by_group(jnp.ones(3), 7)
    with pytest.raises(ValueError, match="num_groups is 4294967296; expected at most"):
        sort_by_group(index, 2**32)
    with pytest.raises(
        ValueError, match=r"permute: inverse is of shape \(7,\); expected a multiple of the 3 rows of x"
    ):
        permute(jnp.ones((3, 2)), index, index)
    with pytest.raises(ValueError, match=r"unpermute: permutation has shape \(7,\); expected \[R\] = \(6\)"):
        unpermute(jnp.ones((6, 2)), index, index)
