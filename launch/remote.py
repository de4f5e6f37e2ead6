"""What the launchers of clusters share: the command that every process runs, and how what they render is shown or
passed on."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from launch import outputs
from research.errors import UserError

CONFIG = flags.DEFINE_string("config", None, "Recipe: FILE.py or FILE.py:ARG.")
WORKDIR = outputs.output_flag(
    "workdir", outputs.Place.RUN, "Directory of the run, on a file system that all machines share."
)
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what would be submitted, and submit nothing.")
NAME = flags.DEFINE_string("name", "nestax", "Name of the job.")


def command(overrides: Mapping[str, str], python: str = "python") -> list[str]:
    """Returns the words of the training command for every process of a cluster.

    Raises:
      UserError: the recipe or the workdir is missing or wrong.
    """
    from launch import config as recipe

    if not CONFIG.value or not WORKDIR.value:
        raise UserError(
            "--config and --workdir are needed, e.g. --config=configs/quickstart.py --workdir=runs/quickstart"
        )
    recipe.load(CONFIG.value, dict(overrides))  # mistakes show here, not in the queue
    fields = [f"--config.{field}={value}" for field, value in overrides.items()]
    return [
        python,
        "-m",
        "launch.train",
        f"--config={CONFIG.value}",
        f"--workdir={WORKDIR.value}",
        *fields,
        "--distributed",
    ]


def name() -> str:
    """Returns the job's name.

    Raises:
      UserError: clusters would not take it.
    """
    text = NAME.value
    if (
        not text
        or len(text) > 40
        or not all(c.isdigit() or c.islower() or c == "-" for c in text)
        or not text[0].isalpha()
        or text[-1] == "-"
    ):
        raise UserError(
            f"--name={text!r}; valid: up to 40 small letters, digits and '-', the first a letter, the last no '-'"
        )
    return text


def lines(words: Sequence[str], indent: str = "  ") -> str:
    """Returns a command of several lines, one a flag, for a shell."""
    out = ""
    for word in map(shlex.quote, words):
        out += (f" \\\n{indent}" if word.startswith("--") else " ") + word
    return out.strip()


def hand_over(text: str, program: Sequence[str]) -> int:
    """Prints `text` under --dry_run, else gives it to a program's standard input; returns the exit code.

    Raises:
      UserError: there is no such program here.
    """
    if DRY_RUN.value:
        print(text, end="" if text.endswith("\n") else "\n")
        return 0
    try:
        return subprocess.run(program, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        raise UserError(
            f"{program[0]} is not installed here; install it, or render with --dry_run and submit elsewhere"
        ) from None


def root() -> str:
    """Returns the folder that commands run in: the repository's root."""
    return os.getcwd()


def interpreter() -> str:
    """Returns this Python, which a shared file system shows on every machine."""
    return sys.executable
