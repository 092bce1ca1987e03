"""Where data sets and caches live on this machine."""

import os
import sys
from pathlib import Path

from common.data.importer import import_cached
from common.data.sources import is_url, open_source
from common.data.store import Record, read_records
from common.errors import UserError

DATASETS = {
    "train": "mp_20/train.csv.gz",
    "val": "mp_20/val.csv.gz",
    "extra": "mp_extra.csv.gz",
}
_REPOSITORY = Path(__file__).resolve().parents[2]


def data_dir() -> Path:
    """Folder of the MP-20 data: $UNI_MDM_DATA, by default ../shared/data beside the repository."""
    given = os.environ.get("UNI_MDM_DATA")
    return Path(given) if given else _REPOSITORY.parent / "shared" / "data"


def cache_dir() -> Path:
    """Folder for what can be made again: $UNI_MDM_CACHE, by default ~/.cache/uni-mdm."""
    given = os.environ.get("UNI_MDM_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "uni-mdm"


def dataset_path(name: str | os.PathLike[str], workers: int | None = None) -> Path:
    """The Parquet file of a data set: train, val, extra, or the path of a CSV or Parquet file.

    A CSV is labelled once and kept in the cache; `workers` as in `import_dataset`.

    Raises UserError when there is no such data set.
    """
    text = os.fspath(name)
    location = _location(text)
    if location.suffix == ".parquet":
        return location
    source = open_source(text if is_url(text) else location, cache_dir())
    report = import_cached(source, cache_dir(), workers=workers)
    if report.reasons:
        why = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
        refused = f"{sum(report.reasons.values())} of {report.rows} rows cannot be used ({why})"
        print(f"{text}: {refused}; see {report.quarantine_path}", file=sys.stderr)
    return report.path


def dataset(name: str | os.PathLike[str], workers: int | None = None) -> list[Record]:
    """The records of a data set, see `dataset_path`; of several, as in ``train+mine.parquet``."""
    parts = _parts(os.fspath(name))
    return [record for part in parts for record in read_records(dataset_path(part, workers))]


def check_dataset(name: str) -> None:
    """Raises UserError when there is no such data set, as `dataset` would, which also reads it."""
    for part in _parts(name):
        _location(part)


def _parts(name: str) -> list[str]:
    """The data sets that a plus joins; a file or address may have one in its own name.

    Raises UserError where an address is among several.
    """
    if is_url(name) or Path(name).exists():
        return [name]
    parts = name.split("+")
    if any(map(is_url, parts)):
        raise UserError(f"{name}: an address cannot be joined; import it, and name the file")
    known = any(part in DATASETS or Path(part).is_file() for part in parts)
    return parts if known and all(parts) else [name]


def _location(name: str) -> Path:
    """Where a data set's file is; UserError if it is not there."""
    location = data_dir() / DATASETS[name] if name in DATASETS else Path(name)
    if not is_url(name) and not location.exists():
        hint = "set UNI_MDM_DATA" if name in DATASETS else f"or one of {', '.join(DATASETS)}"
        raise UserError(f"no data set at {location}: give a CSV or Parquet file, {hint}")
    return location
