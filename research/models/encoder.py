"""Sentence encoders that are told the domain of a text: the domain picks the expert of every layer (enforced routing).

After "Mixture of experts for text embeddings with enforced routing" (arXiv 2401.15713): attention, embeddings and norms
are shared, each FFN is one expert a domain, and a token of the domain stands at position 0 in place of
whatever the sentence holds there. The sentence's vector is the mean over its real tokens, through LayerNorm, Linear,
tanh, Linear. An encoder that is trained with dense FFNs extends to experts without a change of its
function (`research.nested.upcycle`).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.models.registry import Entry, register
from research.models.sequence import SequenceConfig
from research.models.sequence_layers import MIXTURE, Period
from research.modules import mesh
from research.modules.axes import Init, Kind
from research.modules.dropout import dropout
from research.modules.embedding import Embedding
from research.modules.features import named
from research.modules.layers import Linear, normal_02
from research.modules.mixers.attention import Attention
from research.modules.mixers.base import Call
from research.modules.moe_options import Moe
from research.modules.norms import LayerNorm, RMSNorm
from research.modules.state import Stack
from research.ops.pooling import masked_mean


@dataclass(frozen=True)
class EncoderConfig(SequenceConfig):
    """Description of one encoder; fields as in `SequenceConfig`, but for:

    Attributes:
      num_domains: how many domains there are: tokens of position 0 and, with router="domain", experts of each mixture.
      output_dim: numbers of the sentence's vector; 0: dim.
      moe: its `num_experts` 0 stands for one a domain.
    """

    num_domains: int = 1
    pattern: str = "attention"
    pool: str = "mean"
    ffn: str = MIXTURE
    attention: Attention = Attention(causal=False)
    moe: Moe = Moe(num_experts=0, num_experts_per_tok=1, router="domain", balance_loss_coef=0.0)

    renamed: ClassVar[dict[str, str]] = {"domains": "num_domains"}
    family: ClassVar[str] = "encoder"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {**SequenceConfig.derived, "output_dim": ("dim",)}
    elastic: ClassVar[dict[str, str]] = {
        k: v for k, v in SequenceConfig.elastic.items() if k not in ("experts", "active")
    }

    def __post_init__(self):
        if self.num_domains < 1:
            raise UserError(f"encoder: num_domains={self.num_domains}; valid: whole numbers from 1")
        if self.pool != "mean" or self.vector_tokens:
            raise UserError(
                f"encoder: pool={self.pool!r}, vocab_size={self.vocab_size}; valid: "
                "pool=mean over tokens of a vocabulary"
            )
        super().__post_init__()
        if not self.output_dim:
            object.__setattr__(self, "output_dim", self.dim)
        if self.has_mixtures and self.moe.router == "domain" and self.mixture.num_experts != self.num_domains:
            raise UserError(
                f"encoder: moe.num_experts={self.moe.num_experts} for num_domains={self.num_domains}: "
                f"each domain has one expert; valid: {self.num_domains}, or 0 for as many as there are"
            )

    @property
    def mixture(self) -> Moe:
        return replace(self.moe, num_experts=self.moe.num_experts or self.num_domains).resolve(self.ffn_dim)

    @property
    def streams(self) -> bool:
        return False

    def build(self, init: Init) -> nnx.Module:
        return EncoderModel(self, init)

    def check_domain(self, domain: np.ndarray | Array, where: str) -> None:
        """Raises UserError for a label of a domain that the model does not have; `where` says whose it is."""
        wrong = np.asarray(domain)[(np.asarray(domain) < 0) | (np.asarray(domain) >= self.num_domains)]
        if wrong.size:
            raise UserError(
                f"{where}: domain label {wrong.flat[0]} that no expert has; valid: 0..{self.num_domains - 1}"
            )


class Pooler(nnx.Module):
    """Mean over the real tokens, LayerNorm, Linear, tanh, Linear: D D + D N + 3 D + N parameters."""

    def __init__(self, channels: int, outputs: int, init: Init):
        self.norm = LayerNorm(channels, "embed", init.child("norm"))
        self.hidden = Linear(channels, channels, ("embed", "pooler/mlp"), init.child("hidden"))
        self.out = Linear(channels, outputs, ("pooler/mlp", "classes"), init.child("out"))

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B N"]:
        return self.out(jnp.tanh(self.hidden(self.norm(masked_mean(x, mask)))))


class EncoderModel(nnx.Module):
    """The network: tokens and their domain in, one vector a sentence out."""

    def __init__(self, config: EncoderConfig, init: Init):
        self.config = config
        init = replace(init, branches=config.periods * sum(1 if ffn == "none" else 2 for _, ffn in config.period))
        self.embedding = Embedding(config.vocab_size, config.dim, init.child("embedding"))
        self.domain_tokens = init.param(
            "domain_tokens", (config.num_domains, config.dim), ("domains", "embed"), equal_rows, Kind.EMBEDDING
        )
        self.blocks = Stack(
            lambda sub: Period(config, sub), config.periods, "layers", init.child("blocks"), unroll=config.unroll
        )
        self.norm = RMSNorm(config.dim, "embed", init.child("norm"), eps=config.norm_eps)
        self.pooler = Pooler(config.dim, config.output_dim, init.child("pooler"))

    def embed(self, tokens: Int[Array, "B T"], domain: Int[Array, " B"]) -> Float[Array, "B T D"]:
        """Returns the embedded tokens, the domain's own at position 0."""
        first = mesh.on_local_shard(lambda domain, tokens, _: tokens[domain][:, None], domain, self.domain_tokens[...])
        return mesh.by_rows(jnp.concatenate([first, self.embedding(tokens[:, 1:])], 1))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        domain: Int[Array, " B"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        *,
        real: Bool[Array, " B"] | None = None,
        mode: str = "eval",
        key: Array | None = None,
    ) -> Float[Array, "B N"]:
        """Returns the vectors of the sentences.

        Args:
          tokens: ids; what stands at position 0 is not read.
          domain: of each sentence; None: the first. Labels that are known here are checked, those inside a compiled
            program where the data are set up.
          mask: which tokens are real; padding is seen by no other token and does not count in the mean. None: all are.
          real: which sentences are no filler of a batch; the others compete for no expert. None: all.
          mode, key: as in every model.

        Raises:
          UserError: a domain that no expert has.
        """
        domain = jnp.zeros(len(tokens), jnp.int32) if domain is None else domain
        if not isinstance(domain, jax.core.Tracer):
            self.config.check_domain(domain, "encoder")
        if mask is not None:
            mask = mask.astype(bool).at[:, 0].set(True)
            real = mask if real is None else mask & real[:, None]
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        call = Call(mode, key, mask.astype(jnp.int32), tokens=tokens, domain=domain, real=real)
        x = self.embed(tokens, domain)
        if self.config.dropout and mode == "train" and key is not None:
            x = dropout(x, self.config.dropout, jax.random.fold_in(key, 2**20))
        x = self.blocks(x, xs={"index": jnp.arange(self.config.periods)}, remat=self.config.remat, call=call)
        return self.pooler(named("hidden", self.norm(x)), mask)


def equal_rows(key: Array, shape, dtype=jnp.float32) -> Array:
    """Initialises every domain's token alike, N(0, 0.02): domains differ by what they learn."""
    return jnp.broadcast_to(normal_02(key, (1, *shape[1:]), dtype), shape)


def _small(ffn: str, domains: int) -> EncoderConfig:
    """1.6 M active parameters for two cores, half of them embeddings; short sentences of 8,192 words."""
    return EncoderConfig(
        vocab_size=8192,
        length=64,
        dim=128,
        depth=2,
        ffn=ffn,
        num_domains=domains,
        attention=Attention(num_heads=4, causal=False),
    )


VARIANTS: dict[str, EncoderConfig] = {
    "encoder": EncoderConfig(),
    "encoder_small": _small("glu", 5),
    "domain_encoder_small": _small(MIXTURE, 5),
}
"""Of a size for two cores, dense and with experts of five domains, and "encoder", to set the fields of."""

PAPER = "arXiv 2401.15713"


_TINY = dict(
    vocab_size=10, length=12, dim=16, depth=2, output_dim=10, num_domains=3, attention=dict(num_heads=2, head_dim=8)
)
for _name, _config in VARIANTS.items():
    register(Entry(_name, _config, PAPER, "this repository", _TINY))
