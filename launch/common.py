"""What every command shares: flags with useful help, the process set up for speed, mistakes told in one line."""

import contextlib
import difflib
import logging as stdlib_logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags, logging

from research.errors import UserError
from research.process import set_allocator, set_dispatch, set_xla_flags

USER_ERROR = 2  # exit code of a user's mistake
STOPPED = 75  # exit code of a run that SIGTERM stopped and that can go on (EX_TEMPFAIL)


OVERRIDES: dict[str, str] = {}
"""The `--config.field=value` arguments, for commands that take a recipe."""


def run(main: Callable[[], int | None], before: Callable[[], dict[str, str]] | None = None) -> None:
    """Parses the flags, calls `main()` and exits with its code; never returns.

    A UserError is printed as `error: ...` on stderr with exit code 2; so are full disks and unknown flags. Any other
    exception keeps its traceback.
    """
    set_allocator()
    set_dispatch()
    set_xla_flags()
    sys.unraisablehook = _unraisable
    # Libraries' warnings are not the user's concern, and what they log as an error they also raise: it is told once, by us.
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    try:
        if {"--help", "--helpshort", "-h", "-help", "-helpshort"} & set(sys.argv[1:]):
            print(_help())
            sys.exit(0)
        if before is not None:
            OVERRIDES.update(before())
        _parse(sys.argv)
        code = main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(USER_ERROR)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'a file of the run'}; nothing that was there is lost", file=sys.stderr)
        _leave(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on from the last checkpoint", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def pin(process: subprocess.Popen, cores: Sequence[int]) -> None:
    """Keeps a process to some cores, where the system can."""
    if cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, cores)


def _leave(code: int) -> NoReturn:
    """Ends the process at once: after a full disk, writers that close at exit would meet it again, with a traceback each."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _unraisable(error) -> None:
    """Leaves out what tensorstore's threads print when their writes end after a failed save has closed its event loop."""
    if not (error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(error)


def _help() -> str:
    doc = sys.modules["__main__"].__doc__ or ""
    lines = [line for line in flags.FLAGS.main_module_help().splitlines() if not line.startswith("/")]
    return f"{doc.strip()}\n\nflags:\n" + "\n".join(lines).strip("\n")


def _parse(argv: list[str]) -> None:
    try:
        rest = flags.FLAGS(argv, known_only=False)
    except flags.UnrecognizedFlagError as error:
        names = [flag.name for flag in flags.FLAGS.get_key_flags_for_module("__main__")]
        near = difflib.get_close_matches(error.flagname, names, n=3, cutoff=0.5) or names
        raise UserError(f"unknown flag --{error.flagname}; near: {', '.join('--' + n for n in near)} (see --helpshort)") from None
    except flags.Error as error:
        raise UserError(str(error).replace("\n", " ").strip()) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value (see --helpshort)")
