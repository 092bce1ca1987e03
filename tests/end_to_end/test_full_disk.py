"""Places that cannot be written and disks that fill up, through the commands themselves.

One line on stderr, exit code 2, nothing half-written, and nothing lost that was finished before. A
limit on the size of files makes the real write fail midway, as a full disk does; one test fills a
real file system.
"""

import csv
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from pymatgen.core import Structure

from common import runs, training
from common.checkpoint import MODEL, load_checkpoint
from common.cli import run
from common.data.label import label_structure
from common.data.store import Record, read_records, write_records
from tests.crystals import textbook

UNI_MDM = Path(sys.executable).with_name("uni-mdm")
PAIRS = [f"{a}{b}" for a in ("Li", "Na", "K") for b in ("F", "Cl")]
CRYSTALS = ("rock salt NaCl", "CsCl", "rutile TiO2", "perovskite SrTiO3")
CONFIG = {
    "name": "tiny",
    "model": {"layers": 1, "width": 16, "edge_width": 16, "heads": 2, "properties": ["band_gap"]},
    "diffusion": {"steps": 3},
    "train": {"steps": 2, "batch_size": 4, "checkpoint_every": 1, "log_every": 1, "warmup": 1},
}

Contents = dict[str, bytes]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow beyond some bytes in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> Contents:
    """Every file and empty folder below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Textbook crystals as Parquet (twice, so that two rows have a file of their own) and CIFs."""
    folder = tmp_path_factory.mktemp("data")
    records = [
        Record(name, label_structure(textbook(name)), properties={"band_gap": 1.0 + index})
        for index, name in enumerate(CRYSTALS)
    ]
    write_records(records, folder / "crystals.parquet")
    (folder / "cifs").mkdir()
    for name in CRYSTALS:
        textbook(name).to(filename=str(folder / "cifs" / f"{name}.cif"))
    (folder / "cifs" / "broken.cif").write_text("not a CIF")
    return folder


@pytest.fixture(scope="module")
def config(data: Path) -> Path:
    rows = str(data / "crystals.parquet")
    settings = CONFIG | {"train": {**CONFIG["train"], "data": rows, "validation": rows}}
    path = data / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def checkpoint(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    assert run(["train", str(config), "--out", str(folder), "--threads", "1"]) == 0
    return folder / "final"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; the cache is another one."""
    monkeypatch.setenv("UNI_MDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def generate(checkpoint: Path, *arguments: str, top: int = 2, samples: int = 2) -> list[str]:
    options = ["--top", str(top), "--num-samples", str(samples), "--checkpoint", str(checkpoint)]
    return ["generate", *options, *arguments]


def evaluate(checkpoint: Path, data: Path) -> list[str]:
    rows = str(data / "crystals.parquet")
    return ["evaluate", "--data", rows, "--checkpoint", str(checkpoint), "--workers", "1"]


@pytest.fixture
def commands(checkpoint: Path, data: Path, config: Path) -> dict[str, list[str]]:
    """Commands that write, without their --out."""
    source = ["--source", str(data / "cifs"), "--workers", "1"]
    return {
        "generate": generate(checkpoint, "--formula", "NaCl"),
        "evaluate": evaluate(checkpoint, data),
        "import": ["data", "import", *source],
        "split": ["data", "split", str(data / "crystals.parquet")],
        "train": ["train", str(config), "--threads", "1"],
    }


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]):
    """A function that runs a command that must fail, and returns its line and its output."""

    def fail(arguments: list[str]) -> tuple[str, str]:
        capsys.readouterr()
        assert run(arguments) == 2
        output, errors = capsys.readouterr()
        *bars, line = errors.splitlines()
        assert all(bar.startswith("labelling") for bar in bars)
        assert line.startswith("error: cannot write ")
        assert ";" in line, "says what to do"
        return line, output

    return fail


# Places that cannot be written


def _locked_folder(work: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("the superuser may write anywhere")
    (work / "locked").mkdir(mode=0o500)
    return work / "locked" / "out"


def _below_a_file(work: Path) -> Path:
    (work / "file").write_text("kept")
    return work / "file" / "out"


def _system(work: Path) -> Path:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc, where nobody may make a file")
    return Path("/proc/uni-mdm/out")


PLACES = {
    "no permission": _locked_folder,
    "below a file": _below_a_file,
    "name too long": lambda work: work / ("x" * 300),
    "system": _system,
}


def named_for(command: str, out: Path) -> Path:
    """A data set's file has a suffix; the others write folders."""
    return out.with_suffix(".parquet") if command == "import" else out


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["generate", "evaluate", "import", "split", "train"])
def test_unwritable_out(commands, error_of, work: Path, command: str, place: str) -> None:
    out = named_for(command, PLACES[place](work))
    before = contents(work)
    line, output = error_of([*commands[command], "--out", str(out)])
    assert str(out) in line or str(out.parent) in line
    assert not output.strip(), "no work was begun"
    assert contents(work) == before


# Disks that fill up


@pytest.mark.parametrize("command", ["generate", "evaluate", "import", "split", "train"])
def test_disk_that_is_full_already(commands, error_of, work: Path, command: str) -> None:
    with file_size_limit(100):
        out = named_for(command, Path("made/out"))
        line, output = error_of([*commands[command], "--out", str(out)])
    assert "too large" in line
    assert "make room" in line
    assert not output.strip(), "no work was begun"
    assert contents(work) == {}


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["formula"], *([pair] for pair in PAIRS)])
    return path


