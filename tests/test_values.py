"""What a value must be: types, ranges, words for booleans, and the message that a wrong one gets."""

import os
from typing import Any

import pytest

from research.errors import UserError
from research.values import Rule, fit, fit_options, parse


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("no", bool, False),
        ("On", bool, True),
        (3, float, 3.0),
        ([1, 2], tuple[int, ...], (1, 2)),
        (((3,), [5, 7]), tuple[tuple[int, ...], ...], ((3,), (5, 7))),
        (0.5, float | tuple[float, ...], 0.5),
        (None, int | None, None),
        ("a/b", str | os.PathLike | None, "a/b"),
        ({"a": 1}, dict, {"a": 1}),
        (None, Any, None),
    ],
)
def test_values_become_their_kind(value, kind, expected):
    found = fit(value, kind, "x")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("maybe", bool),
        (1, bool),
        (True, int),
        (True, float),
        (3.7, int),
        (3.0, int),
        ("3", int),
        ("1e-3", float),
        (float("nan"), float),
        (float("-inf"), float),
        (10**400, float),
        (2**64, int),
        (None, int),
        (3, str),
        ("a\x00", str),
        ((1, 2, 3), tuple[int, int]),
        ("12", tuple[int, ...]),
        ((1, "a"), tuple[int, ...]),
        ([], dict),
    ],
)
def test_other_kinds_are_refused_in_a_line(value, kind):
    with pytest.raises(UserError, match=r"^config\.x=.*; valid: ") as caught:
        fit(value, kind, "config.x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_rules_hold_for_every_entry():
    assert fit((0.5, 1), tuple[float, ...], "x", Rule(least=0, most=1)) == (0.5, 1.0)
    with pytest.raises(UserError, match="x=\\(0.5, 2\\); valid: a list of numbers from 0 up to 1"):
        fit((0.5, 2), tuple[float, ...], "x", Rule(least=0, most=1))
    with pytest.raises(UserError, match="x=0; valid: a number above 0 below 1"):
        fit(0, float, "x", Rule(above=0, below=1))
    with pytest.raises(UserError, match="x='b'; valid: a, c$"):
        fit("b", str, "x", Rule(choices=("a", "c")))


def test_text_of_a_command_line():
    assert (
        parse("500", str | int) == "500"
        and parse("None", float | None) is None
        and parse("(1, 2)", tuple[int, ...]) == (1, 2)
    )
    assert parse("1e-3", float) == 1e-3 and parse("(" * 500, int) == "(" * 500 and parse("nan", float) == "nan"


def test_options_follow_a_signature():
    def load(name: str, *, user: int = -1, length: int = 8, noise: float = 0.0, **rest: Any) -> None:
        del name, user, length, noise, rest

    assert fit_options({"user": -1, "noise": 1, "else": "x"}, load, "o.") == {"user": -1, "noise": 1.0, "else": "x"}
    for wrong in ({"length": -1}, {"length": 2.5}, {"user": -2}, {"noise": "much"}):
        with pytest.raises(UserError, match=f"o.{next(iter(wrong))}="):
            fit_options(wrong, load, "o.")
