"""Small language models on the ops, as pure functions: Mamba-1, Mamba-2 and gated linear attention, for the benchmark
alone.

Embedding, per layer RMSNorm, mixer and residual, a final RMSNorm, the embedding again as the head, cross entropy of the
next token. Parameters carry the names and shapes that transformers' models have, [out, in], so that both compute the
same numbers. Sources: Gu and Dao 2023 (arXiv 2312.00752), Dao and Gu 2024 (arXiv 2405.21060), Yang et al. 2023 (arXiv
2312.06635).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn
from jaxtyping import Array, Float, Int

from research.bench import peers as other
from research.bench.case import BOTH, FORWARD, Case, foreign, normal, program
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Suite, Threshold, faster
from research.ops.depthwise_1d import causal_conv1d
from research.ops.linear_attention import linear_attention
from research.ops.selective_scan import selective_scan
from research.ops.ssd import ssd

Params = dict[str, Array]
EPS = 1e-5
CONV_WIDTH = 4
GATE_RANK = 16


@dataclass(frozen=True)
class Sizes:
    """Of a model and of its batch; `state` and `heads` mean what each architecture means by them."""

    vocab: int = 256
    width: int = 128
    layers: int = 2
    state: int = 16
    heads: int = 4
    batch: int = 4
    length: int = 512

    @property
    def inner(self) -> int:
        return 2 * self.width

    @property
    def head_dim(self) -> int:
        return self.inner // self.heads

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.width / 16)


SIZES = {"mamba": Sizes(), "mamba2": Sizes(state=128), "gla": Sizes(state=32)}
"""Of about equal numbers of parameters in Mamba-2's layers and those of gated linear attention."""
PEER_OF = {"mamba": "mamba", "mamba2": "mamba2", "gla": "mamba2"}
"""The model of transformers that each is timed beside: gated linear attention has none of its own there."""


@register("mamba", "language model of two Mamba-1 layers, loss and gradients", kind="model")
def mamba_cases(peers: Mapping[str, str]) -> list[Case]:
    return [case("mamba", SIZES["mamba"], direction) for direction in (FORWARD, BOTH)]


@register("mamba2", "the same of Mamba-2 layers", kind="model")
def mamba2_cases(peers: Mapping[str, str]) -> list[Case]:
    return [case("mamba2", SIZES["mamba2"], direction) for direction in (FORWARD, BOTH)]


@register("gla", "the same of gated linear attention layers", kind="model")
def gla_cases(peers: Mapping[str, str]) -> list[Case]:
    return [case("gla", SIZES["gla"], direction) for direction in (FORWARD, BOTH)]


def _of_transformers(claim: str, name: str, asked: float) -> Threshold:
    return faster(claim, name, "transformers", asked, peer="transformers")


register_suite(
    "language_models",
    Suite(
        (("mamba", ""), ("mamba2", ""), ("gla", "")),
        (
            _of_transformers("Mamba-1 language model: speed over transformers'", "mamba", 100),
            _of_transformers("Mamba-2 language model: speed over transformers'", "mamba2", 1.5),
            _of_transformers("GLA language model: speed over transformers' Mamba-2", "gla", 1.5),
        ),
    ),
)


def case(name: str, sizes: Sizes, direction: str) -> Case:
    """The loss of one batch, or the loss and its gradients."""
    loss = MODELS[name].loss
    tokens = sizes.batch * sizes.length
    shapes = jax.eval_shape(lambda: init(name, sizes))
    count = sum(math.prod(p.shape) for p in shapes.values())
    matrices = sum(math.prod(p.shape) for p in shapes.values() if p.ndim == 2)
    peer_sizes = SIZES[PEER_OF[name]] if PEER_OF[name] != name else sizes
    peer = foreign(other.language_model(PEER_OF[name], peer_sizes, direction))

    def ids() -> Int[Array, "B T"]:
        return jnp.asarray(np.random.default_rng(0).integers(0, sizes.vocab, (sizes.batch, sizes.length)), jnp.int32)

    def run(params: Params, ids: Int[Array, "B T"]):
        return jax.value_and_grad(loss)(params, ids, sizes) if direction == BOTH else loss(params, ids, sizes)

    return Case(
        name=name,
        shape=f"{sizes.layers} layers width {sizes.width}, {sizes.batch}x{sizes.length} tokens",
        direction=direction,
        flops=(6 if direction == BOTH else 2) * tokens * matrices,
        num_bytes=4 * (count + tokens + (count if direction == BOTH else 0)),
        inputs=lambda: (init(name, sizes), ids()),
        contenders={"ours": program(run)},
        peers={"transformers": peer},
    )


