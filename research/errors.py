"""The one exception for a user's mistake, and the one warning of what a user should know; launch/ prints both in a
line. What a message offers in place of an unknown name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user: the message names cause, place and remedy in one or two lines."""


class Unregistered(UserError):
    """A name that nothing registered; the message ends with how a file of the user's own is given that does."""

    def __str__(self) -> str:
        return f"{self.args[0]} (one's own: --plugin=FILE)"


class Notice(UserWarning):
    """What a user should know and what stops nothing, such as files that are left out; given by `warnings.warn`."""


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Returns the known names that are like a given one, for messages; all of them, sorted, where none is."""
    names = sorted(known)
    return difflib.get_close_matches(str(name), names, n=3, cutoff=0.4) or names
