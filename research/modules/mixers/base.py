"""What every mixer is: options of its own (a spec), a module, and a state that is all it remembers of the past.

A spec is a frozen dataclass inside a model's config. Sizes that are 0 follow from the model's width: `resolve(dim)`
fills them in, `shrink` scales the filled ones. A mixer is called as

    y, state = mixer(x, call, state)      x [B, T, D]; the piece continues from `state`, or from the start where it is
        None
    y, state = mixer.step(x, call, state) x [B, D]; one token
    state    = mixer.init_state(batch, capacity, dtype)

Both forms, `mixer` and `step`, compute the same numbers; a state is a dictionary of arrays whose first axis is the
batch.
"""

import sys
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol, Self, TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.modules.axes import Init
from research.modules.mesh import TENSOR_AXIS, own_size
from research.modules.renamed import Renamed
from research.ops.precision import matmul
from research.plugins import import_all

State = dict[str, Array]


@dataclass(frozen=True)
class Call:
    """What a layer is told about the tokens at hand.

    Attributes:
      mode: "train", "eval" or "calibrate".
      key: random key, for dropout in training; None without.
      segment_ids: [B, T] (or [B] in a step): documents packed on one axis, which do not see each other; also tells
        padding on the left from the prompt. None: one document.
      position: position of the first token at hand, int32 scalar; 0 unless a state is carried.
      tokens: [B, T] (or [B] in a step) ids of the tokens, for routers that hash them.
      domain: [B], the domain of each example, for routers that are told the expert.
      real: [B] or [B, T], which examples or tokens are no filler; what looks across tokens or examples leaves the
        others out. None: all. Mixers that look back alone need not read it: padding stands behind the text, or is a
        segment of its own.
      carried: the tokens continue from a state, so that what becomes of them may depend on those before them alone.
    """

    mode: str = "eval"
    key: Array | None = None
    segment_ids: Int[Array, " B *T"] | None = None
    position: Int[Array, ""] | int = 0
    tokens: Int[Array, " B *T"] | None = None
    domain: Int[Array, " B *_"] | None = None
    real: Bool[Array, " B *T"] | None = None
    carried: bool = False

    def mask(self, shape: tuple[int, ...]) -> Bool[Array, " B *T"] | None:
        """Returns `real` for every token of an array of `shape` ([B, T] or [B]); None where all are."""
        if self.real is None:
            return None
        return jnp.broadcast_to(self.real.reshape(*self.real.shape, *(1,) * (len(shape) - self.real.ndim)), shape)


@dataclass(frozen=True)
class Spec(Renamed):
    """Options of one kind of mixer; subclasses add fields, `kind`, `paper` and `build`, and are made known by
    `register`. What a field was called in earlier versions stands in `renamed`."""

    kind: ClassVar[str] = ""
    """What `pattern` calls the mixer; the model's config has a field of this name for its options."""
    paper: ClassVar[str] = "this repository"
    """Where the mixer comes from."""
    alone: ClassVar[bool] = False
    """True: layers of this mixer have no FFN, in the small model KIND_small."""
    small: ClassVar[dict[str, Any]] = {}
    """Options in KIND_small, a model for a laptop."""
    tiny: ClassVar[dict[str, Any]] = {}
    """Options in the shrunken twin that tests use: 16 channels, 12 tokens."""
    carries: ClassVar[bool] = True
    """False: the mixer sees a sequence as a whole, so that devices cannot hold shards of it."""
    bounded: ClassVar[bool] = False
    """True: the mixer does not reach beyond the model's `length`."""
    ops: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Names of the ops that the mixer uses, with their implementations: what the config field `implementation` may ask
    for."""

    def sees_later(self) -> bool:
        """Whether a token sees later ones: then no state can carry the mixer on."""
        return False

    def resolve(self, dim: int) -> Self:
        """Returns the spec with every size that was left to the width `dim` filled in.

        Raises:
          UserError: sizes that do not fit together.
        """
        return self

    def shrink(self, width: float, heads: float | int | None, state: float | int | None) -> Self:
        """Returns the spec of a sub-network; sizes are filled in. `heads` None: heads follow the width."""
        return self

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "Mixer":
        """Builds the module for channels `dim`, sequences of up to `length` tokens and axis names under `scope`."""
        raise NotImplementedError

    def require(self, condition: bool, message: str) -> None:
        """Raises UserError with the mixer's name unless the condition holds."""
        if not condition:
            raise UserError(f"mixer {self.kind}: {message}")