def init(name: str, sizes: Sizes) -> Params:
    """Parameters by name; products get normal numbers of spread 1 / sqrt(inputs)."""
    params = {"embeddings.weight": 0.02 * normal(0, (sizes.vocab, sizes.width)), "norm_f.weight": jnp.ones(sizes.width)}
    for layer in range(sizes.layers):
        params[f"layers.{layer}.norm.weight"] = jnp.ones(sizes.width)
        mixer = MODELS[name].init(sizes, layer)
        params |= {f"layers.{layer}.mixer.{key}": value for key, value in mixer.items()}
    return params


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"]) -> Float[Array, "*B D"]:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS) * weight


def next_token_loss(mixer: Callable[[Params, Array, Sizes], Array]):
    """The loss of a model whose layers hold this mixer."""

    def loss(params: Params, ids: Int[Array, "B T"], sizes: Sizes) -> Float[Array, ""]:
        x = params["embeddings.weight"][ids]
        for layer in range(sizes.layers):
            prefix = f"layers.{layer}.mixer."
            own = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
            x = x + mixer(own, rms_norm(x, params[f"layers.{layer}.norm.weight"]), sizes)
        logits = rms_norm(x, params["norm_f.weight"])[:, :-1] @ params["embeddings.weight"].T
        chosen = (logits * nn.one_hot(ids[:, 1:], sizes.vocab)).sum(-1)
        return (nn.logsumexp(logits, -1) - chosen).mean()

    return loss


def short_conv(
    x: Float[Array, "B T C"], weight: Float[Array, "C 1 K"], bias: Float[Array, " C"]
) -> Float[Array, "B T C"]:
    """Causal depthwise convolution and SiLU."""
    return nn.silu(causal_conv1d(x, weight[:, 0].T)[0] + bias)


def _linear(seed: int, inputs: int, outputs: int) -> Array:
    return normal(seed, (outputs, inputs)) / math.sqrt(inputs)


def _dt_bias(size: int) -> Array:
    """Inverse softplus of steps from 1e-3 to 1e-1, evenly spaced in the logarithm."""
    steps = jnp.exp(jnp.linspace(math.log(1e-3), math.log(1e-1), size))
    return steps + jnp.log(-jnp.expm1(-steps))


# --- Mamba-1 ---------------------------------------------------------------------------------------------------------


def _mamba_init(sizes: Sizes, seed: int) -> Params:
    width, inner, state, rank = sizes.width, sizes.inner, sizes.state, sizes.dt_rank
    seeds = range(100 * seed + 1, 100 * seed + 7)
    return {
        "in_proj.weight": _linear(seeds[0], width, 2 * inner),
        "conv1d.weight": normal(seeds[1], (inner, 1, CONV_WIDTH)) / 2,
        "conv1d.bias": jnp.zeros(inner),
        "x_proj.weight": _linear(seeds[2], inner, rank + 2 * state),
        "dt_proj.weight": _linear(seeds[3], rank, inner),
        "dt_proj.bias": _dt_bias(inner),
        "A_log": jnp.log(jnp.broadcast_to(jnp.arange(1.0, state + 1), (inner, state))),
        "D": jnp.ones(inner),
        "out_proj.weight": _linear(seeds[4], inner, width),
    }


def _mamba(p: Params, x: Float[Array, "B T D"], sizes: Sizes) -> Float[Array, "B T D"]:
    x, z = jnp.split(x @ p["in_proj.weight"].T, 2, -1)
    x = short_conv(x, p["conv1d.weight"], p["conv1d.bias"])
    dt, B, C = jnp.split(x @ p["x_proj.weight"].T, (sizes.dt_rank, sizes.dt_rank + sizes.state), -1)
    delta = nn.softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    y, _ = selective_scan(x, delta, -jnp.exp(p["A_log"]), B, C, p["D"])
    return (y * nn.silu(z)) @ p["out_proj.weight"].T


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


