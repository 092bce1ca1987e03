"""Files that are either complete or absent: nothing half-written is ever seen."""

import errno
import fcntl
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from common.errors import UserError

#: What the system says when there is no room, rather than when it forbids.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Is in a folder while a process is alone at work there.
LOCK = ".lock"
#: Stem of the temporary file that `output_folder` writes, and what is in it.
TRIAL = "trial"
_TRIAL_CONTENT = bytes(4096)
#: What temporary names have in them, of `secrets.token_hex(6)`, as a pattern.
_TOKEN = "[0-9a-f]" * 12


def refused(
    path: str | os.PathLike[str], error: OSError, advice: str = "choose another place"
) -> UserError:
    """The line for a user whose system does not let us write to a path."""
    reason = error.strerror or str(error)
    room = "make room and run again, or " if error.errno in _FULL else ""
    return UserError(f"cannot write {os.fsdecode(path)}: {reason}; {room}{advice}")


def temporary_name(stem: str, suffix: str = "") -> str:
    """A hidden name for what gets its own, ``stem`` with ``suffix``, when it is whole."""
    return f".{stem}.{secrets.token_hex(6)}.tmp{suffix}"


def temporary_pattern(stem: str, suffix: str = "") -> str:
    """What the names that `temporary_name` gives match; the stem may be a pattern as well."""
    return f".{stem}.{_TOKEN}.tmp{suffix}"


def sweep_files(folder: Path, pattern: str) -> None:
    """Delete what killed writers of the files in `folder` that match `pattern` have left.

    That is what `atomic_path` makes, and nothing else. Nobody may be writing these files.
    """
    place, name = os.path.split(pattern)
    for rest in folder.glob(os.path.join(place, temporary_pattern(*os.path.splitext(name)))):
        with suppress(OSError):
            rest.unlink()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`, and put it in place if the block succeeds.

    The block must create the temporary file, which keeps the suffix of `path`. On success it is
    flushed to disk and renamed over `path`; on any failure it is removed and `path` keeps its old
    content. Missing parent folders are made, and removed again on failure. A symbolic link is
    followed, not replaced.

    Raises UserError when the system refuses (no space, no permission, a folder in the way).
    An OSError that names another file than the temporary one passes unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(temporary_name(target.stem[:100], target.suffix))
    try:
        _check_regular(target)
        with _made(target.parent):
            try:
                yield temporary
                flush(temporary)
                os.replace(temporary, target)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
        flush_folder(target.parent)
    except OSError as error:
        if _concerns_another_file(error, temporary, target):
            raise
        raise refused(path, error) from error


def unused(path: Path) -> Path:
    """The first of NAME, NAME-2, NAME-3, ... that is not there."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8, line ends unchanged) to `path`, whole or not at all.

    Raises UserError when the system refuses.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(_encoded(data))


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Write several files like `write_atomic`; none is put in place before all are on the disk.

    Raises UserError when the system refuses.
    """
    with ExitStack() as stack:
        for path, data in files.items():
            temporary = stack.enter_context(atomic_path(path))
            temporary.write_bytes(_encoded(data))
            flush(temporary)


def append_whole(path: Path, data: bytes) -> None:
    """Add to the end of a file and flush it to disk; where that fails the file stays as it was.

    Raises UserError when the system refuses.
    """
    size = path.stat().st_size if path.exists() else None
    try:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size) if size is not None else path.unlink()
        raise refused(path, error) from error


@contextmanager
def output_folder(
    folder: str | os.PathLike[str], advice: str = "choose another place"
) -> Iterator[Path]:
    """Make a folder for what the block will write, and try at once whether it can be written to.

    Long work so fails before it begins, not when its result is to be saved. If the block fails,
    the folders that were made are removed again as far as they are empty.

    Args:
        folder: it and its parents are made if missing.
        advice: what a user can do other than make room.

    Raises:
        UserError: when the system refuses.
    """
    path = Path(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(_made(path))
            _try_writing(path)
        except OSError as error:
            raise refused(path, error, advice) from error
        yield path


@contextmanager
def one_at_a_time(path: Path, waiting: str = "") -> Iterator[None]:
    """Other processes of this machine wait before the same block for the same file.

    The system ends the wait when the process inside the block is killed. File systems without
    locks, and lock files of other users, let all of them in.

    Args:
        path: what the block makes; its folder is there.
        waiting: line for stderr if it has to wait.
    """
    lock = path.with_name(f".{path.name}{LOCK}")
    try:
        descriptor = _locked(lock)
        if descriptor is None:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            descriptor = _locked(lock, wait=True)
    except OSError:
        yield
        return
    assert descriptor is not None
    with _released(lock, descriptor):
        yield


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Whether no other process is at work in a folder; others are kept out during the block.

    File systems without locks keep nobody out.
    """
    path = folder / LOCK
    descriptor = _locked(path)
    if descriptor is None:
        yield False
        return
    with _released(path, descriptor):
        yield True


@contextmanager
def _released(lock: Path, descriptor: int) -> Iterator[None]:
    """Removes a lock file that is held, and lets others in."""
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, wait: bool = False) -> int | None:
    """A lock file that is held and opened, or None where another process holds it.

    With ``wait`` it waits for that one to let go.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        # Whoever held it has removed it since it was opened here: others would not find it locked.
        os.close(descriptor)


@contextmanager
def output_file(
    path: str | os.PathLike[str], advice: str = "choose another place"
) -> Iterator[None]:
    """The same as `output_folder` for one file that the block will write with `atomic_path`."""
    with output_folder(Path(path).parent, advice):
        try:
            _check_regular(Path(path))
        except OSError as error:
            raise refused(path, error, advice) from error
        yield


def _check_regular(path: Path) -> None:
    """Refuse to replace a folder or a device."""
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: not a regular file; give another path")


def _try_writing(folder: Path) -> None:
    trial = folder / temporary_name(TRIAL)
    try:
        with open(trial, "xb") as file:
            file.write(_TRIAL_CONTENT)
            file.flush()
            os.fsync(file.fileno())
    finally:
        trial.unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make missing folders for a block; those that are empty after its failure are removed."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def _encoded(data: bytes | str) -> bytes:
    return data.encode("utf-8") if isinstance(data, str) else data


def _concerns_another_file(error: OSError, temporary: Path, target: Path) -> bool:
    """Whether `error` names a file that is neither the one written nor a folder above it."""
    if error.filename is None:
        return False
    named = Path(os.fsdecode(error.filename))
    return named not in (temporary, target) and named not in target.parents


def flush(path: Path) -> None:
    """Wait until the content of a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot flush a folder are left alone."""
    with suppress(OSError):
        flush(folder)
