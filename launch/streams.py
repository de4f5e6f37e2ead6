"""Standard output and error that outlive their reader: after `| head`, or behind a terminal that is gone, a run
continues in silence."""

import errno
import io
import os
import sys
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""What writing to a pipe that nobody reads, or to a terminal that was closed, fails with."""


class _Descriptor(io.FileIO):
    """A descriptor whose writes vanish once nobody reads; other failures name the stream, a full disk behind `> file`
    for one."""

    def __init__(self, descriptor: int, title: str):
        super().__init__(descriptor, "w", closefd=False)
        self.title = title

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise OSError(error.errno, error.strerror, self.title) from None
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def _lasting(stream: TextIO | None, title: str) -> TextIO:
    """Returns a stream like the given one, which prints what its encoding lacks as '?'; None, a closed one, prints
    nowhere."""
    try:
        if stream is None:
            raise OSError
        stream.flush()
        descriptor = stream.fileno()
    except (OSError, ValueError):  # closed before the command began (>&-)
        return open(os.devnull, "w", encoding="utf-8")  # for as long as the process lives
    raw = io.BufferedWriter(_Descriptor(descriptor, title))
    return io.TextIOWrapper(
        raw, encoding=stream.encoding, errors="replace", line_buffering=bool(stream.line_buffering), write_through=False
    )


def set_streams() -> None:
    """Replaces `sys.stdout` and `sys.stderr` by streams that never end a run: not by a missing reader, nor by a letter
    that they lack."""
    sys.stdout = _lasting(sys.stdout, "standard output")
    sys.stderr = _lasting(sys.stderr, "standard error")