def whole(folder: Path) -> int:
    """How many answers a run's folder holds, of which every file can be read."""
    for path in folder.rglob("*"):
        assert path.suffix in (".json", ".jsonl", ".extxyz", ".html", ".cif") or path.is_dir()
        if path.suffix == ".cif":
            assert len(Structure.from_file(path)) > 0
        if path.suffix == ".json":
            json.loads(path.read_text())
    entries = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    named = {row["file"] for entry in entries for row in entry["crystals"]}
    assert named == {str(path.relative_to(folder)) for path in folder.rglob("*.cif")}
    return len(entries)


def test_generate_on_a_disk_that_fills_up(
    checkpoint: Path, error_of, requests: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops: what was answered is there, and the same command goes on from it."""
    monkeypatch.setattr(runs, "_BATCH", 8)  # two requests at a time
    command = generate(checkpoint, "--input", str(requests), "--out")
    assert run([*command, "whole"]) == 0
    expected = contents(work / "whole")
    journal = expected["journal.jsonl"].splitlines(keepends=True)
    sizes = {
        "second line": len(journal[0]) + len(journal[1]) // 2,
        "fifth line": sum(map(len, journal[:4])) + 10,
        "results": len(expected["results.json"]) - 1,
        "report": len(expected["report.html"]) - 1,
    }
    kept = {}
    for name, size in sizes.items():
        with file_size_limit(size):
            line, _ = error_of([*command, name])
        assert "make room and run again" in line
        assert name in line
        if (work / name).exists():
            kept[name] = whole(work / name)
            assert {"results.json", "report.html"}.isdisjoint(contents(work / name))
        assert run([*command, name]) == 0
        assert contents(work / name) == expected
    assert kept == {"fifth line": 4, "results": 6, "report": 6}
    assert len(list(work.iterdir())) == 1 + len(sizes), "no second folder was begun"


def test_evaluate_on_a_disk_that_fills_up(
    commands, error_of, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old report stays, and what was measured is seen."""
    command = [*commands["evaluate"], "--out", "report"]
    assert run([*command, "--seed", "1"]) == 0
    before = contents(work)
    smallest, *_, largest = sorted(map(len, before.values()))
    assert smallest < largest
    with file_size_limit(largest - 1000):
        line, output = error_of(command)
    assert "report/evaluation.png" in line
    assert "random draw" in output
    assert contents(work) == before
    assert run(command) == 0
    assert contents(work) != before


def test_import_on_a_disk_that_fills_up(commands, error_of, work: Path) -> None:
    """Rows and refused rows come together or not at all, into the cache and from there."""
    command = [*commands["import"], "--out", "out.parquet"]
    cache = Path(os.environ["UNI_MDM_CACHE"])
    with file_size_limit(4500):
        line, _ = error_of(command)
    assert str(cache) in line
    assert contents(cache) == {}
    assert contents(work) == {}
    assert run(command) == 0
    made = contents(work)
    assert made.keys() == {"out.parquet", "out.parquet.quarantine.jsonl"}
    assert len(read_records(work / "out.parquet")) == len(CRYSTALS)
    for name in made:
        (work / name).unlink()
    with file_size_limit(4500):
        line, _ = error_of(command)
    assert "out.parquet" in line
    assert contents(work) == {}


def test_cache_that_cannot_be_written(
    commands, error_of, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNI_MDM_CACHE", str(_below_a_file(work)))
    line, _ = error_of([*commands["import"], "--out", "out.parquet"])
    assert "set UNI_MDM_CACHE" in line
    assert contents(work) == {"file": b"kept"}


def test_train_on_a_disk_that_fills_up(
    commands, error_of, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second checkpoint: the first stays sound and the run goes on."""
    command = [*commands["train"], "--out"]
    assert run([*command, "whole"]) == 0
    save_step, saved = training.save_step, []

    def save_while_there_is_room(*arguments: Any, **keywords: Any) -> Path:
        saved.append(arguments)
        with file_size_limit(20_000) if len(saved) == 2 else nullcontext():
            return save_step(*arguments, **keywords)

    monkeypatch.setattr(training, "save_step", save_while_there_is_room)
    line, _ = error_of([*command, "run"])
    assert "run/step_00000002" in line
    left = load_checkpoint(work / "run", optimizer=True)
    assert left.state is not None
    assert left.state["step"] == 1
    assert run([*command, "run"]) == 0
    first, second = ((work / name / "final" / MODEL).read_bytes() for name in ("whole", "run"))
    assert first == second


def test_log_on_a_disk_that_fills_up(commands, error_of, work: Path) -> None:
    command = [*commands["train"], "--out", "run", "--set", "train.steps=40"]
    with file_size_limit(4500):
        line, _ = error_of([*command, "--set", "train.checkpoint_every=40"])
    assert "run/log.jsonl" in line
    assert len([json.loads(row) for row in (work / "run/log.jsonl").read_text().splitlines()]) > 10


# A real one

_ON_A_SMALL_DISK = """
mount -t tmpfs -o size=400k tmpfs "$1" && cd "$1" && shift && head -c 370000 /dev/zero >ballast
"$@"
echo "exit code $?"
rm ballast
"$@" && cp -r out ../result
"""


def test_generate_on_a_small_file_system(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    """Four requests, then two, go into some ten blocks, then there is room."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
        subprocess.run([*namespace, *mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted in a namespace here: {error}")
    arguments = ["--input", str(requests), "--out", "out"]
    command = generate(checkpoint, *arguments, top=1, samples=256)
    script = ["sh", "-c", _ON_A_SMALL_DISK, "sh", str(disk), str(UNI_MDM), *command]
    finished = subprocess.run([*namespace, *script], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0
    assert finished.stderr.count("\n") == 1
    assert "No space left on device; make room and run again" in finished.stderr
    assert "exit code 2\n" in finished.stdout
    assert "4 of the 6 requests had been answered before" in finished.stdout
    assert whole(tmp_path / "result") == len(PAIRS)
