"""Configs of runs that earlier versions trained, in the fields of today: what became a method, or has another name.

What fields of a model were called is declared by the model (`research.modules.renamed`).
"""

from collections.abc import Mapping
from typing import Any

from research.modules.renamed import with_present_names

ROBUST = {
    "pgd": ("pgd", ("epsilon", "steps", "step_size", "through_gate", "eval_steps")),
    "trades": ("trades", ("epsilon", "steps", "step_size", "through_gate", "eval_steps", "beta")),
    "alternate": (
        "advmoe",
        ("epsilon", "steps", "step_size", "through_gate", "eval_steps", "beta", "alpha", "shared_attack"),
    ),
}
"""Former task.robust.method -> (method, the options that it has kept)."""
SCHEMES: dict[str, tuple[str, ...]] = {
    "random": (),
    "sorted": ("count",),
    "sandwich": ("count", "distill"),
    "all": (),
}
"""Former nested.scheme, the method's name -> the fields of `nested` that became its options."""
MOVED = {
    "nested.scheme": "config.methods, e.g. --config.methods=\"('sandwich',)\"",
    "nested.count": "config.method.sandwich.count or config.method.sorted.count",
    "nested.distill": "config.method.sandwich.distill",
    "nested.spread": "config.nested.execution=parallel",
    "train.ema": "config.methods with 'ema' and config.method.ema.decay",
    "train.upcycle": "config.methods with 'upcycling' and config.method.upcycling, whose source is the dense run",
    "task.robust": "config.methods with 'pgd', 'trades' or 'advmoe' and config.method.NAME",
    "report.attacks": "config.methods with 'attacks' and config.method.attacks.names",
    "report.attack_examples": "config.method.attacks.examples",
    "report.attack_epsilon": "config.method.attacks.epsilon",
    "report.attack_steps": "config.method.attacks.steps",
}
"""Former field -> what says the same today."""


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a run with today's fields; one that has them already is the same."""
    sections = {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    if not all(isinstance(sections.get(name, {}), dict) for name in ("task", "nested", "train", "report", "method")):
        return sections  # what is no group is refused by whoever checks the fields
    task, nested, train, report = (sections.get(name, {}) for name in ("task", "nested", "train", "report"))
    names, options = list(sections.get("methods", ())), dict(sections.get("method", {}))

    def add(name: str, own: Mapping[str, Any]) -> None:
        names.append(name)
        options[name] = dict(own)

    robust = task.pop("robust", {"method": "none"})
    if isinstance(robust, Mapping) and robust.get("method") in ROBUST:
        name, kept = ROBUST[robust["method"]]
        add(name, {k: robust[k] for k in kept if k in robust})
    scheme = nested.pop("scheme", "full")
    count = {k: nested.pop(k) for k in ("count", "distill") if k in nested}
    if scheme in SCHEMES:
        add(scheme, {k: v for k, v in count.items() if k in SCHEMES[scheme]})
    if nested.pop("spread", False):
        nested["execution"] = "parallel"
    if decay := train.pop("ema", 0.0):
        add("ema", {"decay": decay})
    upcycle = train.pop("upcycle", {})
    if isinstance(upcycle, Mapping) and any(upcycle.values()):
        add("upcycling", {"source": train.pop("init_from", ""), **upcycle})
    attacks = {k: report.pop(f"attack_{k}") for k in ("examples", "epsilon", "steps") if f"attack_{k}" in report}
    if named := report.pop("attacks", ()):
        add("attacks", {"names": tuple(named), **attacks})
    return {**_with_model(sections), "methods": names, "method": options}


def _with_model(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sections with today's names of the model's fields; a model that is not known stays as it is."""
    from research.models.registry import entry, list_models

    given = sections.get("model")
    if not isinstance(given, dict) or given.get("name") not in list_models():
        return dict(sections)
    return {**sections, "model": with_present_names(type(entry(given["name"]).config), given)}
