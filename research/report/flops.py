"""FLOPs by our own count over the jaxpr: a multiply-add is two, a loop body counts as often as it runs.

What is counted, and nothing else (the field's convention for MACs: elementwise work, reductions, norms, softmax,
pooling, gathers and sorts cost 0):

    dot_general, ragged dot   2 per multiply-add (ragged: each row meets one group)
    conv_general_dilated      2 * N * H_out * W_out * C_out * C_in / groups * kh * kw, padding and kernel dilation
                              nominal; divided by the input dilation, whose zeros are no work (transposed
                              convolutions, input gradients)
    fft                       5 n log2(n) per transform of n points, half of it for real ones (FFTW's convention)
    triangular_solve          n^2 per right-hand side
    cholesky                  n^3 / 3

Complex multiply-adds count as four real ones. `scan` multiplies by its length, `cond` / `switch` / `platform_dependent`
take the dearest branch, `shard_map` multiplies by the number of shards. A `while` has no trip count in the jaxpr: a
body that holds counted work is an error. The count is of the program as traced, before XLA removes dead code.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count_flops(fn: Callable, *args: Any) -> int:
    """FLOPs of one call of `fn(*args)`: nothing is computed, a multiply-add is two.

    Args:
      fn: a function of pytrees of arrays; close over anything static.
      *args: arrays, or each a `jax.ShapeDtypeStruct`. Give a batch of one for the cost of one example.

    Raises:
      ValueError: a `while` loop with counted work in its body (`fori_loop` with static bounds and `scan` are fine).
    """
    return sum(flops_by_primitive(fn, *args).values())


def count_macs(fn: Callable, *args: Any) -> int:
    """Multiply-adds of one call of `fn(*args)`: half of `count_flops`."""
    return count_flops(fn, *args) // 2


def flops_by_primitive(fn: Callable, *args: Any) -> dict[str, int]:
    """`count_flops` split by primitive name, the dearest first, e.g. `{"conv_general_dilated": 1000, "dot_general":
    20}`."""
    closed = jax.make_jaxpr(fn)(*args)
    return dict(_of_jaxpr(closed.jaxpr).most_common())


def _of_jaxpr(jaxpr: Jaxpr) -> Counter[str]:
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        total += _of_eqn(eqn)  # Counter addition drops zeros
    return total


def _of_eqn(eqn: JaxprEqn) -> Counter:
    name = eqn.primitive.name
    if name in _PRICES:
        return Counter({name: _PRICES[name](eqn)})
    bodies = [_of_jaxpr(jaxpr) for jaxpr in _sub_jaxprs(eqn)]
    if not any(bodies):
        return Counter()
    if name == "cond":  # lax.cond, lax.switch and lax.platform_dependent
        return max(bodies, key=lambda body: body.total())
    if name == "while":
        found = ", ".join(sorted(set().union(*bodies)))
        raise ValueError(
            f"cannot count FLOPs: a while loop runs {found} an unknown number of times; "
            "use lax.scan or lax.fori_loop with static bounds, or count the naive implementation"
        )
    times = _repeats(eqn)
    return Counter({key: times * flops for body in bodies for key, flops in body.items()})


def _repeats(eqn: JaxprEqn) -> int:
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        # Only axes that shard something: work repeated on every device of an unused axis is one job, not several.
        used = {axis for spec in (*eqn.params["in_specs"], *eqn.params["out_specs"]) for axis in _axes(spec)}
        return math.prod(eqn.params["mesh"].shape[axis] for axis in used)
    return 1


def _axes(spec: Any) -> Iterator[str]:
    for entry in spec:
        yield from (entry if isinstance(entry, tuple) else () if entry is None else (entry,))


def _sub_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs that running `eqn` runs: those among its parameters, and of a linear solve the solve alone."""
    if eqn.primitive.name == "custom_linear_solve":
        yield eqn.params["jaxprs"].solve.jaxpr
        return
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _array(variable: Any) -> ShapedArray:
    """Shape and type of a variable that holds an array, as those of all primitives below do."""
    return variable.aval


def _per_multiply_add(eqn: JaxprEqn) -> int:
    return 8 if jnp.issubdtype(_array(eqn.outvars[0]).dtype, jnp.complexfloating) else 2


def _dot_general(eqn: JaxprEqn) -> int:
    lhs, rhs = (_array(var).shape for var in eqn.invars)
    (_, contract), (_, batch) = eqn.params["dimension_numbers"]
    free = [size for axis, size in enumerate(rhs) if axis not in (*contract, *batch)]
    return _per_multiply_add(eqn) * math.prod(lhs) * math.prod(free)


def _ragged_dot_general(eqn: JaxprEqn) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    lhs, rhs = (_array(var).shape for var in eqn.invars[:2])
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    taken = (*contract, *batch, *numbers.rhs_group_dimensions)
    return _per_multiply_add(eqn) * math.prod(lhs) * math.prod(n for axis, n in enumerate(rhs) if axis not in taken)


def _conv(eqn: JaxprEqn) -> int:
    # The kernel's input axis already is C_in / feature_group_count, and under batch groups the output's batch axis is
    # already N / batch_group_count: one formula covers both.
    kernel = _array(eqn.invars[1]).shape
    _, in_axis, *spatial = eqn.params["dimension_numbers"].rhs_spec
    per_output = kernel[in_axis] * math.prod(kernel[axis] for axis in spatial)
    multiply_adds = math.prod(_array(eqn.outvars[0]).shape) * per_output
    return _per_multiply_add(eqn) * -(-multiply_adds // math.prod(eqn.params["lhs_dilation"]))


def _fft(eqn: JaxprEqn) -> int:
    lengths = eqn.params["fft_lengths"]
    n = math.prod(lengths)
    real = any(not jnp.issubdtype(_array(var).dtype, jnp.complexfloating) for var in (eqn.invars[0], eqn.outvars[0]))
    transforms = math.prod(_array(eqn.outvars[0]).shape[: -len(lengths)])
    return round(transforms * (2.5 if real else 5) * n * math.log2(n))


def _triangular_solve(eqn: JaxprEqn) -> int:
    n = _array(eqn.invars[0]).shape[-1]
    return _per_multiply_add(eqn) // 2 * math.prod(_array(eqn.invars[1]).shape) * n


def _cholesky(eqn: JaxprEqn) -> int:
    *batch, n, _ = _array(eqn.invars[0]).shape
    return math.prod(batch) * _per_multiply_add(eqn) // 2 * n**3 // 3


_PRICES: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _conv,
    "fft": _fft,
    "triangular_solve": _triangular_solve,
    "cholesky": _cholesky,
}
