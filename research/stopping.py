"""How a process is told to stop: by SIGTERM, Ctrl-C, a closed terminal or spent CPU time.

Where somebody heeds it the first word sets a flag; elsewhere it raises `Told`, so that nothing continues for ever. A
second Ctrl-C ends the process.

Standard library only, so that a command can listen before it imports anything else.
"""

import contextlib
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

AT_ONCE = 128 + signal.SIGINT
"""Exit code after a second Ctrl-C."""
SAME_S = 0.5
"""Seconds within which Ctrl-C comes twice where a wrapper passes on what its whole group got already."""
PUT_OFF_S, AGAIN_S = 0.02, 5.0
"""Seconds after which a signal is heard again: one that came while a module was being imported, and one that somebody
swallowed."""
IMPORTS_S = 20
"""Seconds after which even an import is interrupted."""
SIGNALS = {
    "SIGTERM": "SIGTERM",
    "SIGINT": "Ctrl-C",
    "SIGHUP": "SIGHUP, a closed terminal",
    "SIGXCPU": "SIGXCPU, the limit of CPU time",
}
"""Signals that are listened to, where the system has them -> what they are called."""


class Preempted(Exception):
    """The run was told to stop; `step` is where it continues, and its state is saved unless that is 0. `by`: what told
    it."""

    def __init__(self, step: int, by: str = "SIGTERM"):
        saved = "; the state is saved, start the same command again to continue"
        nothing = ", before the first update was done; nothing was to be saved, start the same command again to begin"
        super().__init__(f"stopped by {by} at step {step}{saved if step else nothing}")
        self.step = step


class Told(BaseException):
    """This process was told to stop where nobody heeds it; no error, so that nothing takes it for one."""

    def __init__(self, by: str):
        super().__init__(f"stopped by {by} outside of training; nothing was to be saved, start the same command again")
        self.by = by


class Stop:
    """Whether, and by what, this process was told to stop.

    Attributes:
      told: "" or the name in `SIGNALS` of the first signal that came.
      last: called before a second Ctrl-C ends the process.
      forward: called with the number of every signal; for processes that others wait on.
    """

    def __init__(self) -> None:
        self.told = ""
        self.last: Callable[[], None] = lambda: None
        self.forward: Callable[[int], None] = lambda _: None
        self._first_interrupt = 0.0
        self.resend = 0  # what this process sends itself in place of a signal that it has heard before
        self._resent = 0  # the same, while it is on its way
        self._waits = 0.0  # since when a signal is to end what does not heed it
        self._raised = -SAME_S  # when `Told` was raised last
        self._heeding: set[object] = set()

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """For the time of the body a signal only sets `told`, which the body looks at."""
        who = object()
        self._heeding.add(who)
        try:
            yield
        finally:
            self._heeding.discard(who)

    def heed(self) -> None:
        """From here on a signal only sets `told`: of processes that others wait for, which must not end alone."""
        self._heeding.add(self)

    def __bool__(self) -> bool:
        return bool(self.told)

    def hear(self, number: int, frame: Any = None) -> None:
        """The handler of the signals."""
        now = time.monotonic()
        again = number == self._resent
        self._resent = 0 if again else self._resent
        if number == signal.SIGINT and self._first_interrupt and not again and now - self._first_interrupt > SAME_S:
            with contextlib.suppress(Exception):
                self.last()
            os._exit(AT_ONCE)
        if number == signal.SIGINT and not self._first_interrupt:
            self._first_interrupt = now
        self.told = self.told or SIGNALS[signal.Signals(number).name]
        if not again:
            self.forward(number)
        if self._heeding or now - self._raised <= SAME_S:  # heeded; or the same one, and on its way
            return
        self._waits = self._waits or now
        if _importing(frame) and now - self._waits < IMPORTS_S:  # compiled modules may crash where they are interrupted
            self._later(number, PUT_OFF_S)
            return
        self._raised = now
        self._later(number, AGAIN_S)
        raise Told(self.told)

    def take_back(self, number: int) -> None:
        """Listens again to a signal that a library has taken over, and heeds no more: no process waits for this one."""
        if _listening[:1] == [self] and threading.current_thread() is threading.main_thread():
            signal.signal(number, self.hear)
        self._heeding.discard(self)

    def _later(self, number: int, seconds: float) -> None:
        """Has the signal heard again, unless it is heeded or nobody listens by then."""

        def send() -> None:
            if _listening[:1] == [self] and not self._heeding:
                self._resent = self.resend or number
                os.kill(os.getpid(), self._resent)

        timer = threading.Timer(seconds, send)
        timer.daemon = True
        timer.start()


def _importing(frame: types.FrameType | None) -> bool:
    """Whether a module is being imported where a signal came."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_listening: list[Stop] = []


def heed() -> None:
    """Ends what was told to stop, while that was heeded, before it begins what does not heed it.

    Raises:
      Told: it was.
    """
    if _listening and _listening[0]:
        raise Told(_listening[0].told)


@contextlib.contextmanager
def listening(leave: Collection[str] = ()) -> Iterator[Stop]:
    """Yields the `Stop` that signals set for the time of the body: that of the caller where it listens already.

    Signals that were ignored, as SIGHUP is under nohup, stay so. Outside of the main thread nothing is heard.

    Args:
      leave: names of signals that somebody else listens to.
    """
    if _listening or threading.current_thread() is not threading.main_thread():
        yield _listening[0] if _listening else Stop()
        return
    stop, old = Stop(), {}
    for name in SIGNALS:
        number = getattr(signal, name, None)  # Windows has not all of them
        if number is not None and name not in leave and signal.getsignal(number) is not signal.SIG_IGN:
            old[number] = signal.signal(number, stop.hear)
    # A Ctrl-C that came while another one, of ours, is on its way would be taken for that: the others may come twice.
    several: list[int] = [getattr(signal, name, 0) for name in ("SIGXCPU", "SIGHUP", "SIGTERM")]
    stop.resend = next((number for number in several if number in old), 0)
    _listening.append(stop)
    try:
        yield stop
    finally:
        _listening.clear()
        for number, handler in old.items():
            signal.signal(number, handler)
