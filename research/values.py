"""What a value must be, said by an annotation and a rule: configs, options of data sets and fields of models are typed
here.

Standard library only. Whatever reads a setting that a user wrote, on a command line or in a recipe, goes through `fit`.
"""

import ast
import dataclasses
import inspect
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union

from research.errors import UserError, near_names
from research.files import printable

T = TypeVar("T")

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""What stands for a boolean in a text."""
DIGITS = 15
"""Digits of the longest whole number of a duration; of sizes and counts the largest is LARGEST."""
LARGEST = 10**DIGITS


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must keep beside its type; of a tuple every entry.

    Attributes:
      least, most: smallest and largest number.
      above, below: what a number must be greater and less than.
      choices: the only values.
      pattern: regular expression of the whole text.
      says: the pattern in words.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[Any] = ()
    pattern: str = ""
    says: str = ""

    def keeps(self, value: Any) -> bool:
        """Whether a value, or every entry of a tuple, keeps the rule."""
        if isinstance(value, list | tuple):
            return all(self.keeps(entry) for entry in value)
        if self.choices and value not in self.choices:
            return False
        if isinstance(value, str):
            return not self.pattern or re.fullmatch(self.pattern, value) is not None
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return True
        return self._holds(value)

    def _holds(self, value: Any) -> bool:
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return low and (self.most is None or value <= self.most) and (self.below is None or value < self.below)

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(map(str, self.choices))
        limits = (("from", self.least), ("above", self.above), ("up to", self.most), ("below", self.below))
        return self.says or " ".join(f"{word} {limit:,}" for word, limit in limits if limit not in (None, LARGEST))


ANYTHING = Rule()
SIZE, COUNT, SHARE, WEIGHT = (
    Rule(least=1, most=LARGEST),
    Rule(least=0, most=LARGEST),
    Rule(least=0, most=1),
    Rule(least=0),
)
"""A number of things of which there is one at least; of which there may be none; a part of a whole; a factor that is
not negative."""


_DURATION = rf"\s*(\d{{1,{DIGITS}}}((\.\d{{1,{DIGITS}}})?\s*(ep|ex))?|(100|\d{{1,2}})(\.\d{{1,{DIGITS}}})?\s*%)\s*"
DURATION = Rule(least=0, pattern=_DURATION, says="a duration: 500 (updates), '10ep', '50000ex' or '5%' of the run")
Layers = Annotated[int, Rule(least=1, most=9999)]
"""A number of layers; more would only be found out when they are built."""
Rate = Annotated[float, Rule(least=0, below=1)]
"""A probability of being dropped."""


class _Wrong(Exception):
    """A value is not of the kind."""


def fit(value: Any, kind: Any, where: str, rule: Rule = ANYTHING) -> Any:
    """Returns a value as its kind: whole numbers as floats where those are wanted, lists as tuples, yes and no as
    booleans.

    Args:
      value: what a user gave.
      kind: an annotation: bool, int, float, str, tuple[...], a union, dict or Mapping, or Any.
      where: what the message calls the value.
      rule: what it must keep beside its type.

    Raises:
      UserError: it is of another kind, not finite, or against the rule.
    """
    kind, rule = _unwrapped(kind, rule)
    try:
        fitted = _fit(value, kind)
    except _Wrong:
        fitted = None
    if (fitted is None and value is not None) or (value is None and not _takes_none(kind)) or not rule.keeps(fitted):
        wanted = str(rule) if rule.choices or rule.says else f"{described(kind)} {rule}".strip()
        raise UserError(f"{where}={_shown(value)}; valid: {wanted}")
    return fitted


def _unwrapped(kind: Any, rule: Rule) -> tuple[Any, Rule]:
    """Takes the rule out of an annotation that carries one, also where it is that of a tuple's entries."""
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)[0], next((extra for extra in kind.__metadata__ if isinstance(extra, Rule)), rule)
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and args and typing.get_origin(args[0]) is Annotated:
        inner, rule = _unwrapped(args[0], rule)
        return types.GenericAlias(tuple, (inner, *args[1:])), rule
    return kind, rule


