"""What every command shares: flags with useful help, the process set up for speed, mistakes told in one line."""

import contextlib
import difflib
import errno
import logging as stdlib_logging
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags, logging

from launch import outputs
from launch.path_flags import path_flag as path_flag  # for the commands, as `common.path_flag`
from launch.streams import set_streams
from research import plugins, stopping
from research.errors import Notice, Unregistered, UserError
from research.files import printable
from research.process import set_allocator, set_dispatch, set_xla_flags

flags.disclaim_key_flags()  # `--plugin` belongs to the command that is run

PLUGINS = flags.DEFINE_multi_string(
    "plugin", [], "File of one's own that registers models, mixers or the like. Repeatable."
)


def plugin_flags() -> list[str]:
    """Returns the flags that bring the user's own files into another command."""
    return [f"--plugin={file}" for file in PLUGINS.value]


def print_next(command: str) -> None:
    """Prints the command that continues from here, with the user's own files."""
    print(f"next: {' '.join([command, *plugin_flags()])}")


def _plugins_of_run() -> str:
    """Tells the user's own files in the command of the run that --workdir names, where they were not given."""
    from research.report.reading import read_environment

    workdir = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
    if not workdir or "://" in workdir:
        return ""
    command = read_environment(Path(workdir)).get("command")
    named = re.findall(r"--plugin[= ](\S+)", command) if isinstance(command, str) else []
    missing = [f"--plugin={file}" for file in dict.fromkeys(named) if file not in PLUGINS.value]
    return f"; the run's command has {' '.join(missing)}" if missing else ""


USER_ERROR = 2  # exit code of a user's mistake
STOPPED = 75  # exit code of a run that was told to stop and that can continue (EX_TEMPFAIL)
INTERRUPTED = stopping.AT_ONCE  # exit code of a command that Ctrl-C ended


OVERRIDES: dict[str, str] = {}
"""The `--config.field=value` arguments, for commands that take a recipe."""


def run(
    main: Callable[[], int | None], before: Callable[[], dict[str, str]] | None = None, *, trains: bool = False
) -> None:
    """Parses the flags, calls `main()` and exits with its code; never returns.

    With `trains` the command listens from here on to what tells it to stop, see `research.stopping`: where `main` does
    not heed it the command ends.

    A UserError is printed as `error: ...` on stderr with exit code 2; so are unknown flags, what the system refuses
    (full disks, missing rights, too many open files) and memory that does not suffice. Any other exception keeps its
    traceback. Where nobody reads what is printed any more (`| head`), the command still does its work to the end.
    """
    set_streams()
    set_allocator()
    set_dispatch()
    set_xla_flags()
    sys.unraisablehook = _unraisable
    _show_notices()
    # Libraries' warnings are not the user's concern, and what they log as an error they also raise: it is told once, by
    # us.
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    listening = stopping.listening() if trains else contextlib.nullcontext()
    stop = listening.__enter__()  # to the end of the process
    try:
        if {"--help", "--helpshort", "-h", "-help", "-helpshort"} & set(sys.argv[1:]):
            print(_help())
            sys.exit(0)
        if before is not None:
            OVERRIDES.update(before())
        _parse(sys.argv)
        outputs.check()
        for file in PLUGINS.value:
            plugins.load(file)
        code = main()
        sys.stdout.flush()
        if stop is not None:
            stop.heed()  # the work is done
    except stopping.Told as told:
        stopped(told)
    except UserError as error:
        print(f"error: {error}{_plugins_of_run() if isinstance(error, Unregistered) else ''}", file=sys.stderr)
        _leave(USER_ERROR)
    except OSError as error:
        print(f"error: {_refused_by_system(error)}", file=sys.stderr)
        _leave(USER_ERROR)
    except Exception as error:
        if (short := _out_of_memory(error)) is None:
            raise
        print(f"error: {short}", file=sys.stderr)
        _leave(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code or 0)


def stopped(told: object) -> NoReturn:
    """Ends a command whose run was told to stop; threads that compile must not hold the process."""
    print(told, flush=True)
    _leave(STOPPED)


