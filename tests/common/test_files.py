"""Files are whole or absent, whatever happens while they are written."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import (
    LOCK,
    TRIAL,
    alone_in,
    append_whole,
    atomic_path,
    one_at_a_time,
    output_file,
    output_folder,
    sweep_files,
    unused,
    write_atomic,
    write_together,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_text_and_bytes_unchanged(tmp_path: Path) -> None:
    write_atomic(tmp_path / "sub" / "a.txt", "Å\r\n\n")
    write_atomic(tmp_path / "b.bin", b"\x00\xff")
    assert (tmp_path / "sub" / "a.txt").read_bytes() == "Å\r\n\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert listing(tmp_path) == ["b.bin", "sub"]


def test_failure_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "a.cif"
    write_atomic(target, "old")

    def fail_halfway() -> None:
        with atomic_path(target) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".cif"
            temporary.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["a.cif"]


def test_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt"), atomic_path(tmp_path / "a.txt"):
        pass
    assert listing(tmp_path) == []


@pytest.mark.parametrize("place", ["folder", "file/below", "x" * 300])
def test_refused_places_are_user_errors(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / place, "text")
    assert listing(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("place", ["file/below", "x" * 300, "made/file"])
def test_refused_together_means_none(tmp_path: Path, place: str) -> None:
    write_atomic(tmp_path / "file", "kept")
    if place == "made/file":
        (tmp_path / "made" / "file").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot write"):
        write_together({tmp_path / "new" / "a.txt": "a", tmp_path / place: b"b"})
    assert sorted(tmp_path.rglob("*")) == before
    write_together({tmp_path / "new" / "a.txt": "a", tmp_path / "b.txt": b"b"})
    assert (tmp_path / "new" / "a.txt").read_text() == "a"
    assert (tmp_path / "b.txt").read_bytes() == b"b"


def test_appends(tmp_path: Path) -> None:
    append_whole(tmp_path / "log", b"1\n")
    append_whole(tmp_path / "log", b"2\n")
    assert (tmp_path / "log").read_bytes() == b"1\n2\n"
    with pytest.raises(UserError, match="absent/log: No such file"):
        append_whole(tmp_path / "absent" / "log", b"1\n")
    with pytest.raises(UserError, match="No space left on device; make room and run again, or"):
        append_whole(Path("/dev/full"), b"1\n")


def test_output_folder_is_tried_and_goes_again_if_nothing_came_of_it(tmp_path: Path) -> None:
    def fail(folder: Path, made: str) -> None:
        with output_folder(folder):
            assert listing(folder) == []
            if made:
                (folder / made).write_text("precious")
            raise ZeroDivisionError

    for made in ("", "file"):
        with pytest.raises(ZeroDivisionError):
            fail(tmp_path / "a" / "b", made)
        assert listing(tmp_path) == (["a"] if made else [])
    with output_folder(tmp_path / "c"):
        pass
    assert listing(tmp_path) == ["a", "c"]


@pytest.mark.parametrize("place", ["folder", "file/below", "x" * 300])
def test_output_file_is_refused_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    with (
        pytest.raises(UserError, match=r"cannot write .*; "),
        output_file(tmp_path / place, "think"),
    ):
        raise AssertionError("the block is not entered")
    assert listing(tmp_path) == ["file", "folder"]


def test_others_wait_for_the_same_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entered: list[str] = []

    def enter(name: str) -> None:
        with one_at_a_time(tmp_path / name, f"waiting for {name}"):
            entered.append(name)

    threads = [threading.Thread(target=enter, args=(name,)) for name in ("same", "other")]
    with one_at_a_time(tmp_path / "same"):
        for thread in threads:
            thread.start()
        threads[1].join(60)
        assert entered == ["other"]
        threads[0].join(0.3)
        assert entered == ["other"]
        started, told = time.monotonic(), ""
        while not told and time.monotonic() < started + 60:
            told = capsys.readouterr().err
        assert told == "waiting for same\n"
    threads[0].join(60)
    assert entered == ["other", "same"]
    assert capsys.readouterr() == ("", "")
    assert listing(tmp_path) == []


def test_a_place_that_takes_no_lock_lets_all_in(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path / "absent" / "file"):
        assert listing(tmp_path) == []


def test_one_at_a_time_is_alone_in_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path) as first, alone_in(tmp_path) as second:
        assert (first, second) == (True, False)
        assert listing(tmp_path) == [LOCK]
    assert listing(tmp_path) == []


def test_a_lock_that_its_holder_removes_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process leaves after this one has opened the file, before it has locked it."""
    flock, left = fcntl.flock, []

    def leave_before(descriptor: int, operation: int) -> None:
        if not left:
            left.append(descriptor)
            (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", leave_before)
    with alone_in(tmp_path) as first, alone_in(tmp_path) as second:
        assert (first, second) == (True, False)
        assert listing(tmp_path) == [LOCK]
    assert left
    assert listing(tmp_path) == []


def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone_in(tmp_path) as first, alone_in(tmp_path) as second:
        assert (first, second) == (True, True)


def test_device_is_not_replaced() -> None:
    with pytest.raises(UserError, match="not a regular file"):
        write_atomic("/dev/null", "text")
    assert not Path("/dev/null").is_file()


def test_link_is_followed(tmp_path: Path) -> None:
    write_atomic(tmp_path / "real.txt", "old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_atomic(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_error_of_another_file_passes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        (tmp_path / "missing" / "input.txt").read_text()


def run(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_disk_that_fills_up(tmp_path: Path) -> None:
    """A limit on file size makes the real write fail midway, as a full disk does."""
    target, log = tmp_path / "a.bin", tmp_path / "log"
    target.write_bytes(b"old")
    log.write_bytes(b"first line\n")
    code = f"""
import resource
from pathlib import Path
from common.errors import UserError
from common.files import append_whole, output_folder, write_atomic, write_together
folder = Path({str(tmp_path)!r})

def try_folder(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 10_000))
    with output_folder(path):
        raise AssertionError

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write, *arguments in (
    (write_atomic, folder / "a.bin", b"x" * 100_000),
    (append_whole, folder / "log", b"x" * 100_000),
    (append_whole, folder / "new log", b"x" * 100_000),
    (write_together, {{folder / "new" / "b.txt": "b", folder / "a.bin": b"x" * 100_000}}),
    (try_folder, folder / "deep" / "deeper"),
):
    try:
        write(*arguments)
    except UserError as error:
        print(error)
"""
    output, _ = run(code).communicate(timeout=60)
    lines = output.splitlines()
    named = ["a.bin", "log", "new log", "a.bin", "deep/deeper"]
    for line, name in zip(lines, named, strict=True):
        assert line.startswith(f"cannot write {tmp_path / name}: File too large; make room")
    assert target.read_bytes() == b"old"
    assert log.read_bytes() == b"first line\n"
    assert listing(tmp_path) == ["a.bin", "log"]


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    code = f"""
import time
from common.files import atomic_path
with atomic_path({str(target)!r}) as temporary:
    temporary.write_bytes(b"new, but not whol")
    print("half", flush=True)
    time.sleep(60)
"""
    process = run(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    assert target.read_bytes() == b"old"


def test_what_killed_writers_leave_is_swept(tmp_path: Path) -> None:
    """And only that: not what has another name, and not what is like it."""
    kept = [".a.0123456789ab.tmp", ".a.0123456789ab.tmp.txt", ".a.b.tmp.cif", "a.cif"]
    for name in kept:
        (tmp_path / name).write_text("precious")
    for write in ("write_atomic(folder / 'a.cif', 'x')", "output_folder(folder).__enter__()"):
        code = f"""
import os, signal
from pathlib import Path
from common.files import output_folder, write_atomic
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
folder = Path({str(tmp_path)!r})
{write}
"""
        with run(code) as process:
            assert process.wait(timeout=60) == -signal.SIGKILL
    assert len(listing(tmp_path)) == len(kept) + 2
    sweep_files(tmp_path, "b.cif")
    sweep_files(tmp_path, "*/a.cif")
    assert len(listing(tmp_path)) == len(kept) + 2
    sweep_files(tmp_path.parent, f"{tmp_path.name}/*.cif")
    sweep_files(tmp_path, TRIAL)
    assert listing(tmp_path) == sorted(kept)


def test_an_unused_name_is_numbered(tmp_path: Path) -> None:
    wanted = tmp_path / "report"
    for name in ("report", "report-2", "report-3"):
        found = unused(wanted)
        assert found.name == name
        found.mkdir()
