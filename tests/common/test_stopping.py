"""What asks a process to end, in processes of their own."""

import signal
import subprocess
import sys

import pytest

#: Hears signals for a while, and says what the first one was.
LISTENER = """
import sys, time
from common.stopping import stop_requests

with stop_requests(float(sys.argv[1])) as request:
    print("ready", flush=True)
    sum(range(10**7))
    while not request.signal:
        time.sleep(0.01)
    print(request.signal, flush=True)
    time.sleep(float(sys.argv[2]))
print("left", flush=True)
time.sleep(60)
"""


def listener(echo: float, stays: float) -> "subprocess.Popen[str]":
    # A shell may have started the tests with interruptions ignored, which a process inherits.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(echo), str(stays)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, inherited)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_first_signal_asks_and_the_second_ends(first: str, second: str) -> None:
    process = listener(0, 60)
    assert process.stdout is not None
    process.send_signal(signal.Signals[first])
    assert process.stdout.readline() == f"{int(signal.Signals[first])}\n"
    process.send_signal(signal.Signals[second])
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.Signals[second]
    assert output == ""
    assert errors.splitlines() == ["", "stopping after this step; a second signal ends at once"]


def test_what_a_launcher_repeats_counts_once() -> None:
    process = listener(60, 1)
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "15\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "left\n"
    # Behind the block a signal is what it was before.
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
