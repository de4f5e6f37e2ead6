"""Evaluates sub-networks of a finished or running training, each with statistics of its own.

python -m launch.evaluate --workdir=runs/quickstart                              # every named network
python -m launch.evaluate --workdir=runs/quickstart --subnet=width=0.5,depth=0.5 --split=validation --out=table.csv
python -m launch.evaluate --workdir=runs/shakespeare --split=validation --carry     # also with the state carried
through the text
python -m launch.evaluate --workdir=runs/advmoe/alternate --evaluations=            # without the methods' columns
python -m launch.evaluate --workdir=runs/advmoe/alternate --config.method.attacks.names=pgd50,apgd \\
    --config.method.attacks.examples=500                                            # under other attacks

Columns that the run's methods add to its report (`attacks`, `customisation`, methods of one's own) are added here too;
--config.method.NAME.OPTION=VALUE sets an option of one, also of one that the run was not trained with.
"""

from typing import Any

from absl import flags

from launch import common, outputs

_WORKDIR = common.path_flag("workdir", None, "Directory of a run.")
_SUBNET = flags.DEFINE_string("subnet", "all", "A name, choices such as width=0.5,depth=0.5, or all.")
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation", "train"], "Which examples.")
_CARRY = flags.DEFINE_bool(
    "carry", False, "Language models: add the metrics of one pass over the whole text, the state carried."
)
_EVALUATIONS = flags.DEFINE_list(
    "evaluations",
    None,
    "Methods whose columns are added, also others than the run was trained with; by default those of the run, and "
    "those that --config.method.NAME.OPTION=VALUE is given of.",
)
_OUT = outputs.output_flag("out", outputs.Place.FILE, "CSV file to write beside the table.", reads=[_WORKDIR])


def _options(overrides: dict[str, str]) -> dict[str, dict[str, str]]:
    """Method -> option -> text."""
    from research.errors import UserError

    out: dict[str, dict[str, str]] = {}
    for field, text in overrides.items():
        parts = field.split(".")
        if len(parts) != 3 or parts[0] != "method":
            raise UserError(
                f"--config.{field}: a run keeps its config; valid: --config.method.NAME.OPTION=VALUE, of a method that "
                "adds columns"
            )
        out.setdefault(parts[1], {})[parts[2]] = text
    return out


def main(overrides: dict[str, str]) -> int:
    from research.errors import UserError

    if not _WORKDIR.value:
        raise UserError("--workdir is needed: the directory of a run, e.g. --workdir=runs/quickstart")

    from research.report import tables
    from research.report.machine import command_line
    from research.train import columns, costs
    from research.train.extraction import Trained

    options = _options(overrides)
    trained = Trained(_WORKDIR.value, say=print)
    evaluations = columns.evaluations(trained.setup, _EVALUATIONS.value, options)
    names = trained.setup.order if _SUBNET.value == "all" else [trained.add(_SUBNET.value)]
    statistics = {name: trained.statistics(name) for name in names}
    results = trained.evaluator.run(statistics, trained.weights, _SPLIT.value)
    rows: list[dict[str, Any]] = [
        {"name": n, **results[n], **costs.static_costs(trained.setup.space.configs[n])} for n in names
    ]
    if _CARRY.value:
        from research.train.carried import carried_metrics

        source = trained.setup.splits[_SPLIT.value]
        for row in rows:
            carried = carried_metrics(trained.model(row["name"]), source, trained.setup.task)
            row |= {f"{key}, carried": value for key, value in carried.items()}
    rows = columns.add(rows, evaluations, trained.evaluator, trained.weights, statistics, _SPLIT.value)
    print(f"{_SPLIT.value} split, step {trained.step} of {_WORKDIR.value}")
    print(tables.text_table(rows, list(rows[0])))
    if _OUT.value:
        tables.write_csv(_OUT.value, rows, command=command_line())
        print(f"written to {_OUT.value}")
    trained.programs.close()
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
