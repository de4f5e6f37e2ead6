"""The columns that methods add to a report, at the end of a run or where a run is opened again."""

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import UserError
from research.modules.state import Arrays
from research.report.columns import VALUE, Column
from research.report.reading import SUBNET_COLUMNS
from research.tasks.base import Task
from research.train.evaluation import Evaluator, Weights
from research.train.method import Evaluation, Method
from research.train.method_registry import find, known, make
from research.train.methods import make_methods
from research.train.sections import RunConfig
from research.train.setup import Setup
from research.values import parse


def evaluations(
    setup: Setup, names: Sequence[str] | None, options: Mapping[str, Mapping[str, str]]
) -> tuple[Evaluation, ...]:
    """Returns the evaluations of methods of the registry, also of those that the run was not trained with.

    Args:
      setup: of the run, which says what it has itself of their options.
      names: of the methods; None: those of the run, and those that options are given of.
      options: method -> option -> its text on the command line.

    Raises:
      UserError: an unknown method or option, a method without columns, or one that does not fit the run.
    """
    own = [method.name for method in setup.methods.items if method.evaluations()]
    wanted = list(dict.fromkeys([*own, *options] if names is None else names))
    for name in options:
        if name not in wanted:
            raise UserError(
                f"options of {name} are given, which is not evaluated; valid: {', '.join(wanted) or 'none'}"
            )
    found: list[Evaluation] = []
    for name in wanted:
        kind = find(name, "evaluations")
        given = {option: _value(text, kind, option) for option, text in options.get(name, {}).items()}
        several = make(name, {**setup.config.method.get(name, {}), **given}).evaluations()
        if not several:
            adding = (other for other, kind in known().items() if kind.evaluations is not Method.evaluations)
            raise UserError(f"method {name} adds no columns to a report; valid: {', '.join(adding)}")
        for evaluation in several:
            evaluation.check(setup.about)
        found += several
    return tuple(found)


def known_columns(config: RunConfig) -> tuple[str, ...]:
    """Returns columns that the report of a run will have and that are known without its data."""
    evaluations = make_methods(config).evaluations()
    return (*SUBNET_COLUMNS, *(name for evaluation in evaluations for name in evaluation.declared()))


def _value(text: str, kind: type[Method], option: str) -> Any:
    """What a text says of an option, which is judged when the method is made; a list of texts needs no quotes."""
    wanted = typing.get_type_hints(kind).get(option, Any)
    value = parse(text, wanted)
    if wanted == tuple[str, ...] and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def add(
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    evaluator: Evaluator,
    weights: Weights,
    statistics: Mapping[str, Arrays],
    split: str,
) -> list[dict[str, Any]]:
    """Returns the rows of networks with the columns of evaluations.

    Args:
      rows: each with the "name" of its network.
      evaluator, weights, statistics, split: as of `Evaluation.columns`.
    """
    out = [dict(row) for row in rows]
    for evaluation in evaluations:
        found = evaluation.columns(evaluator, weights, statistics, split)
        out = [row | found.get(row["name"], {}) for row in out]
    return out


def declared(task: Task, rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation]) -> dict[str, Column]:
    """Returns how the measured columns of a report's rows are read, as task and evaluations declare it."""
    value = Column(task.higher_is_better, task.percent)
    found = {VALUE: value, f"validation_{task.metric}": value}
    found |= {name: Column(better, name in task.in_percent) for name, better in task.directions.items()}
    for evaluation in evaluations:
        found |= evaluation.declared()
    return {name: column for name, column in found.items() if any(name in row for row in rows)}
