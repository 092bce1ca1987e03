"""What ends a command before its time: a user's mistake, or a signal."""


class UserError(Exception):
    """A mistake in what the user gave: one line that says what, where, and what to do.

    The command line prints the message and exits with status 2.
    """


class Interrupted(Exception):
    """A signal asked a run to end, and what is needed to go on was kept: one line says where.

    The command line prints it and exits with status 128 + the signal's number, as shells have it.

    Args:
        message: the line.
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
