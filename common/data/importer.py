"""From a source to labelled crystals on disk; rows that cannot be used go to a quarantine file.

Rows are parsed and labelled in worker processes and written in the order of the source, so the
result does not depend on the number of workers. Results are cached under a key made of the source's
content, the code's versions and the options.
"""

import hashlib
import json
import math
import multiprocessing
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Structure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from common.crystal.structure import Crystal
from common.data.cif import CifError, parse_cif
from common.data.label import (
    LABEL_REASONS,
    LABEL_VERSION,
    LabelError,
    label_structure,
)
from common.data.sources import RawEntry, Source, file_sha256, printable
from common.data.store import (
    SCHEMA_VERSION,
    Cell,
    Record,
    lacking,
    reduced_formula,
    write_records,
)
from common.errors import UserError
from common.files import (
    atomic_path,
    one_at_a_time,
    output_file,
    output_folder,
    write_atomic,
    write_together,
)
from common.machine import cpu_count, one_thread, start_worker
from common.properties import TARGETS

#: Part of the key of cached imports: raise it when the same rows give another result.
IMPORT_VERSION = 4
#: Why a row can be refused.
REASONS = (
    "malformed_row",
    "no_id",
    "duplicate_id",
    "unparsable",
    "bad_label",
    "not_finite",
    "out_of_range",
    "too_many_atoms",
    "crash",
    *(reason for reason in LABEL_REASONS if reason != "not_finite"),
)

_LIBRARIES = ("numpy", "pymatgen", "spglib", "moyopy", "pyarrow")
_CHUNK = 64
_CHUNKS_AHEAD = 4  # per worker
#: Seconds after which a worker counts as caught in an endless loop. A row takes milliseconds.
PATIENCE = 300.0

Labeller = Callable[[Structure], Crystal]


@dataclass(frozen=True)
class ImportOptions:
    """What decides which rows are taken and how they are labelled.

    Attributes:
        max_atoms: largest number of atoms in the cell as given; None for no limit.
        label: a function from a structure to its crystal, importable by worker processes.
    """

    max_atoms: int | None = None
    label: Labeller = label_structure


@dataclass(frozen=True)
class Rejection:
    """A row that was refused: why, what was found, where it stands in the source."""

    material_id: str
    reason: str
    detail: str
    origin: str


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        rows: of the source.
        written: of these.
        reasons: how many of the others were refused for what.
        lacking: how many of those written have no value of a property that the source offers and
            a crystal can be asked for; without those that all have.
        seconds: wall time.
        from_cache: whether an earlier import was copied.
    """

    path: Path
    quarantine_path: Path
    rows: int
    written: int
    reasons: dict[str, int] = field(default_factory=dict)
    lacking: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    from_cache: bool = False


def import_dataset(
    source: Source,
    out_path: str | os.PathLike[str],
    workers: int | None = None,
    max_atoms: int | None = None,
    cache: Path | None = None,
    label: Labeller = label_structure,
    show_progress: bool = True,
) -> ImportReport:
    """Label every row of a source and write `out_path` and `<out_path>.quarantine.jsonl`.

    A row may lack properties. With a folder `cache`, an import with the same source and options is
    copied from there. `workers` (default: the number of CPUs) changes the time alone. Both files
    appear whole or not at all.

    Raises UserError when the source cannot be read or a file cannot be written.
    """
    out = Path(out_path)
    started = time.monotonic()
    options = _options(max_atoms, label)
    if cache is None:
        return _run(source, out, options, _workers(workers), show_progress)
    with output_file(out):
        kept = import_cached(source, cache, workers, max_atoms, label, show_progress)
        write_together(
            {
                quarantine_path(out): kept.quarantine_path.read_bytes(),
                out: kept.path.read_bytes(),
            }
        )
    return replace(
        kept,
        path=out,
        quarantine_path=quarantine_path(out),
        seconds=time.monotonic() - started,
    )


def import_cached(
    source: Source,
    cache: Path,
    workers: int | None = None,
    max_atoms: int | None = None,
    label: Labeller = label_structure,
    show_progress: bool = True,
) -> ImportReport:
    """The same, into the folder `cache`, unless it is there already.

    The paths of the report lie in `cache`: read them, do not change them.
    """
    started = time.monotonic()
    workers = _workers(workers)
    options = _options(max_atoms, label)
    key = json.dumps(_provenance(source, options), sort_keys=True)
    out = cache / "imports" / f"{hashlib.sha256(key.encode()).hexdigest()}.parquet"
    report = _read_report(out)
    if report is None:
        refusal = "set UNI_MDM_CACHE to another folder"
        told = f"{source.description['name']}: waiting for another process, which labels it"
        waiting = told if show_progress else ""
        with output_folder(out.parent, refusal), one_at_a_time(out, waiting):
            report = _read_report(out)  # which another process may have made meanwhile
            if report is None:
                report = _run(source, out, options, workers, show_progress)
                _write_report(report)
                return report
    return replace(report, seconds=time.monotonic() - started, from_cache=True)


def quarantine_path(out_path: str | os.PathLike[str]) -> Path:
    """The file of refused rows beside a data set."""
    path = Path(out_path)
    return path.with_name(path.name + ".quarantine.jsonl")


def process_entry(entry: RawEntry, options: ImportOptions) -> Record | Rejection:
    """Parse, check and label one row; never raises on what a row holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _record(entry, options)
    except LabelError as error:
        return _rejection(entry, error.reason, error.detail)
    except _Refused as error:
        return _rejection(entry, error.reason, error.detail)
    # A labelling library can raise anything on a strange structure; the row is reported, not lost.
    except Exception as error:
        return _rejection(entry, "symmetry", f"{type(error).__name__}: {error}")


