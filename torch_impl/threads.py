"""Threads that compute side by side, where torch's own would wait for one another."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

#: Calls of a network at once, of which more only wait for Python's lock.
MAX_PARALLEL_CALLS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def threads_per_operation(count: int) -> Iterator[None]:
    """Within it operations have so many threads, also in threads that are started meanwhile.

    Several threads in one operation change the last bits of its result with their number, wait for
    one another after each of many small operations, and burn whole cores if one is kept busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SideBySide:
    """Threads that each compute a share, and between them have as many as torch may have."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count)  # kept, for new threads get fresh memory

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """What a function returns for each item, in their order."""
        with threads_per_operation(max(1, torch.get_num_threads() // self.count)):
            return list(self._pool.map(function, items))
