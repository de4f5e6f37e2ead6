"""Makes a trained network several users' own: a local expert and a gate from each one's few images, the network itself
frozen. One user at a time, in the training loop: configs/customise.py:user.

    python -m launch.train --config=configs/customise.py --workdir=runs/customise
    python -m launch.customise --workdir=runs/customise --out=results/customise

Users are simulated writers (research/data/handwriting.py). Writes customise.csv, a row per user: accuracy on the user's
and on everybody's test images before and after, what local expert and gate add in parameters and multiply-adds (an
error above --budget), and the checksum of the frozen network; and each user's experts to WORKDIR/customised/userN.npz.
"""

from pathlib import Path
from typing import Any

from absl import flags

from launch import common, outputs

_WORKDIR = common.path_flag("workdir", None, "Directory of a run of configs/customise.py.")
_USERS = flags.DEFINE_integer("users", 10, "How many of the ten users.", lower_bound=1, upper_bound=10)
_SAMPLES = flags.DEFINE_integer("samples", 200, "Images that each user gives to learn from.", lower_bound=1)
_RANK = flags.DEFINE_integer("rank", 8, "Rank of the local expert.")
_HIDDEN = flags.DEFINE_integer("hidden", 8, "Hidden units of the gate.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.5, "The local expert answers where the gate is above it.")
_BUDGET = flags.DEFINE_float(
    "budget", 0.025, "Parameters and multiply-adds of local expert and gate over the network's, at most."
)
_OUT = outputs.output_flag(
    "out",
    outputs.Place.FOLDER,
    "Folder for customise.csv and customise.md; default --workdir.",
    reads=[_WORKDIR],
    beside=_WORKDIR,
)


def _row(
    config: Any, expert: Any, stats: Any, user: int, everybody: dict[str, Any], prepare: Any, costs: dict[str, float]
) -> dict[str, Any]:
    import jax

    from research.data.handwriting import Handwriting, user_indices
    from research.data.sources import load_splits
    from research.errors import UserError
    from research.methods.bases import customise
    from research.models.customised import global_part

    own = load_splits("handwriting", validation_fraction=0.0, user=user)
    written = own["train"]
    assert isinstance(written, Handwriting)
    images = prepare(written, user_indices(written, _SAMPLES.value))
    params = customise.train_experts(
        config, expert, stats, images, everybody["train"], jax.random.key(user), customise.Schedule()
    )
    before, after = customise.checksum(expert), customise.checksum(global_part(params))
    if before != after:
        raise UserError(f"user {user}: the global expert changed ({before[:12]} -> {after[:12]})")
    customise.save_experts(Path(_WORKDIR.value) / "customised" / f"user{user}.npz", params)
    mine, theirs = (
        {name: float(value) for name, value in customise.measure(config, params, stats, test).items()}
        for test in (prepare(own["test"]), everybody["test"])
    )
    columns = ("before", "after", "local_answers")
    row = {"user": user, **{f"user_{k}": mine[k] for k in columns}, **{f"generic_{k}": theirs[k] for k in columns}}
    return {**row, **costs, "global_expert": after[:12]}


def main() -> int:
    from research.errors import UserError

    if not _WORKDIR.value:
        raise UserError(
            "--workdir is needed, e.g. --workdir=runs/customise (made by launch.train --config=configs/customise.py)"
        )

    import jax.numpy as jnp
    import numpy as np

    from research.data.augment import make_augment
    from research.data.sources import load_splits
    from research.methods.bases import customise
    from research.models.customised import CustomisedConfig
    from research.report import machine, tables
    from research.train import costs
    from research.train.extraction import load_model
    from research.train.rundir import read_config

    run = read_config(_WORKDIR.value)
    if run["data"]["name"] != "handwriting":
        raise UserError(
            f"{_WORKDIR.value} holds a {run['model']['name']} on {run['data']['name']}; "
            "give a run of configs/customise.py"
        )
    network, expert, stats = load_model(_WORKDIR.value, say=print)
    config = CustomisedConfig(network, _RANK.value, _HIDDEN.value, _THRESHOLD.value, _BUDGET.value)
    added = customise.overheads(config, costs.forward_flops(config) // 2, costs.forward_flops(network) // 2)
    augment = make_augment(run["data"]["augment"])

    def prepare(source: Any, indices: Any = None) -> Any:
        block = augment.evaluate(source.gather(np.arange(len(source)) if indices is None else indices))
        return customise.Images(jnp.asarray(block["image"]), jnp.asarray(block["label"]))

    population = load_splits("handwriting", validation_fraction=run["data"]["validation_fraction"])
    everybody = {split: prepare(population[split]) for split in ("train", "test")}
    rows = [_row(config, expert, stats, user, everybody, prepare, added) for user in range(_USERS.value)]
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if isinstance(rows[0][key], float)}
    rows.append({"user": "mean", **means, "global_expert": rows[0]["global_expert"]})
    shown = [{k: f"{100 * v:.2f} %" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    print(tables.text_table(shown, list(rows[0])))
    out = _OUT.value or _WORKDIR.value
    tables.write_both(out, "customise", rows, shown, machine.command_line(), "users are simulated")
    print(f"written to {out}/customise.csv, .md; experts in {_WORKDIR.value}/customised")
    return 0


if __name__ == "__main__":
    common.run(main)
