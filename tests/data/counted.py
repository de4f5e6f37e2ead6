"""How much Python a function runs, which no clock and no busy machine decides."""

import sys
from collections.abc import Callable


def calls(run: Callable[[], object]) -> int:
    """Returns how many functions `run` calls, of Python and of C."""
    count = 0

    def on(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    run()  # what is made once is there
    before = sys.getprofile()
    sys.setprofile(on)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count
