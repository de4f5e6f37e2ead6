"""What can be timed, by name. Nothing heavy is imported here: listing is instant, and no peer need be installed."""

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from research.errors import UserError

if TYPE_CHECKING:
    from research.bench.case import Case

OPS = {
    "depthwise_conv2d": ("depthwise_cases", "depthwise convolution of maps, kernels 3 to 13"),
    "depthwise_conv1d": ("depthwise_cases", "causal depthwise convolution of width 4"),
    "linear_recurrence": ("scan_cases", "h_t = a_t h_{t-1} + b_t"),
    "selective_scan": ("scan_cases", "the recurrence of Mamba-1"),
    "ssd": ("linear_attention_cases", "state space duality of Mamba-2, length 512 to 16,384"),
    "trapezoidal_scan": ("linear_attention_cases", "the state space of Mamba-3"),
    "linear_attention": ("linear_attention_cases", "linear, gated and delta-rule attention, length 512 to 16,384"),
    "softmax_attention": ("attention_cases", "softmax attention, linear attention beside it at length 8,192"),
    "sliding_window_attention": ("attention_cases", "softmax attention to the 256 tokens before"),
    "routing_attention": ("attention_cases", "softmax attention inside clusters of tokens"),
    "grouped_matmul": ("grouped_cases", "matrix products of sorted, ragged groups"),
    "routed_conv": ("routed_cases", "convolutions with an expert for each image, 2 and 8 experts"),
}
"""Op to the file of its cases and a line about it."""

MODELS = {
    "unireplknet_a": ("models", "training step, batch 32, 64x64 pixels, AdamW"),
    "mamba": ("language_models", "language model of two Mamba-1 layers, loss and gradients"),
    "mamba2": ("language_models", "the same of Mamba-2 layers"),
    "gla": ("language_models", "the same of gated linear attention layers"),
    "moe_ffn": ("moe_cases", "a mixture's training step beside a dense FFN of the same active FLOPs, 8 and 64 experts"),
    "sequence_training": (
        "sequence_cases",
        "a training step of every linear mixer, length 256 to 8,192 at 8,192 tokens",
    ),
    "sequence_decoding": (
        "sequence_cases",
        "one step of generation at positions 100 and 10,000, recurrent mixers and attention",
    ),
}

PEERS = {
    "torch": ("package torch", ("torch",)),
    "transformers": ("packages torch and transformers", ("torch", "transformers")),
    "unireplknet": ("package torch and the official file: --peer=unireplknet:PATH/unireplknet.py", ("torch",)),
}
"""Peer to what it needs, in words and as packages."""

WITH_PATH = ("unireplknet",)


def installed(peer: str) -> bool:
    """Whether the packages that a peer needs can be imported."""
    return all(importlib.util.find_spec(package) is not None for package in PEERS[peer][1])


def parse_peers(texts: Iterable[str]) -> dict[str, str]:
    """`NAME` or `NAME:PATH` to name and path ("" where there is none).

    Raises:
      UserError: an unknown peer, one whose packages are not installed, a path that is missing or does not exist.
    """
    peers = {}
    for text in texts:
        name, _, path = text.partition(":")
        if name not in PEERS:
            raise UserError(f"unknown peer {name!r}; valid: {', '.join(PEERS)}")
        needs, packages = PEERS[name]
        if not installed(name):
            have = [peer for peer in PEERS if installed(peer)]
            raise UserError(
                f"peer {name} is not installed: it needs {needs} (pip install {' '.join(packages)}); installed: "
                f"{_listed(have)}"
            )
        if name in WITH_PATH and not Path(path).is_file():
            raise UserError(f"peer {name}: no file at {path!r}; expected --peer={name}:PATH/{name}.py")
        if path and name not in WITH_PATH:
            raise UserError(f"peer {name} takes no path; valid: --peer={name}")
        peers[name] = path
    return peers


def known(kind: str, name: str) -> str:
    """The name itself.

    Args:
      kind: "op" or "model".

    Raises:
      UserError: there is none of this kind with this name.
    """
    names = {"op": OPS, "model": MODELS}[kind]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
        raise UserError(
            f"unknown {kind} {name!r}; {'near: ' + ', '.join(near) if near else 'valid: ' + ', '.join(names)} "
            "(all: --list)"
        )
    return name


def cases(name: str, peers: dict[str, str]) -> list["Case"]:
    """All cases of an op or a model.

    Args:
      peers: as `parse_peers` returns them: some cases need the path.
    """
    module = importlib.import_module(f"research.bench.{({**OPS, **MODELS})[name][0]}")
    found: list[Case] = module.cases(name, peers)
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
