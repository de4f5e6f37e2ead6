"""Probabilistic mixture of experts: a policy that is a mixture of Gaussians, and gradients for its discrete choice.

PMOE (Ren et al. 2021, arXiv 2104.09122): pi(a|s) = sum_i w_i(s) N(a; mu_i(s), diag sigma_i(s)^2). Which primitive acts
is a discrete choice; three estimators of the router's gradient stand side by side: the paper's frequency loss, the
score ratio (REINFORCE) and the straight-through Gumbel-softmax. Actions may be squashed by tanh into (-1, 1), as SAC
does.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from research.modules.axes import Init, Kind
from research.modules.layers import Linear, zeros
from research.ops.precision import einsum

LOG_STD_RANGE = (-20.0, 2.0)
LOG_2PI = math.log(2 * math.pi)


def small_uniform(key: Array, shape: Sequence[int], dtype: jnp.dtype) -> Array:
    """Uniform within 3e-3, where heads of policies and critics start (Lillicrap et al. 2016, arXiv 1509.02971, section
    7)."""
    return jax.random.uniform(key, shape, dtype, -3e-3, 3e-3)


class Mixture(NamedTuple):
    """K diagonal Gaussians over A numbers; the weights are kept as logarithms, which sum to 1 as exponentials."""

    log_weights: Float[Array, "*B K"]
    means: Float[Array, "*B K A"]
    log_stds: Float[Array, "*B K A"]


class Draws(NamedTuple):
    """One action of every primitive with its log density under that primitive alone."""

    actions: Float[Array, "*B K A"]
    log_probs: Float[Array, "*B K"]


class GaussianMixtureHead(nnx.Module):
    """Means and log standard deviations from features; weights from the raw state by one linear map (PMOE's own code).

    The router starts at zero: every primitive acts equally often until the critic can tell them apart.

    Args:
      sizes: (features, numbers of the state, actions A, primitives K).
      axes: axis names of the features and of the state.
      scope: scope of the axes that belong to this head.
    """

    def __init__(self, sizes: tuple[int, int, int, int], axes: tuple[str, str], scope: str, init: Init):
        features, state, actions, experts = sizes
        inner = (f"{scope}/experts", f"{scope}/actions")
        self.means_kernel = init.param(
            "means_kernel", (features, experts, actions), (axes[0], *inner), small_uniform, Kind.MATRIX
        )
        self.means_bias = init.param("means_bias", (experts, actions), inner, small_uniform, Kind.BIAS)
        self.log_stds_kernel = init.param(
            "log_stds_kernel", (features, experts, actions), (axes[0], *inner), small_uniform, Kind.MATRIX
        )
        self.log_stds_bias = init.param("log_stds_bias", (experts, actions), inner, small_uniform, Kind.BIAS)
        self.router = Linear(state, experts, (axes[1], inner[0]), init.child("router"), kernel_init=zeros, exact=True)

    def __call__(self, features: Float[Array, "*B F"], state: Float[Array, "*B S"]) -> Mixture:
        means = einsum("...f,fka->...ka", features, self.means_kernel[...]) + self.means_bias[...]
        log_stds = einsum("...f,fka->...ka", features, self.log_stds_kernel[...]) + self.log_stds_bias[...]
        return Mixture(jax.nn.log_softmax(self.router(state)), means, jnp.clip(log_stds, *LOG_STD_RANGE))


def primitive_log_density(mixture: Mixture, x: Float[Array, "*B A"]) -> Float[Array, "*B K"]:
    """log N(x; mu_i, diag sigma_i^2) of every primitive at the same point, in nats."""
    z = (x[..., None, :] - mixture.means) * jnp.exp(-mixture.log_stds)
    return -(0.5 * jnp.square(z) + mixture.log_stds + 0.5 * LOG_2PI).sum(-1)


def log_density(mixture: Mixture, x: Float[Array, "*B A"]) -> Float[Array, "*B"]:
    """log sum_i w_i N_i(x) in nats, by log-sum-exp: finite however far x lies from every mean."""
    return jax.nn.logsumexp(mixture.log_weights + primitive_log_density(mixture, x), -1)


def squash(x: Float[Array, "*B A"]) -> tuple[Float[Array, "*B A"], Float[Array, "*B"]]:
    """Returns (tanh x, log |det| of its Jacobian), SAC's bound on actions (Haarnoja et al. 2018, arXiv 1801.01290,
    appendix C).

    log(1 - tanh^2 x) is written as 2 (log 2 - x - softplus(-2x)), exact where the usual log(1 - tanh^2 x + 1e-6)
    saturates.
    """
    return jnp.tanh(x), 2 * (math.log(2) - x - jax.nn.softplus(-2 * x)).sum(-1)


def squashed_log_density(mixture: Mixture, action: Float[Array, "*B A"]) -> Float[Array, "*B"]:
    """Log density in nats, under the whole mixture squashed by tanh, of an action inside (-1, 1)."""
    x = jnp.arctanh(action)
    return log_density(mixture, x) - squash(x)[1]


def draw(mixture: Mixture, key: Array) -> Draws:
    """Draws one squashed action of every primitive, reparameterised: gradients reach means and standard deviations."""
    noise = jax.random.normal(key, mixture.means.shape, mixture.means.dtype)
    x = mixture.means + noise * jnp.exp(mixture.log_stds)
    own = -(0.5 * jnp.square(noise) + mixture.log_stds + 0.5 * LOG_2PI).sum(-1)
    actions, log_det = squash(x)
    return Draws(actions, own - log_det)


def choose(mixture: Mixture, key: Array) -> Int[Array, "*B"]:
    """Draws which primitive acts, i ~ Categorical(w)."""
    return jax.random.categorical(key, mixture.log_weights)


def of_primitive(values: Float[Array, "*B K"], index: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns the value of the given primitive."""
    return jnp.take_along_axis(values, index[..., None], -1)[..., 0]


