"""`uni-mdm`: lazy, and one line with exit code 2 for what the user can mend."""

import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from common.checkpoint import shipped, shipped_language
from common.cli import COMMANDS

UNI_MDM = Path(sys.executable).with_name("uni-mdm")


def call(*arguments: str | bytes, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess:
    command = [UNI_MDM, *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


def error_of(*arguments: str | bytes, stdout: int = subprocess.PIPE) -> str:
    finished = call(*arguments, stdout=stdout)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
    assert finished.stderr[:-1].isprintable()
    return finished.stderr


def test_help_names_every_command() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        finished = call(*arguments)
        assert finished.returncode == 0
        assert not finished.stderr
        for name in COMMANDS:
            assert f"\n  {name} " in finished.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    finished = call(name, "--help")
    assert finished.returncode == 0, finished.stderr
    assert f"Usage: uni-mdm {name}" in finished.stdout


def test_help_takes_less_than_half_a_second() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5, "processor time, which other programs hardly change"


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from common.cli import run; run(['--help']); print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = set(finished.stdout.split())
    assert "typer" in loaded
    assert not loaded & {"numpy", "pymatgen", "pandas", "torch", "rich", "pydantic"}


def test_version() -> None:
    assert call("--version").stdout == f"uni-mdm {version('uni-mdm')}\n"


def test_info_describes_this_machine() -> None:
    finished = call("info")
    assert finished.returncode == 0, finished.stderr
    assert version("pymatgen") in finished.stdout
    assert "cpu" in finished.stdout.lower()
    assert "crystal_dit_small_fm" in finished.stdout
    # Paths can be copied: they stand on one line each, however narrow the terminal is.
    shown = {line.split(", ")[-1] for line in finished.stdout.splitlines()}
    assert {str(path) for path in (shipped() | shipped_language()).values()} <= shown
    counts = re.findall(r"([\d,]+) parameters", finished.stdout)
    assert len(counts) == len(shipped()) + len(shipped_language())
    assert min(int(count.replace(",", "")) for count in counts) > 1000, "also of small adapters"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dta"], "Did you mean 'data'?"),
        (["--nonsense"], "No such option: --nonsense"),
        (["data"], "Missing command (see 'uni-mdm data --help')"),
        (["data", "split", "train"], "Missing option '--out'"),
        (["data", "split", "x", "--out", "a", "--out", "b"], "--out is given twice"),
        (["data", "split", "x", "--out", "a", "--seed", "one"], "'--seed'"),
        (["data", "import", "--source", "x", "--out", "y", "--format", "doc"], "'auto', 'csv'"),
        (["data", "info", "absent.parquet"], "absent.parquet"),
        (["train"], "Missing argument"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["train", "x.yaml", "--resume", "--fresh"], "--resume is given twice"),
    ],
)
def test_mistake(arguments: list[str], expected: str) -> None:
    assert expected in error_of(*arguments)


def test_what_the_terminal_would_obey_is_escaped() -> None:
    message = error_of("data", "info", b"\x1b[31m\nred\xff")
    assert "\\x1b[31m\\nred" in message


def test_characters_that_the_terminal_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("UNI_MDM_DATA", str(tmp_path / "\N{GREEK SMALL LETTER DELTA}"))
    finished = call("info")
    assert finished.returncode == 0, finished.stderr
    assert "data (UNI_MDM_DATA)" in finished.stdout
    assert "crystal_dit_small_fm" in finished.stdout


def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        for arguments in (["--version"], ["info"]):
            assert "No space left" in error_of(*arguments, stdout=full.fileno())


def test_reader_that_went_away_is_no_crash() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    finished = call("--help", stdout=writer)
    os.close(writer)
    assert "Traceback" not in finished.stderr


def test_interruption(tmp_path: Path) -> None:
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    # A shell may have started the tests with interruptions ignored, which a process inherits.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([UNI_MDM, "train", pipe], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, inherited)
    errors = ""
    with pipe.open("w"):  # Waits until the command reads.
        for _ in range(3):  # Python loses an interruption that falls into a destructor.
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=60)
                break
    assert process.returncode == 130
    assert "Traceback" not in errors
