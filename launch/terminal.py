"""Lines and a progress bar for a human: a bar with ETA on a terminal, plain lines elsewhere."""

import shutil
import sys

BAR = 24
LEAST_NEEDED = ("MFU", "lr", "grad")
"""Parts of a line that are left out first where the terminal is narrow."""


def shorten(text: str, room: int) -> str:
    """Returns the parts of a line (two spaces between them) that fit into `room` columns: the less needed go first, the
    last one, the ETA, stays."""
    parts = text.split("  ")
    while len(parts) > 1 and len("  ".join(parts)) > room:
        spare = next((i for i, part in enumerate(parts) if part.startswith(LEAST_NEEDED)), len(parts) - 2)
        del parts[spare]
    return "  ".join(parts)[: max(room, 0)]


def bar_line(done: int, total: int, text: str, columns: int) -> str:
    """Returns step counter, bar and text in one line of less than `columns`; the counter is never cut, the bar goes
    first."""
    counter = f"{done}/{total}"
    room = columns - 1 - len(counter) - 1
    width = min(BAR, room - len(text) - 1)
    if width < 8:
        return f"{counter} {shorten(text, room)}"
    full = width * done // max(total, 1)
    return f"{counter} {'#' * full}{'-' * (width - full)} {text}"


class Terminal:
    """The Reporter of `research.train.loop` on stdout."""

    def __init__(self):
        self._shown = 0  # letters of the bar that stand in the last line

    def say(self, line: str) -> None:
        self.close()
        print(line, flush=True)

    def progress(self, done: int, total: int, text: str) -> None:
        if not sys.stdout.isatty():
            print(f"step {done}/{total}  {text}", flush=True)
            return
        line = bar_line(done, total, text, shutil.get_terminal_size().columns)
        print(f"\r{line.ljust(self._shown)}", end="", flush=True)
        self._shown = len(line)

    def close(self) -> None:
        """Leaves the bar as it is; what is printed next begins a line."""
        if self._shown:
            print(flush=True)
            self._shown = 0


class Silent:
    """The Reporter of processes beside the one that prints."""

    def say(self, line: str) -> None:
        pass

    def progress(self, done: int, total: int, text: str) -> None:
        pass

    def close(self) -> None:
        pass
