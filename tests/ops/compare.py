"""What the tests of ops share: arrays, comparisons in outputs and gradients, and the lowering for accelerators."""

import jax
import jax.numpy as jnp
import numpy as np


def filler(shape, k, a=1.0, f=0.7):
    """The array whose C-order entry j = 1..n is a * sin(f * j + k), in float64."""
    return a * np.sin(f * np.arange(1, np.prod(shape) + 1) + k).reshape(shape)


def draw(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_agree(actual, expected, tolerance, *, dtypes=False, floor=0.0):
    """max|a-b| <= tolerance * max(max|b|, floor) for every leaf, of equal shape and, if asked, dtype; nothing is NaN.

    A floor is for gradients that cancel to zero in theory and so have no scale of their own.
    """
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, (i, a.shape, b.shape)
        assert not dtypes or a.dtype == b.dtype, (i, a.dtype, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, scale = np.max(np.abs(a - b), initial=0), np.max(np.abs(b), initial=0)
        assert error <= tolerance * max(scale, floor), (
            f"array {i} of shape {a.shape}: error {error:.2e} at scale {scale:.2e}"
        )


def outputs_and_grads(function, *args):
    """Outputs, and gradients of a loss that weighs every output entry differently, with respect to all float
    arguments."""
    floats = [i for i, a in enumerate(args) if a is not None and jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)]

    def run(*inputs):
        full = list(args)
        for i, x in zip(floats, inputs, strict=True):
            full[i] = x
        return function(*full)

    @jax.jit
    def both(*inputs):
        outputs, vjp = jax.vjp(run, *inputs)
        weights = [
            jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).astype(y.dtype).reshape(y.shape) * (1 + i)
            for i, y in enumerate(jax.tree.leaves(outputs))
        ]
        return outputs, vjp(jax.tree.unflatten(jax.tree.structure(outputs), weights))

    return both(*(jnp.asarray(args[i]) for i in floats))


def assert_lowers_everywhere(function, *args):
    """The function and its gradient lower for cuda and tpu; returns the StableHLO text of the gradient for cuda."""
    floats = tuple(i for i, a in enumerate(args) if jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating))
    loss = lambda *a: sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(function(*a)))
    for platform in ("tpu", "cuda"):
        jax.export.export(jax.jit(function), platforms=[platform])(*args)
        exported = jax.export.export(jax.jit(jax.grad(loss, floats)), platforms=[platform])(*args)
    return exported.mlir_module()
