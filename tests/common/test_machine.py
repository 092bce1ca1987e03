"""What a process says to the libraries that it loads, and when it ends."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from common.errors import UserError
from common.machine import apart, one_thread, worker_pool

REPOSITORY = Path(__file__).resolve().parents[2]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
#: A process, and one of its own that says who it is and then works for long.
APART = """
import os, sys, time
from pathlib import Path

from common.machine import apart


def work(path):
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").rename(path)
    time.sleep(600)


if __name__ == "__main__":
    apart(work, Path(sys.argv[1]))
"""
LOAD = "from common.backend import load_backend; load_backend('torch')"


@pytest.mark.parametrize(
    ("chosen", "rounds"),
    [({}, 0), ({"OMP_WAIT_POLICY": "active"}, 30_000_000_000), ({"GOMP_SPINCOUNT": "7"}, 7)],
)
def test_threads_wait_asleep_unless_the_user_has_chosen(
    chosen: dict[str, str], rounds: int
) -> None:
    """As GNU OpenMP itself reports when torch has loaded it."""
    given = {name: value for name, value in os.environ.items() if name not in WAITING}
    given |= {"OMP_DISPLAY_ENV": "verbose"} | chosen
    finished = subprocess.run(
        [sys.executable, "-c", LOAD], env=given, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    report = dict(line.split(" = ") for line in finished.stderr.splitlines() if " = " in line)
    assert report["  GOMP_SPINCOUNT"] == f"'{rounds}'"


def runs(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within minutes."""
    end = time.monotonic() + 300
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are seen in /proc")
def test_a_killed_process_takes_its_own_along(tmp_path: Path) -> None:
    script, said = tmp_path / "script.py", tmp_path / "process"
    script.write_text(APART)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(said)], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    try:
        assert wait_until(said.exists)
        child = int(said.read_text())
        assert runs(child)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not runs(child))


def test_one_thread_and_afterwards_as_before() -> None:
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info()]

    np.eye(2) @ np.eye(2)  # its library is loaded
    with threadpool_limits(2):
        before = threads()
        assert 2 in before
        with one_thread():
            assert set(threads()) == {1}
        assert threads() == before


def test_a_worker_that_is_killed_is_one_line() -> None:
    line = "a process ended before its work did, perhaps killed for want of memory: "
    with (
        pytest.raises(UserError, match=f"^{line}buy some$"),
        worker_pool(1, advice="buy some") as pool,
    ):
        list(pool.map(os._exit, [9]))
    with pytest.raises(UserError, match=f"^{line}ask for less"):
        apart(os._exit, 9)


def test_what_workers_raise_themselves_passes() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(divmod, 1, 0)
