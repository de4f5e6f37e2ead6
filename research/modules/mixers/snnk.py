"""Scalable neural network kernels (Sehanobish et al. 2024, arXiv 2310.13225): a layer f(Wx + b) as a product Psi(W, b)
Phi(x).

Phi holds M random features of the input and is not trained; Psi [outputs, M] is, directly, so that outputs * M
parameters take the place of outputs * inputs. A product that follows could be merged into Psi.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from research.modules.axes import Init, Kind, StatKind
from research.modules.layers import Linear, normal_02
from research.ops.precision import wide

MAPS = ("relu", "positive")
ACTIVATIONS = {"relu": "relu", "cos": "positive", "sin": "positive"}
"""Activation f -> the map of inputs that its weights go with."""


def input_features(x: Float[Array, "*B D"], projection: Float[Array, "M D"], kind: str) -> Float[Array, "*B M"]:
    """Phi(x) of Gaussian rows g: M^-0.5 times max(g.x, 0) ("relu"), or exp(g.x - |x|^2 / 2) ("positive"), float32 at
    least.

    Raises:
      ValueError: unknown kind.
    """
    if kind not in MAPS:
        raise ValueError(f"snnk: map is {kind!r}; expected one of {', '.join(MAPS)}")
    x = wide(x)
    projected = _project(x, projection)
    if kind == "relu":
        return jnp.maximum(projected, 0) * projection.shape[0] ** -0.5
    return jnp.exp(projected - 0.5 * jnp.square(x).sum(-1, keepdims=True)) * projection.shape[0] ** -0.5


def weight_features(
    weight: Float[Array, "L D"], bias: Float[Array, " L"] | None, projection: Float[Array, "M D"], activation: str
) -> Float[Array, "L M"]:
    """Psi(W, b), with E[Psi(W, b) Phi(x)] over the rows of the projection a function of Wx + b.

    "cos" and "sin": f(Wx + b) itself, with the map "positive" (section 3, the universal features where the Fourier
    transform of f is a pair of deltas). "relu": the arc-cosine kernel |x||w| (sin t + (pi - t) cos t) / (2 pi), t the
    angle between them, with the map "relu" and without bias (section 3.2).

    Raises:
      ValueError: unknown activation, or a bias with "relu".
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"snnk: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    weight = wide(weight)
    if activation == "relu":
        if bias is not None:
            raise ValueError("snnk: the activation 'relu' takes no bias")
        return input_features(weight, projection, "relu")
    shift = 0 if bias is None else wide(bias)[:, None]
    wave = {"cos": jnp.cos, "sin": jnp.sin}[activation](_project(weight, projection) + shift)
    return jnp.exp(0.5 * jnp.square(weight).sum(-1, keepdims=True)) * wave * projection.shape[0] ** -0.5


def _project(x, projection):
    return jnp.einsum("...d,md->...m", x, projection.astype(x.dtype), precision=lax.Precision.HIGHEST)


class SnnkLinear(nnx.Module):
    """y = Psi Phi(x) over the last axis, without bias; outputs * features parameters.

    The random directions are a statistic: entries are independent, so that a slice of channels or features is a smaller
    draw.

    Args:
      axes: names of the axes of inputs, features and outputs.
      kind: map of the inputs; under "positive" they are set to unit length first.
    """

    def __init__(
        self, inputs: int, features: int, outputs: int, axes: tuple[str, str, str], init: Init, *, kind: str = "relu"
    ):
        self.kind = kind
        normal = lambda key, shape, dtype: jax.random.normal(key, shape, dtype)
        self.projection = init.stat("projection", (features, inputs), (axes[1], axes[0]), normal, StatKind.CONSTANT)
        self.kernel = init.param("kernel", (features, outputs), axes[1:], normal_02, Kind.MATRIX)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        inputs = wide(x)
        if self.kind == "positive":
            inputs = inputs * lax.rsqrt(jnp.square(inputs).sum(-1, keepdims=True) + 1e-6)
        return input_features(inputs, self.projection[...], self.kind).astype(x.dtype) @ self.kernel[...]


class SnnkMlp(nnx.Module):
    """FFN whose first product and activation are an `SnnkLinear`: y = Psi Phi(x) W2 + b2; `axes` as in
    `Mlp`.

    `features` 0: a quarter of the channels.
    """

    def __init__(
        self, channels: int, hidden: int, axes: tuple[str, str], init: Init, *, features: int = 0, kind: str = "relu"
    ):
        features = features or max(1, channels // 4)
        scope = axes[1].rpartition("/")[0]
        names = (axes[0], f"{scope}/features" if scope else "features", axes[1])
        self.up = SnnkLinear(channels, features, hidden, names, init.child("up"), kind=kind)
        self.down = Linear(hidden, channels, axes[::-1], init.child("down"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(self.up(x))
