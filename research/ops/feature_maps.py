"""Feature maps of linear attention: phi(query) . phi(key) takes the place of exp(query . key).

The maps work on the last axis, in float32 at least, and return the dtype of their input. No map scales for another one:
give the linear attention op a scale of 1 where the text of a map says that it has its own.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.ops import checks, precision

SCALINGS = ("gaussian", "constant")


def elu_plus_one(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """elu(x) + 1: x + 1 for positive x, exp(x) else (Katharopoulos et al. 2020, arXiv 2006.16236, equation 7)."""
    wide = precision.wide(x)
    return jnp.where(wide > 0, wide + 1, jnp.exp(jnp.where(wide > 0, 0, wide))).astype(x.dtype)


def relu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """max(x, 0) (SLAB, Guo et al. 2024, arXiv 2405.11582, section 3.3); a token may have no feature: guard the
    denominator."""
    return jnp.maximum(x, 0)


def cos_reweighted(
    x: Float[Array, "*B T H K"], positions: Int[Array, "*B T"] | Int[Array, " T"], max_length: int
) -> Float[Array, "*B T H F"]:
    """[relu(x) sin p, relu(x) cos p], p = pi position / (2 max_length): products are relu(q).relu(k) cos(pi (i - j) /
    (2 max_length)).

    Args:
      x: queries or keys, neither scaled.
      positions: position of each token, 0 to max_length, counted alike for queries and keys.
      max_length: the largest length ever used: it is part of every weight, so it must not change between training and
        decoding.

    Returns:
      F = 2 K features, at least 0; divide by max(sum of the weights, 1e-6).

    Raises:
      ValueError: naming the argument that does not fit.

    Source: cosFormer (Qin et al. 2022, arXiv 2202.08791), section 3.2.
    """
    op = "cos_reweighted"
    bound = checks.shapes(op, x=(x, "*B T H K"))
    checks.require(max_length >= 1, op, "max_length", max_length, "at least 1")
    fits = positions.shape in ((bound["T"],), (*bound["*B"], bound["T"]))
    checks.require(
        fits, op, "positions", f"of shape {positions.shape}", f"({bound['T']},) or {(*bound['*B'], bound['T'])}"
    )
    wide = jnp.maximum(precision.wide(x), 0)
    angle = positions.astype(wide.dtype)[..., None, None] * (math.pi / (2 * max_length))
    return jnp.concatenate([wide * jnp.sin(angle), wide * jnp.cos(angle)], -1).astype(x.dtype)


def taylor(x: Float[Array, "*B K"]) -> Float[Array, "*B F"]:
    """[1, x / K^(1/4), x_i^2 / sqrt(2 K), x_i x_j / sqrt(K) for i < j]: products are 1 + s + s^2 / 2 with s = q.k /
    sqrt(K).

    Args:
      x: queries or keys, not scaled (the map does it); K is small, 16 in the paper.

    Returns:
      F = 1 + K + K (K + 1) / 2 features.

    Source: Based (Arora et al. 2024, arXiv 2402.18668), section 4.1.
    """
    wide = precision.wide(x)
    size = x.shape[-1]
    linear = wide * size**-0.25
    # Rows of the triangle of products: slices, whose gradient is a sum of pads where that of an indexed triangle is a
    # scatter.
    products = [linear[..., i : i + 1] * linear[..., i + 1 :] for i in range(size - 1)]
    squares = jnp.square(linear) * math.sqrt(0.5)
    return jnp.concatenate([jnp.ones_like(wide[..., :1]), linear, squares, *products], -1).astype(x.dtype)


def orthogonal_projection(
    key: Array, features: int, head_dim: int, *, scaling: str = "gaussian"
) -> Float[Array, "M K"]:
    """Random directions, orthogonal to each other within blocks of head_dim rows, for the two maps below.

    Args:
      key: random key. Draw once, or again every few hundred steps; the same rows in training, prefill and decoding.
      features: number of rows; head_dim ln(head_dim) is the paper's choice.
      head_dim: size of a row.
      scaling: lengths of the rows: "gaussian" (those of Gaussian vectors, which makes the estimate unbiased) or
        "constant", sqrt(head_dim).

    Raises:
      ValueError: naming the argument that does not fit.

    Source: Performer (Choromanski et al. 2021, arXiv 2009.14794), section 2.4.
    """
    op = "orthogonal_projection"
    checks.require(scaling in SCALINGS, op, "scaling", repr(scaling), f"one of {', '.join(SCALINGS)}")
    checks.require(features >= 1, op, "features", features, "at least 1")
    blocks = -(-features // head_dim)
    direction_key, length_key = jax.random.split(key)
    directions, triangle = jnp.linalg.qr(jax.random.normal(direction_key, (blocks, head_dim, head_dim), jnp.float32))
    # The signs of R make Q uniform over rotations; without them its directions depend on how QR is computed.
    signs = jnp.where(jnp.diagonal(triangle, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    rows = jnp.swapaxes(directions * signs[:, None], -1, -2).reshape(-1, head_dim)[:features]
    if scaling == "constant":
        return rows * math.sqrt(head_dim)
    return rows * jnp.linalg.norm(
        jax.random.normal(length_key, (features, head_dim), jnp.float32), axis=-1, keepdims=True
    )


def _project(op, x, projection):
    checks.shapes(op, x=(x, "*B K"), projection=(projection, "M K"))
    scaled = precision.wide(x) * x.shape[-1] ** -0.25
    # An error of the exponent is a relative error of the feature: the product is exact to float32.
    return scaled, jnp.einsum("...k,mk->...m", scaled, projection.astype(scaled.dtype), precision=lax.Precision.HIGHEST)


def positive_random_features(
    x: Float[Array, "*B T H K"],
    projection: Float[Array, "M K"],
    *,
    stabiliser: str | float | Float[Array, "..."],
    eps: float = 1e-4,
) -> Float[Array, "*B T H M"]:
    """M^-0.5 (exp(w.y - |y|^2 / 2 - stabiliser) + eps), y = x / K^(1/4): products estimate exp(q.k / sqrt(K)), up to a
    factor.

    Args:
      x: queries or keys, not scaled (the map does it).
      projection: rows w, from `orthogonal_projection`.
      stabiliser: what keeps exp in range. "token": the largest exponent of the token, for queries (it cancels in a
        normalised attention but for eps). "sequence": the largest of head and sequence, for keys that are all known:
        through eps it tells a causal attention about the future. A number, or an array that broadcasts to [*B, T, H,
        1], such as one constant a head: for the keys of a causal attention; 0 serves normalised or small tokens.
      eps: least value of a feature before the factor.

    Returns:
      M positive features.

    Raises:
      ValueError: naming the argument that does not fit.

    Source: FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794), lemma 1 and its released code.
    """
    op = "positive_random_features"
    checks.shapes(op, x=(x, "*B T H K"))
    scaled, projected = _project(op, x, projection)
    exponent = projected - 0.5 * jnp.square(scaled).sum(-1, keepdims=True)
    if isinstance(stabiliser, str):
        axes = {"token": (-1,), "sequence": (-3, -1)}
        checks.require(
            stabiliser in axes, op, "stabiliser", repr(stabiliser), f"a number, an array or one of {', '.join(axes)}"
        )
        stabiliser = lax.stop_gradient(exponent.max(axes[stabiliser], keepdims=True))
    return ((jnp.exp(exponent - stabiliser) + eps) * projection.shape[0] ** -0.5).astype(x.dtype)


def relu_random_features(
    x: Float[Array, "*B K"], projection: Float[Array, "M K"], *, eps: float = 1e-3
) -> Float[Array, "*B M"]:
    """relu(w.y) + eps, y = x / K^(1/4): the generalised attention of Performer (arXiv 2009.14794, section 4 and its
    released code).

    Args:
      x: queries or keys, not scaled (the map does it).
      projection: rows w, from `orthogonal_projection`.
      eps: least value of a feature.

    Returns:
      M positive features.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    return (jnp.maximum(_project("relu_random_features", x, projection)[1], 0) + eps).astype(x.dtype)
