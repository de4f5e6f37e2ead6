"""The collectives of a compiled program, read from its HLO: kind, bytes, which axes of the mesh they run over, how
often.

XLA counts a loop's body once; here it counts as often as the loop runs, where the compiler knows that.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)[^=]*\{$")
_CALL = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_OP = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=\{(\{[^=]*?\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[^=]*?\})\}")


@dataclass(frozen=True, order=True)
class Collective:
    """A collective of a step.

    Attributes:
      kind: one of `KINDS`.
      axes: of the mesh, over which its groups reach; "all" where no mesh was given.
      shapes: of its results on one device, as HLO writes them.
      bytes: of these results.
      group: devices of a group.
      times: how often the step runs it.
    """

    kind: str
    axes: tuple[str, ...]
    shapes: str
    bytes: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends at every run, by the ring algorithm."""
        n = self.group
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-gather": (n - 1) / n,
            "all-to-all": (n - 1) / n,
        }
        return self.bytes * share.get(self.kind, 1.0)


def collectives(hlo: str, mesh: Any = None) -> list[Collective]:
    """Returns the collectives of a compiled module's text, equal ones in one entry.

    Args:
      hlo: `compiled.as_text()`.
      mesh: the mesh that it was compiled for, which gives groups their axes.
    """
    places = _runs(hlo)
    found: Counter = Counter()
    for computation, line in _lines(hlo):
        match = _OP.search(line)
        if match is None or not places[computation]:
            continue
        shapes, kind, start = match.groups()
        results = _SHAPE.findall(shapes)
        if start and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
            results = results[len(results) // 2 :] if kind == "all-gather" else results[1:2]
        groups = _groups(line)
        size = sum(_bytes(dtype, sizes) for dtype, sizes in results)
        text = " ".join(f"{dtype}[{sizes}]" for dtype, sizes in results)
        every = mesh.size if mesh is not None else 2
        group = 2 if kind == "collective-permute" else len(groups[0]) if groups else every
        found[(kind, axes_of(groups, mesh), text, size, group)] += places[computation]
    return sorted(
        Collective(kind, axes, text, size, group, times) for (kind, axes, text, size, group), times in found.items()
    )


def axes_of(groups: Sequence[Sequence[int]], mesh: Any) -> tuple[str, ...]:
    """Returns the axes of the mesh along which the devices of a group differ; without groups all devices are one."""
    if mesh is None:
        return ("all",)
    if not groups:
        return tuple(name for name, size in mesh.shape.items() if size > 1)
    sizes = tuple(mesh.shape.values())
    differs = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))
        differs |= (places != places[:, :1]).any(1)
    return tuple(name for name, differ in zip(mesh.shape, differs, strict=True) if differ)


def summary(found: Sequence[Collective]) -> dict[str, int]:
    """Returns "KIND over AXES: SHAPES" -> how often; what stored files hold."""
    out: Counter = Counter()
    for c in found:
        out[f"{c.kind} over {'+'.join(c.axes) or 'nothing'}: {c.shapes}"] += c.times
    return dict(sorted(out.items()))


def by_axes(found: Sequence[Collective]) -> dict[tuple[str, ...], float]:
    """Returns axes -> bytes that each device sends along them in a step."""
    out: dict[tuple[str, ...], float] = {}
    for c in found:
        out[c.axes] = out.get(c.axes, 0) + c.sent * c.times
    return out


def _lines(hlo: str):
    """Yields (name of the computation, line)."""
    name = ""
    for line in hlo.splitlines():
        if line and not line.startswith((" ", "}")) and line.rstrip().endswith("{"):
            match = _COMPUTATION.match(line.rstrip().split(" (")[0] + " {")
            name = match.group(2) if match else ""
        elif line.startswith(" "):
            yield name, line


def _runs(hlo: str) -> Mapping[str, int]:
    """Returns computation -> how often the entry runs it."""
    entry = ""
    calls: dict[str, list[tuple[str, int]]] = {}
    for line in hlo.splitlines():
        if line.startswith("ENTRY"):
            entry = line.split()[1].lstrip("%").split("(")[0]
    for computation, line in _lines(hlo):
        names = _CALL.findall(line)
        for branches in _BRANCHES.findall(line):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        trips = _TRIPS.search(line)
        times = int(trips.group(1)) if trips and " while(" in line else 1
        for name in names:
            calls.setdefault(computation, []).append((name, times))
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for inner, several in calls.get(name, ()):
            visit(inner, times * several)

    visit(entry, 1)
    return runs


def _groups(line: str) -> list[list[int]]:
    """Returns the groups of devices of a line, explicit, in XLA's iotan implementation or by the axes of a mesh; of a
    permute the pairs.

    Raises:
      ValueError: groups in an implementation that is not known.
    """
    if mesh := _MESH.search(line):
        return _groups_of_mesh(*mesh.groups())
    if iota := _IOTA.search(line):
        count, size, dims, order = iota.groups()
        ids = np.arange(int(count) * int(size)).reshape([int(d) for d in dims.split(",")])
        if order:
            ids = ids.transpose([int(i) for i in order.split(",")])
        return ids.reshape(int(count), int(size)).tolist()
    match = _GROUPS.search(line) or _PAIRS.search(line)
    if match is None:
        if "replica_groups={}" not in line and "replica_groups=" in line:
            raise ValueError(f"groups of an unknown implementation: {line.strip()[:300]}")
        return []
    return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match.group(1))]


def _groups_of_mesh(axes: str, dims: str | None, order: str | None, over: str) -> list[list[int]]:
    """Groups of mesh['a'=4,'b'=2] {'a'}, maybe with an order of devices; of an axis 'a':(2)2 the part of 2 behind the
    first 2 takes part."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if dims:
        ids = ids.reshape([int(d) for d in dims.split(",")])
        ids = ids.transpose([int(i) for i in order.split(",")]) if order else ids
    shape: list[int] = []
    takes_part: list[bool] = []
    wanted = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)
    }
    for name, size in sizes.items():
        before, part = wanted.get(name, (size, 1))
        part = part or size
        shape += [before, part, size // before // part]
        takes_part += [False, name in wanted, False]
    ids = ids.reshape(shape)
    kept = [i for i, part in enumerate(takes_part) if not part]
    joined = [i for i, part in enumerate(takes_part) if part]
    return ids.transpose(kept + joined).reshape(-1, math.prod(shape[i] for i in joined)).tolist()


def _bytes(dtype: str, sizes: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
    return math.prod(int(s) for s in sizes.split(",") if s) * bits // 8