def _mamba2_init(sizes: Sizes, seed: int) -> Params:
    width, inner, state, heads = sizes.width, sizes.inner, sizes.state, sizes.heads
    mixed = inner + 2 * state
    seeds = range(100 * seed + 1, 100 * seed + 7)
    return {
        "in_proj.weight": _linear(seeds[0], width, inner + mixed + heads),
        "conv1d.weight": normal(seeds[1], (mixed, 1, CONV_WIDTH)) / 2,
        "conv1d.bias": jnp.zeros(mixed),
        "dt_bias": _dt_bias(heads),
        "A_log": jnp.log(jnp.arange(1.0, heads + 1)),
        "D": jnp.ones(heads),
        "norm.weight": jnp.ones(inner),
        "out_proj.weight": _linear(seeds[2], inner, width),
    }


def _mamba2(p: Params, x: Float[Array, "B T D"], sizes: Sizes) -> Float[Array, "B T D"]:
    inner, state = sizes.inner, sizes.state
    z, mixed, dt = jnp.split(x @ p["in_proj.weight"].T, (inner, 2 * inner + 2 * state), -1)
    mixed = short_conv(mixed, p["conv1d.weight"], p["conv1d.bias"])
    x, B, C = jnp.split(mixed, (inner, inner + state), -1)
    heads = x.reshape(*x.shape[:2], sizes.heads, sizes.head_dim)
    delta = nn.softplus(dt + p["dt_bias"])
    y, _ = ssd(heads, delta, -jnp.exp(p["A_log"]), B[:, :, None], C[:, :, None], p["D"])
    return rms_norm(y.reshape(x.shape) * nn.silu(z), p["norm.weight"]) @ p["out_proj.weight"].T


# --- gated linear attention ------------------------------------------------------------------------------------------


def _gla_init(sizes: Sizes, seed: int) -> Params:
    width, inner, keys = sizes.width, sizes.inner, sizes.heads * sizes.state
    seeds = range(100 * seed + 1, 100 * seed + 9)
    return {
        "q_proj.weight": _linear(seeds[0], width, keys),
        "k_proj.weight": _linear(seeds[1], width, keys),
        "v_proj.weight": _linear(seeds[2], width, inner),
        "g_proj.weight": _linear(seeds[3], width, inner),
        "gk_proj.0.weight": _linear(seeds[4], width, GATE_RANK),
        "gk_proj.1.weight": _linear(seeds[5], GATE_RANK, keys),
        "gk_proj.1.bias": jnp.zeros(keys),
        "g_norm.weight": jnp.ones(sizes.head_dim),
        "o_proj.weight": _linear(seeds[6], inner, width),
    }


def _gla(p: Params, x: Float[Array, "B T D"], sizes: Sizes) -> Float[Array, "B T D"]:
    def split(name: str, size: int) -> Float[Array, "B T H K"]:
        return (x @ p[name].T).reshape(*x.shape[:2], sizes.heads, size)

    q, k, v = (
        split("q_proj.weight", sizes.state),
        split("k_proj.weight", sizes.state),
        split("v_proj.weight", sizes.head_dim),
    )
    gate = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
    out, _ = linear_attention(q, k, v, log_decay=nn.log_sigmoid(gate).reshape(q.shape) / 16)
    out = rms_norm(out, p["g_norm.weight"]) * nn.silu(split("g_proj.weight", sizes.head_dim))
    return out.reshape(*x.shape[:2], -1) @ p["o_proj.weight"].T


@dataclass(frozen=True)
class Model:
    """What is special about one: `init` makes a mixer's parameters from the sizes and a seed."""

    init: Callable[[Sizes, int], Params]
    loss: Callable[[Params, Int[Array, "B T"], Sizes], Float[Array, ""]]


MODELS = {
    "mamba": Model(_mamba_init, next_token_loss(_mamba)),
    "mamba2": Model(_mamba2_init, next_token_loss(_mamba2)),
    "gla": Model(_gla_init, next_token_loss(_gla)),
}
