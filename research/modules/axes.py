"""Axis names and kinds: every parameter and statistic says what each of its axes is, every parameter also what it does.

A name is a scope and a role, `"stage2/embed"`: equal names are coupled (the same channels), rules speak
of the role, the last component. A scope that holds the component `layer` belongs to one layer of the
stack `layers` beside it: `stage2/layer/mlp` is a different axis in every layer of `stage2/layers`.
Sharding, slicing, pruning and growth are derived from these names; this file alone reads and writes them.
Weight decay and Muon follow from the kinds (research/optim/rules.py).
"""

import enum
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from research.errors import near_names

Axes = tuple[str, ...]
Initializer = Callable[[Array, Sequence[int], jnp.dtype], Array]

ROLES = {
    "image": "channels of the input image",
    "classes": "outputs of the classifier",
    "stem": "hidden channels of the stem",
    "embed": "channels of the residual stream",
    "bottleneck": "inner channels of a residual block",
    "mlp": "hidden units of an FFN",
    "squeeze": "hidden units of a squeeze-and-excite gate",
    "heads": "attention heads",
    "head_dim": "features of one attention head",
    "layers": "equal blocks stacked into one array",
    "kernel_h": "rows of a depthwise kernel, cut around its centre",
    "kernel_w": "columns of a depthwise kernel, cut around its centre",
    "window_h": "rows of a dense convolution window",
    "window_w": "columns of a dense convolution window",
    "tokens": "positions of a learnt position embedding",
    "vocab": "entries of a vocabulary",
    "input": "features of a continuous input token",
    "inner": "inner channels of a sequence mixer",
    "state": "numbers of state per inner channel or head of a state space",
    "groups": "groups of heads that share maps, keys or values",
    "rank": "inner features of a low-rank projection",
    "taps": "steps of a short convolution over time",
    "angles": "pairs of state features that rotate together",
    "features": "random features of a kernel",
    "clusters": "centroids of routing attention",
    "experts": "experts of a mixture",
    "domains": "domains that a text may come from",
    "slots": "soft slots of one expert",
    "router": "channels of the router of images, which sub-networks keep whole",
    "observed": "numbers that a layer reports of itself",
    "choices": "what a method chooses among or counts: an axis of its own arrays that no network cuts",
    "actions": "numbers of one action of a policy",
    "directions": "ways in which a mixer walks over an image",
}

EXTENTS = frozenset({"kernel_h", "kernel_w", "window_h", "window_w", "taps"})
"""Roles of the sides of kernels: they are not coupled, each kernel of a network may have its own size."""


class _Named(enum.EnumMeta):
    """Tells the members where one is asked for that is not there."""

    def __getattr__(cls, name: str):
        raise AttributeError(f"{cls.__name__}.{name} is not there; valid: {', '.join(cls.__members__)}")


class Kind(enum.Enum, metaclass=_Named):
    """What a trained array does, declared where it is made."""

    MATRIX = "maps features to features by a sum: kernels of linear layers and dense convolutions"
    DEPTHWISE = "weighs neighbours in space or time, each channel by itself"
    EMBEDDING = "one row for each entry of a vocabulary"
    POSITION = "is put in the place of a token, or added to it: position embeddings, class tokens"
    BIAS = "is added"
    GAIN = "multiplies, feature by feature: scales of norms, layer scale"
    CONSTANT = "a coefficient of a recurrence or of a bound: decay rates, skip weights"


class Param(nnx.Param):
    """A trained array.

    Attributes:
      axes: one name for each of its axes.
      kind: what it does.
      precise: whether reduced precision leaves it alone.
    """


class StatKind(enum.Enum, metaclass=_Named):
    """How a statistic moves, declared where it is made."""

    MOMENT = "a running average of what a layer sees: every batch moves it, recalibration replaces it"
    LOG = "what the last call in training tells of itself"
    LOSS = "a loss of the last call in training, which training adds to the task's"
    SUM = "what the calls in training add up over an update, zero between updates"
    STATE = "what a whole update moves, from its sums (see `research.modules.state.OncePerUpdate`)"
    CONSTANT = "drawn once and never moved"


@dataclass(frozen=True)
class Log:
    """What a statistic of kind LOG is called in metrics.jsonl: HEADING/LAYER/NAME.

    Attributes:
      heading: of what the module tells, e.g. "experts".
      names: of its entries, each of which is logged as a number; a single name logs the whole statistic, as a list
        where it has an axis.
    """

    heading: str
    names: str | tuple[str, ...]


