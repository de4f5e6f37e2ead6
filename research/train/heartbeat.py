"""A sign of life: where nothing else is said for a while, a line tells what a run is at."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

EVERY_S = 10.0
"""Seconds of silence after which a line is said."""


class Heartbeat:
    """Says what the main thread is at, from a thread of its own: the main one may be inside a compiler.

    Args:
      say: called with a line.
      every: seconds of silence.
    """

    def __init__(self, say: Callable[[str], None], every: float = EVERY_S):
        self._say, self._every = say, every
        self._what: Callable[[], str] | None = None
        self._began = 0.0
        self._said = 0.0  # when a line was said last
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def at(self, what: Callable[[], str]) -> Iterator[None]:
        """Tells what `what()` returns as long as the body lasts; inner bodies come first."""
        outer, began = self._what, self._began
        self._what, self._began = what, time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            self._what, self._began = outer, began

    def _run(self) -> None:
        while not self._over.wait(self._every / 10):
            self.beat()

    def beat(self) -> None:
        """Tells what the main thread is at, where nothing was said for long."""
        what, began, now = self._what, self._began, time.monotonic()
        if what is None or now - max(self._said, began) < self._every:
            return
        self._said = now
        self._say(f"{what()} ({now - began:.0f} s)")

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
