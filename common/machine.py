"""What this machine has."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # ships no types

from common.errors import UserError

Result = TypeVar("Result")

#: How many a launcher says where a process is alone: msrun's scheduler is beside any number.
_ALONE = {"WORLD_SIZE": 1, "MS_WORKER_NUM": 0}


def cpu_count() -> int:
    """CPUs that this process may use, which in a container are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ascend_count() -> int:
    """Ascend NPUs whose driver is there, counted without any framework."""
    return sum(path.name[7:].isdecimal() for path in Path("/dev").glob("davinci*"))


def cpu_share() -> int:
    """CPUs for each of the processes that torchrun or run_ascend_distributed.sh started here."""
    counts = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_WORKER"))
    processes = max((int(count) for count in counts if count.isdecimal()), default=1)
    return max(1, cpu_count() // max(1, processes))


def launched_by(variable: str) -> bool:
    """Whether a launcher started this process together with others, msrun's scheduler among them.

    Args:
        variable: where it says how many: ``WORLD_SIZE`` (torchrun) or ``MS_WORKER_NUM`` (msrun).
    """
    count = os.environ.get(variable, "")
    return count.isdecimal() and int(count) > _ALONE[variable]


def let_threads_sleep() -> None:
    """Make threads that wait for one another sleep, unless the user has chosen how they wait.

    GNU OpenMP reads this when a framework loads it. By default its threads wait in a loop for some
    milliseconds, at the end of every operation: with another program on one core, all of them then
    wait for the one that was interrupted, and training takes up to ten times as long.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def apart(function: Callable[..., Result], *arguments: object) -> Result:
    """What a function returns in a process of its own.

    Frameworks in one process disturb each other's threads, and keep the memory that they have had.
    """
    advice = "ask for less, or end what else takes memory"
    with worker_pool(1, leave_with_parent, advice=advice) as pool:
        return pool.submit(function, *arguments).result()


def leave_with_parent() -> None:
    """From now on this process ends when the one that started it has ended, in whatever way."""

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def one_thread() -> AbstractContextManager[object]:
    """During the block one thread computes a product of matrices, numpy's or a framework's.

    For many small ones: OpenBLAS's other threads wait for the next one in a loop, which takes a
    whole core from whatever else computes.
    """
    limits: AbstractContextManager[object] = threadpool_limits(1)
    return limits


def start_worker() -> None:
    """First call of a worker process: one thread each, and Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threadpool_limits(1)
    leave_with_parent()


@contextmanager
def worker_pool(
    workers: int | None,
    initializer: Callable[..., None] = start_worker,
    initargs: tuple[object, ...] = (),
    advice: str = "with fewer processes at once (--workers, where a command has it) it takes less",
) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes for a block, after which what they have not begun is dropped.

    Args:
        workers: how many; one per CPU without it.
        initializer: the first call of each.
        initargs: its arguments.
        advice: to who has too little memory.

    Raises:
        UserError: in the block, if one of them ends early.
    """
    pool = ProcessPoolExecutor(
        workers or cpu_count(), multiprocessing.get_context("spawn"), initializer, initargs
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"a process ended before its work did, perhaps killed for want of memory: {advice}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
