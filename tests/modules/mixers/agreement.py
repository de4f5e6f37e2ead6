"""What the tests of mixers share: a mixer as functions of arrays, and the checks that its implementations compute the
same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.modules.axes import Init, Param
from research.modules.mixers.base import Call
from research.modules.state import merge, split
from tests.models.twins import fast_jit
from tests.ops.compare import assert_agree, draw, outputs_and_grads


class Functions:
    """A mixer's jitted functions; `weights` = (params, stats), kernels redrawn at a scale that makes every term
    count."""

    def __init__(self, spec, dim, length, *, implementation="auto", redraw=True):
        self.spec = spec.resolve(dim)
        described = {}

        def build(key):
            module = self.spec.build(dim, length, "layer", Init(key), implementation)
            graphdef, params, stats, axes = split(module)
            precise = {"/".join(map(str, path)) for path, v in nnx.to_flat_state(nnx.state(module, Param)) if v.precise}
            redrawn = {k: v for k, v in params.items() if redraw and v.ndim > 1 and k not in precise}
            described.update(
                graphdef=graphdef,
                axes=axes,
                redrawn={k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in redrawn.items()},
            )
            return {k: v for k, v in params.items() if k not in redrawn}, stats

        # One program that leaves out the draws that are not used: to compile every initialiser takes longer than most
        # checks.
        params, stats = jax.jit(build)(jax.random.key(0))
        self.graphdef, self.axes = described["graphdef"], described["axes"]
        params |= {k: _redrawn(k, v, self.axes[k]) for k, v in described["redrawn"].items()}
        self.weights = dict(sorted(params.items())), stats
        self.module = merge(self.graphdef, *self.weights)
        self.call, self.step = jax.jit(self.pure), jax.jit(self._step)

    def pure(self, weights, x, segment_ids=None, state=None, position=0):
        """(y, state) of the parallel form."""
        return merge(self.graphdef, *weights)(x, Call(segment_ids=segment_ids, position=position), state)

    def _step(self, weights, x, segment_ids, state, position):
        return merge(self.graphdef, *weights).step(x, Call(segment_ids=segment_ids, position=position), state)

    def steps(self, weights, x, segment_ids, state, position=0):
        """(y, state) of steps over the tokens of x [B, T, D]; compiled once for all lengths, as long as the state's
        size stays."""
        y = []
        for t in range(x.shape[1]):
            ids = None if segment_ids is None else segment_ids[:, t]
            out, state = self.step(weights, x[:, t], ids, state, jnp.int32(position + t))
            y.append(out)
        return jnp.stack(y, 1), state

    def start(self, batch, capacity):
        return self.module.init_state(batch, capacity, jnp.float32)


CAPACITY = 128
"""Tokens that the caches of `check_forms` hold: one for all lengths, so that a step is compiled once."""


@functools.lru_cache(maxsize=4)
def _functions(spec, dim, length, implementation, redraw):
    return Functions(spec, dim, length, implementation=implementation, redraw=redraw)


def _redrawn(name, value, axes):
    """Normal with variance 1 / fan-in; the last axis but for kernels that end in the residual stream is an output."""
    fan_in = value.shape[0] if axes[-1] != "embed" else value.size // value.shape[-1]
    return jnp.asarray(draw(value.shape, len(name) + value.size) / np.float32(np.sqrt(fan_in)))


def check_forms(spec, dim, length, *, batch=2, tolerance=1e-5, naive=True, causal=True, packing=True, redraw=True):
    """Checks one length: the parallel form, steps, pieces, packed documents, padding on the left and the naive
    implementation agree.

    Args:
      spec: of the mixer.
      dim: channels.
      length: tokens, up to 128.
      batch: sequences.
      tolerance: of the largest difference, relative to the largest output; gradients get ten times as much.
      naive: whether the naive implementations of the mixer's ops are compared, in outputs and gradients.
      causal: whether outputs must not move when later inputs change.
      packing: whether packed documents must come out as they do alone.
      redraw: whether kernels are redrawn; False keeps the mixer's own initialisation.
    """
    mixer = _functions(spec, dim, CAPACITY, "cpu", redraw)
    weights, x = mixer.weights, jnp.asarray(draw((batch, length, dim), length))
    whole, final = mixer.call(weights, x)
    assert whole.shape == x.shape and whole.dtype == x.dtype
    assert float(jnp.abs(whole).max()) > 1e-3, "an output of nothing agrees with everything"
    described = lambda state: jax.tree.map(lambda s: (s.shape, s.dtype), state)
    assert described(final) == described(mixer.start(batch, length))
    stepped, state = mixer.steps(weights, x, None, mixer.start(batch, CAPACITY))
    assert_agree(stepped, whole, tolerance)
    assert_agree(_fit(state, final), final, tolerance, floor=1e-3)
    half = length // 2
    if half:
        check_pieces(mixer, x, whole, final, half, tolerance)
    if causal and half:
        moved = mixer.call(weights, x.at[:, half:].add(1.0))[0]
        assert_agree(moved[:, :half], whole[:, :half], min(tolerance, 1e-6))
        assert float(jnp.abs(moved[:, half:] - whole[:, half:]).max()) > 1e-3
    if packing and half:
        check_packing(mixer, x, half, tolerance)
    if naive:
        implementation = (
            ",".join(f"{op}=naive" for op, implementations in spec.ops.items() if "naive" in implementations) or "auto"
        )
        twin = _functions(spec, dim, CAPACITY, implementation, redraw)
        outputs = lambda f: outputs_and_grads(
            lambda x, *p: f.pure((dict(zip(weights[0], p, strict=True)), weights[1]), x)[0], x, *weights[0].values()
        )
        actual, expected = outputs(mixer), outputs(twin)
        assert_agree(actual[0], expected[0], tolerance)
        assert_agree(actual[1], expected[1], 10 * tolerance, floor=1e-2)


def _fit(state, like):
    """The part of caches that holds as many tokens as those of `like`."""
    return jax.tree.map(lambda s, final: s if s.shape == final.shape else s[:, : final.shape[1]], state, like)


def check_pieces(mixer, x, whole, final, half, tolerance):
    """Two pieces and what is left step by step, and a piece and then steps, are the whole."""
    weights, start = mixer.weights, mixer.start(x.shape[0], CAPACITY)
    first, middle = mixer.call(weights, x[:, :half], None, start, 0)
    second, state = mixer.call(weights, x[:, half : 2 * half], None, middle, half)
    assert_agree(jnp.concatenate([first, second], 1), whole[:, : 2 * half], tolerance)
    if x.shape[1] % 2:
        last, state = mixer.steps(weights, x[:, 2 * half :], None, state, 2 * half)
        assert_agree(last, whole[:, 2 * half :], tolerance)
    assert_agree(_fit(state, final), final, tolerance, floor=1e-3)
    assert_agree(mixer.steps(weights, x[:, half:], None, middle, half)[0], whole[:, half:], tolerance)


def check_packing(mixer, x, half, tolerance):
    """Two documents on one axis come out as they do alone; a prompt padded on the left continues as if there were no
    padding."""
    weights, batch, x = mixer.weights, x.shape[0], x[:, : 2 * half]
    documents = lambda border: jnp.broadcast_to((jnp.arange(2 * half) >= border).astype(jnp.int32), (batch, 2 * half))
    alone = [mixer.call(weights, piece)[0] for piece in (x[:, :half], x[:, half:])]
    assert_agree(mixer.call(weights, x, documents(half))[0], jnp.concatenate(alone, 1), tolerance)
    ids = documents(half // 2)
    packed, final = mixer.call(weights, x, ids)
    prompt, state = mixer.call(weights, x[:, :half], ids[:, :half], mixer.start(batch, CAPACITY), 0)
    assert_agree(prompt, packed[:, :half], tolerance)
    told, _ = mixer.steps(weights, x[:, half:], ids[:, half:], state, half)
    assert_agree(told, packed[:, half:], tolerance)
    untold, state = mixer.steps(weights, x[:, half:], None, state, half)
    assert_agree(untold, packed[:, half:], tolerance)
    assert_agree(_fit(state, final), final, tolerance, floor=1e-3)


def check_documents(spec, dim, *, tolerance=1e-5):
    """What every mixer must do, checked at four tokens: packed documents are what each is alone, in outputs, gradients
    and statistics; a prompt padded on the left, and pieces and steps that continue from a state, are the whole."""
    mixer = Functions(spec, dim, 4)
    mixer.step = fast_jit(mixer._step)
    weights, x = mixer.weights, jnp.asarray(draw((2, 4, dim), 1))
    ids = jnp.broadcast_to(jnp.arange(4) // 2, (2, 4))

    @fast_jit
    def both(weights, x, ids, counted):
        def loss(params, x):
            y, _ = merge(mixer.graphdef, params, weights[1])(x, Call(segment_ids=ids), None)
            return (jnp.sin(y) * counted[..., None]).sum(), y

        (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(weights[0], x)
        return y, *grads

    # Four rows: two of two documents each, or each document alone with what a mixer that looks back cannot see behind
    # it.
    places = jnp.arange(1.0, 9).reshape(2, 4)
    halves = lambda a: a.reshape(4, 2, *a.shape[2:])
    packed, grads, moved = both(
        weights, jnp.tile(x, (2, 1, 1)), jnp.tile(ids, (2, 1)), jnp.concatenate([places, 0 * places])
    )
    behind = jnp.pad(halves(x), ((0, 0), (0, 2), (0, 0)), constant_values=1.0)
    alone, own, own_moved = both(
        weights, behind, jnp.zeros((4, 4), jnp.int32), jnp.pad(halves(places), ((0, 0), (0, 2)))
    )
    assert_agree(halves(packed[:2]), alone[:, :2], tolerance)
    assert_agree((grads, halves(moved[:2])), (own, own_moved[:, :2]), 10 * tolerance, floor=1e-2)
    # Going on from a state by a piece, and by steps that are told nothing: a text, and one behind a token of padding.
    piece = fast_jit(lambda weights, x, ids, state, at: mixer.pure(weights, x, ids, state, at))
    for own_ids in (jnp.zeros_like(ids), jnp.broadcast_to(jnp.array([0, 1, 1, 1]), (2, 4))):
        expected = both(weights, jnp.tile(x, (2, 1, 1)), jnp.tile(own_ids, (2, 1)), jnp.zeros((4, 4)))[0][:2]
        first, middle = piece(weights, x[:, :2], own_ids[:, :2], mixer.start(2, 4), jnp.int32(0))
        second, _ = piece(weights, x[:, 2:], own_ids[:, 2:], middle, jnp.int32(2))
        assert_agree(jnp.concatenate([first, second], 1), expected, tolerance)
        assert_agree(mixer.steps(weights, x[:, 2:], None, middle, 2)[0], expected[:, 2:], tolerance)
    check_padding(mixer, x, tolerance)


def check_padding(mixer, x, tolerance):
    """A mixer with statistics learns from real tokens alone."""
    if not mixer.weights[1]:
        return

    @fast_jit
    def learn(weights, x, real):
        module = merge(mixer.graphdef, *weights)
        module(x, Call("train", segment_ids=None if real is None else jnp.where(real, 0, -1), real=real), None)
        return split(module)[2]

    padded = jnp.concatenate([x, 2 - 3 * x], 1)
    real = jnp.broadcast_to(jnp.arange(8) < 4, (2, 8))
    assert_agree(learn(mixer.weights, padded, real), learn(mixer.weights, x, None), tolerance)


def shapes(spec, dim, length):
    """(shapes of params, shapes of stats, axes) by path; no arrays are made."""
    axes = {}

    def build(key):
        _, params, stats, names = split(spec.resolve(dim).build(dim, length, "layer", Init(key), "auto"))
        axes.update(names)
        return params, stats

    return *jax.eval_shape(build, jax.eval_shape(lambda: jax.random.key(0))), axes


def num_params(spec, dim, length=8):
    """Number of trained values."""
    return sum(v.size for v in shapes(spec, dim, length)[0].values())


def check_shrink(spec, dim, small_dim, *, length=8, width=0.5, heads=None, state=None, cut=()):
    """The sub-network has the same arrays with the same names of axes, and no axis is larger; returns its spec.

    `cut`: exactly these axes, by name, must have become smaller in every array that has them.
    """
    full = spec.resolve(dim)
    small = full.shrink(width, heads, state)
    assert small.resolve(small_dim) == small, "a sub-network must have every size filled in"
    (params, stats, axes), (small_params, small_stats, small_axes) = (
        shapes(full, dim, length),
        shapes(small, small_dim, length),
    )
    assert axes == small_axes
    smaller = {}
    for name, array in {**small_params, **small_stats}.items():
        for axis, size, limit in zip(axes[name], array.shape, {**params, **stats}[name].shape, strict=True):
            assert size <= limit, (name, axis, size, limit)
            smaller.setdefault(axis, set()).add(size < limit)
    assert {axis for axis, how in smaller.items() if True in how} == set(cut), smaller
    assert all(len(how) == 1 for how in smaller.values()), smaller
    return small
