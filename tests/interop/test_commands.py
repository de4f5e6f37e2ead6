"""launch.convert and launch.export from a shell: files, exit codes, messages."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from research.errors import UserError
from research.interop.folders import end_of_text
from research.interop.safetensors_io import load_folder, load_safetensors, save_safetensors
from research.interop.unireplknet_names import to_official
from tests.interop.test_moe_names import fill

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "third_party" / "unireplknet"


def command(name, *flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_convert_then_export_deployed(tmp_path, naive_logits):
    done = command(
        "convert",
        "--source=unireplknet",
        f"--weights={GOLDEN}/golden_training.safetensors",
        f"--out={tmp_path}/a",
        "--image_size=32",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "23,225 parameters in training form, 272 arrays matched, 0 unused" in done.stdout
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert (report["params"], report["missing"], report["unexpected"], report["config"]["depths"]) == (
        23225,
        [],
        [],
        [1, 2, 4, 1],
    )
    done = command("export", f"--workdir={tmp_path}/a", "--format=safetensors", "--deploy", f"--out={tmp_path}/b")
    assert (done.returncode, done.stderr) == (0, "")
    config, params, stats = load_folder(tmp_path / "b")
    assert config.deploy and sum(p.size for p in params.values()) == 19081
    assert to_official(config, params, stats).keys() >= {"stages.2.3.dwconv.bias", "stages.1.0.dwconv.lk_origin.bias"}
    with np.load(GOLDEN / "golden.npz") as golden:
        logits = naive_logits(config, params, stats, golden["images"].transpose(0, 2, 3, 1))
        assert np.abs(logits - golden["logits"]).max() <= 1e-5 * np.abs(golden["logits"]).max()


def test_mistakes_are_one_line_with_exit_code_2(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nonsense")
    cases = {
        (
            "convert",
            "--source=unireplknet",
            f"--weights={tmp_path}/a.pth",
            f"--out={tmp_path}/o",
        ): "is not a zip-format PyTorch file",
        ("convert", "--source=unireplknet", "--weights=x", f"--out={tmp_path}/o", "more"): "unexpected argument 'more'",
    }
    for arguments, message in cases.items():
        done = command(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert command("convert", "--wieghts=x").returncode == 2
    assert command("convert", "--helpshort").returncode == 0


@pytest.mark.slow
def test_a_mixture_of_experts_comes_in_writes_and_goes_out(tmp_path):
    numbers = json.loads((ROOT / "third_party" / "moe_language" / "golden.json").read_text())["models"]["mixtral"]
    state = {path: fill(path, shape, k).astype(np.float32) for k, (path, shape) in enumerate(numbers["shapes"].items())}
    (tmp_path / "a").mkdir()
    save_safetensors(tmp_path / "a" / "model.safetensors", state)
    (tmp_path / "a" / "config.json").write_text(json.dumps({**numbers["config"], "eos_token_id": [2, 5]}))
    done = command("convert", "--source=hf-mixtral", f"--weights={tmp_path}/a", f"--out={tmp_path}/b")
    assert (done.returncode, done.stderr) == (0, "")
    assert "sequence: 3,048 parameters, 41 arrays matched, 0 unused" in done.stdout
    assert json.loads((tmp_path / "b" / "tokenizer.json").read_text()) == {
        "kind": "integers",
        "vocab_size": 16,
        "eot": [2, 5],
    }
    done = command(
        "generate",
        f"--workdir={tmp_path}/b",
        "--prompt_ids=3",
        "--num_tokens=2",
        "--temperature=0",
        f"--out={tmp_path}/o.json",
    )
    assert done.returncode == 0, done.stderr
    first = int(np.argmax(numbers["logits"][0]))
    assert json.loads((tmp_path / "o.json").read_text())["texts"][0][0].split()[0] == str(first)
    done = command("export", f"--workdir={tmp_path}/b", "--format=hf-mixtral", f"--out={tmp_path}/c")
    assert (done.returncode, done.stderr) == (0, "")
    again = load_safetensors(tmp_path / "c" / "model.safetensors")
    assert again.keys() == state.keys() and all((again[name] == w).all() for name, w in state.items())


def test_end_of_text_tokens_that_a_foreign_folder_declares(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert end_of_text(tmp_path, 16) == end_of_text(tmp_path / "model.safetensors", 16) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    assert end_of_text(tmp_path, 16) == (0, 3)
    with pytest.raises(
        UserError, match=r"generation_config.json: eos_token_id=\[0, 3\]; valid: tokens in 0..2, or null"
    ):
        end_of_text(tmp_path, 3)
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    assert end_of_text(tmp_path, 16) == ()
