"""What a process says to the libraries that it loads."""

import os
import subprocess
import sys

import pytest

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
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
