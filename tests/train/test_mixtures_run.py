"""Mixtures of experts through the whole loop: what is logged of them, the heat map, dead experts by name."""

import json
import math

import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.models.sequence import SequenceConfig
from research.modules.moe import OBSERVED
from research.modules.moe_options import Moe
from research.nested.space import make_space
from research.report.logs.experts import summary
from research.train.build import check_experts, make_programs
from research.train.evaluation import Evaluate
from research.train.layout import shapes_of
from research.train.loop import train
from research.train.setup import make_setup
from tests.train.reporter import Lines

LINE = "the cat sat on the mat; the dog sat on the log; "
MODEL = {
    "name": "sequence",
    "pattern": "hgrn",
    "ffn": "glu moe",
    "dim": 16,
    "hgrn": {"d_conv": 3},
    "implementation": "grouped_matmul=naive",
}


def run(folder, moe, depth):
    (folder / "text.txt").write_text(LINE * 100)
    config = recipe.load(
        "tests/tiny_lm.py:all", {"data.dir": str(folder / "text.txt"), "train.duration": "20", "train.log_every": "2"}
    )
    config["model"] = {**MODEL, "depth": depth, "moe": moe}
    config["nested"]["points"] = {}
    lines = Lines()
    train(config, str(folder / "run"), lines)
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return folder / "run", lines, metrics


def told(row):
    """Whether a line of metrics.jsonl is of an update."""
    return "loss/full" in row


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    return run(tmp_path_factory.mktemp("moe"), {"num_experts": 4, "num_experts_per_tok": 2}, 4)


def test_every_logged_line_tells_the_load_of_every_layer(learnt):
    _, _, metrics = learnt
    rows = [m for m in metrics if "experts/layer1/load" in m]
    assert [m["step"] for m in rows] == list(range(2, 21, 2))
    for row in rows:
        for layer in ("layer1", "layer3"):
            load = np.array(row[f"experts/{layer}/load"])
            assert load.shape == (4,) and abs(load.sum() - 2) < 1e-5
            share = load / load.sum()
            entropy = -(share * np.log(np.maximum(share, 1e-20))).sum()
            assert abs(row[f"experts/{layer}/entropy"] - entropy) < 1e-5 and entropy <= math.log(4) + 1e-6
            assert abs(row[f"experts/{layer}/max_load"] - load.max() / load.mean()) < 1e-5
            assert row[f"experts/{layer}/dropped"] == 0 and row[f"experts/{layer}/router_z"] > 0
    assert not any("layer0" in key for key in rows[0])
    similar = [m["experts/layer3/similarity"] for m in metrics if "experts/layer3/similarity" in m]
    assert similar and all(abs(s) < 0.2 for s in similar)


def test_the_names_in_metrics_and_report_are_those_of_runs_before(learnt):
    """Reports and runs of earlier versions are read and compared by them."""
    workdir, _, metrics = learnt
    numbers = {"load", *OBSERVED}
    updates, evaluations = ({key for m in metrics if keep(m) for key in m} for keep in (told, lambda m: not told(m)))
    own = lambda names: {f"experts/{layer}/{name}" for layer in ("layer1", "layer3") for name in names}
    assert {key for key in updates if key.startswith("experts/")} == own(numbers)
    assert {key for key in evaluations if key.startswith("experts/")} == own({"similarity"})
    report = json.loads((workdir / "report.json").read_text())
    assert [key for key in report if "experts" in key] == ["dead_experts"]
    assert list(summary(metrics)[0]) == [
        "layer", "experts", "least load", "largest load", "confidence", "dropped", "entropy", "router_z", "similarity",
        "dead",
    ]  # fmt: skip


def test_report_has_the_section_and_the_map(learnt):
    workdir, lines, metrics = learnt
    text = (workdir / "report.md").read_text()
    assert "## Experts" in text and "experts.png" in text and (workdir / "experts.png").stat().st_size > 5000
    assert [row["layer"] for row in summary(metrics)] == ["layer1", "layer3"]
    assert json.loads((workdir / "report.json").read_text())["dead_experts"] == 0
    assert {r["dead"] for r in summary(metrics)} == {"none"} and not any("got no token" in line for line in lines.said)


@pytest.mark.slow
def test_dead_experts_are_named(tmp_path):
    """Twenty characters hashed to 24 experts leave some without any."""
    workdir, lines, metrics = run(
        tmp_path,
        {"num_experts": 24, "router": "hash", "num_experts_per_tok": 1, "ffn_dim": 8, "balance_loss_coef": 0.0},
        2,
    )
    told = [line for line in lines.said if "got no token" in line]
    empty = [i for i, load in enumerate(metrics[-2]["experts/layer1/load"]) if not load]
    assert json.loads((workdir / "report.json").read_text())["dead_experts"] == len(empty)
    assert len(told) == 1 and empty and told[0].endswith(", ".join(map(str, empty)))


def test_experts_that_do_not_divide_over_the_mesh_are_told():
    space = make_space(SequenceConfig(pattern="hgrn", ffn="moe", moe=Moe(num_experts=8)), {"few": "experts=6"})
    check_experts(space, 1)
    check_experts(space, 2)
    with pytest.raises(
        UserError,
        match="mesh.expert=4: the 6 experts of network few do not divide .* valid: divisors of 6, or a multiple of 4",
    ):
        check_experts(space, 4)
    check_experts(make_space(SequenceConfig(pattern="hgrn"), {}), 4)


def test_what_fills_up_a_batch_moves_no_metric(tmp_path):
    """The compiled evaluation of a capacity-limited mixture, on three examples beside filler of two kinds."""
    (tmp_path / "text.txt").write_text(LINE * 100)
    config = recipe.load("tests/tiny_lm.py:all", {"data.dir": str(tmp_path / "text.txt")})
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "group_size": 0,
        "capacity": "megablocks",
        "capacity_factor": 0.5,
        "router": "top_k",
        "ffn_dim": 16,
    }
    config["model"] = {**MODEL, "depth": 1, "ffn": "moe", "moe": moe}
    config["nested"]["points"] = {}
    setup = make_setup(config)
    programs = make_programs(setup)
    state = programs.init_state()
    block = setup.splits["validation"].gather(np.arange(8))
    real = np.arange(8) % 3 == 2
    sums = []
    for filler in (block["tokens"], 1 + 0 * block["tokens"]):
        tokens = np.where(real[:, None], block["tokens"], filler)
        batch = {**block, "tokens": tokens, "mask": real.astype(np.float32)}
        zero = {k: np.asarray(v, np.float32) for k, v in setup.task.zero_sums().items()}
        sums.append(
            programs.get(Evaluate("full", shapes_of(batch)))(state.params, state.methods, state.stats, zero, batch)
        )
    assert float(sums[0]["count"]) > 0 and abs(float(sums[0]["nll"]) - float(sums[1]["nll"])) < 1e-5 * float(
        sums[0]["nll"]
    )
    programs.close()