def pin(process: subprocess.Popen, cores: Sequence[int]) -> None:
    """Keeps a process to some cores, where the system can."""
    if cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, cores)


REMEDIES = {
    errno.ENOSPC: "free space there, or give another place",
    errno.EDQUOT: "free some of your quota there, or give another place",
    errno.EFBIG: "files may not become as large here: raise the limit (ulimit -f), or use a file system without it",
    errno.EMFILE: "this process may not open more files: raise the limit (ulimit -n 4096)",
    errno.ENFILE: "this machine may not open more files: end other programs",
    errno.EACCES: "get the right to it, or give another place",
    errno.EPERM: "get the right to it, or give another place",
    errno.EROFS: "give a place that can be written",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOTDIR: "a part of this path is a file, where a folder is needed",
    errno.ENOENT: "it, or the folder it lies in, is missing",
    errno.ENOMEM: "end other programs, or give the command less to do",
}
"""What a user can do about what the system refused."""


def _refused_by_system(error: OSError) -> str:
    """The cause, the file and what to do; a file that the system did not name is told by the line of ours that used
    it."""
    place = error.filename if error.filename is not None else _place(error)
    name = printable(os.fsdecode(place) if isinstance(place, bytes | str) else place, 300)
    remedy = REMEDIES.get(error.errno or 0)
    return (
        f"{error.strerror or printable(error, 300)}: {name}{f'; {remedy}' if remedy else ''}; "
        "what was whole before is whole still"
    )


def _place(error: BaseException) -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith((f"{root}/research/", f"{root}/launch/"))
    ]
    return f"at {os.path.relpath(own[-1].filename, root)}:{own[-1].lineno}" if own else "an unnamed file"


def _out_of_memory(error: Exception) -> str | None:
    """The line for memory that did not suffice, on the host or on a device; None for any other error."""
    told = str(error).strip().splitlines() or [""]
    if isinstance(error, MemoryError):
        return (
            f"out of memory{f': {printable(told[0], 200)}' if told[0] else ''}; give smaller batches, "
            "a smaller model or a machine with more"
        )
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in told[0]:  # what JAX raises for every backend
        return (
            f"out of memory on the device: {printable(told[0], 200)}; give smaller batches, "
            "a smaller model or more devices"
        )
    return None


def _leave(code: int) -> NoReturn:
    """Ends the process at once: after a full disk, writers that close at exit would meet it again, with a traceback
    each."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _unraisable(error) -> None:
    """Ends a command that was told to stop inside a callback of a library, which would lose that.

    Leaves out what tensorstore's threads print when their writes end after a failed save has closed its event loop.
    """
    if isinstance(error.exc_value, stopping.Told):
        with contextlib.suppress(Exception):  # it may have come inside of a print
            print(error.exc_value, flush=True)
        _leave(STOPPED)
    if not (error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(error)


def _show_notices() -> None:
    """Has every `Notice` printed in a line of its own; other warnings are shown as Python does."""
    usual = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if issubclass(category, Notice):
            print(f"note: {message}", file=sys.stderr, flush=True)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    warnings.simplefilter("always", Notice)


def _help() -> str:
    doc = sys.modules["__main__"].__doc__ or ""
    flags.declare_key_flag("plugin")
    lines = [line for line in flags.FLAGS.main_module_help().splitlines() if not line.startswith("/")]
    return f"{doc.strip()}\n\nflags:\n" + "\n".join(lines).strip("\n")


def _parse(argv: list[str]) -> None:
    try:
        rest = flags.FLAGS(argv, known_only=False)
    except flags.UnrecognizedFlagError as error:
        names = [flag.name for flag in flags.FLAGS.get_key_flags_for_module("__main__")]
        near = difflib.get_close_matches(error.flagname, names, n=3, cutoff=0.5) or names
        raise UserError(
            f"unknown flag --{error.flagname}; near: {', '.join('--' + n for n in near)} (see --helpshort)"
        ) from None
    except flags.Error as error:
        raise UserError(printable(str(error).replace("\n", " ").strip(), 400)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value (see --helpshort)")