def frequency_loss(
    log_weights: Float[Array, "*B K"], values: Float[Array, "*B K"], form: Literal["sum", "mean"] = "sum"
) -> Float[Array, "*B"]:
    """sum_i (w_i - v_i)^2 with v the one-hot of the primitive of the largest value (PMOE, section 4.2).

    Its minimiser is w_i = P(primitive i is the best). No gradient reaches `values`.

    Args:
      log_weights: of the router.
      values: Q(s, a_i) of one action of every primitive.
      form: "sum" as in the paper, "mean" over the K primitives as in the released code.
    """
    best = jax.nn.one_hot(jax.lax.stop_gradient(values).argmax(-1), values.shape[-1], dtype=log_weights.dtype)
    errors = jnp.square(jnp.exp(log_weights) - best)
    return errors.sum(-1) if form == "sum" else errors.mean(-1)


def score_ratio_loss(
    log_weights: Float[Array, "*B K"], values: Float[Array, "*B K"], index: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """-log w_i (Q_i - sum_j w_j Q_j) for a drawn i: its gradient is REINFORCE's (Williams 1992) of -E_i[Q_i], with a
    baseline.

    No gradient reaches `values`. The baseline, our choice, does not depend on the drawn i and so adds no bias.
    """
    values, weights = jax.lax.stop_gradient((values, jnp.exp(log_weights)))
    advantage = of_primitive(values, index) - (weights * values).sum(-1)
    return -of_primitive(log_weights, index) * advantage


def gumbel_choice(log_weights: Float[Array, "*B K"], key: Array, temperature: float = 1.0) -> Float[Array, "*B K"]:
    """One-hot of i ~ Categorical(w) whose gradient is that of softmax((log w + Gumbel noise) / temperature).

    Straight-through Gumbel-softmax (Jang et al. 2017, arXiv 1611.01144, section 2.2).
    """
    perturbed = log_weights + jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
    soft = jax.nn.softmax(perturbed / temperature)
    hard = jax.nn.one_hot(perturbed.argmax(-1), soft.shape[-1], dtype=soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))