class Stat(nnx.Variable):
    """An array that is not trained; `axes` as in `Param`, `kind` says how it moves, `log` what a LOG is called (None of
    other kinds)."""


def role(name: str) -> str:
    """Returns the role of an axis name: its last component."""
    return name.rsplit("/", 1)[-1]


def layer_stack(name: str) -> str | None:
    """Returns the name of the stack axis that a per-layer name belongs to, or None for a shared name."""
    head, found, _ = name.partition("/layer/")
    if found:
        return head + "/layers"
    return "layers" if name.startswith("layer/") else None


@dataclass(frozen=True)
class Init:
    """What a constructor needs to create arrays: a key, a dtype, the stack that it is built in, how many residual
    branches the network adds up (some initialisers shrink with it), and whether its statistics are frozen, so that
    nothing moves them.

    Every array in the repository is created by `param` or `stat`, so none is without axis names.
    """

    key: Array
    dtype: jnp.dtype = jnp.float32
    stack: tuple[tuple[int, str], ...] = ()
    branches: int = 1
    frozen: bool = False

    def child(self, tag: str | int) -> "Init":
        """Returns an Init with an independent key; equal tags give equal keys."""
        return replace(self, key=jax.random.fold_in(self.key, zlib.crc32(str(tag).encode()) & 0x7FFFFFFF))

    def stacked(self, size: int, name: str) -> "Init":
        """Returns an Init that creates `size` independent layers along a new first axis called `name`."""
        return replace(self, stack=(*self.stack, (size, name)))

    def param(
        self, tag: str, shape: Sequence[int], axes: Axes, init: Initializer, kind: Kind, *, precise: bool = False
    ) -> Param:
        """Creates a parameter.

        Args:
          tag: name that makes the key differ from its neighbours'.
          shape: shape without the stacked axes.
          axes: one axis name per entry of `shape`.
          init: called as `init(key, shape, dtype)`, once for every stacked layer.
          kind: what the array does; weight decay and matrix optimizers follow from it.
          precise: used in float32 whatever the run's precision, such as logarithms of decay rates.
        """
        return Param(self._create(tag, shape, axes, init), axes=self._axes(axes), kind=kind, precise=precise)

    def stat(
        self,
        tag: str,
        shape: Sequence[int],
        axes: Axes,
        init: Initializer,
        kind: StatKind,
        *,
        log: Log | None = None,
    ) -> Stat:
        """Creates a statistic; arguments as in `param`, `kind` says how it moves, `log` what one of kind LOG is called.

        Raises:
          ValueError: a LOG without `log`, another kind with it, or other names than it has entries.
        """
        if (kind is StatKind.LOG) != (log is not None):
            raise ValueError(f"{tag}: kind {kind.name} {'needs' if log is None else 'has no'} log=Log(heading, names)")
        if log is not None and not isinstance(log.names, str) and tuple(shape) != (len(log.names),):
            raise ValueError(f"{tag}: the names {log.names} are of {len(log.names)} numbers, its shape is {shape}")
        if self.frozen:
            kind, log = StatKind.CONSTANT, None
        return Stat(self._create(tag, shape, axes, init), axes=self._axes(axes), kind=kind, log=log)

    def _axes(self, axes: Axes) -> Axes:
        return (*(name for _, name in self.stack), *axes)

    def _create(self, tag: str, shape: Sequence[int], axes: Axes, init: Initializer) -> Array:
        if len(axes) != len(shape):
            raise ValueError(f"{tag}: {len(shape)} axes need as many names, got {axes}")
        unknown = [name for name in axes if role(name) not in ROLES]
        if unknown:
            near = near_names(role(unknown[0]), ROLES)
            raise ValueError(
                f"{tag}: unknown axis role in {unknown}; near: {', '.join(near)} (all: docs/reference/axis-roles.md)"
            )
        make = lambda key: init(key, tuple(shape), self.dtype)
        keys = self.child(tag).key
        for size, _ in self.stack:
            keys = (
                jax.vmap(lambda k, n=size: jax.random.split(k, n), in_axes=0)(keys)
                if keys.ndim
                else jax.random.split(keys, size)
            )
            make = jax.vmap(make)
        return make(keys)
