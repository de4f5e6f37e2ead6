"""Lines and a progress bar for a human: a bar with ETA on a terminal, plain lines elsewhere."""

import sys
import time


class Terminal:
    """The Reporter of `research.train.loop` on stdout."""

    def __init__(self):
        self._bar = None
        self._task = None
        self._last = 0.0

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def progress(self, done: int, total: int, text: str) -> None:
        if not sys.stdout.isatty():
            print(f"step {done}/{total}  {text}", flush=True)
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar.start()
            self._task = self._bar.add_task(text, total=total)
        self._bar.update(self._task, completed=done, description=text)
        self._last = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Silent:
    """The Reporter of processes beside the one that prints."""

    def say(self, line: str) -> None:
        pass

    def progress(self, done: int, total: int, text: str) -> None:
        pass

    def close(self) -> None:
        pass
