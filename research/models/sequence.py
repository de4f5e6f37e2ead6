"""Sequence models: one backbone that takes any pattern of mixers, for language, probes and classification of sequences.

Embedding (or a linear input projection), then pre-norm residual layers - a mixer each, and an FFN if asked for - a
final RMSNorm and an output head, by default the embedding again. `pattern` names the mixers of consecutive layers and
repeats: "mamba", "mamba mamba attention"; so does `ffn` their FFNs: "glu", "glu moe". Both together are
one period of the stack, so depth is a multiple of the number of its layers. Wide Attention (arXiv 2210.00640) is depth
1 with all heads in it.

Sub-networks: `width` (channels; inner channels and, unless given, heads follow), `heads`, `state`, `ffn`, `experts`,
`active`, `depth`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from research.errors import Unregistered, UserError
from research.models.implementations import check_implementation
from research.models.mixtures import MixtureConfig
from research.models.sequence_layers import FFNS, MIXTURE, Period
from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.dropout import dropout
from research.modules.embedding import Embedding
from research.modules.features import named
from research.modules.layers import normal_02
from research.modules.mixers import contract
from research.modules.mixers.base import Call, Spec, known
from research.modules.moe_options import Moe
from research.modules.norms import RMSNorm
from research.modules.ssm import torch_linear
from research.modules.state import Stack
from research.ops import grouped_matmul
from research.ops.pooling import masked_last, masked_mean
from research.values import Layers, Rate


def with_mixers(cls: type) -> type:
    """Gives a class that becomes a dataclass a field for the options of every kind of mixer."""
    for kind, spec in known().items():
        if kind in cls.__annotations__:
            raise UserError(f"mixer {kind}: {spec.__name__}.kind is the name of a field of the model; choose another")
        cls.__annotations__[kind] = spec
        setattr(cls, kind, spec())
    return cls


@dataclass(frozen=True)
@with_mixers
class SequenceConfig(MixtureConfig):
    """Description of one sequence model.

    Attributes:
      vocab_size: rows of the embedding; 0 with `input_dim` > 0: tokens are vectors of that many numbers.
      output_dim: numbers read out per token; 0: one logit per entry of the vocabulary.
      tie_embeddings: the output head is the embedding's transpose.
      length: tokens of a training example, and the longest sequence of mixers with absolute positions.
      dim, depth: channels and layers.
      pattern: kinds of mixer, space-separated, repeated to the depth.
      ffn: FFN after the mixers of consecutive layers, space-separated: none, mlp, glu, snnk (random
        features in place of the first product), or moe (a mixture of experts).
      ffn_dim: hidden units of the dense ones; 0: 4 * dim, with glu or gated experts 8/3 * dim rounded up to a multiple
        of 32.
      moe: options of the mixtures.
      pool: "none", or "mean" / "last" over the tokens before the output head: a classifier of sequences.
      dropout: rate on the embedding and on every branch in training.
      kept_layers: for a sub-network, indices of its periods in the full model.
      mamba, ...: options of each kind of mixer; only those in the pattern count.
    """

    vocab_size: int = 256
    input_dim: int = 0
    output_dim: int = 0
    tie_embeddings: bool = True
    length: int = 256
    dim: int = 256
    depth: Layers = 4
    pattern: str = "mamba"
    ffn: str = "none"
    ffn_dim: int = 0
    pool: str = "none"
    norm_eps: float = 1e-5
    dropout: Rate = 0.0
    kept_layers: tuple[int, ...] = ()
    unroll: bool = False
    implementation: str = "auto"
    remat: str = "none"
    moe: Moe = Moe()

    renamed: ClassVar[dict[str, str]] = {"outputs": "output_dim", "tied": "tie_embeddings"}
    family: ClassVar[str] = "sequence"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {
        "ffn_dim": ("dim", "ffn"),
        "kept_layers": ("depth", "pattern", "ffn"),
    }
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels; inner channels, hidden units and, unless given, heads follow",
        "depth": "fraction of the layers, or a whole number of them, a multiple of the pattern's length",
        "ffn": "fraction of the hidden units of each FFN, or of each expert",
        "experts": "fraction of the experts of every mixture, or a whole number of them",
        "active": "fraction of the experts of a token, or a whole number of them",
        "heads": "fraction of the heads of every mixer, or a whole number of them",
        "state": "fraction of the state per inner channel or head, or a whole number",
        "keep": "which layers stay: first or even",
    }

    def __post_init__(self):
        kinds = self.kinds
        unknown = sorted(set(kinds) - set(self.specs()))
        if unknown or not kinds:
            raise Unregistered(
                f"sequence: pattern={self.pattern!r} names {unknown or 'no mixer'}; valid: {', '.join(self.specs())}"
            )
        self.check_sizes("length", "dim", "depth")
        for name, given, valid in (
            ("ffn", self.ffn, ("none", *FFNS, MIXTURE)),
            ("pool", self.pool, ("none", "mean", "last")),
        ):
            if not set(given.split()) <= set(valid) or not given.split():
                raise UserError(f"sequence: {name}={given!r}; valid: {', '.join(valid)}")
        if self.depth % len(self.period):
            more = f" and ffn={self.ffn!r}" if " " in self.ffn else ""
            raise UserError(
                f"sequence: depth={self.depth} is no multiple of the {len(self.period)} layers of "
                f"pattern={self.pattern!r}{more}"
            )
        if not self.vocab_size and not (self.input_dim and self.output_dim):
            raise UserError("sequence: give vocab_size, or both input_dim and outputs for tokens that are vectors")
        if not self.ffn_dim and self.ffn != "none":
            gated = "glu" in self.ffn_kinds or (self.has_mixtures and self.moe.gated)
            object.__setattr__(self, "ffn_dim", -(-8 * self.dim // 96) * 32 if gated else 4 * self.dim)
        if self.has_mixtures:
            if self.moe.router == "hash" and self.vector_tokens:
                raise UserError("sequence: moe.router='hash' needs tokens of a vocabulary; vector tokens have no ids")
            if self.pool == "none" and self.mixture.router not in Moe.causal_routers:
                causal = ", ".join(Moe.causal_routers)
                raise UserError(
                    f"sequence: moe.router={self.moe.router!r} looks at later tokens; valid where pool=none: {causal}"
                )
        if self.pool == "none" and (later := [k for k in kinds if self.spec(k).sees_later()]):
            raise UserError(f"sequence: {later[0]}.causal=False looks at later tokens; valid where pool=none: True")
        if not self.kept_layers:
            object.__setattr__(self, "kept_layers", tuple(range(self.periods)))
        if len(self.kept_layers) != self.periods:
            raise UserError(
                f"sequence: kept_layers={self.kept_layers} must have one entry for each of the {self.periods} periods"
            )
        ops = {op: implementations for kind in kinds for op, implementations in self.spec(kind).ops.items()}
        if self.has_mixtures:
            ops[grouped_matmul.OP] = grouped_matmul.IMPLEMENTATIONS
        check_implementation("sequence", self.implementation, ops)

    @classmethod
    def specs(cls) -> dict[str, type[Spec]]:
        """Kind of mixer -> class of its options."""
        return known()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The mixers of one period."""
        return tuple(self.pattern.split())

    @property
    def ffn_kinds(self) -> tuple[str, ...]:
        """The FFNs of consecutive layers."""
        return tuple(self.ffn.split())

    @property
    def period(self) -> tuple[tuple[str, str], ...]:
        """(mixer, FFN) of the layers of one period."""
        kinds, ffns = self.kinds, self.ffn_kinds
        return tuple((kinds[j % len(kinds)], ffns[j % len(ffns)]) for j in range(math.lcm(len(kinds), len(ffns))))

    @property
    def periods(self) -> int:
        return self.depth // len(self.period)

    @property
    def vector_tokens(self) -> bool:
        return not self.vocab_size

    @property
    def streams(self) -> bool:
        """Whether a state can carry the model on, token by token: no mixer sees later tokens."""
        return not any(self.spec(kind).sees_later() for kind in self.kinds)

    @property
    def has_mixtures(self) -> bool:
        return MIXTURE in self.ffn_kinds

    @property
    def mixture(self) -> Moe:
        """The options of the mixtures of experts, every size filled in."""
        return self.moe.resolve(self.ffn_dim)

    def layer_places(self) -> tuple[tuple[str, int], ...]:
        """Where the arrays of each layer lie, in the order of the layers: (prefix of their names, index on their first
        axis)."""
        return tuple((f"blocks/layer/layers/{j}", i) for i in range(self.periods) for j in range(len(self.period)))

    def options(self, kind: str) -> Spec:
        """Returns the options of a kind of mixer as they were given."""
        return vars(self)[kind]

    def spec(self, kind: str) -> Spec:
        """Returns the options of a kind of mixer, every size filled in."""
        return self.options(kind).resolve(self.dim)

    def build(self, init: Init) -> nnx.Module:
        return SequenceModel(self, init)

    def check_parts(self) -> None:
        for kind in dict.fromkeys(self.kinds):
            contract.check(self.spec(kind), self.dim, self.length)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {"layers": self.kept_layers}

    def input_shape(self) -> tuple[int, ...]:
        return (self.length, self.input_dim) if self.vector_tokens else (self.length,)

    def shrink(
        self, *, width=1.0, depth=1.0, ffn=1.0, heads=None, state=None, experts=None, active=None, keep="first"
    ) -> "SequenceConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        elastic.check_fraction(width, "width")
        dim = elastic.scaled(self.dim, width, 8, "width")
        period = len(self.period)
        kept = elastic.kept_layers(
            self.kept_layers, elastic.depth_count(depth, self.depth, period, "depth") // period, keep
        )
        cuts = {kind: self.spec(kind).shrink(dim / self.dim, heads, state) for kind in set(self.kinds)}
        sizes: dict[str, Any] = {
            kind: spec for kind, spec in cuts.items() if spec != self.spec(kind)
        }  # what is not cut stays derived
        hidden = round(self.ffn_dim * dim / self.dim)
        if self.ffn != "none":
            sizes["ffn_dim"] = elastic.scaled(hidden, ffn, 8, "ffn")
        if self.has_mixtures:
            cut = self.mixture.shrink(dim / self.dim, ffn, experts, active)
            sizes["moe"] = self.moe if cut == self.mixture else cut
        return replace(self, dim=dim, depth=period * len(kept), kept_layers=kept, **sizes)


