"""Output folders of ``generate``: written as answers come, resumed after a kill, never overwritten.

    run.json         what was asked, and whether it is finished
    journal.jsonl    one line per answered request, as they were answered
    *.cif            one symmetrised CIF per candidate; in a folder per request if there are several
    results.json     everything, in the order of the requests
    results.extxyz   the same structures, for ASE and others; rank, request (a number) and its id
    report.html      to look at; opens without a network

The last three are made from the journal at the end, so an interrupted run and an uninterrupted one
give the same bytes.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from common.crystal.structure import Crystal
from common.errors import UserError
from common.files import (
    LOCK,
    TRIAL,
    alone_in,
    append_whole,
    output_folder,
    refused,
    sweep_files,
    temporary_pattern,
    write_atomic,
    write_together,
)
from common.machine import start_worker, worker_pool
from common.pipeline import (
    Engine,
    Progress,
    Query,
    Sampled,
    Settings,
    describe,
    load_engine,
    sample_symmetries,
)
from common.prior import TemplatePrior
from common.ranking import Ranker, rank_symmetries

FORMAT_VERSION = 1
_RUN, _JOURNAL = "run.json", "journal.jsonl"
_RESULTS = ("results.json", "results.extxyz", "report.html")
_WRITTEN = (TRIAL, _RUN, *_RESULTS, "*.cif", "*/*.cif")
#: What a kill leaves in a folder before it is said which run it holds.
_NOTHING = (LOCK, temporary_pattern(TRIAL), temporary_pattern("run", ".json"))
#: Crystals sampled together; a kill costs at most so many, or twice as many where the last ones are
#: compared in other processes meanwhile. A call of the network has one size however few crystals
#: are in it, so that small batches take longer.
_BATCH = 1024
#: Fewer are not worth starting a process for.
_CRYSTALS_PER_WORKER = 200
_MAX_FOLDERS = 10_000


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: where it is.
        resumed: requests that an interrupted run had answered already.
        entries: the journal's lines in the order of the requests.
        rankers: name and hash of what ranked symmetries, one for each property asked for.
        notes: what the user should know of it, one line each.
    """

    folder: Path
    resumed: int
    entries: list[dict[str, Any]]
    rankers: list[dict[str, str]]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Requests that could not be answered, with the reason."""
        return [entry for entry in self.entries if entry["status"] != "done"]


def generate_many(
    queries: Sequence[Query],
    out: Path,
    settings: Settings | None = None,
    *,
    backend: str = "auto",
    checkpoint: str | Path | None = None,
    prior: Any = None,
    symmetry_model: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Outcome:
    """Answers requests into a folder.

    The same call, with the same framework on the same kind of device, goes on where an interrupted
    one stopped; a finished run, or another one, is left alone and a new folder (``out-2``,
    ``out-3``, ...) is taken.

    Args:
        queries: see ``common.pipeline.make_query`` and ``common.requests.read_requests``.
        out: the folder.
        settings: the same for all.
        backend, checkpoint, prior, symmetry_model: as in ``common.pipeline.generate``.
        workers: processes that compare crystals, if there are many. They are spawned: a script
            that asks for several needs an ``if __name__ == "__main__"``.
        progress: told what is done.

    Raises:
        UserError: if a checkpoint, the prior or the folder cannot be used; before anything is
            written where that can be known.
    """
    if not queries:
        raise UserError("there is no request to answer: give at least one")
    settings = settings or Settings()
    _check_folder(Path(out))
    engines = _load_engines(queries, backend, checkpoint, prior, symmetry_model)
    if len(queries) == 1:
        first = engines[_kind(queries[0])]
        rank_symmetries(queries[0], Ranker(first.prior), 1)
    description = _describe_run(queries, settings, engines)
    with _open_folder(Path(out), description) as folder:
        journal = _Journal(folder / _JOURNAL)
        resumed = len(journal.entries)
        _answer_all(queries, engines, settings, folder, journal, workers, progress)
        entries = [journal.entries[index] for index in range(len(queries))]
        _finish(folder, description, entries)
    told = [engine.ranker.note for engine in engines.values()] + [query.note for query in queries]
    notes = tuple(dict.fromkeys(filter(None, told)))
    return Outcome(folder, resumed, entries, _rankers(engines), notes)


def _kind(query: Query) -> str | None:
    return next(iter(query.properties), None)


def _load_engines(
    queries: Sequence[Query],
    backend: str,
    checkpoint: str | Path | None,
    prior: Any,
    symmetry_model: str | Path | None,
) -> dict[str | None, Engine]:
    engines: dict[str | None, Engine] = {}
    for kind in sorted({_kind(query) for query in queries}, key=str):
        wanted = [kind] if kind else []
        engines[kind] = load_engine(wanted, backend, checkpoint, prior, symmetry_model)
    return engines


def _rankers(engines: dict[str | None, Engine]) -> list[dict[str, str]]:
    """Name and hash of what ranked symmetries."""
    return _distinct(engine.ranker.identity for engine in engines.values())


def _distinct(identities: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Without repetition, in order."""
    return [dict(one) for one in sorted({tuple(identity.items()) for identity in identities})]


