"""The command: the list, one case with its files, a suite's exit code, and what a mistake gets."""

import subprocess
import sys

import pytest
from absl import flags

from launch import bench
from research.bench import catalog, run, thresholds
from research.errors import UserError
from research.report import tables

if not flags.FLAGS.is_parsed():
    flags.FLAGS(["test"])


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process with very few calls; returns (exit code, what it printed)."""
    monkeypatch.setattr(run, "SECONDS", 0.001)

    def call(**values):
        for name, value in values.items():
            monkeypatch.setattr(getattr(bench, f"_{name.upper()}"), "value", value, raising=False)
        return bench.main({}), capsys.readouterr().out

    saved = {
        name: getattr(bench, name)
        for name in dir(bench)
        if name.startswith("_") and hasattr(getattr(bench, name), "value")
    }
    for name, holder in saved.items():
        monkeypatch.setattr(bench, name, type("Flag", (), {"value": holder.value, "name": holder.name})())
    return call


def test_list_names_everything(command):
    code, out = command(list=True)
    assert code == 0
    for words in (
        "op     depthwise_conv2d",
        "model  mamba",
        "suite  grouped",
        "tune   depthwise_conv1d",
        "peer   torch",
        "installed",
    ):
        assert words in out


def test_list_is_quick():
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launch.bench", "--list"], capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 0 and "depthwise_conv2d" in out.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in out.stderr.splitlines()}


SMALL = "8x28x28x64 7x7 | forward"


@pytest.mark.slow
def test_a_case_is_timed_and_written(command, tmp_path):
    code, out = command(
        op="depthwise_conv2d",
        shapes=SMALL,
        csv=str(tmp_path / "a" / "b.csv"),
        plot=str(tmp_path / "b.png"),
        implementations=True,
    )
    assert code == 0 and "[2/2]" in out and "GFLOP/s" in out and "floor" in out
    comments = [line for line in (tmp_path / "a" / "b.csv").read_text().splitlines() if line.startswith("#")]
    assert comments[0].startswith("# made by: python")
    assert {line.split(":")[0] for line in comments[1:]} == {
        "# versions",
        "# commit",
        "# device",
        "# XLA_FLAGS",
        "# rates",
        "# allocator",
    }
    rows = tables.read_csv(tmp_path / "a" / "b.csv")
    assert [row["contender"] for row in rows] == 2 * [
        "ours",
        "xla",
        "implementation shift",
        "implementation toeplitz",
        "implementation dft",
    ]
    assert all(row["floor_ms"] > 0 and row["p5_ms"] <= row["median_ms"] <= row["p95_ms"] for row in rows)
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize("asked, code, met", [(1e-9, 0, "yes"), (1e9, 1, "no")])
def test_a_suite_is_judged(command, monkeypatch, tmp_path, asked, code, met):
    of_xla = thresholds.Threshold(
        "c", lambda rows: min(thresholds.ratios(rows, "depthwise_conv2d", "xla", "ours")), asked, at_least=True
    )
    of_torch = thresholds.Threshold("d", lambda rows: 0.0, 1, peer="torch")
    tiny = thresholds.Suite((("depthwise_conv2d", "8x28x28x64"),), (of_xla, of_torch))
    monkeypatch.setitem(catalog._SUITES, "tiny", tiny)
    got, out = command(suite="tiny", csv=str(tmp_path / "t.csv"))
    assert got == code and "[1/1]" in out and "not judged: needs --peer=torch" in out
    judged = tables.read_csv(tmp_path / "t_thresholds.csv")
    assert [row["met"] for row in judged] == [met, "not judged: needs --peer=torch"]


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(), "nothing to do: give one of --op, --model, --suite, --tune, --config or --list"),
        (dict(op="ssd", model="mamba"), "--op and --model exclude each other"),
        (dict(op="ssdd"), "unknown op 'ssdd'; near: ssd"),
        (dict(op="mamba"), "unknown op 'mamba'; valid: depthwise_conv1d, depthwise_conv2d, "),
        (dict(model="bert"), "unknown model 'bert'; valid: gla, mamba, mamba2, moe_ffn"),
        (dict(suite="all"), "unknown suite 'all'; valid: attention, "),
        (dict(suite="group"), "unknown suite 'group'; near: grouped"),
        (dict(tune="ssd"), "no tuner for 'ssd'; valid: depthwise_conv1d"),
        (
            dict(op="depthwise_conv2d", shapes="99x99"),
            "no case holds --shapes='99x99'; valid: depthwise_conv2d | 32x28",
        ),
        (dict(op="depthwise_conv2d", peer=["numpy"]), "unknown peer 'numpy'; valid: torch, transformers, unireplknet"),
        (dict(model="unireplknet_a", peer=["unireplknet:/none.py"]), "peer unireplknet"),
        (dict(suite="unireplknet"), "suite unireplknet judges against a peer: give --peer=unireplknet"),
    ],
)
def test_mistakes(command, values, words):
    with pytest.raises(UserError) as error:
        command(**values)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_ends_the_process_with_code_2():
    out = subprocess.run(
        [sys.executable, "-m", "launch.bench", "--op=ssdd"], capture_output=True, text=True, timeout=60
    )
    assert (
        out.returncode == 2
        and out.stderr == "error: unknown op 'ssdd'; near: ssd (all: --list) (one's own: --plugin=FILE)\n"
    )