class SequenceModel(nnx.Module):
    """The network. A state is {"layers": [one entry a layer of the period, stacked over periods], "position": int32
    scalar}."""

    def __init__(self, config: SequenceConfig, init: Init):
        self.config = config
        parts = sum(1 if ffn == "none" else 2 for _, ffn in config.period)
        init = replace(init, branches=config.periods * parts)
        vectors = config.vector_tokens
        self.embedding = None if vectors else Embedding(config.vocab_size, config.dim, init.child("embedding"))
        self.read_in = (
            init.param(
                "read_in",
                (config.input_dim, config.dim),
                ("input", "embed"),
                torch_linear(config.input_dim),
                Kind.MATRIX,
            )
            if vectors
            else None
        )
        self.blocks = Stack(
            lambda sub: Period(config, sub), config.periods, "layers", init.child("blocks"), unroll=config.unroll
        )
        self.norm = RMSNorm(config.dim, "embed", init.child("norm"), eps=config.norm_eps)
        tied = config.tie_embeddings and not vectors and not config.output_dim
        axis = "classes" if config.output_dim else "vocab"
        size = config.output_dim or config.vocab_size
        self.head = None if tied else init.param("head", (config.dim, size), ("embed", axis), normal_02, Kind.MATRIX)

    def _embed(self, tokens: Array, call: Call) -> Array:
        if self.embedding is not None:
            x = self.embedding(tokens)
        else:
            assert self.read_in is not None  # in place of the embedding
            x = tokens @ self.read_in[...]
        if self.config.dropout and call.mode == "train" and call.key is not None:
            x = dropout(x, self.config.dropout, jax.random.fold_in(call.key, 2**20))
        return x

    def _read(self, x: Float[Array, "*B D"]) -> Float[Array, "*B N"]:
        x = self.norm(x)
        if self.head is not None:
            return x @ self.head[...]
        assert self.embedding is not None  # tied
        return x @ self.embedding.table[...].T

    def __call__(
        self,
        tokens: Int[Array, "B T"] | Float[Array, "B T I"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        domain: Int[Array, " B"] | None = None,
        real: Bool[Array, " B *T"] | None = None,
        mode: str = "eval",
        key: Array | None = None,
    ) -> Float[Array, "B T N"] | Float[Array, "B N"]:
        """Returns the output of the head for every token, or for the pooled sequence.

        Args:
          tokens: ids, or vectors.
          segment_ids: documents packed on one axis.
          domain: of each example, where it chooses the experts.
          real: which examples, or which of their tokens, are no filler; None: all. Padding stands behind the text, or
            has `segment_ids` of its own.
          mode, key: as in every model.
        """
        text = real if real is not None and real.ndim == 2 else None
        if text is not None and not self.config.streams:  # these see later tokens: padding becomes a segment of its own
            segment_ids = jnp.where(text, 0 if segment_ids is None else segment_ids, -1)
        call = Call(mode, key, segment_ids, tokens=tokens, domain=domain, real=real)
        x = self._embed(tokens, call)
        x = self.blocks(x, xs={"index": jnp.arange(self.config.periods)}, remat=self.config.remat, call=call)
        x = named("hidden", x)
        if self.config.pool == "none":
            return self._read(x)
        if text is not None:
            return self._read((masked_mean if self.config.pool == "mean" else masked_last)(x, text))
        return self._read(x.mean(1) if self.config.pool == "mean" else x[:, -1])

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> dict[str, Any]:
        """The state before the first token; attention caches hold `capacity` tokens."""
        periods = self.config.periods
        states = [layer.mixer.init_state(batch, capacity, dtype) for layer in self.blocks.layer.layers]
        stacked = jax.tree.map(lambda a: jnp.broadcast_to(a, (periods, *a.shape)), states)
        return {"layers": stacked, "position": jnp.zeros((), jnp.int32)}

    def extend(
        self,
        tokens: Int[Array, "B T"],
        state: dict[str, Any],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        last: bool = False,
    ) -> tuple[Float[Array, "B _ N"], dict[str, Any]]:
        """Continues from a state by several tokens in the parallel form; returns (outputs, state), with `last` that of
        the last token alone."""
        call = Call(segment_ids=segment_ids, position=state["position"], tokens=tokens, carried=True)
        xs = {"index": jnp.arange(self.config.periods), "state": state["layers"]}
        x, layers = self.blocks.scan("extend", self._embed(tokens, call), xs, call)
        return self._read(x[:, -1:] if last else x), {"layers": layers, "position": state["position"] + tokens.shape[1]}

    def step(
        self, token: Int[Array, " B"], state: dict[str, Any], segment_ids: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B N"], dict[str, Any]]:
        """Continues by one token; returns (output, state)."""
        call = Call(segment_ids=segment_ids, position=state["position"], tokens=token, carried=True)
        xs = {"index": jnp.arange(self.config.periods), "state": state["layers"]}
        x, layers = self.blocks.scan("step", self._embed(token, call), xs, call)
        return self._read(x), {"layers": layers, "position": state["position"] + 1}


def take_batch(state: dict[str, Any], indices: Int[Array, " N"]) -> dict[str, Any]:
    """Returns the state of the batch rows `indices` (repeated rows fork a sequence, as beam search does)."""
    return {**state, "layers": jax.tree.map(lambda a: jnp.take(a, indices, axis=1), state["layers"])}
