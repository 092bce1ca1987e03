"""Ending long work because a signal asks for it, at a moment that the work chooses."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Ctrl-C, and what a cluster's scheduler sends some time before it kills.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nstopping after this step; a second signal ends at once\n"
_SHOW_CURSOR = b"\x1b[?25h"


class StopRequest:
    """Whether this process was asked to end.

    Args:
        echo: seconds in which further signals count as the first one.

    Attributes:
        signal: number of the first signal that asked, or None.
    """

    def __init__(self, echo: float) -> None:
        self.signal: int | None = None
        self._echo = echo

    def _listen(self, pipe: int) -> None:
        """Takes note of the first signal, and ends the process at the second."""
        first = 0.0
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if self.signal is not None:
                    if time.monotonic() - first < self._echo:
                        continue
                    if sys.stdout.isatty():  # a bar of progress hides it
                        os.write(1, _SHOW_CURSOR)
                    os._exit(128 + number)
                self.signal, first = number, time.monotonic()
                os.write(2, _NOTICE)


@contextmanager
def stop_requests(echo: float = 0.0) -> Iterator[StopRequest]:
    """During the block Ctrl-C and SIGTERM only ask for the end; a second one ends at once.

    A thread hears them, for the main thread cannot while a framework compiles or computes. Outside
    of the main thread nothing is changed, and a signal that is ignored, as Ctrl-C by what a script
    starts in the background, stays so. MindSpore passes Ctrl-C on as SIGTERM.

    Args:
        echo: seconds in which further signals count as the first one: a launcher passes on what
            the scheduler has sent to every process.
    """
    request = StopRequest(echo)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listener = threading.Thread(target=request._listen, args=(reader,), daemon=True)
    listener.start()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _leave_to_listener)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(heard)
        os.close(writer)
        listener.join()
        os.close(reader)


def _leave_to_listener(*_: object) -> None:
    """That a handler in Python is there makes Python write the signal's number to the pipe."""
