"""A case: one job at one shape in one direction, and its contenders, which are built only when they are measured."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

FORWARD = "forward"
BOTH = "forward and gradients"


class Built(NamedTuple):
    """A contender that is ready to be called; what a foreign one does not tell is None."""

    call: Callable[[], Any]
    compile_s: float | None = None
    temp_bytes: int | None = None


Contender = Callable[..., Built]
"""Builds from the inputs of a case."""


@dataclass(frozen=True)
class Case:
    """One job.

    Attributes:
      name: of the op or the model.
      shape: the sizes, as `--shapes` filters them, e.g. "32x28x28x64 13x13".
      direction: FORWARD or BOTH.
      flops: that the job needs, a multiply-add as two; implementations that find a cheaper way may stay below it.
      num_bytes: that any program must move: inputs read once, outputs written once, in both directions.
      inputs: draws the arrays that all contenders get.
      contenders: name to contender; "ours" is the one that is judged, "naive" its reference implementation, "xla" the
      compiler's own op.
      implementations: the op's implementations by name, measured on demand.
      peers: the same in other frameworks; the first word of the name is the peer's.
    """

    name: str
    shape: str
    direction: str
    flops: float
    num_bytes: float
    inputs: Callable[[], tuple[Any, ...]]
    contenders: Mapping[str, Contender]
    implementations: Mapping[str, Contender] = field(default_factory=dict)
    peers: Mapping[str, Contender] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name} | {self.shape} | {self.direction}"


def program(function: Callable, *, donated: Sequence[int] = ()) -> Contender:
    """A contender of ours: `function(*inputs)` under jit.

    Args:
      donated: inputs whose buffers the program may take; it then returns their successors first, one for each, and the
        next call gets those.
    """

    def build(*inputs: Any) -> Built:
        start = time.perf_counter()
        compiled = jax.jit(function, donate_argnums=tuple(donated)).lower(*inputs).compile()
        seconds = time.perf_counter() - start
        stats = compiled.memory_analysis()
        held = list(inputs)
        for i in donated:  # the other contenders need theirs
            held[i] = jax.tree.map(jnp.copy, held[i])

        def call() -> Any:
            out = compiled(*held)
            for place, i in enumerate(donated):
                held[i] = out[place]
            return out

        return Built(call, seconds, None if stats is None else stats.temp_size_in_bytes)

    return build


def foreign(make: Callable[..., Callable[[], Any]]) -> Contender:
    """A contender of another framework: `make(*inputs as numpy arrays)` returns a call without arguments."""
    return lambda *inputs: Built(make(*jax.tree.map(np.asarray, inputs)))


def directed(function: Callable, direction: str, differentiated: int) -> Callable:
    """`function(*inputs)` itself, or `(cotangent, *inputs)` to its output and the gradients of the first inputs.

    Args:
      differentiated: number of leading inputs that get a gradient.
    """
    if direction == FORWARD:
        return function

    def both(cotangent: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        rest = inputs[differentiated:]
        out, pull = jax.vjp(lambda *first: function(*first, *rest), *inputs[:differentiated])
        return out, pull(cotangent)

    return both


def op_case(
    name: str,
    shape: str,
    direction: str,
    flops: float,
    draw: Callable[[], tuple[Any, ...]],
    functions: Mapping[str, Callable],
    *,
    implementations: Mapping[str, Callable] | None = None,
    peers: Mapping[str, Callable] | None = None,
    differentiated: int | None = None,
) -> Case:
    """A case of an op whose functions take equal arrays and return one.

    Args:
      flops: of the forward pass; the gradients of a product or a recurrence need twice as many again.
      draw: makes the arrays.
      functions, implementations: contender to function of these arrays; the last of `functions` is traced for the
        output's shape.
      peers: name to `make(direction)`, which returns what `foreign` wants: a function of the arrays (first the
        cotangent, in both directions).
      differentiated: number of leading arrays that get gradients; by default all.
    """
    arrays = jax.eval_shape(draw)
    count = len(arrays) if differentiated is None else differentiated
    out = jax.eval_shape([*functions.values()][-1], *arrays)
    read, written, gradients = _num_bytes(arrays), _num_bytes([out]), _num_bytes(arrays[:count])

    def inputs() -> tuple[Any, ...]:
        drawn = tuple(draw())
        return drawn if direction == FORWARD else (normal(len(drawn), out.shape, out.dtype), *drawn)

    def contender(function: Callable) -> Contender:
        return program(directed(function, direction, count))

    both = direction == BOTH
    return Case(
        name=name,
        shape=shape,
        direction=direction,
        flops=3 * flops if both else flops,
        num_bytes=read + written + (written + gradients if both else 0),
        inputs=inputs,
        contenders={key: contender(function) for key, function in functions.items()},
        implementations={key: contender(function) for key, function in (implementations or {}).items()},
        peers={key: foreign(make(direction)) for key, make in (peers or {}).items()},
    )


def fast(implementations: Iterable[str]) -> list[str]:
    """The implementations of an op that may be faster than its reference implementation."""
    return [implementation for implementation in implementations if implementation not in ("auto", "cpu", "naive")]


def normal(seed: int, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Numbers of a standard normal distribution, the same at every call."""
    return jax.random.normal(jax.random.key(seed), tuple(shape), dtype)


def _num_bytes(arrays: Sequence[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(list(arrays)))
