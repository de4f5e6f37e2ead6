"""What a step would take on chips that are not here: the longest of computing, memory and the links between chips.

Figures are the vendors' for dense bfloat16; a step reaches some share of them, so a prediction is a floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from research.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      flops: dense bfloat16, a second.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      links: bytes a second that it sends to its neighbours, over all links, in one direction.
      network: bytes a second of the data-centre network, the chip's share of its host's.
      source: where the figures stand.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float
    source: str


CHIPS = {
    "tpu_v5e": Chip(
        197e12,
        16e9,
        819e9,
        200e9,
        3.1e9,
        "Cloud TPU documentation, v5e: interconnect 400 GB/s in both directions, 6.4 Tbit/s a pod of 256",
    ),
    "tpu_v5p": Chip(
        459e12, 95e9, 2765e9, 600e9, 6.25e9, "Cloud TPU documentation, v5p: interconnect 1200 GB/s in both directions"
    ),
    "tpu_v6e": Chip(
        918e12, 32e9, 1638e9, 400e9, 12.5e9, "Cloud TPU documentation, v6e: interconnect 800 GB/s in both directions"
    ),
    "h100": Chip(
        989e12,
        80e9,
        3350e9,
        450e9,
        50e9,
        "NVIDIA H100 SXM data sheet: NVLink 900 GB/s in both directions; 400 Gbit/s a GPU between hosts",
    ),
    "h200": Chip(
        989e12,
        141e9,
        4800e9,
        450e9,
        50e9,
        "NVIDIA H200 SXM data sheet: NVLink 900 GB/s in both directions; 400 Gbit/s a GPU between hosts",
    ),
    "b200": Chip(
        2250e12,
        180e9,
        7700e9,
        900e9,
        50e9,
        "NVIDIA HGX B200 data sheet: NVLink 1800 GB/s in both directions; 400 Gbit/s a GPU between hosts",
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step on one chip, each part alone; the step takes `hidden_s` at best and `exposed_s` where nothing
    overlaps."""

    compute_s: float
    memory_s: float
    links_s: float
    flops: float  # of the chip in a step
    peak: float

    @property
    def hidden_s(self) -> float:
        return max(self.compute_s, self.memory_s, self.links_s)

    @property
    def exposed_s(self) -> float:
        return max(self.compute_s, self.memory_s) + self.links_s

    @property
    def bound(self) -> str:
        """What the best case waits for."""
        return max(
            ("compute", self.compute_s), ("memory", self.memory_s), ("links", self.links_s), key=lambda part: part[1]
        )[0]

    def mfu(self, seconds: float) -> float:
        """Share of the peak that a step of so many seconds makes use of."""
        return self.flops / seconds / self.peak


def chip(name: str) -> Chip:
    """Returns a chip by name.

    Raises:
      UserError: it is not known.
    """
    if name not in CHIPS:
        raise UserError(f"unknown chip {name!r}; valid: {', '.join(CHIPS)}")
    return CHIPS[name]


def predict(name: str, *, flops: float, memory_bytes: float, sent: Mapping[bool, float]) -> Prediction:
    """Returns the prediction of a step.

    Args:
      name: of the chip.
      flops: of one chip.
      memory_bytes: that one chip reads and writes.
      sent: bytes that one chip sends, over the network between slices or hosts (True) and over its links (False).
    """
    c = chip(name)
    links = sent.get(False, 0.0) / c.links + sent.get(True, 0.0) / c.network
    return Prediction(flops / c.flops, memory_bytes / c.bandwidth, links, flops, c.flops)