class _Refused(Exception):
    """A row that the importer itself refuses."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def _options(max_atoms: int | None, label: Labeller) -> ImportOptions:
    if max_atoms is not None and max_atoms < 1:
        raise UserError(f"max atoms {max_atoms}: give a number of at least 1")
    return ImportOptions(max_atoms, label)


def _workers(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers}: give a number of at least 1")
    return workers or cpu_count()


def _provenance(source: Source, options: ImportOptions) -> dict[str, Any]:
    """All that the result depends on; stored in the file and hashed for the cache."""
    return {
        **source.description,
        "max_atoms": options.max_atoms,
        "label": f"{options.label.__module__}.{options.label.__qualname__}",
        "label_version": LABEL_VERSION,
        "import_version": IMPORT_VERSION,
        "schema_version": SCHEMA_VERSION,
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def _run(
    source: Source, out: Path, options: ImportOptions, workers: int, show_progress: bool
) -> ImportReport:
    started = time.monotonic()
    records: dict[str, Record] = {}
    rejections: list[Rejection] = []
    with _progress(show_progress) as progress:
        name, total = source.description["name"], len(source)
        if not progress.console.is_terminal:  # which shows the bar only when it is full
            text = Text(f"labelling {name}: {total} rows")
            progress.console.print(text, soft_wrap=True)
        task = progress.add_task(f"labelling {escape(name)}", total=total)
        for entry, outcome in _outcomes(source, options, workers):
            if isinstance(outcome, Rejection):
                rejections.append(outcome)
            elif outcome.material_id in records:
                rejections.append(_rejection(entry, "duplicate_id", "an earlier row has this id"))
            else:
                records[outcome.material_id] = outcome
            progress.advance(task)
    lines = [json.dumps(asdict(rejection), sort_keys=True) + "\n" for rejection in rejections]
    with atomic_path(quarantine_path(out)) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
        write_records(records.values(), out, _provenance(source, options))
    reasons = Counter(rejection.reason for rejection in rejections)
    absent = {name: lacking(records.values(), name) for name in TARGETS if name in source.offers}
    return ImportReport(
        out,
        quarantine_path(out),
        len(records) + len(rejections),
        len(records),
        dict(sorted(reasons.items())),
        {name: count for name, count in absent.items() if count},
        time.monotonic() - started,
    )


def _progress(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, quiet=not show),
    )


def _read_report(out: Path) -> ImportReport | None:
    """The report of a finished import in the cache; written last, so that it proves completion."""
    try:
        data = json.loads(_report_path(out).read_text("utf-8"))
        if _digests(out) != data.pop("files"):
            return None
        return ImportReport(out, quarantine_path(out), **data)
    except (OSError, UserError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write_report(report: ImportReport) -> None:
    data = {
        "files": _digests(report.path),
        "rows": report.rows,
        "written": report.written,
        "reasons": report.reasons,
        "lacking": report.lacking,
    }
    write_atomic(_report_path(report.path), json.dumps(data, sort_keys=True))


def _digests(out: Path) -> list[str]:
    return [file_sha256(path) for path in (out, quarantine_path(out))]


def _report_path(out: Path) -> Path:
    return out.with_name(out.name + ".report.json")


# One row.


def _record(entry: RawEntry, options: ImportOptions) -> Record:
    if entry.problem:
        raise _Refused("malformed_row", entry.problem)
    if not entry.material_id:
        raise _Refused("no_id", "empty material_id")
    properties = {name: _number(name, value) for name, value in entry.properties.items()}
    structure = _structure(entry.content)
    if options.max_atoms is not None and len(structure) > options.max_atoms:
        raise _Refused("too_many_atoms", f"{len(structure)} atoms, limit {options.max_atoms}")
    crystal = options.label(structure)
    cell = Cell.from_structure(structure)
    numbers = Counter(cell.atomic_numbers.tolist())
    if reduced_formula(crystal.formula_counts) != reduced_formula(numbers):
        raise _Refused("sites", "the labelled crystal has another composition")
    # A new Crystal: the labelled one may hold cached tables, which are slow to send.
    crystal = Crystal(crystal.space_group, crystal.sites, np.asarray(crystal.lattice))
    return Record(entry.material_id, crystal, cell, properties)


def _structure(content: str | Structure | Mapping[str, Any] | None) -> Structure:
    if content is None:
        raise _Refused("unparsable", "no structure given")
    if isinstance(content, Structure):
        return content
    try:
        return (
            parse_cif(content) if isinstance(content, str) else Structure.from_dict(dict(content))
        )
    except CifError as error:
        raise _Refused("unparsable", str(error)) from error
    # The dict comes from a server: anything may be wrong with it.
    except Exception as error:
        raise _Refused("unparsable", f"{type(error).__name__}: {error}") from error


def _number(name: str, value: Any) -> float | None:
    """A number in its range, or None where there is none; NaN counts as none but in a target."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise _Refused("bad_label", f"{name} is {str(value)[:50]!r}, not a number") from error
    if math.isnan(number) and name not in TARGETS:
        return None
    if not math.isfinite(number):
        raise _Refused("not_finite", f"{name} is {number}")
    unit, low, high = TARGETS.get(name, ("", -math.inf, math.inf))
    if not low <= number <= high:
        raise _Refused("out_of_range", f"{name} is {number:g}, not from {low:g} to {high:g} {unit}")
    return number


