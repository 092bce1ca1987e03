"""Files that are either complete or absent: nothing half-written is ever seen."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`, and put it in place if the block succeeds.

    The block must create the temporary file, which keeps the suffix of `path`. On success it is
    flushed to disk and renamed over `path`; on any failure it is removed and `path` keeps its old
    content. Missing parent folders are made. A symbolic link is followed, not replaced.

    Raises UserError when the system refuses (no space, no permission, a folder in the way).
    An OSError that names another file than the temporary one passes unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(6)}.tmp{target.suffix}")
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: not a regular file; give another path")
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
        flush_folder(target.parent)
    except OSError as error:
        if _concerns_another_file(error, temporary, target):
            raise
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; free or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8, line ends unchanged) to `path`, whole or not at all.

    Raises UserError when the system refuses.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


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
