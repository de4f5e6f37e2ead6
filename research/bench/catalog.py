"""What can be timed, by name: ops and models with their cases, suites with their thresholds, and peers.

Cases and suites register themselves in the file that defines them: those of this package, whose files are imported when
one is first asked for, and those of a user's own file (`--plugin=FILE`). No peer need be installed.
"""

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from research.bench.case import Case
from research.bench.thresholds import Suite
from research.errors import Unregistered, UserError
from research.plugins import import_all

Kind = Literal["op", "model"]
T = TypeVar("T")
Cases = Callable[[Mapping[str, str]], list[Case]]
"""Makes all cases of an op or a model. Its argument is what `parse_peers` returns: some cases need a peer's path."""


@dataclass(frozen=True)
class Entry:
    """An op or a model: a line about its cases, and what makes them."""

    about: str
    cases: Cases


_ENTRIES: dict[Kind, dict[str, Entry]] = {"op": {}, "model": {}}
_SUITES: dict[str, Suite] = {}

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


def register(name: str, about: str, *, kind: Kind = "op") -> Callable[[Cases], Cases]:
    """Makes what is decorated known as the cases of an op, or of a model.

    Args:
      name: of the op or the model, which is also the name of each of its cases.
      about: a line for `--list`.

    Raises:
      UserError: there are cases of this name already.
    """

    def add(cases: Cases) -> Cases:
        _refuse_second(kind, name, _ENTRIES[kind])
        _ENTRIES[kind][name] = Entry(about, cases)
        return cases

    return add


def register_suite(name: str, suite: Suite) -> None:
    """Makes a suite known: cases that are timed together and judged.

    Raises:
      UserError: there is a suite of this name already.
    """
    _refuse_second("suite", name, _SUITES)
    _SUITES[name] = suite


def known(kind: Kind) -> dict[str, Entry]:
    """Ops or models by name, sorted."""
    import_all(__package__ or "")
    return dict(sorted(_ENTRIES[kind].items()))


def suites() -> dict[str, Suite]:
    """Suites by name, sorted."""
    import_all(__package__ or "")
    return dict(sorted(_SUITES.items()))


def find(kind: Kind, name: str) -> Entry:
    """The op or the model of a name.

    Raises:
      UserError: there is none of this kind with this name.
    """
    return _find(kind, name, known(kind))


def find_suite(name: str) -> Suite:
    """The suite of a name.

    Raises:
      UserError: there is none.
    """
    return _find("suite", name, suites())


def cases_of(suite: Suite, peers: Mapping[str, str]) -> list[Case]:
    """The cases of a suite.

    Raises:
      UserError: it wants cases of a name that nobody has registered.
    """
    entries = {**known("model"), **known("op")}
    names = dict.fromkeys(name for name, _ in suite.wanted)
    cases = [case for name in names for case in _find("op", name, entries).cases(peers)]
    return [case for case in cases if suite.wants(case.name, case.shape, case.direction)]


def _find(kind: str, name: str, entries: Mapping[str, T]) -> T:
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3, cutoff=0.6)
        raise Unregistered(
            f"unknown {kind} {name!r}; {'near: ' + ', '.join(near) if near else 'valid: ' + ', '.join(entries)} "
            "(all: --list)"
        )
    return entries[name]


def _refuse_second(kind: str, name: str, entries: Mapping[str, object]) -> None:
    if name in entries:
        raise UserError(f"{kind} {name} is in the catalogue of benchmarks already; choose another name")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
