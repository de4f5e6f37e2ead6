"""The config's section `optim`, and what each optimizer takes of it: its own constants where a recipe leaves them open.

Without JAX: recipes are read by it before anything heavy is imported. The directions themselves stand in
`directions.py`.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from research.errors import Unregistered, UserError
from research.sections import Only, Section, setting
from research.values import DURATION, WEIGHT, Rule, fit

SCHEDULES = ("cosine", "linear", "constant", "cosine_power")
_AVERAGE = Rule(least=0, below=1)
_SOME = Rule(above=0)


@dataclass(frozen=True)
class OptimSection(Section):
    """The section. What is None follows the optimizer, see `resolve`; of the constants an optimizer has those that
    `OPTIMIZERS` gives it."""

    name: str = setting("adamw", "optimizer, see OPTIMIZERS in research/optim/section.py")
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


CONSTANTS = ("b1", "b2", "b3", "rho", "eps", "momentum", "nesterov")
"""Fields that are constants of directions; None: the optimizer's own."""


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer takes where a recipe leaves it open.

    Attributes:
      constants: the constants that it has, with its own values.
      source: the paper.
      lr: its usual learning rate; None where there is none, so that a recipe must set one.
      weight_decay: its usual decay.
    """

    constants: Mapping[str, float | bool]
    source: str
    lr: float | None = 1e-3
    weight_decay: float = 0.0


def _adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> dict[str, float | bool]:
    return {"b1": b1, "b2": b2, "eps": eps}


OPTIMIZERS: dict[str, Optimizer] = {
    "acprop": Optimizer(_adam(eps=1e-16), "Zhuang et al. 2021, arXiv 2110.05454"),
    "adadelta": Optimizer({"rho": 0.9, "eps": 1e-6}, "Zeiler 2012, arXiv 1212.5701", lr=1.0),
    "adam": Optimizer({**_adam(), "nesterov": False}, "Kingma and Ba 2015, arXiv 1412.6980"),
    "adamax": Optimizer(_adam(), "Kingma and Ba 2015, arXiv 1412.6980, section 7", lr=2e-3),
    "adamw": Optimizer(_adam(), "Loshchilov and Hutter 2019, arXiv 1711.05101", weight_decay=0.05),
    "adan": Optimizer({**_adam(0.98, 0.92), "b3": 0.99}, "Xie et al. 2022, arXiv 2208.06677", weight_decay=0.02),
    "ademamix": Optimizer({**_adam(), "b3": 0.9999}, "Pagliardini et al. 2024, arXiv 2409.03137", weight_decay=0.1),
    "adopt": Optimizer({**_adam(b2=0.9999, eps=1e-6), "nesterov": False}, "Taniguchi et al. 2024, arXiv 2411.02853"),
    "amsgrad": Optimizer(_adam(), "Reddi et al. 2018, arXiv 1904.09237"),
    "belief": Optimizer({**_adam(eps=1e-16), "nesterov": False}, "Zhuang et al. 2020, arXiv 2010.07468"),
    "factored_rms": Optimizer({}, "Shazeer and Stern 2018, arXiv 1804.04235", lr=None),
    # A tenth of AdamW's rate and ten times its decay, within the 3 to 10 of the paper's section 5: their product stays.
    "lion": Optimizer({"b1": 0.9, "b2": 0.99}, "Chen et al. 2023, arXiv 2302.06675", lr=1e-4, weight_decay=0.5),
    "muon": Optimizer(
        {"momentum": 0.95, "b1": 0.9, "b2": 0.999}, "Liu et al. 2025, arXiv 2502.16982", weight_decay=0.1
    ),
    "novograd": Optimizer(_adam(b2=0.25), "Ginsburg et al. 2019, arXiv 1905.11286", lr=1e-2, weight_decay=1e-3),
    "optimistic_gradient": Optimizer({}, "Mokhtari et al. 2020, arXiv 1901.08511", lr=None),
    "radam": Optimizer({**_adam(), "nesterov": False}, "Liu et al. 2020, arXiv 1908.03265"),
    "rms": Optimizer({"rho": 0.9, "eps": 1e-8}, "Tieleman and Hinton 2012, RMSProp"),
    "rss": Optimizer({"eps": 1e-7}, "Duchi et al. 2011, AdaGrad", lr=1e-2),
    "sgd": Optimizer(
        {"momentum": 0.9, "nesterov": True}, "He et al. 2016, arXiv 1512.03385, section 3.4", lr=0.1, weight_decay=1e-4
    ),
    "sign": Optimizer({}, "Bernstein et al. 2018, arXiv 1802.04434", lr=1e-4),
    "stddev": Optimizer({"rho": 0.9, "eps": 1e-8}, "Graves 2013, arXiv 1308.0850, section 4.2", lr=1e-4),
    "yogi": Optimizer(_adam(eps=1e-3), "Zaheer et al. 2018, NeurIPS", lr=1e-2),
}  # fmt: skip
"""Name -> optimizer. All need gradients, their state and the parameters only: line searches and steps from the loss's
value are not here."""


def optimizer(name: str) -> Optimizer:
    """Returns what an optimizer takes.

    Raises:
      UserError: there is none of this name.
    """
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=3, cutoff=0.5)
        more = f"near: {', '.join(near)}; " if near else ""
        raise Unregistered(f"unknown optim.name {name!r}; {more}valid: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def resolve(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section with the optimizer's own values where it holds None.

    Raises:
      UserError: unknown optimizer, a constant that it does not have, no learning rate where it has no usual one, a bad
        rule.
    """
    name = section["name"]
    known = optimizer(name)
    for field in CONSTANTS:
        if section[field] is not None and field not in known.constants:
            valid = ", ".join(("lr", "weight_decay", *known.constants))
            raise UserError(
                f"config.optim.{field}={section[field]!r}: {name} has no such constant, only {valid}; "
                f"remove it, or --config.optim.{field}=None"
            )
    if section["lr"] is None and known.lr is None:
        raise UserError(f"config.optim.lr is missing: {name} has no usual learning rate; set one")
    for field in ("decay_rules", "lr_rules"):
        compiled(section[field], f"config.optim.{field}")
    return _filled(section, known)


def left_over(section: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Returns the constants of a recipe's own optimizer that the one which a command line chose instead does not have.

    Args:
      section: the section with what the command line sets.
      given: the fields of the section that it sets.

    Raises:
      UserError: unknown optimizer.
    """
    if "name" not in given:
        return []
    return [field for field in CONSTANTS if field not in optimizer(section["name"]).constants and field not in given]


def stored(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section of a run's config.json as `resolve` would: constants that the optimizer does not have never
    did anything there.

    An optimizer that is no longer there keeps what it had: such a run is only read.
    """
    if section["name"] not in OPTIMIZERS:
        return dict(section)
    known = optimizer(section["name"])
    return _filled(
        {key: None if key in CONSTANTS and key not in known.constants else value for key, value in section.items()},
        known,
    )


def _filled(section: Mapping[str, Any], known: Optimizer) -> dict[str, Any]:
    own = {"lr": known.lr, "weight_decay": known.weight_decay, **known.constants}
    return {key: own.get(key) if value is None else value for key, value in section.items()}


def constants(section: OptimSection) -> dict[str, Any]:
    """Returns the constants of the section's optimizer, its own where the section leaves them out."""
    known, given = optimizer(section.name), dataclasses.asdict(section)
    return {key: own if given[key] is None else given[key] for key, own in known.constants.items()}


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
