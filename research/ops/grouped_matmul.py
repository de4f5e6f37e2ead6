"""Products of rows with the weights of their group: what a mixture of experts computes once its tokens are sorted by
expert.

Nothing is dropped and nothing is padded to a capacity (MegaBlocks, Gale et al. 2022, arXiv 2211.15841, sections 4 and
5). On a CPU the time follows the number of rows, not that of groups; `lax.ragged_dot` is what accelerators are given.
Sorting, and moving rows there and back, stand beside it, with gradients that gather and never scatter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from research.ops import checks, dispatch, grouped_implementations

OP = "grouped_matmul"
IMPLEMENTATIONS = tuple(grouped_implementations.IMPLEMENTATIONS)


def grouped_matmul(
    x: Float[Array, "T K"],
    weights: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str = "auto",
    partial: bool = False,
) -> Float[Array, "T N"]:
    """Returns y[t] = x[t] @ weights[group of t], where the first group_sizes[0] rows are of group 0, the next ones of
    group 1, and so on.

    Args:
      x: rows sorted by group, see `sort_by_group`.
      weights: one matrix per group.
      group_sizes: rows of each group; zeros are allowed. As traced values they are not checked: rows beyond their sum
        give zero and get a zero gradient, rows that they count beyond T are passed over.
      implementation: "auto" (by platform), "cpu", "blocks" (a CPU's), "ragged" (`lax.ragged_dot`, that of accelerators)
        or "naive" (all rows with each group's weights in turn, E times the work; gradient by autodiff).
      partial: rows beyond the sum of the sizes are meant to be of no group.

    Returns:
      Rows in the common dtype of x and weights; sums are taken in float32 at least. Differentiable once, in reverse, in
      x and weights.

    Raises:
      ValueError: when shapes do not fit, group sizes that are known do not sum to T, or the implementation is unknown.

    Source: MegaBlocks (Gale et al. 2022, arXiv 2211.15841), section 4.
    """
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    num_rows = checks.shapes(OP, x=(x, "T K"), weights=(weights, "E K N"), group_sizes=(group_sizes, "E"))["T"]
    integral = jnp.issubdtype(group_sizes.dtype, jnp.integer)
    checks.require(integral, OP, "group_sizes", f"of dtype {group_sizes.dtype}", "integers")
    if not isinstance(group_sizes, jax.core.Tracer):
        _check_sizes(np.asarray(group_sizes), num_rows, partial)
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), num_rows)
    sizes = jnp.diff(ends, prepend=0)
    dtype = jnp.promote_types(x.dtype, weights.dtype)
    x, weights = x.astype(dtype), weights.astype(dtype)
    if implementation == "naive" or num_rows == 0:
        return grouped_implementations.naive(x, weights, sizes).astype(dtype)
    return _grouped_matmul(implementation, x, weights, sizes)


def _check_sizes(sizes, num_rows, partial):
    told = f"of shape {sizes.shape} and sum {sizes.sum()}"
    checks.require(
        sizes.sum() == num_rows or (partial and sizes.sum() < num_rows),
        OP,
        "group_sizes",
        told,
        f"sum {num_rows}, the rows of x",
    )
    checks.require((sizes >= 0).all(), OP, "group_sizes", f"{told}, the least {sizes.min()}", "none below 0")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(implementation, x, weights, sizes):
    return _forward(implementation, x, weights, sizes)[0]


def _per_platform(implementation, direction, *operands):
    def rounded(name):
        function = direction(grouped_implementations.IMPLEMENTATIONS[name])
        return lambda *operands: jax.tree.map(lambda array: array.astype(operands[0].dtype), function(*operands))

    if implementation in grouped_implementations.IMPLEMENTATIONS:
        return rounded(implementation)(*operands)
    if not dispatch.known(operands[0].shape[0]):  # blocks are cut for a number of rows
        return rounded("ragged")(*operands)
    return dispatch.per_platform(implementation, rounded("blocks"), rounded("ragged"), *operands)


def _forward(implementation, x, weights, sizes):
    return _per_platform(implementation, lambda one: one.product, x, weights, sizes), (x, weights, sizes)


def _backward(implementation, residuals, dy):
    return *_per_platform(implementation, lambda one: one.gradients, *residuals, dy), None


_grouped_matmul.defvjp(_forward, _backward)


# --- sorting rows by group, and moving them ---------------------------------------------------------------------------


def sort_by_group(assignments: Int[Array, " T"] | Int[Array, "T k"], num_groups: int) -> tuple[Array, Array, Array]:
    """Sorts (row, choice) pairs by the group that each is assigned to, pairs of one group in their order.

    Args:
      assignments: group of each row, or of each of its k choices, from 0 to num_groups - 1.
      num_groups: number of groups E.

    Returns:
      permutation [T * k]: which pair, t * k + choice, comes at each place; inverse [T * k]: the place of each pair;
      group sizes [E].

    Raises:
      ValueError: for other shapes or dtypes, or so many pairs and groups that their product exceeds 32 bits.
    """
    op = "sort_by_group"
    checks.require(assignments.ndim in (1, 2), op, "assignments", f"of shape {assignments.shape}", "[T] or [T, k]")
    integral = jnp.issubdtype(assignments.dtype, jnp.integer)
    checks.require(integral, op, "assignments", f"of dtype {assignments.dtype}", "integers")
    num_pairs = assignments.size
    groups, pairs = assignments.reshape(-1).astype(jnp.uint32), jnp.arange(num_pairs, dtype=jnp.uint32)
    if dispatch.known(num_pairs):
        checks.require(
            num_pairs * num_groups <= 2**32, op, "num_groups", num_groups, f"at most 2**32 / {num_pairs} pairs"
        )
        # One integer holds group and pair: on a CPU, XLA sorts plain integers several times faster than a key with its
        # value.
        permutation = (lax.sort(groups * num_pairs + pairs) % max(num_pairs, 1)).astype(jnp.int32)
    else:
        permutation = jnp.argsort(groups, stable=True).astype(jnp.int32)
    places = jnp.zeros(num_pairs, jnp.int32).at[permutation]
    inverse = places.set(pairs.astype(jnp.int32), unique_indices=True, mode="promise_in_bounds")
    sizes = (groups[:, None] == jnp.arange(num_groups, dtype=jnp.uint32)).sum(0, dtype=jnp.int32)
    return permutation, inverse, sizes


def _gather(rows, index, partial=False):
    return (
        jnp.take(rows, index, axis=0, mode="fill", fill_value=0)
        if partial
        else jnp.take(rows, index, axis=0, mode="clip")
    )


def permute(
    x: Float[Array, "T D"], permutation: Int[Array, " R"], inverse: Int[Array, " P"], *, partial: bool = False
) -> Float[Array, "R D"]:
    """Returns the rows of x in the order of `sort_by_group`, each P / T = k times; the gradient gathers by the inverse.

    Args:
      x: one row per token.
      permutation: which of the P = T * k pairs (pair p is of token p // k) comes at each of R places.
      inverse: the place of each pair.
      partial: some pairs have no place (an inverse of R) and some places no pair (a permutation of P), which gives rows
        of zeros; otherwise R is P.

    Raises:
      ValueError: when shapes do not fit.
    """
    checks.shapes("permute", x=(x, "T D"), permutation=(permutation, "R"), inverse=(inverse, "P" if partial else "R"))
    whole = inverse.size % max(x.shape[0], 1) == 0
    checks.require(
        whole, "permute", "inverse", f"of shape {inverse.shape}", f"a multiple of the {x.shape[0]} rows of x"
    )
    return _permute(partial, x, permutation, inverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute(partial, x, permutation, inverse):
    choices = inverse.size // max(x.shape[0], 1)
    return _gather(x, permutation // max(choices, 1), partial)


def _permute_forward(partial, x, permutation, inverse):
    return _permute(partial, x, permutation, inverse), (x.shape, inverse)


def _permute_backward(partial, residuals, dy):
    (num_rows, width), inverse = residuals
    dx = _gather(dy, inverse, partial)
    if inverse.size != num_rows:
        dx = dx.reshape(num_rows, -1, width).sum(1)
    return dx, None, None


_permute.defvjp(_permute_forward, _permute_backward)


def unpermute(
    y: Float[Array, "R D"], permutation: Int[Array, " R"], inverse: Int[Array, " P"], *, partial: bool = False
) -> Float[Array, "P D"]:
    """Returns the rows y at their places in the order t * k + choice; the gradient gathers by the permutation.

    Args:
      y: one row per place.
      permutation, inverse, partial: as in `permute`; a pair without a place gets zeros.

    Raises:
      ValueError: when shapes do not fit.
    """
    checks.shapes("unpermute", y=(y, "R D"), permutation=(permutation, "R"), inverse=(inverse, "P" if partial else "R"))
    return _permute(partial, y, inverse, permutation)
