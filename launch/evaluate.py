"""Evaluates sub-networks of a finished or running training, each with statistics of its own.

python -m launch.evaluate --workdir=runs/quickstart                              # every named network
python -m launch.evaluate --workdir=runs/quickstart --subnet=width=0.5,depth=0.5 --split=validation --out=table.csv
python -m launch.evaluate --workdir=runs/shakespeare --split=validation --carry     # also with the state carried
through the text
python -m launch.evaluate --workdir=runs/advmoe/alternate --attacks=pgd50,apgd      # also under attack, on the first
1,000 images
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
_ATTACKS = flags.DEFINE_list(
    "attacks",
    [],
    "Images in [0, 1]: also under pgdN (N steps), apgd_ce, apgd_dlr, apgd_t, apgd (the worst of the first two).",
)
_ATTACK_EXAMPLES = flags.DEFINE_integer(
    "attack_examples", 1000, "How many images are attacked, from the start of the split."
)
_ATTACK_EPSILON = flags.DEFINE_float(
    "attack_epsilon", 0.0, "Radius, in units of a pixel's range; 0: that of the run's config."
)
_ATTACK_STEPS = flags.DEFINE_integer("attack_steps", 100, "Steps of each APGD.")
_OUT = outputs.output_flag("out", outputs.Place.FILE, "CSV file to write beside the table.", reads=[_WORKDIR])


def main() -> int:
    from research.errors import UserError

    if not _WORKDIR.value:
        raise UserError("--workdir is needed: the directory of a run, e.g. --workdir=runs/quickstart")

    from research.report import tables
    from research.report.machine import command_line
    from research.train import costs
    from research.train.extraction import Trained

    trained = Trained(_WORKDIR.value, say=print)
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
    if _ATTACKS.value:
        from research.methods.attacks import check_sizes, columns, radius, robust_accuracies
        from research.methods.bases.adversarial import check_pixels
        from research.robust.attacks import check_attacks

        own = trained.config.method.get("attacks", {}).get("epsilon", 0.0)
        epsilon = _ATTACK_EPSILON.value or own or radius(trained.setup.task)
        check_attacks(_ATTACKS.value, "--attacks")
        check_pixels(trained.config, trained.setup.sample)
        check_sizes(epsilon, _ATTACK_EXAMPLES.value, _ATTACK_STEPS.value)
        sizes: dict[str, Any] = {"epsilon": epsilon, "examples": _ATTACK_EXAMPLES.value, "steps": _ATTACK_STEPS.value}
        robust = robust_accuracies(
            trained.evaluator, trained.weights, statistics, _ATTACKS.value, _SPLIT.value, **sizes
        )
        for row in rows:
            row |= columns(robust[row["name"]])
    print(f"{_SPLIT.value} split, step {trained.step} of {_WORKDIR.value}")
    print(tables.text_table(rows, list(rows[0])))
    if _OUT.value:
        tables.write_csv(_OUT.value, rows, command=command_line())
        print(f"written to {_OUT.value}")
    trained.programs.close()
    return 0


if __name__ == "__main__":
    common.run(main)
