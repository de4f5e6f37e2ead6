"""Trains nanoGPT's CPU recipe and recipes of ours on tiny Shakespeare, one after the other on this machine, and
compares.

    python -m launch.versus --peer=nanogpt:CHECKOUT --configs=configs/shakespeare.py:small,configs/shakespeare.py \\
        --out=results/shakespeare

Both are judged by the loss over the whole validation text, in nats per character. Ours is reported with windows that
start afresh, as nanoGPT's do, and with the state carried through the text. Wall time is that of the whole process for
both: start, imports, compiling, training, evaluating. A run of ours that lies in its directory from before is deleted,
so that its time is whole.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

from absl import flags

from launch import common, outputs
from launch.children import Children

_PEER = flags.DEFINE_string("peer", None, "nanogpt:PATH, PATH a checkout of nanoGPT; its Python needs PyTorch.")
_CONFIGS = flags.DEFINE_multi_string(
    "configs", ["configs/shakespeare.py"], "Recipes of ours: FILE.py or FILE.py:ARG; repeatable, or with commas."
)
_WORKDIR = outputs.output_flag(
    "workdir", outputs.Place.FOLDER, "Directory under which each of ours gets its own run.", default="runs/versus"
)
_OUT = outputs.output_flag("out", outputs.Place.FOLDER, "Folder for versus.csv and versus.md.")


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
    from research.train.carried import carried_metrics
    from research.train.extraction import Trained
    from research.train.results import finished

    checkout = str(user_path(checkout))
    nanogpt.check(checkout)
    configs = {text: recipe.load(text, overrides) for text in recipe.split_recipes(_CONFIGS.value)}
    if wrong := [text for text, config in configs.items() if config["data"]["name"] != "tiny_shakespeare"]:
        raise UserError(f"{wrong[0]} is no recipe over tiny_shakespeare, which nanoGPT is compared on")
    data = next(iter(configs.values()))["data"]
    splits = load_splits("tiny_shakespeare", data_dir=data["dir"] or None, tokenizer="chars")
    children = Children()
    print("nanoGPT's CPU recipe ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peer = nanogpt.train(checkout, splits, Path(folder))
    rows = [
        {
            "model": "nanoGPT, CPU recipe",
            "params": peer["params"],
            "wall_s": peer["wall_s"],
            "loss": peer["loss"],
            "carried": None,
        }
    ]
    for text in configs:
        workdir = os.path.join(_WORKDIR.value, text.replace("/", "_").replace(":", "_").replace(".py", ""))
        print(f"{text}: {workdir}", flush=True)
        shutil.rmtree(workdir, ignore_errors=True)
        start = time.perf_counter()
        children.train_alone(text, workdir, overrides)
        wall = time.perf_counter() - start
        report = finished(workdir, configs[text])
        if report is None:
            raise UserError(f"{workdir} holds no whole report after training; start the same command again")
        trained = Trained(workdir)
        full = report["subnets"][0]
        carried = carried_metrics(trained.model("full"), splits["validation"], trained.setup.task)
        trained.programs.close()
        rows.append(
            {"model": text, "params": full["params"], "wall_s": wall, "loss": full["value"], "carried": carried["loss"]}
        )
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
        text = (
            f"Made by `{machine.command_line()}`; nanoGPT's own estimate "
            f"{peer['own_estimate']:.4f}.\n\n{tables.markdown_table(rows, columns)}"
        )
        write_text(Path(_OUT.value, "versus.md"), text)
        print(f"written to {_OUT.value}")
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