def _rejection(entry: RawEntry, reason: str, detail: str) -> Rejection:
    line = " ".join(printable(detail).split())[:300]
    return Rejection(printable(entry.material_id), reason, line, printable(entry.origin))


# Many rows.


def _outcomes(
    entries: Iterable[RawEntry], options: ImportOptions, workers: int
) -> Iterator[tuple[RawEntry, Record | Rejection]]:
    """Every row with what became of it, in the order of the rows."""
    chunks = _chunks(entries)
    if workers == 1:
        with one_thread():
            for chunk in chunks:
                yield from zip(chunk, _process_chunk(chunk, options), strict=True)
    else:
        for chunk, outcomes in _parallel(chunks, options, workers):
            yield from zip(chunk, outcomes, strict=True)


def _chunks(entries: Iterable[RawEntry]) -> Iterator[list[RawEntry]]:
    iterator = iter(entries)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _process_chunk(chunk: list[RawEntry], options: ImportOptions) -> list[Record | Rejection]:
    return [process_entry(entry, options) for entry in chunk]


Outcomes = list[Record | Rejection]


def _parallel(
    chunks: Iterator[list[RawEntry]], options: ImportOptions, workers: int
) -> Iterator[tuple[list[RawEntry], Outcomes]]:
    """Chunks with their outcomes, in order, a bounded number of them in work at a time.

    If a worker process dies or does not end, the rows in work are done again one by one.
    """
    pool = _pool(workers)
    pending: deque[tuple[list[RawEntry], Future[Outcomes]]] = deque()
    try:
        while True:
            for chunk in islice(chunks, workers * _CHUNKS_AHEAD - len(pending)):
                pending.append((chunk, _submit(pool, chunk, options)))
            if not pending:
                return
            chunk, future = pending[0]
            try:
                outcomes = future.result(PATIENCE)
            except (BrokenProcessPool, TimeoutError):
                _kill(pool)
                for waiting, _ in pending:
                    yield waiting, _one_by_one(waiting, options)
                pending.clear()
                pool = _pool(workers)
            else:
                pending.popleft()
                yield chunk, outcomes
    finally:
        _kill(pool)


def _submit(
    pool: ProcessPoolExecutor, chunk: list[RawEntry], options: ImportOptions
) -> Future[Outcomes]:
    """Hand a chunk to the pool; a pool that is broken already gives a failed future."""
    try:
        return pool.submit(_process_chunk, chunk, options)
    except BrokenProcessPool as error:
        failed: Future[Outcomes] = Future()
        failed.set_exception(error)
        return failed


def _one_by_one(chunk: list[RawEntry], options: ImportOptions) -> Outcomes:
    """Outcomes of a chunk in which a row ends its process, or never ends: that row is refused."""
    outcomes: Outcomes = []
    pool = _ready_pool()
    try:
        for entry in chunk:
            try:
                outcomes += _submit(pool, [entry], options).result(PATIENCE)
            except (BrokenProcessPool, TimeoutError) as error:
                fate = "does not end" if isinstance(error, TimeoutError) else "ends its process"
                outcomes.append(_rejection(entry, "crash", f"labelling this row {fate}"))
                _kill(pool)
                pool = _ready_pool()
    finally:
        _kill(pool)
    return outcomes


def _kill(pool: ProcessPoolExecutor) -> None:
    """End a pool at once, also when a worker is caught in compiled code."""
    for process in list((pool._processes or {}).values()):  # no public way before Python 3.14
        process.kill()
    pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes (not forked: forking a process that runs threads can lock up)."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)


def _ready_pool() -> ProcessPoolExecutor:
    """One process that has started, so that PATIENCE counts for the rows alone."""
    pool = _pool(1)
    pool.submit(os.getpid).result()
    return pool
