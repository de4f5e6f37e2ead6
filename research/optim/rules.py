"""Which parameters decay, and rules over parameters in general.

By default weight decay follows from the kind that an array is declared with. Rules of a config are ordered: the first
pattern that is found decides; a parameter without a rule is an error, and so is a rule that is found in none.

A pattern is a regular expression searched in `path|axis,axis,...`, for instance
`stages/0/layer/phases/0/up/kernel|stage1/embed,stage1/layer/phase0/mlp`. Stack axes are left out, so
`\\|[^,]*$` means "one-dimensional within its layer".
"""

from collections.abc import Mapping, Sequence

from research.errors import UserError
from research.modules.axes import Axes, Kind, role
from research.optim.section import compiled

Rules = Sequence[tuple[str, float]]

DECAYED = {Kind.MATRIX, Kind.DEPTHWISE, Kind.EMBEDDING}
"""Kinds that decay: weights of sums, as in timm, DeiT (arXiv 2012.12877) and big_vision, and tables of embeddings, as
in GPT-2.

Biases, gains, position embeddings and class tokens do not (timm's `no_weight_decay`), nor do a recurrence's
coefficients (Mamba's `_no_weight_decay`).
"""


def by_kind(axes: Mapping[str, Axes], kinds: Mapping[str, Kind]) -> dict[str, float]:
    """Returns parameter -> 1.0 where it decays, else 0.0."""
    return {name: float(kinds[name] in DECAYED) for name in axes}


def label(path: str, axes: Axes) -> str:
    """Returns the text that patterns are searched in."""
    return f"{path}|{','.join(name for name in axes if role(name) not in ('layers', 'directions'))}"


def resolve(rules: Rules, axes: Mapping[str, Axes], field: str) -> dict[str, float]:
    """Returns parameter -> value of its first matching rule.

    Args:
      rules: ordered (pattern, value).
      axes: axis names by parameter.
      field: name of the config field, for the message.

    Raises:
      UserError: a bad pattern, a parameter that no rule covers, or a pattern that is found in none.
    """
    ordered = compiled(rules, field)
    texts = {path: label(path, names) for path, names in axes.items()}
    for pattern, _ in ordered:
        if not any(pattern.search(text) for text in texts.values()):
            raise UserError(
                f"{field}: {pattern.pattern!r} is found in no parameter; "
                f"they read like {next(iter(texts.values()), 'none')!r}"
            )
    out = {}
    for path, text in texts.items():
        value = next((v for pattern, v in ordered if pattern.search(text)), None)
        if value is None:
            raise UserError(f"{field}: no rule covers {text}; end the list with ('.*', 1.0)")
        out[path] = value
    return out
