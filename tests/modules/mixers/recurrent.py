"""The checks of `agreement` for mixers whose state has a fixed size, from few compiled programs: a piece, steps and two
gradients.

Weights are drawn by NumPy over abstract arrays: compiling the initialisers would take longer than the checks. Also the
parts of independent formulas in float64.
"""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from research.modules.mixers.base import Call, Spec
from research.modules.state import abstract, apply
from research.nested.slicing import slice_like
from tests.modules.mixers.agreement import _redrawn
from tests.ops.compare import assert_agree, draw, outputs_and_grads

PADS = 3


@dataclass(frozen=True)
class Alone:
    """A mixer as a model of its own, for `abstract` and `apply`."""

    spec: Spec
    dim: int
    length: int
    implementation: str = "cpu"

    def build(self, init):
        return self.spec.resolve(self.dim).build(self.dim, self.length, "layer", init, self.implementation)

    def kept(self):
        return {}


def weights(config):
    """(params, stats): kernels of variance 1 / fan-in, vectors around 0.5, so that every term counts."""
    shapes = abstract(config)
    vector = lambda name, shape: jnp.asarray(0.5 + 0.3 * draw(shape, len(name)))
    make = lambda name, a: _redrawn(name, a, shapes.axes[name]) if len(a.shape) > 1 else vector(name, a.shape)
    params = {name: make(name, a) for name, a in shapes.params.items()}
    return params, {name: jnp.asarray(draw(a.shape, len(name))) for name, a in shapes.stats.items()}


@functools.partial(jax.jit, static_argnums=0)
def run(config, arrays, x, ids=None, state=None, position=0):
    """(outputs, state) of the parallel form."""
    return apply(config, *arrays, x, Call(segment_ids=ids, position=position), state)[0]


@functools.partial(jax.jit, static_argnums=0)
def run_steps(config, arrays, x, state, position):
    """(outputs, state) of one step for each token of x."""

    def step(carry, token):
        state, position = carry
        y, state = apply(config, *arrays, token, Call(position=position), state, method="step")[0]
        return (state, position + 1), y

    (state, _), y = jax.lax.scan(step, (state, position), x.swapaxes(0, 1))
    return y.swapaxes(0, 1), state


