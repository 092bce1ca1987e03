"""How a process that has trained together with others ends.

MindSpore 2.9 leaves its cluster in a handler of ``atexit``. What is taken down after that was seen
to crash (signal 11, once, on a busy machine), when the finished run was on the disk. A handler that
was registered before MindSpore was imported runs after its own, and skips the rest.
"""

import atexit
import os
import sys

_done = False


def leave_at_once() -> None:
    """From now on nothing is left to do, and this process ends with status 0."""
    global _done
    _done = True


def _leave() -> None:
    if _done:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


atexit.register(_leave)
