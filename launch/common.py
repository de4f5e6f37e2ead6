"""What every command shares: the process set up for speed, and a user's mistake told in one line."""

import sys
from collections.abc import Callable, Sequence

from absl import app

from research.errors import UserError
from research.process import set_allocator

USER_ERROR = 2  # exit code


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main()` and exits with its code; never returns.

    A UserError is printed as `error: ...` on stderr with exit code 2, any other exception with its traceback.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        set_allocator()
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value (see --helpshort)")
            return main()
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            return USER_ERROR

    app.run(guarded)
