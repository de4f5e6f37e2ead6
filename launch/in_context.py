"""Trains an in-context learner, if its directory holds none yet, and sets it beside the algorithms that solve its task.

    python -m launch.in_context --config=configs/in_context_linear.py --workdir=runs/in_context_linear \\
        --out=results/in_context_linear

Writes in_context.csv, in_context.md and in_context.png: the error (or accuracy) after 0, 1, 2, ... examples of the
model, of least squares, ridge regression and gradient descent (Boolean functions: nearest neighbour, averaging, least
squares), on the same prompts of the test split.
"""

from pathlib import Path
from typing import Any

from absl import flags

from launch import common, outputs
from research import stopping
from research.files import write_text

_CONFIG = common.path_flag("config", None, "Recipe over an in_context: data set.")
_WORKDIR = outputs.output_flag("workdir", outputs.Place.RUN, "Directory of the run.")
_OUT = outputs.output_flag(
    "out", outputs.Place.FOLDER, "Folder for the table and the plot; default --workdir.", beside=_WORKDIR
)
_PROMPTS = flags.DEFINE_integer("prompts", 2000, "Prompts to compare on.", lower_bound=1)


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from launch.terminal import Terminal
    from research.errors import UserError

    if not _CONFIG.value or not _WORKDIR.value:
        raise UserError(
            "--config and --workdir are needed, e.g. --config=configs/in_context_linear.py "
            "--workdir=runs/in_context_linear"
        )
    config = recipe.load(_CONFIG.value, overrides)
    if not config["data"]["name"].startswith("in_context:"):
        raise UserError(f"{_CONFIG.value} has data.name={config['data']['name']}; this command is for in_context:TASK")

    from research.report import machine, plots, provenance, tables
    from research.search.in_context import errors
    from research.train.extraction import Trained
    from research.train.loop import Preempted, train
    from research.train.results import finished

    report = finished(_WORKDIR.value, config)
    if report is None:
        try:
            report = train(config, _WORKDIR.value, Terminal())
        except Preempted as stop:
            common.stopped(stop)
        stopping.heed()
    trained = Trained(_WORKDIR.value, say=print)
    task: Any = trained.setup.task
    found = errors(trained.model("full"), trained.setup.splits["test"], task, prompts=_PROMPTS.value)
    trained.programs.close()
    rows = [{"examples": n, **{name: float(values[n]) for name, values in found.items()}} for n in range(task.points)]
    columns = list(rows[0])
    shown = [{key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    print(tables.text_table(shown, columns))
    rival = "nearest neighbour" if task.boolean else "least squares"
    best = found[rival]
    size = trained.setup.splits["test"].dims
    points = [n for n in (size // 2, size, 2 * size) if n < task.points]
    ratio = "; ".join(f"after {n} examples {found['model'][n]:.4f} against {best[n]:.4f} of {rival}" for n in points)
    mean = float(found["model"][1:].mean() / best[1:].mean()) if best[1:].mean() else float("nan")
    line = f"{task.metric}: {ratio}; mean over all prefixes {mean:.3f} times that of {rival}"
    print(line)
    out = Path(_OUT.value or _WORKDIR.value)
    out.mkdir(parents=True, exist_ok=True)
    tables.write_csv(out / "in_context.csv", rows, command=machine.command_line())
    facts = (
        f"{provenance.line([report], [config])}; {report['subnets'][0]['params']:,} parameters, "
        f"{_PROMPTS.value:,} test prompts"
    )
    text = f"Made by `{machine.command_line()}`: {facts}.\n\n{line}.\n\n{tables.markdown_table(shown, columns)}"
    write_text(out / "in_context.md", text)
    series = {
        name: [{"examples": n, "value": float(v)} for n, v in enumerate(values)] for name, values in found.items()
    }
    title = f"{config['data']['name']}, {size} dimensions"
    plots.curves_plot(
        out / "in_context.png",
        series,
        "value",
        step_key="examples",
        title=title,
        xlabel="examples in the prompt",
        ylabel=task.metric,
    )
    print(f"written to {out}/in_context.csv, .md, .png")
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
