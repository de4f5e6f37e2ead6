"""What the launchers of clusters render, checked by the engines' own readers where these are installed; and their
mistakes."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.launch import jobset_schema

RECIPE = ["--config=configs/quickstart.py", "--config.seed=7"]
SLURM = ["slurm", "--nodes=2", "--gpus_per_node=8", "--partition=long run", "--workdir=runs/pod", *RECIPE]
TPU = [
    "tpu",
    "--tpu=slice",
    "--zone=us-east5-a",
    "--repository=https://example.org/n.git",
    "--commit=abc",
    "--workdir=/mnt/it's",
    *RECIPE,
]
TPU_PODS = [
    "jobset",
    "--image=i",
    "--accelerator=tpu-v5-lite-podslice",
    "--topology=4x4",
    "--hosts=4",
    "--slices=2",
    "--claim=shared",
]
TPU_PODS += ["--workdir=/mnt/runs/x", *RECIPE]
GPU_PODS = [
    "jobset",
    "--image=i",
    "--accelerator=nvidia-h100-80gb",
    "--hosts=2",
    "--chips=8",
    "--workdir=/mnt/runs/x",
    *RECIPE,
]


def call(arguments, *more):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{arguments[0]}", *arguments[1:], *more],
        capture_output=True,
        text=True,
        timeout=120,
    )


def render(arguments):
    done = call(arguments, "--dry_run")
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_shell(text):
    readers = [["bash", "-n"], *([["shellcheck", "-"]] if shutil.which("shellcheck") else [])]
    for reader in readers:
        done = subprocess.run(reader, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_slurm_script_saves_requeues_and_ends_together():
    text = render(SLURM)
    check_shell(text)
    head = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "signal=TERM@120", "requeue", "open-mode=append"} <= set(
        head
    )
    assert "srun --kill-on-bad-exit=1" in text and "--config.seed=7" in text and "--distributed" in text
    assert 'if [ "$code" -eq 75 ]' in text and "scontrol requeue" in text


def test_tpu_script_sets_up_every_host_and_starts_again():
    text = render(TPU)
    check_shell(text)
    inner = text.split("<<'HOST'\n")[1].split("HOST\n")[0]
    check_shell("#!/bin/bash\n" + inner)
    assert "--worker=all" in text and "make install EXTRAS=tpu" in inner and "--distributed" in inner
    assert "'--workdir=/mnt/it'\"'\"'s'" in inner


def test_the_hosts_loop_ends_at_success_and_at_mistakes_and_gives_up(tmp_path):
    """The rendered loop itself, with a program that plays the run."""
    inner = render(TPU).split("<<'HOST'\n")[1].split("HOST\n")[0]
    loop = inner[inner.index("restarts=0") :].replace("sleep 20", "true")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for codes, starts, end in (([75, 1, 0], 3, 0), ([2], 1, 2), ([1] * 20, 11, 1)):
        (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
        (tmp_path / "starts").write_text("")
        python.write_text('#!/bin/bash\necho x >> starts\ncode=$(head -1 codes)\nsed -i 1d codes\nexit "$code"\n')
        python.chmod(0o755)
        done = subprocess.run(
            ["bash", "-c", "set -eu\n" + loop], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, (tmp_path / "starts").read_text().count("x")) == (end, starts)


@pytest.mark.parametrize("arguments", [TPU_PODS, GPU_PODS])
def test_jobset_manifest(arguments):
    """With JOBSET_CRD, the path of JobSet's CRD, and jsonschema at hand the engine's own schema is asked too."""
    manifest = yaml.safe_load(render(arguments))
    if "JOBSET_CRD" in os.environ:
        assert not jobset_schema.mistakes(os.environ["JOBSET_CRD"], manifest)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
    assert (
        job["parallelism"] == job["completions"] == (4 if arguments is TPU_PODS else 2)
        and job["completionMode"] == "Indexed"
    )
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 10 and job["podFailurePolicy"]["rules"][0][
        "onExitCodes"
    ]["values"] == [2]
    command = pod["containers"][0]["command"]
    assert ("--distributed" in command) == (arguments is TPU_PODS) and "--config.seed=7" in command
    if arguments is GPU_PODS:
        assert "--processes=2" in command and "--coordinator=nestax-slice-0-0.nestax:8476" in command
    try:
        import kubernetes_validate
    except ImportError:
        return
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": job}
    kubernetes_validate.validate(whole, "1.30", strict=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["slurm"], "--config and --workdir are needed"),
        (["slurm", "--config=configs/quickstrat.py", "--workdir=x"], "near: configs/quickstart.py"),
        (["slurm", "--name=Bad_Name", *SLURM[1:]], "valid: up to 40 small letters"),
        (["tpu", "--workdir=x", *RECIPE], "--tpu and --zone are needed"),
        (["jobset", "--workdir=x", *RECIPE], "--image and --accelerator are needed"),
        (["jobset", *GPU_PODS[1:], "--slices=2"], "--slices=2 is for TPU slices"),
        (["local", "--workdir=x", "--config=configs/quickstart.py", "--config.optim.lrr=1"], "near: config.optim.lr"),
        (["train", "--processes=2", "--workdir=x", *RECIPE], "--processes needs --coordinator=HOST:PORT"),
        (
            ["train", "--processes=2", "--process=2", "--workdir=x", *RECIPE],
            "--process=2 of --processes=2; valid: 0..1",
        ),
        (["plan", "--devices=2"], "--config is needed"),
        (["plan", "--devices=2", "--chips=abacus", *RECIPE], "unknown chip 'abacus'; valid: tpu_v5e"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = call(arguments, *(["--dry_run"] if arguments[0] in ("slurm", "tpu", "jobset") else []))
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_missing_engine_is_told():
    if shutil.which("sbatch"):
        pytest.skip("Slurm is installed here")
    done = call(SLURM)
    assert done.returncode == 2 and "sbatch is not installed here" in done.stderr
