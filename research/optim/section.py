"""The config's section `optim`, and what each optimizer takes of it: its own constants where a recipe leaves them open.

Without JAX: recipes are read by it before anything heavy is imported.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from research.errors import UserError
from research.optim.registry import CONSTANTS, Optimizer, find, known
from research.sections import Only, Section, free, setting
from research.values import DURATION, WEIGHT, Rule, fit

SCHEDULES = ("cosine", "linear", "constant", "cosine_power")
_AVERAGE = Rule(least=0, below=1)
_SOME = Rule(above=0)


@dataclass(frozen=True)
class OptimSection(Section):
    """The section. What is None follows the optimizer, see `resolve`; of the constants an optimizer has those that
    its factory takes; `options` are those that it alone has."""

    name: str = setting("adamw", "optimizer, see docs/optimizers.md")
    lr: float | None = setting(None, "largest learning rate; None: the optimizer's own", WEIGHT)
    weight_decay: float | None = setting(
        None, "decoupled decay, multiplied by the learning rate; None: the optimizer's own", WEIGHT
    )
    b1: float | None = setting(None, "decay of the average of gradients", _AVERAGE)
    b2: float | None = setting(
        None, "decay of the average of squared gradients; of Lion, of its momentum; of Adan, of differences", _AVERAGE
    )
    b3: float | None = setting(
        None, "of Adan, decay of the average of squares; of AdEMAMix, of the slow average", _AVERAGE
    )
    rho: float | None = setting(None, "of rms, stddev and adadelta, decay of the average of squares", _AVERAGE)
    eps: float | None = setting(None, "added to what is divided by", _SOME)
    momentum: float | None = setting(None, "decay of the sum (sgd) or of the average (muon) of gradients", _AVERAGE)
    nesterov: bool | None = setting(None, "momentum looks ahead")
    clip_norm: float = setting(0.0, "largest global norm of the gradients; 0: off", WEIGHT)
    schedule: str = setting("cosine", "how the learning rate falls after the warm-up", Rule(choices=SCHEDULES))
    warmup: str | int = setting("5%", "updates of linear rise", DURATION)
    final_lr: float = setting(
        0.0,
        "learning rate at the end",
        WEIGHT,
        Only("schedules that fall", lambda config: config.optim.schedule != "constant"),
    )
    order: float = setting(
        2.0,
        "power of cosine_power; 1 is plain cosine",
        Rule(least=1, most=1e6),
        Only("optim.schedule=cosine_power", lambda config: config.optim.schedule == "cosine_power"),
    )
    decay_rules: tuple[Any, ...] = setting(
        (), "(regular expression, factor) of weight decay by parameter; (): by what each array is"
    )
    lr_rules: tuple[Any, ...] = setting((), "(regular expression, factor) of the learning rate by parameter")
    options: Mapping[str, Any] = free()


def resolve(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section with the optimizer's own values where it holds None, and those of its options.

    Raises:
      UserError: unknown optimizer, a constant or an option that it does not have, no learning rate where it has no
        usual one, a bad rule.
    """
    own = find(section["name"])
    for field in CONSTANTS:
        if section[field] is not None and field not in own.constants:
            valid = ", ".join(("lr", "weight_decay", *own.constants))
            raise UserError(
                f"config.optim.{field}={section[field]!r}: {own.name} has no such constant, only {valid}; "
                f"remove it, or --config.optim.{field}=None"
            )
    if section["lr"] is None and own.lr is None:
        raise UserError(f"config.optim.lr is missing: {own.name} has no usual learning rate; set one")
    for field in ("decay_rules", "lr_rules"):
        compiled(section[field], f"config.optim.{field}")
    return _filled(section, own)


def drop_left_over(section: MutableMapping[str, Any], given: Collection[str]) -> None:
    """Takes out of the section the constants and options of a recipe's own optimizer that the one which a command line
    chose instead does not have.

    Args:
      section: with what the command line sets; changed here.
      given: the fields of the section that it sets, e.g. "name" or "options.alpha".

    Raises:
      UserError: unknown optimizer.
    """
    if "name" not in given:
        return
    own = find(section["name"])
    for field in CONSTANTS:
        if field not in own.constants and field not in given:
            section[field] = None
    section["options"] = {
        name: value for name, value in section["options"].items() if name in own.options or f"options.{name}" in given
    }


def stored(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section of a run's config.json as `resolve` would: constants that the optimizer does not have never
    did anything there.

    An optimizer that is no longer there keeps what it had: such a run is only read.

    Raises:
      UserError: an option that the optimizer does not have.
    """
    own = known().get(section["name"])
    if own is None:
        return dict(section)
    return _filled(
        {key: None if key in CONSTANTS and key not in own.constants else value for key, value in section.items()}, own
    )


def _filled(section: Mapping[str, Any], own: Optimizer) -> dict[str, Any]:
    values = {"lr": own.lr, "weight_decay": own.weight_decay, **own.constants}
    filled = {key: values.get(key) if value is None else value for key, value in section.items()}
    return {**filled, "options": own.filled(section["options"])}


def taken(section: OptimSection) -> dict[str, Any]:
    """Returns the constants and options of the section's optimizer, its own where the section leaves them out.

    Raises:
      UserError: unknown optimizer, or an option that it does not have.
    """
    own, given = find(section.name), dataclasses.asdict(section)
    constants = {key: value if given[key] is None else given[key] for key, value in own.constants.items()}
    return {**constants, **own.filled(section.options)}


def compiled(rules: Sequence[Any], field: str) -> list[tuple[re.Pattern[str], float]]:
    """Returns rules ready to be searched.

    Raises:
      UserError: no list of (regular expression, factor from 0).
    """
    out = []
    for rule in rules:
        fitted = fit(rule, tuple, field)
        if len(fitted) != 2:
            raise UserError(f"{field}: {rule!r} is no pair; write a list of (regular expression, number)")
        pattern, value = (
            fit(fitted[0], str, f"{field}: a pattern"),
            fit(fitted[1], float, f"{field}: {fitted[0]!r}", WEIGHT),
        )
        try:
            out.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(f"{field}: {pattern!r}: {error}; write a list of (regular expression, number)") from None
    return out
