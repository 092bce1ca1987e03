"""Errors that a user can cause and mend."""


class UserError(Exception):
    """A mistake in what the user gave: one line that says what, where, and what to do.

    The command line prints the message and exits with status 2.
    """
