"""The losses of customisation (Sathe et al. 2018, arXiv 1811.00056), and its training on all images at once.

Where few images are at hand, the frozen network's embeddings are computed once, and local expert and gate are fitted to
all of them, without batches: a user takes seconds.
"""

import functools
import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.files import check_zip, make_folder, replace_file
from research.models.customised import GATE, GLOBAL, LOCAL, CustomisedConfig, answers, global_part, is_local, within
from research.modules.axes import Kind
from research.modules.state import Arrays, abstract, apply, initialize
from research.optim.rules import DECAYED

TINY = 1e-20
"""Keeps a mean over no example at 0."""


def gate_labels(right_local: Bool[Array, " B"], right_global: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Returns 1 where the local expert is right and the global one wrong, else 0."""
    return (right_local & ~right_global).astype(jnp.float32)


def cross_entropy(
    logits: Float[Array, "B N"], target: Float[Array, "B N"], weights: Float[Array, " B"]
) -> Float[Array, ""]:
    """Returns the weighted mean of the cross entropy, in nats; 0 where nothing has weight."""
    each = -(target * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)
    return (weights * each).sum() / jnp.maximum(weights.sum(), TINY)


def shares(own: Float[Array, " B"]) -> Float[Array, " B"]:
    """Returns the weights of the gate's loss: the user's images (`own` 1) count as much as the replay (0), however many
    of it there are."""
    return 0.5 * own / jnp.maximum(own.sum(), 1.0) + 0.5 * (1 - own) / jnp.maximum((1 - own).sum(), 1.0)


def gate_cross_entropy(
    logits: Float[Array, " B"], wanted: Float[Array, " B"], weights: Float[Array, " B"]
) -> Float[Array, ""]:
    """Returns the weighted sum of the gate's binary cross entropy."""
    logits = logits.astype(jnp.float32)
    return (weights * (jax.nn.softplus(logits) - wanted * logits)).sum()


class Images(NamedTuple):
    """Labelled images, prepared for the network."""

    image: Float[Array, "B H W C"]
    label: Int[Array, " B"]


@dataclass(frozen=True)
class Schedule:
    """How local expert and gate are trained: AdamW over all images at once, the rate falling along a cosine.

    Attributes:
      steps: updates of each of the two.
      lr: peak learning rate.
      weight_decay: of the matrices of both.
      mistake_weight: weight of the images that the global expert gets wrong, in the local expert's loss; of others 1.
    """

    steps: int = 800
    lr: float = 0.02
    weight_decay: float = 0.01
    mistake_weight: float = 4.0


def checksum(arrays: Mapping[str, Array]) -> str:
    """Returns SHA-256 over names and bytes of arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _fit(loss: Any, params: Arrays, kinds: Mapping[str, Kind], schedule: Schedule) -> Arrays:
    """Minimises `loss(params)` by full-batch AdamW."""
    decayed = {name: kinds[name] in DECAYED for name in params}
    rate = optax.cosine_decay_schedule(schedule.lr, schedule.steps)
    optimizer = optax.adamw(rate, weight_decay=schedule.weight_decay, mask=decayed)

    def body(carry: tuple[Arrays, Any], _: None) -> tuple[tuple[Arrays, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, optimizer.init(params)), length=schedule.steps)[0][0]


@functools.partial(jax.jit, static_argnums=(0, 6))
def train_experts(
    config: CustomisedConfig,
    expert: Arrays,
    stats: Arrays,
    user: Images,
    replay: Images,
    key: Array,
    schedule: Schedule,
) -> Arrays:
    """Returns the parameters of the customised network; those of the global expert are `expert`, untouched.

    Args:
      config: of the customised network.
      expert, stats: parameters and statistics of the global expert.
      user: the user's images.
      replay: images of everybody.
      key: of the initial parameters.
      schedule: of the training.
    """
    fresh, kinds = initialize(config, key)[0], abstract(config).kinds
    frozen, still = within(expert), within(stats)

    def run(params: Arrays, method: str, x: Array) -> Array:
        outputs: Array = apply(config, {**frozen, **params}, still, x, method=method)[0]
        return outputs

    def of_backbone(x: Array, method: str) -> Array:
        outputs: Array = apply(config.backbone, expert, stats, x, method=method)[0]
        return outputs

    local = {name: array for name, array in fresh.items() if name.startswith(LOCAL)}
    gate = {name: array for name, array in fresh.items() if name.startswith(GATE)}
    idle = {**local, **gate}
    mine, others = of_backbone(user.image, "embed"), of_backbone(replay.image, "embed")
    right = of_backbone(mine, "head").argmax(-1) == user.label
    weights, target = jnp.where(right, 1.0, schedule.mistake_weight), jax.nn.one_hot(user.label, config.num_classes)

    local_loss = lambda params: cross_entropy(run({**idle, **params}, "local", mine), target, weights)
    local = _fit(local_loss, local, kinds, schedule)
    right_local = run({**gate, **local}, "local", mine).argmax(-1) == user.label
    wanted = jnp.concatenate([gate_labels(right_local, right), jnp.zeros(len(others))])
    features = jnp.concatenate([mine, others])
    share = shares(jnp.concatenate([jnp.ones(len(mine)), jnp.zeros(len(others))]))

    gate_loss = lambda params: gate_cross_entropy(run({**local, **params}, "gate", features), wanted, share)
    return {**frozen, **local, **_fit(gate_loss, gate, kinds, schedule)}


@functools.partial(jax.jit, static_argnums=0)
def measure(config: CustomisedConfig, params: Arrays, stats: Arrays, images: Images) -> dict[str, Array]:
    """Returns accuracies of the global expert ("before") and of the customised network ("after"), and the share that
    the local one answers.

    Args:
      params: of the customised network.
      stats: of the global expert.
    """
    parts = apply(config, params, within(stats), images.image, method="parts")[0]
    right: Callable[[Array], Array] = lambda logits: (logits.argmax(-1) == images.label).mean()
    return {
        "before": right(parts.everybody),
        "after": right(answers(config, parts)),
        "local_answers": is_local(config, parts).mean(),
    }


def overheads(config: CustomisedConfig, macs: int, expert_macs: int) -> dict[str, float]:
    """Returns parameters and multiply-adds of local expert and gate over those of the global expert.

    Raises:
      UserError: the multiply-adds exceed the budget (parameters are checked by the config).
    """
    share = macs / expert_macs - 1
    if share > config.budget:
        raise UserError(
            f"customised: local expert and gate add {100 * share:.2f} % multiply-adds, more than the budget of "
            f"{100 * config.budget:g} %; "
            f"lower rank={config.rank} or hidden={config.hidden}"
        )
    return {"params_overhead": config.overhead, "macs_overhead": share}


def save_experts(path: Path, params: Arrays) -> None:
    """Writes local expert and gate with the checksum of the global expert that they belong to, as .npz."""
    make_folder(path.parent)
    own: dict[str, Any] = {name: np.asarray(array) for name, array in params.items() if not name.startswith(GLOBAL)}

    def write(temp: str) -> None:
        with open(temp, "wb") as file:
            np.savez(file, belongs_to=np.array(checksum(global_part(params))), **own)

    replace_file(path, write)


def load_experts(path: Path, expert: Arrays) -> Arrays:
    """Returns the customised network's parameters from a file of `save_experts` and the global expert's.

    Raises:
      UserError: no such file, or it belongs to another global expert.
    """
    if not path.is_file():
        raise UserError(f"no local expert at {path}; make it by python -m launch.customise")
    check_zip(path, "make it anew by python -m launch.customise")
    try:
        with np.load(path, allow_pickle=False) as data:
            own = {name: np.asarray(data[name]) for name in data.files}
        belongs_to = str(own.pop("belongs_to"))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        raise UserError(
            f"{path} is damaged or holds no local expert; make it anew by python -m launch.customise"
        ) from None
    if belongs_to != checksum(expert):
        raise UserError(f"{path} belongs to another global expert; customise this one by python -m launch.customise")
    return {**within(expert), **{name: jnp.asarray(array) for name, array in own.items()}}