def check_recurrent(spec, dim, length, *, batch=2, tolerance=1e-5, gradients=True):
    """Checks that pieces of `length` tokens, steps, packed documents, padding on the left and the naive implementation
    agree.

    The sequence is two pieces long, and outputs must not move when later inputs change. `tolerance` is relative; ten
    times as much for the gradients of the naive implementation, which `gradients` False leaves out.

    Returns:
      (params and stats in float64 NumPy, x, outputs) of the whole sequence, for an independent formula.
    """
    config = Alone(spec, dim, 2 * length)
    arrays = params, stats = weights(config)
    x = jnp.asarray(draw((batch, 2 * length, dim), length))
    start, one = (
        apply(config, *arrays, batch, 2 * length, method="init_state")[0],
        jnp.zeros((batch, length), jnp.int32),
    )
    call = lambda x, ids=one, state=start, position=0: run(config, arrays, x, ids, state, jnp.int32(position))
    steps = lambda x, state, position: run_steps(config, arrays, x, state, jnp.int32(position))
    stepped, after = steps(x, start, 0)
    assert float(jnp.abs(stepped).max()) > 1e-3, "an output of nothing agrees with everything"

    first, middle = call(x[:, :length])
    second, last = call(x[:, length:], state=middle, position=length)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), start) == jax.tree.map(lambda s: (s.shape, s.dtype), last)
    assert_agree(jnp.concatenate([first, second], 1), stepped, tolerance)
    assert_agree(last, after, tolerance, floor=1e-3)
    assert_agree(steps(jnp.roll(x, -length, 1), middle, length)[0][:, :length], second, tolerance)

    cut = length // 2
    moved = call(x[:, :length].at[:, cut:].multiply(-2.0))[0]
    assert_agree(moved[:, :cut], first[:, :cut], 1e-6)
    assert float(jnp.abs(moved - first)[:, cut:].max()) > 1e-3

    borders = sorted({0, min(3, length), min(4, length), cut, length})
    ids = np.repeat(np.searchsorted(borders, np.arange(length), side="right")[None], batch, 0).astype(np.int32)
    packed = call(x[:, :length], jnp.asarray(ids))[0]
    for low, high in itertools.pairwise(borders):
        alone = call(jnp.roll(x[:, :length], -low, 1))[0]
        assert_agree(packed[:, low:high], alone[:, : high - low], tolerance)

    if length > PADS:
        rest = length - PADS
        padded = jnp.concatenate([jnp.full((batch, PADS, dim), 5.0), x[:, :rest]], 1)
        y, state = call(padded, jnp.asarray(np.repeat(np.arange(length)[None] >= PADS, batch, 0), jnp.int32))
        assert_agree(y[:, PADS:], first[:, :rest], tolerance)
        assert_agree(
            steps(jnp.roll(x, -rest, 1), state, length)[0][:, : 2 * length - rest], stepped[:, rest:], tolerance
        )

    if gradients:
        implementation = ",".join(
            f"{op}=naive" for op, implementations in spec.ops.items() if "naive" in implementations
        )
        results = []
        for twin in (config, Alone(spec, dim, 2 * length, implementation)):
            outputs = lambda x, *p, twin=twin: run(twin, (dict(zip(params, p, strict=True)), stats), x)[0]
            results.append(outputs_and_grads(outputs, x[:, :length], *params.values()))
        (fast, fast_grads), (naive, naive_grads) = results
        assert_agree(fast, naive, tolerance)
        assert_agree(fast, first, tolerance)
        assert_agree(fast_grads, naive_grads, 10 * tolerance, floor=1e-2)
    return {k: np.asarray(v, np.float64) for k, v in {**params, **stats}.items()}, np.asarray(x, np.float64), stepped


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, scale):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def heads(x, kernel):
    """[B, T, D] times [D, H, K]."""
    return np.einsum("btd,dhk->bthk", x, kernel)


def convolved(x, kernel):
    """Causal depthwise convolution of [B, T, ...] with [taps, ...], the last tap the latest."""
    taps = kernel.shape[0]
    padded = np.concatenate([np.zeros_like(x[:, :1]).repeat(taps - 1, 1), x], 1)
    return sum(padded[:, j : j + x.shape[1]] * kernel[j] for j in range(taps))


def recurrence(q, k, v, *, decay=1.0, beta=None):
    """S' = decay S, S = S' + k v^T, or S' + beta k (v - S'^T k)^T; o = S^T q. Decays broadcast to [B, T, H, K]."""
    decay = np.broadcast_to(decay, k.shape)
    memory, outputs = np.zeros((*k.shape[:1], *k.shape[2:], v.shape[-1])), []
    for t in range(q.shape[1]):
        memory = memory * decay[:, t, :, :, None]
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None] * (value - (memory * k[:, t, :, :, None]).sum(2))
        memory = memory + k[:, t, :, :, None] * value[:, :, None]
        outputs.append((memory * q[:, t, :, :, None]).sum(2))
    return np.stack(outputs, 1)


def check_slices(spec, dim, small_dim, small):
    """The sub-network `small` (a spec) runs on slices of the full one's arrays; returns their shapes."""
    full, small = Alone(spec, dim, 4), Alone(small, small_dim, 4)
    cut = [slice_like(arrays, abstract(full), abstract(small)) for arrays in weights(full)]
    x = jnp.zeros((1, 4, small_dim))
    assert jax.eval_shape(functools.partial(run, small), tuple(cut), x)[0].shape == x.shape
    wanted = {**abstract(small).params, **abstract(small).stats}
    assert all(array.shape == wanted[name].shape for name, array in {**cut[0], **cut[1]}.items())
    return {name: array.shape for name, array in wanted.items()}
