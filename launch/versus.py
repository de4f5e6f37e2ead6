"""Trains nanoGPT's CPU recipe and recipes of ours on tiny Shakespeare, one after the other on this machine, and compares.

    python -m launch.versus --peer=nanogpt:CHECKOUT --configs=configs/shakespeare.py:small,configs/shakespeare.py --out=results/shakespeare

Both are judged by the loss over the whole validation text, in nats per character. Ours is reported with windows that start
afresh, as nanoGPT's do, and with the state carried through the text. Wall time is the whole run, compiling and evaluating included.
"""

import os
import tempfile
from pathlib import Path

from absl import flags

from launch import common

_PEER = flags.DEFINE_string("peer", None, "nanogpt:PATH, PATH a checkout of nanoGPT; its Python needs PyTorch.")
_CONFIGS = flags.DEFINE_list("configs", ["configs/shakespeare.py"], "Recipes of ours: FILE.py or FILE.py:ARG.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/versus", "Directory under which each of ours gets its own run.")
_OUT = flags.DEFINE_string("out", None, "Folder for versus.csv and versus.md.")


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from launch.terminal import Terminal
    from research.errors import UserError

    kind, _, checkout = (_PEER.value or "").partition(":")
    if kind != "nanogpt" or not checkout:
        raise UserError("--peer=nanogpt:PATH is needed, PATH a checkout of github.com/karpathy/nanoGPT")

    from research.bench import nanogpt
    from research.data.sources import load_splits
    from research.report import machine, tables
    from research.report.run_card import read_report
    from research.train.carried import carried_metrics
    from research.train.extraction import Trained
    from research.train.loop import train

    nanogpt.check(checkout)
    configs = {text: recipe.load(text, overrides) for text in _CONFIGS.value}
    data = next(iter(configs.values()))["data"]
    splits = load_splits("tiny_shakespeare", data_dir=data["dir"] or None, tokenizer="chars")
    print("nanoGPT's CPU recipe ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peer = nanogpt.train(checkout, splits, Path(folder))
    rows = [{"model": "nanoGPT, CPU recipe", "params": peer["params"], "wall_s": peer["wall_s"], "loss": peer["loss"], "carried": None}]
    for text, config in configs.items():
        workdir = os.path.join(_WORKDIR.value, text.replace("/", "_").replace(":", "_").replace(".py", ""))
        print(f"{text}: {workdir}", flush=True)
        train(config, workdir, Terminal())
        report = read_report(workdir)
        trained = Trained(workdir)
        full = report["subnets"][0]
        carried = carried_metrics(trained.model("full"), splits["validation"], trained.setup.task)
        trained.programs.close()
        rows.append(
            {"model": text, "params": full["params"], "wall_s": report["wall_s"], "loss": full["value"], "carried": carried["loss"]}
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
        text = f"Made by `{machine.command_line()}`; nanoGPT's own estimate {peer['own_estimate']:.4f}.\n\n{tables.markdown_table(rows, columns)}"
        Path(_OUT.value, "versus.md").write_text(text, encoding="utf-8")
        print(f"written to {_OUT.value}")
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