def _describe_run(
    queries: Sequence[Query], settings: Settings, engines: dict[str | None, Engine]
) -> dict[str, Any]:
    """What makes two runs the same: requests, settings, weights, prior, program and framework.

    Another framework or device computes other last digits.
    """
    first = next(iter(engines.values()))
    return {
        "format": "uni-mdm run",
        "version": FORMAT_VERSION,
        "created_by": f"uni-mdm {version('uni-mdm')}",
        "backend": first.backend,
        "device": first.generator.device,
        "settings": settings.to_dict(),
        "checkpoints": _distinct(engine.checkpoint for engine in engines.values()),
        "symmetry_models": _rankers(engines),
        "prior": {"hash": first.prior.hash, "source": first.prior.metadata["source"]},
        "attribution": first.prior.metadata["attribution"],
        "requests": len(queries),
        "requests_sha256": _digest([query.to_dict() for query in queries]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# The folder


@contextmanager
def _open_folder(out: Path, description: dict[str, Any]) -> Iterator[Path]:
    """The folder of a run, locked: the same run's if it was interrupted, else a new one.

    If the block fails before anything was answered, the folder is gone again.
    """
    for number in range(1, _MAX_FOLDERS):
        folder = out if number == 1 else out.with_name(f"{out.name}-{number}")
        if not _may_use(folder, description):
            continue
        with output_folder(folder, "give another --out"), alone_in(folder) as locked:
            # Between the look and the lock another one may have finished this run.
            if locked and _may_use(folder, description):
                for pattern in _WRITTEN:
                    sweep_files(folder, pattern)
                with _begun(folder, description):
                    yield folder
                return
    raise UserError(f"{out} and its numbered siblings are all taken; give another --out")


def _check_folder(out: Path) -> None:
    """Refuses a file where the folder should be."""
    with suppress(OSError):  # which trying to write there will say
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file, not a folder: give another --out")


def _may_use(folder: Path, description: dict[str, Any]) -> bool:
    """Whether a folder is not there yet, or is empty, or holds this run, interrupted.

    It counts as empty with what a kill leaves there before a run has begun.
    """
    try:
        if not folder.exists():
            return True
        return folder.is_dir() and _may_resume(folder, description)
    except OSError as error:
        raise refused(folder, error, "give another --out") from error


@contextmanager
def _begun(folder: Path, description: dict[str, Any]) -> Iterator[None]:
    """Say during the block which run the folder holds; no longer if nothing came of it."""
    write_atomic(folder / _RUN, _dump(description | {"status": "running"}))
    try:
        yield
    except BaseException:
        if {path.name for path in folder.iterdir()} <= {_RUN, LOCK}:
            (folder / _RUN).unlink(missing_ok=True)
        raise


def _may_resume(folder: Path, description: dict[str, Any]) -> bool:
    """Whether a folder is empty or holds this run, interrupted."""
    if all(any(map(path.match, _NOTHING)) for path in folder.iterdir()):
        return True
    try:
        known = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(known == json.loads(_dump(description | {"status": "running"})))


class _Journal:
    """Answered requests by their index; a last line cut short by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[int, dict[str, Any]] = {}
        whole = 0
        if path.exists():
            data = path.read_bytes()
            for line in data.splitlines(keepends=True):
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:
                    break
                self.entries[entry["index"]] = entry
                whole += len(line)
            if whole < len(data):
                os.truncate(path, whole)

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line and makes it durable."""
        line = json.dumps(entry, separators=(",", ":")) + "\n"
        append_whole(self._path, line.encode())
        self.entries[entry["index"]] = entry


# Answering


@dataclass(frozen=True)
class _Job:
    """A request on its way: its folder, and its crystals or why there can be none."""

    index: int
    query: Query
    place: str = ""
    sampled: Sampled | None = None
    error: str | None = None


_Answer = tuple[dict[str, Any], dict[str, str]]
"""A line of the journal, and the CIFs that it names by their path in the run's folder."""


def _answer_all(
    queries: Sequence[Query],
    engines: dict[str | None, Engine],
    settings: Settings,
    folder: Path,
    journal: _Journal,
    workers: int,
    progress: Progress | None,
) -> None:
    def tell() -> None:
        if progress is not None and len(queries) > 1:
            progress("Requests", len(journal.entries), len(queries))

    tell()
    waiting = [index for index in range(len(queries)) if index not in journal.entries]
    jobs = _sample_all(queries, waiting, engines, settings, progress)
    prior = next(iter(engines.values())).prior
    work = len(waiting) * settings.top * settings.num_samples // _CRYSTALS_PER_WORKER
    workers = min(workers, len(waiting), 1 + work)
    answers = (
        _described_apart(jobs, prior, workers, limit=_chunk(settings))
        if workers > 1
        else (_answer_job(job, prior, progress) for job in jobs)
    )
    with closing(answers):
        for entry, files in answers:
            _keep(folder, entry, files, journal)
            tell()


def _chunk(settings: Settings) -> int:
    """Requests whose crystals are sampled together."""
    return max(1, _BATCH // (settings.top * settings.num_samples))


def _sample_all(
    queries: Sequence[Query],
    waiting: Sequence[int],
    engines: dict[str | None, Engine],
    settings: Settings,
    progress: Progress | None,
) -> Iterator[_Job]:
    """The waiting requests with their crystals, batch by batch."""
    report = progress or (lambda *_: None)
    size = _chunk(settings)
    for kind, engine in engines.items():
        mine = [index for index in waiting if _kind(queries[index]) == kind]
        for start in range(0, len(mine), size):
            chunk = mine[start : start + size]
            ranked = {}
            for done, index in enumerate(chunk):
                report("Ranking", done, len(chunk))
                query = queries[index]
                try:
                    ranked[index] = query, rank_symmetries(query, engine.ranker, settings.top)
                except UserError as error:
                    yield _Job(index, query, error=str(error))
            report("Ranking", len(chunk), len(chunk))
            if not ranked:
                continue
            crystals = sample_symmetries(list(ranked.values()), engine, settings, progress)
            for (index, (query, candidates)), samples in zip(ranked.items(), crystals, strict=True):
                place = f"{index + 1:05d}_{query.formula.text}" if len(queries) > 1 else ""
                sampled = Sampled(query, candidates, samples, settings, engine.checkpoint)
                yield _Job(index, query, place, sampled)


def _answer_job(job: _Job, prior: TemplatePrior, progress: Progress | None = None) -> _Answer:
    """Chooses among a request's crystals and describes them."""
    rows = []
    files = {}
    for crystal in describe(job.sampled, prior, progress) if job.sampled else ():
        row = crystal.to_dict()
        del row["query"], row["settings"]  # the same for all rows, kept once
        file = f"{job.place}/{crystal.name}.cif" if job.place else f"{crystal.name}.cif"
        rows.append({"file": file} | row)
        files[file] = crystal.to_cif()
    entry = {
        "index": job.index,
        "status": "failed" if job.error else "done",
        "error": job.error,
        "query": job.query.to_dict(),
        "folder": job.place,
        "crystals": rows,
    }
    return entry, files


def _described_apart(
    jobs: Iterator[_Job], prior: TemplatePrior, workers: int, limit: int
) -> Generator[_Answer, None, None]:
    """``_answer_job`` in processes of their own, while the next crystals are sampled here.

    Args:
        jobs: what to answer; the answers keep its order.
        prior: the training structures.
        workers: number of processes.
        limit: jobs that wait at most.
    """
    waiting: deque[Future[_Answer]] = deque()
    advice = "the same command goes on where this one stopped, with --workers 1 in one process"
    with worker_pool(workers, _start_describing, (prior,), advice) as pool:
        for job in jobs:
            waiting.append(pool.submit(_answer_apart, job))
            while waiting and (len(waiting) > limit or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_prior: TemplatePrior | None = None  # of a process that describes


def _start_describing(prior: TemplatePrior) -> None:
    global _prior
    start_worker()
    _prior = prior


def _answer_apart(job: _Job) -> _Answer:
    assert _prior is not None
    return _answer_job(job, _prior)


def _keep(folder: Path, entry: dict[str, Any], files: dict[str, str], journal: _Journal) -> None:
    """Save an answer: the files first, for what the journal names is there."""
    paths = {folder / name: text for name, text in files.items()}
    write_together(paths)
    try:
        journal.append(entry)
    except UserError:
        for path in paths:
            path.unlink()
            with suppress(OSError):
                path.parent.rmdir()
        raise


def _finish(folder: Path, description: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    from common.report import render_report

    results = {**description, "format": "uni-mdm results", "results": entries}
    frames = (_extxyz(entry, row) for entry in entries for row in entry["crystals"])
    contents = (_dump(results), "".join(frames), render_report(results))
    write_together({folder / name: text for name, text in zip(_RESULTS, contents, strict=True)})
    write_atomic(folder / _RUN, _dump(description | {"status": "finished"}))


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _extxyz(entry: dict[str, Any], row: dict[str, Any]) -> str:
    """One structure (conventional cell, A) as extended XYZ, with its request's number and id."""
    structure = Crystal.from_dict(row["crystal"]).to_structure()
    lattice = " ".join(f"{x:.8f}" for x in np.asarray(structure.lattice.matrix).ravel())
    name = entry["query"]["name"].replace("\\", "\\\\").replace('"', '\\"')
    request = f"request={entry['index'] + 1} " + (f'id="{name}" ' if name else "")
    comment = (
        f'Lattice="{lattice}" Properties=species:S:1:pos:R:3 pbc="T T T" {request}'
        f'formula="{row["formula"]}" rank={row["rank"]} space_group={row["space_group"]} '
        f'sites="{row["sites"]}" probability={row["probability"]:.6g} file="{row["file"]}"'
    )
    lines = [str(len(structure)), comment]
    for site in structure:
        x, y, z = site.coords
        lines.append(f"{site.specie.symbol:<2} {x:14.8f} {y:14.8f} {z:14.8f}")
    return "\n".join(lines) + "\n"
