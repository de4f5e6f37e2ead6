"""Sections of a config: frozen dataclasses made of plain values, with what each field is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from research.errors import UserError
from research.sections import Section, defaults, fields_of, free, free_groups, group, read, setting
from research.train.config import base_config, resolved
from research.train.sections import RunConfig
from research.values import SIZE


@dataclass(frozen=True)
class Inner(Section):
    width: int = setting(3, "how wide", SIZE)
    kinds: tuple[str, ...] = setting((), "which kinds")
    options: Mapping[str, Any] = free()


@dataclass(frozen=True)
class Outer(Section):
    rate: float | None = setting(None, "how fast")
    inner: Inner = group(Inner)

    def check(self) -> None:
        if self.rate == self.inner.width:
            raise UserError("rate and width are the same")


def test_plain_values_become_a_section_and_its_defaults_plain_values():
    plain = {"rate": None, "inner": {"width": 3, "kinds": (), "options": {}}}
    assert defaults(Outer) == plain and read(Outer, plain) == Outer()
    given = {"rate": 2, "inner": {"width": 4, "kinds": ["a", "b"], "options": {"x": 1}}}
    made = read(Outer, given)
    assert made == Outer(2.0, Inner(4, ("a", "b"), {"x": 1})) and type(made.rate) is float
    assert list(fields_of(Outer)) == ["rate", "inner.width", "inner.kinds"]
    assert free_groups(Outer) == ("inner.options",)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"width": 0}, "config.inner.width=0; valid: a whole number from 1"),
        ({"kinds": 3}, "config.inner.kinds=3; valid: a list of texts"),
        ({"options": 3}, "config.inner.options=3; valid: a group of fields"),
        ({"widht": 2}, "unknown config field 'inner.widht'; near: inner.width"),
    ],
)
def test_values_are_judged_where_they_stand(inner, message):
    with pytest.raises(UserError, match=message):
        read(Outer, {"rate": None, "inner": {**defaults(Inner), **inner}})


def test_what_is_missing_or_means_nothing_together_is_refused():
    with pytest.raises(UserError, match=r"config.inner.kinds is missing; change a group by config.inner.update"):
        read(Outer, {"rate": None, "inner": {"width": 3, "options": {}}})
    with pytest.raises(UserError, match="rate and width are the same"):
        read(Outer, {**defaults(Outer), "rate": 3})


def test_a_run_s_config_is_read_once_and_stays():
    config = RunConfig.of(resolved(base_config()))
    assert RunConfig.of(config) is config and config.optim.lr == 1e-3 and config.mesh.sizes["data"] == -1
    assert config.report.latency_batches == (1, 32) and config.train.duration == "10ep"