def parse(text: str, kind: Any) -> Any:
    """Returns what a text on a command line says where a value of this kind is wanted; `fit` judges it."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    return text if _takes_text(kind) and not isinstance(value, str | types.NoneType) else value


def described(kind: Any) -> str:
    """Returns an annotation in words."""
    plain = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        types.NoneType: "None",
        Any: "a value",
    }
    if kind in plain:
        return plain[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(arg) for arg in args))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple and args and args[-1] is ...:
        return (
            f"a list of {described(args[0]).removeprefix('a ')}s"
            if args[0] in plain
            else f"a list, each entry {described(args[0])}"
        )
    if origin is tuple and args:
        return f"({', '.join(described(arg) for arg in args)})"
    if _is_mapping(kind):
        return "a group of fields"
    if kind in (tuple, list) or origin is list:
        return "a list"
    return "a path" if kind is os.PathLike else f"a {kind.__name__ if isinstance(kind, type) else kind}"


def _fit(value: Any, kind: Any) -> Any:
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _first(value, args)
    if origin is typing.Literal:
        return value if value in args else _wrong()
    if origin is tuple or kind is tuple:
        return _fit_tuple(value, args)
    if kind is list or origin is list:
        return list(value) if isinstance(value, list | tuple) else _wrong()
    if _is_mapping(kind):
        return dict(value) if isinstance(value, Mapping) else _wrong()
    single: dict[Any, Callable[[Any], Any]] = {
        bool: _boolean,
        int: _whole,
        float: _number,
        str: _text,
        types.NoneType: _none,
    }
    if kind in single:
        return single[kind](value)
    return value if isinstance(kind, type) and isinstance(value, kind) else _wrong()


def _first(value: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        try:
            return _fit(value, kind)
        except _Wrong:
            continue
    return _wrong()


def _fit_tuple(value: Any, args: tuple) -> tuple:
    if not isinstance(value, list | tuple):
        return _wrong()
    if not args:
        return tuple(value)
    if args[-1] is ...:
        return tuple(_fit(entry, args[0]) for entry in value)
    return (
        tuple(_fit(entry, arg) for entry, arg in zip(value, args, strict=True)) if len(value) == len(args) else _wrong()
    )


def _wrong() -> Any:
    raise _Wrong


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        return WORDS[value.lower()] if value.lower() in WORDS else _wrong()
    return value if isinstance(value, bool) else _wrong()


def _whole(value: Any) -> int:
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < 2**64
    return int(value) if fits else _wrong()


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return _wrong()
    try:
        return float(value) if math.isfinite(float(value)) else _wrong()
    except OverflowError:
        return _wrong()


def _text(value: Any) -> str:
    return value if isinstance(value, str) and "\x00" not in value else _wrong()


def _none(value: Any) -> None:
    if value is not None:
        _wrong()


def _is_mapping(kind: Any) -> bool:
    plain = typing.get_origin(kind) or kind
    return isinstance(plain, type) and issubclass(plain, Mapping)


def _takes_none(kind: Any) -> bool:
    return kind in (Any, types.NoneType) or types.NoneType in typing.get_args(kind)


def _takes_text(kind: Any) -> bool:
    """Whether text is the first thing that the kind is: then a number on a command line is a text too."""
    first = typing.get_args(kind)[0] if typing.get_origin(kind) in (Union, types.UnionType) else kind
    return first is str


def _shown(value: Any) -> str:
    return printable(repr(value) if not isinstance(value, str) else f"'{value}'")


def fit_options(options: Mapping[str, Any], takes: Callable[..., Any], where: str) -> dict[str, Any]:
    """Returns keyword options with the types that a function's or dataclass's annotations ask for; unknown names pass.

    Whole numbers may be negative only where the default is.

    Raises:
      UserError: a value of another type.
    """
    kinds, parameters = (
        typing.get_type_hints(takes.__init__ if inspect.isclass(takes) else takes, include_extras=True),
        inspect.signature(takes).parameters,
    )
    out = dict(options)
    for name, value in options.items():
        if name in kinds and name in parameters:
            out[name] = fit(value, kinds[name], f"{where}{name}", not_negative(parameters[name].default, kinds[name]))
    return out


def check_options(options: Collection[str], valid: Collection[str], where: str, of: str) -> None:
    """Raises UserError for an option that is not valid, with the near ones; `where` and `of` as of `made_of`."""
    for name in options:
        if name not in valid:
            near = ", ".join(near_names(name, valid))
            raise UserError(
                f"{where}{name} is unknown to {of}{f'; near: {near}' if near else ', which has no options'}"
            )


def made_of(kind: type[T], options: Mapping[str, Any], where: str, of: str, **given: Any) -> T:
    """Returns a dataclass of a user's options, typed and checked as by `fit_options`.

    Args:
      kind: the dataclass.
      options: some of its fields, by name.
      where: what stands before a name in a message, e.g. "task.options.".
      of: what is made, for messages.
      given: fields that are not the user's to set.

    Raises:
      UserError: an unknown name, or a value of another type.
    """
    valid = [f.name for f in dataclasses.fields(kind) if f.name not in given]  # type: ignore[arg-type]  # T is one
    check_options(options, valid, where, of)
    return kind(**fit_options(options, kind, where), **given)


def not_negative(default: Any, kind: Any, most: int = LARGEST) -> Rule:
    """The rule that whole numbers count from 0 up to `most`: from a default that is negative, and from 1 in a list like
    the default's."""
    least = default if isinstance(default, int) and not isinstance(default, bool) and default < 0 else 0
    if isinstance(default, tuple) and default and all(isinstance(entry, int) and entry > 0 for entry in default):
        least = 1
    return Rule(least=least, most=most) if _counts(kind) else ANYTHING


def _counts(kind: Any) -> bool:
    """Whether every number of a kind is a whole one."""
    parts = typing.get_args(kind)
    return kind is int or (bool(parts) and all(part in (..., types.NoneType) or _counts(part) for part in parts))
