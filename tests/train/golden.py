"""Two updates of every kind of network, run as the commands run them, and the numbers that they gave when they were
stored in golden.json.

    python -m tests.train.golden --renew [FAMILY ...]

renews them, of all families or of those named: when a change of what is trained is meant, and only then. Networks are
the tiny twins of the registry, each with a sub-network of half the width, on made data; the optimizer is SGD, whose
steps are proportional to the gradients, so that rounding stays rounding (Adam's first step of a gradient that is
nothing but rounding is a whole one).
"""

import json
import sys
import tempfile
from pathlib import Path

from research.models import registry
from research.report.reading import read_journal
from research.train import loop
from research.train.config import base_config, resolved
from tests import text_pairs
from tests.train.reporter import Lines

STORED = Path(__file__).with_name("golden.json")
MODELS = {
    "customised": "customised",
    "encoder": "domain_encoder_small",
    "hmode": "hmode",
    "lenet": "lenet5",
    "resnet": "advmoe_resnet18",
    "sequence": "hybrid_small",
    "unireplknet": "unireplknet_a",
    "vgg": "vgg16",
    "vim": "vim_tiny_patch16_224",
    "vit": "vmoe_base_patch16_last2",
    "vmamba": "vmamba_tiny_s1l8",
    "wide_resnet": "wrn28_10",
}
"""Of every family a model."""


def config_of(name: str, folder: Path):
    """Returns the config of a run of a model's twin; `folder` is for made data."""
    config, twin = base_config(), registry.entry(name).tiny
    model = registry.model_config(name, **twin)
    config.model = {"name": name, **twin}
    config.data.update({"batch_size": 8, "validation_fraction": 0.0, **data_for(model, folder)})
    config.nested.points = {"s": "width=0.5"}
    config.methods = ("all",)
    config.optim.update({"name": "sgd", "lr": 0.1, "clip_norm": 1.0, "momentum": 0.9, "nesterov": False, "warmup": "0"})
    config.task.contrastive.update({"normalize": True, "temperature": 0.05})
    config.train.update({"duration": "2", "log_every": "1", "norms": True})
    config.eval.update({"every": "0", "batch_size": 8, "calibrate_batches": 0})
    config.checkpoint.every = "0"
    config.report.update({"latency": False, "test": False})
    return resolved(config)


def data_for(model, folder: Path) -> dict:
    """Returns the fields `config.data` of data that a model takes."""
    if model.predicts == "density":
        return {
            "name": "counting",
            "options": {"image_size": model.image_size, "train_examples": 16, "test_examples": 1},
        }
    if len(model.input_shape()) == 3:
        size, _, channels = model.input_shape()
        options = {"image_size": size, "channels": channels, "examples": 16, "test_examples": 8}
        return {"name": "synthetic", "options": options}
    if model.family == "encoder":
        return {"name": "text_pairs", "dir": text_pairs.write(folder, 16), "options": {"length": 12, "vocab_size": 10}}
    options = {"length": 12, "vocab_size": 10, "pairs": 2, "train_examples": 16, "test_examples": 1}
    return {"name": "probe:mqar", "options": options}


def numbers(name: str, folder: Path) -> dict[str, float]:
    """Runs a model's twin and returns the numbers of its two updates, "STEP NAME" -> value, and norms of the parameters
    after them."""
    loop.train(config_of(name, folder), str(folder / "run"), Lines())
    first, second = (row for row in read_journal(folder / "run/metrics.jsonl")[0] if "loss" in row)
    plain = ("loss", "loss/full", "loss/s", "lr", "grad_norm")
    norms = [key for key in second if key.startswith("norm/param/")]
    found = {f"{row['step']} {key}": row[key] for row in (first, second) for key in plain}
    return found | {f"2 {key}": second[key] for key in norms}


def renew(families) -> None:
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            found = numbers(MODELS[family], Path(folder))
        stored[family] = {key: float(f"{value:.8g}") for key, value in found.items()}
        print(family, stored[family], file=sys.stderr, flush=True)
    STORED.write_text(json.dumps({family: stored[family] for family in MODELS if family in stored}, indent=1) + "\n")


if __name__ == "__main__":
    if "--renew" not in sys.argv:
        sys.exit(__doc__)
    renew([a for a in sys.argv[1:] if not a.startswith("--")] or MODELS)
