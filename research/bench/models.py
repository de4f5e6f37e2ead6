"""UniRepLKNet-A's training step: loss, gradients and AdamW in one program, beside the official class in PyTorch."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from research.bench import peers as other
from research.bench.case import Case, foreign, normal, program
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Suite, slower
from research.models import registry
from research.modules.state import abstract, apply, initialize
from research.optim.build import make_optimizer
from research.optim.section import OptimSection
from research.report import flops
from research.tasks.classification import Classification

BATCH, SIDE, CLASSES = 32, 64, 10
OPTIMIZER = OptimSection(
    name="adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=0.0, decay_rules=((".*", 1.0),), lr_rules=()
)
"""As torch.optim.AdamW is by default: every parameter decays."""


@register("unireplknet_a", "training step, batch 32, 64x64 pixels, AdamW", kind="model")
def cases(peers: Mapping[str, str]) -> list[Case]:
    return [training_step("unireplknet_a", peers.get("unireplknet", ""), BATCH, SIDE)]


register_suite(
    "unireplknet",
    Suite(
        (("unireplknet_a", ""),),
        (
            slower(
                "UniRepLKNet-A step: time over the official class's",
                "unireplknet_a",
                "unireplknet",
                1,
                peer="unireplknet",
            ),
        ),
    ),
)


def training_step(name: str, official: str, batch: int, side: int) -> Case:
    """The case of one update; `official` is the path of the official file, "" for none."""
    config = registry.model_config(name, num_classes=CLASSES, image_size=side)
    task = Classification(CLASSES)
    shapes = abstract(config)
    optimizer = make_optimizer(
        OPTIMIZER, lambda step: 1e-3, {key: shapes.axes[key] for key in shapes.params}, shapes.kinds
    )

    def inputs():
        params, stats = jax.jit(functools.partial(initialize, config))(jax.random.key(0))
        labels = jnp.arange(batch, dtype=jnp.int32) % CLASSES
        return (params, stats, optimizer.init(params)), normal(1, (batch, side, side, 3)), labels

    def step(state, images, labels):
        params, stats, opt_state = state

        def loss_of(params):
            logits, new_stats = apply(config, params, stats, images, mode="train", key=jax.random.key(0))
            return task.loss(logits, jax.nn.one_hot(labels, CLASSES)), new_stats

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, stats, opt_state), loss

    naive = registry.model_config(name, num_classes=CLASSES, image_size=side, implementation="naive")
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    forward = flops.count_flops(lambda p, s, x: apply(naive, p, s, x)[0], shapes.params, shapes.stats, image)
    made = {
        "unireplknet": other.unireplknet_a(official, CLASSES, channels_last=False),
        "unireplknet channels_last": other.unireplknet_a(official, CLASSES, channels_last=True),
    }
    return Case(
        name=name,
        shape=f"batch {batch} {side}x{side}",
        direction="training step",
        flops=3 * batch * forward,
        num_bytes=4 * (6 * shapes.num_params() + batch * side**2 * 3),  # parameters and both moments, read and written
        inputs=inputs,
        contenders={"ours": program(step, donated=(0,))},
        peers={key: foreign(make) for key, make in made.items()} if official else {},
    )
