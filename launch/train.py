"""Trains a recipe in a run directory; the same directory again continues where it stopped.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=configs/quickstart.py --print_config
    python -m launch.train --config=configs/quickstart.py --dry_run
    python -m launch.train --config=configs/quickstart.py --workdir=runs/small --config.train.duration=20ep \\
        --config.seed=1

Any field of the recipe is set by --config.FIELD=VALUE. The directory ends with report.md, report.json and pareto.png.
On several machines every process runs this command with --distributed, or --processes, --process and --coordinator;
launch.local, launch.slurm, launch.tpu and launch.jobset write those. SIGTERM, Ctrl-C and a closed terminal save and
stop; a second Ctrl-C ends at once. Exit code 0: finished; 2: a mistake, told in one line; 75: stopped and saved, start
again to continue; 130: ended by a second Ctrl-C.
"""

import json
import os
import sys
from typing import Any

from absl import flags

from launch import common, outputs, processes
from research import stopping

_CONFIG = common.path_flag("config", None, "Recipe: FILE.py or FILE.py:ARG, for instance configs/quickstart.py.")
_WORKDIR = outputs.output_flag(
    "workdir", outputs.Place.RUN, "Directory of the run; made when missing, resumed when not."
)
_CACHE = outputs.output_flag(
    "compilation_cache", outputs.Place.FOLDER, "Folder in which compiled programs are kept for later starts."
)


_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config",
    False,
    "Print the resolved config as JSON, without touching data, and end. Each field is checked by itself; whether the "
    "sizes of the model fit together and fit the data, --dry_run tells.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Tell shapes, parameters, FLOPs, memory, programs and an estimate of the time, and end."
)


def _check_model(given: dict[str, Any]) -> None:
    from research.train import learner_registry, model
    from research.train.sections import RunConfig

    config = RunConfig.of(given)
    if learner_registry.find(config.learner.name).goes_by("model"):
        model.check_fields(config)


def _dry_run(config: dict[str, Any]) -> None:
    from research.report.tables import text_table
    from research.train import learner_registry
    from research.train.learner import USUAL_MFU
    from research.train.sections import RunConfig

    learner = learner_registry.make(RunConfig.of(config), lambda: None, lambda title, seconds: None)
    try:
        found = learner.foresee()
    finally:
        learner.close()
    if found.inputs:
        print("a batch as a gradient program takes it:")
        print(text_table([{"entry": k, "shape": v} for k, v in found.inputs.items()], ["entry", "shape"]) + "\n")
    if found.networks:
        print(f"{len(found.networks)} networks:")
        print(text_table(found.networks, ["name", "params", "flops"]) + "\n")
    print("bytes of a device:")
    print(text_table([{"what": k, "bytes": v} for k, v in found.bytes.items()], ["what", "bytes"]))
    parts = [f"{found.updates:,} updates"]
    if found.flops:
        parts.append(f"{found.flops:.3g} FLOPs of training")
    if found.programs:
        parts.append(f"{len(found.programs)} programs to compile")
    if found.floor_s:
        parts[-1] += (
            f"; training takes {found.floor_s:,.1f} s at this machine's rate of matrix products, about "
            f"{found.estimate_s:,.0f} s at {USUAL_MFU:.0%} of it, compiling and evaluating left out"
        )
    print(f"\n{', '.join(parts)}. Nothing was trained.")


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
    show = lambda piece: print(piece, end="", flush=True)
    result = text.write(model, [tokens], request, tokenizer, show)
    print(
        f"\n\n{result.summary}\nmore: python -m launch.generate --workdir={workdir} --prompt={prompt!r} "
        f"{' '.join(['--temperature=0.7', *common.plugin_flags()])}"
    )


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from launch.terminal import Silent, Terminal
    from research.errors import UserError

    if _CONFIG.value and (_PRINT_CONFIG.value or _DRY_RUN.value):
        config = recipe.load(_CONFIG.value, overrides, _WORKDIR.value or "")
        if _PRINT_CONFIG.value:
            _check_model(config)
            print(json.dumps(config, indent=2, sort_keys=True))
        else:
            _dry_run(config)
        return 0
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
        f"\n{report['wall_s']:.0f} s in all, {report['compile_s']:.0f} s of them compiling; report: "
        f"{_WORKDIR.value}/report.md, plot: {_WORKDIR.value}/pareto.png"
    )
    if config["report"]["sample"]:
        stopping.heed()
        _write_sample(_WORKDIR.value, config["report"]["sample"])
    smallest = report["subnets"][-1]["name"]
    extract = (
        f"python -m launch.extract --workdir={_WORKDIR.value} --subnet={smallest} --out={_WORKDIR.value}/{smallest}"
    )
    common.print_next(next(iter(report.get("next", [extract]))))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
