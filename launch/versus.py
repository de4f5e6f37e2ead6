"""Trains nanoGPT's CPU recipe and recipes of ours on tiny Shakespeare, one after the other on this machine, and compares.

    python -m launch.versus --peer=nanogpt:CHECKOUT --configs=configs/shakespeare.py:small,configs/shakespeare.py --out=results/shakespeare

Both are judged by the loss over the whole validation text, in nats per character. Ours is reported with windows that start
afresh, as nanoGPT's do, and with the state carried through the text. Wall time is that of the whole process for both: start, imports, compiling, training, evaluating.
A run of ours that lies in its directory from before is deleted, so that its time is whole.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from launch import common, outputs

_PEER = flags.DEFINE_string("peer", None, "nanogpt:PATH, PATH a checkout of nanoGPT; its Python needs PyTorch.")
_CONFIGS = flags.DEFINE_multi_string(
    "configs", ["configs/shakespeare.py"], "Recipes of ours: FILE.py or FILE.py:ARG; repeatable, or with commas."
)
_WORKDIR = outputs.output_flag(
    "workdir", outputs.Place.FOLDER, "Directory under which each of ours gets its own run.", default="runs/versus"
)
_OUT = outputs.output_flag("out", outputs.Place.FOLDER, "Folder for versus.csv and versus.md.")


def _train(config: str, workdir: str, overrides: dict[str, str]) -> float:
    """Trains in a process of its own, as nanoGPT does, and returns its seconds from start to end."""
    from research.errors import UserError

    command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}"]
    start = time.perf_counter()
    code = subprocess.run([*command, *(f"--config.{field}={value}" for field, value in overrides.items())]).returncode
    if code:
        raise UserError(f"training {config} ended with exit code {code}")
    return time.perf_counter() - start


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from research.errors import UserError
    from research.files import user_path, write_text

    kind, _, checkout = (_PEER.value or "").partition(":")
    if kind != "nanogpt" or not checkout:
        raise UserError("--peer=nanogpt:PATH is needed, PATH a checkout of github.com/karpathy/nanoGPT")

    from research.bench import nanogpt
    from research.data.sources import load_splits
    from research.report import machine, tables
    from research.report.run_card import read_report
    from research.train.carried import carried_metrics
    from research.train.extraction import Trained

    checkout = str(user_path(checkout))
    nanogpt.check(checkout)
    configs = {text: recipe.load(text, overrides) for text in recipe.split_recipes(_CONFIGS.value)}
    if wrong := [text for text, config in configs.items() if config["data"]["name"] != "tiny_shakespeare"]:
        raise UserError(f"{wrong[0]} is no recipe over tiny_shakespeare, which nanoGPT is compared on")
    data = next(iter(configs.values()))["data"]
    splits = load_splits("tiny_shakespeare", data_dir=data["dir"] or None, tokenizer="chars")
    print("nanoGPT's CPU recipe ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peer = nanogpt.train(checkout, splits, Path(folder))
    rows = [{"model": "nanoGPT, CPU recipe", "params": peer["params"], "wall_s": peer["wall_s"], "loss": peer["loss"], "carried": None}]
    for text in configs:
        workdir = os.path.join(_WORKDIR.value, text.replace("/", "_").replace(":", "_").replace(".py", ""))
        print(f"{text}: {workdir}", flush=True)
        shutil.rmtree(workdir, ignore_errors=True)
        wall = _train(text, workdir, overrides)
        report = read_report(workdir)
        trained = Trained(workdir)
        full = report["subnets"][0]
        carried = carried_metrics(trained.model("full"), splits["validation"], trained.setup.task)
        trained.programs.close()
        rows.append({"model": text, "params": full["params"], "wall_s": wall, "loss": full["value"], "carried": carried["loss"]})
    columns = {
        "model": "model",
        "params": "parameters",
        "wall_s": "wall time",
        "loss": "loss, fresh windows",
        "carried": "loss, state carried",
    }
    print(tables.text_table(rows, columns))
    if _OUT.value:
        os.makedirs(_OUT.value, exist_ok=True)
        tables.write_csv(os.path.join(_OUT.value, "versus.csv"), rows, command=machine.command_line())
        text = f"Made by `{machine.command_line()}`; nanoGPT's own estimate {peer['own_estimate']:.4f}.\n\n{tables.markdown_table(rows, columns)}"
        write_text(Path(_OUT.value, "versus.md"), text)
        print(f"written to {_OUT.value}")
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
