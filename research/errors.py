"""The one exception for a user's mistake, and the one warning of what a user should know; launch/ prints both in a
line."""


class UserError(Exception):
    """A mistake of the user: the message names cause, place and remedy in one or two lines."""


class Notice(UserWarning):
    """What a user should know and what stops nothing, such as files that are left out; given by `warnings.warn`."""