S = TypeVar("S", bound=type[Spec])
_SPECS: dict[str, type[Spec]] = {}
_closed: list[str] = []


def register(spec: S) -> S:
    """Makes a kind of mixer known: models take it in their `pattern`, and there is a small model of it.

    Raises:
      UserError: the class is no frozen dataclass that derives from `Spec` with `kind`, `build` and a default for every
        option; another mixer has this name; or models were made already, which have no field for its options.
    """
    _check_class(spec)
    other = _SPECS.get(spec.kind)
    if other is not None and (other.__module__, other.__qualname__) != (spec.__module__, spec.__qualname__):
        raise UserError(
            f"mixer {spec.kind} is registered twice, by {other.__module__} and by {spec.__module__}; give yours "
            "another kind"
        )
    if _closed:
        raise UserError(
            f"mixer {spec.kind} comes too late: models were made before; import {spec.__module__} first, "
            "or give it by --plugin"
        )
    _SPECS[spec.kind] = spec
    return spec


def _check_class(spec: type[Spec]) -> None:
    """Raises UserError unless a class can be the options of a mixer."""
    if not (isinstance(spec, type) and issubclass(spec, Spec)):
        raise UserError(f"mixer {spec}: register takes a class that derives from Spec")
    parameters = vars(spec).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        wrong = "is no frozen dataclass; write @register above @dataclass(frozen=True)"
    elif not (isinstance(spec.kind, str) and spec.kind.isidentifier()):
        wrong = f'has kind {spec.kind!r}; wanted, the name of the mixer: kind: ClassVar[str] = "shift"'
    elif spec.build is Spec.build:
        wrong = "has no build(dim, length, scope, init, implementation), which returns the module"
    elif bare := [f.name for f in fields(spec) if f.default is MISSING and f.default_factory is MISSING]:
        wrong = f"has no default for {', '.join(bare)}; every option needs one"
    else:
        return
    place = vars(sys.modules[spec.__module__]).get("__file__", spec.__module__)
    raise UserError(f"mixer {spec.kind or spec.__name__}: {spec.__name__} {wrong} ({place})")


def known() -> dict[str, type[Spec]]:
    """Returns kind -> options of every mixer that is registered; those of this package are imported first. None comes
    after."""
    if not _closed:
        import_all(__package__ or "")
        _closed.append(__name__)
    return dict(_SPECS)


class Mixer(Protocol):
    """The module that a spec builds."""

    def __call__(
        self, x: Float[Array, "B T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State]: ...

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]: ...

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State: ...


class Gathers:
    """What a mixer derives from that reads all tokens rather than a state: where sequences are sharded, every device
    gathers what its own shard reads."""

    def gathered(self, x: Float[Array, "B T D"], call: Call, axis: str) -> Float[Array, "B T D"]:
        """Returns the output for the shard that starts at `call.position`, under `jax.shard_map` over `axis`."""
        raise NotImplementedError


def fused(
    x: Float[Array, "*B D"],
    *kernels: nnx.Variable,
    implementation: str = "auto",
    exact: tuple[nnx.Variable | None, ...] = (),
) -> tuple[Float[Array, "*B _"], ...]:
    """Products of one input with several kernels [D, ...], each with all outputs on one axis; no accelerator rounds
    those of `exact`.

    On one CPU it is a single product, which is quicker, and the outputs are parts of one array; elsewhere, and where
    heads are cut over devices, the kernels stay apart, since each may be sharded along axes of its own.
    """
    flat = [kernel[...].reshape(x.shape[-1], -1) for kernel in kernels]
    if "cpu" not in implementation or own_size(TENSOR_AXIS) > 1:
        products = [matmul if any(kernel is one for one in exact) else jnp.matmul for kernel in kernels]
        return tuple(product(x, kernel) for product, kernel in zip(products, flat, strict=True))
    sizes = [kernel.shape[1] for kernel in flat]
    cuts = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return tuple(jnp.split(x @ jnp.concatenate(flat, 1), cuts, -1))
