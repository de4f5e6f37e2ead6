"""Shrunken twins of the registry's models with random numbers, and a jit that compiles fast. Shared by the tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.models import registry
from research.modules.state import abstract, apply

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def fast_jit(f):
    """jax.jit at the lowest optimisation level: half the compile time."""
    return jax.jit(f, compiler_options=FAST)


def twin(name: str, **overrides):
    """Returns the tiny config of a model; drop path is on where the family has it, so that many twins are equal."""
    fields = registry.entry(name).config.__dataclass_fields__
    more = {"drop_path_rate": 0.1} if "drop_path_rate" in fields else {}
    return registry.model_config(name, **{**registry.entry(name).tiny, **more, **overrides})


def distinct_twins() -> dict:
    """Returns tiny config -> the names that share it."""
    groups: dict = {}
    for name in registry.list_models():
        groups.setdefault(twin(name), []).append(name)
    return groups


def random_arrays(config, seed: int = 0, dtype=np.float32):
    """Returns (params, stats): gains, layer scales and variances near 1, everything else normal; nothing is zero."""
    shapes, rng = abstract(config), np.random.default_rng(seed)

    def draw(name, shape):
        leaf = name.rsplit("/", 1)[-1]
        if leaf in ("scale", "layer_scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, shape), dtype)
        spread = 0.3 if leaf in ("bias", "mean") else (np.prod(shape[-3:-1]) or 1) ** -0.5
        return jnp.asarray(rng.normal(0, spread, shape), dtype)

    return ({k: draw(k, v.shape) for k, v in sorted(group.items())} for group in (shapes.params, shapes.stats))


def images(config, batch: int = 3, seed: int = 7, dtype=np.float32):
    """Returns a batch of normal noise, or of tokens."""
    if len(config.input_shape()) == 1:
        return jnp.asarray(
            np.random.default_rng(seed).integers(0, config.vocab_size, (batch, *config.input_shape())), jnp.int32
        )
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, *config.input_shape())), dtype)


def beside(config, batch: int) -> dict:
    """Returns what a model is told beside its input: an encoder, the domains of its sentences."""
    return {"domain": jnp.arange(batch) % config.num_domains} if hasattr(config, "num_domains") else {}


def loss_and_logits(config, params, stats, x, mode: str = "train"):
    """Returns (a scalar that every logit counts in, differently; the logits)."""
    logits, _ = apply(config, params, stats, x, mode=mode, key=jax.random.key(3), **beside(config, len(x)))
    places = jnp.meshgrid(*map(jnp.arange, logits.shape), indexing="ij")
    places = sum(
        place * stride for place, stride in zip(places, np.cumprod([1, *logits.shape[:0:-1]])[::-1], strict=True)
    )
    weights = jnp.cos(places.astype(logits.dtype))
    return (weights * logits).sum() + (logits**2).mean(), logits


def loss(config, params, stats, x, mode: str = "train"):
    """The scalar of `loss_and_logits`."""
    return loss_and_logits(config, params, stats, x, mode)[0]


@functools.lru_cache(maxsize=64)
def train_results(config):
    """Returns (loss, gradients) of a twin in training mode, computed once."""
    params, stats = random_arrays(config)
    value, grads = fast_jit(jax.value_and_grad(lambda p, s, x: loss(config, p, s, x)))(params, stats, images(config))
    return float(value), {k: np.asarray(g) for k, g in grads.items()}
