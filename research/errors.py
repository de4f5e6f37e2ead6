"""The one exception for a user's mistake; launch/ prints it without a traceback."""


class UserError(Exception):
    """A mistake of the user: the message names cause, place and remedy in one or two lines."""
