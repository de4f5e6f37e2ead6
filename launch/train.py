"""Trains a recipe in a run directory; the same directory again goes on where it stopped.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=configs/quickstart.py --workdir=runs/small --config.train.duration=20ep
    --config.seed=1

Any field of the recipe is set by --config.FIELD=VALUE. The directory ends with report.md, report.json and pareto.png.
On several machines every process runs this command with --distributed, or --processes, --process and --coordinator;
launch.local, launch.slurm, launch.tpu and launch.jobset write those. SIGTERM, Ctrl-C and a closed terminal save and
stop; a second Ctrl-C ends at once. Exit code 0: finished; 2: a mistake, told in one line; 75: stopped and saved, start
again to go on; 130: ended by a second Ctrl-C.
"""

import os
import sys

from launch import common, outputs, processes
from research import stopping

_CONFIG = common.path_flag("config", None, "Recipe: FILE.py or FILE.py:ARG, for instance configs/quickstart.py.")
_WORKDIR = outputs.output_flag(
    "workdir", outputs.Place.RUN, "Directory of the run; made when missing, resumed when not."
)
_CACHE = outputs.output_flag(
    "compilation_cache", outputs.Place.FOLDER, "Folder in which compiled programs are kept for later starts."
)


def _write_sample(workdir: str, prompt: str) -> None:
    from research.data.tokenizer_files import load_tokenizer
    from research.decode import models, text
    from research.train.extraction import load_model

    tokenizer = load_tokenizer(workdir, required=True)
    model, tokens = load_model(workdir), tokenizer.encode(prompt)
    longest = models.longest(model[0])
    request = text.Request(
        num_tokens=400 if longest is None else max(1, min(400, longest - len(tokens))), temperature=0.7
    )
    print(f"\nwhat it writes at temperature {request.temperature}:\n\n{prompt}", end=tokenizer.joint)
    show = lambda piece: print(piece, end="", flush=True)  # noqa: E731
    result = text.write(model, [tokens], request, tokenizer, show)
    print(
        f"\n\n{result.summary}\nmore: python -m launch.generate --workdir={workdir} --prompt={prompt!r} --temperature=0.7"
    )


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from launch.terminal import Silent, Terminal
    from research.errors import UserError

    if not _CONFIG.value or not _WORKDIR.value:
        raise UserError(
            "--config and --workdir are needed, e.g. --config=configs/quickstart.py --workdir=runs/quickstart"
        )
    if _CACHE.value:  # before the recipe: it may import JAX, which reads these once
        os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.value
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    processes.listen()
    config = recipe.load(_CONFIG.value, overrides, _WORKDIR.value)
    prints = processes.connect()

    from research.report.tables import text_table
    from research.train.loop import Preempted, train

    terminal = Terminal() if prints else Silent()
    try:
        report = train(config, _WORKDIR.value, terminal)
    except Preempted as stop:
        terminal.close()
        common.stopped(stop if prints else "")
    finally:
        terminal.close()
    if not prints:
        return 0
    columns = [
        k
        for k in ("name", "value", "params", "flops", "latency_ms", "latency_ms_32", "peak_memory_bytes")
        if k in report["subnets"][0]
    ]
    print(
        f"\n{report['metric'] if report['split'] else 'parameters'} and costs of the {len(report['subnets'])} networks:"
    )
    print(text_table(report["subnets"], columns))
    print(
        f"\n{report['wall_s']:.0f} s in all, {report['compile_s']:.0f} s of them compiling; report: {_WORKDIR.value}/report.md, plot: {_WORKDIR.value}/pareto.png"
    )
    if config["report"]["sample"]:
        stopping.heed()
        _write_sample(_WORKDIR.value, config["report"]["sample"])
    smallest = report["subnets"][-1]["name"]
    print(
        f"next: python -m launch.extract --workdir={_WORKDIR.value} --subnet={smallest} --out={_WORKDIR.value}/{smallest}"
    )
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
