"""Do the fast labels agree with the paper's? ``python -m common.data.agreement --data val``.

Labels every row with ``label_structure`` and with ``label_structure_reference``, compares the
crystals and explains each difference. Exit code 1 if one has no explanation.
"""

import csv
import gzip
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer, SymmetryUndeterminedError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.crystal.structure import Crystal
from common.crystal.wyckoff import Sites, wyckoff_summary
from common.data.importer import Labeller, import_cached
from common.data.label import ANGLE_TOLERANCE, SYMPREC, label_structure, label_structure_reference
from common.data.locations import DATASETS, cache_dir, data_dir
from common.data.sources import RawEntry, Source, open_source
from common.data.store import Record, read_records
from common.errors import UserError
from common.machine import worker_pool

#: Space groups of MP-20 rows by another program, in the data folder.
PUBLISHED = "wyckoff_symprec0.1.csv.gz"


class Outcome(StrEnum):
    """How the two labels of a row compare."""

    IDENTICAL = "identical sites"
    RELABELLED = "equal after a change of origin or axes"
    EXPLAINED = "different, explained"
    UNEXPLAINED = "different, unexplained"
    REFUSED = "refused by both"


@dataclass(frozen=True)
class Row:
    """One structure and its two labels: a record, or why there is none."""

    material_id: str
    fast: Record | str
    reference: Record | str


@dataclass(frozen=True)
class Comparison:
    """An outcome, and what is known of a difference."""

    material_id: str
    outcome: Outcome
    detail: str = ""


def compare(row: Row) -> Comparison:
    """Compare the two labels of a row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _compare(row)


def _compare(row: Row) -> Comparison:
    fast, reference = row.fast, row.reference
    if isinstance(fast, str) and isinstance(reference, str):
        return Comparison(row.material_id, Outcome.REFUSED, f"{fast}; reference: {reference}")
    if isinstance(fast, str) or isinstance(reference, str):
        return _one_refusal(row)
    given = fast.structure
    assert given is not None
    if fast.crystal.space_group != reference.crystal.space_group:
        return _different(row.material_id, _groups(fast, reference), sensitivity(given))
    if not same_crystal(fast.crystal, reference.crystal):
        return _different(row.material_id, "the crystals do not match", sensitivity(given))
    ours, theirs = (sorted_sites(record.crystal) for record in (fast, reference))
    if ours == theirs:
        return Comparison(row.material_id, Outcome.IDENTICAL)
    canonical = wyckoff_summary(fast.crystal.space_group).canonical
    if canonical(ours) == canonical(theirs):
        return Comparison(row.material_id, Outcome.RELABELLED)
    detail = f"{fast.crystal.sites_string}; reference: {reference.crystal.sites_string}"
    return _different(row.material_id, detail, sensitivity(given))


def _one_refusal(row: Row) -> Comparison:
    """A row that only one way can label: explained where the label is the crystal that was given.

    pyxtal returns crystals without some of their atoms and does not say so.
    """
    if isinstance(row.fast, Record):
        given = row.fast.structure
        assert given is not None
        detail = f"{row.fast.crystal.space_group}; reference: {row.reference}"
        kept = same_crystal(row.fast.crystal, given)
        return _different(row.material_id, detail, "the label is the crystal given" * kept)
    return _different(row.material_id, f"{row.fast}; the reference has a label", "")


def _groups(fast: Record, reference: Record) -> str:
    return f"{fast.crystal.space_group}; reference: {reference.crystal.space_group}"


def _different(material_id: str, detail: str, explanation: str) -> Comparison:
    outcome = Outcome.EXPLAINED if explanation else Outcome.UNEXPLAINED
    return Comparison(material_id, outcome, f"{detail} ({explanation or 'no explanation'})")


def sorted_sites(crystal: Crystal) -> Sites:
    """Elements and letters of a crystal's sites, in an order of their own."""
    return tuple(sorted((site.atomic_number, site.letter) for site in crystal.sites))


def same_crystal(crystal: Crystal, other: Crystal | Structure) -> bool:
    """Whether two crystals match within what symmetrising at SYMPREC may move atoms."""
    structure = crystal.to_structure(primitive=True)
    if isinstance(other, Crystal):
        other = other.to_structure(primitive=True)
    return bool(_matcher().fit(structure, other))


@cache
def _matcher() -> StructureMatcher:
    return StructureMatcher(ltol=0.02, stol=0.05, angle_tol=1.0)


def sensitivity(structure: Structure) -> str:
    """How the space group by spglib depends on tolerances and cell; empty if it does not.

    Tried are half, all and twice SYMPREC on the cell as given and on the Niggli-reduced one, and
    SYMPREC without the tolerance of angles that pymatgen adds.
    """
    reduced = structure.get_reduced_structure()
    found = {
        f"{name} {factor * SYMPREC:g} A": _group_number(cell, factor * SYMPREC, ANGLE_TOLERANCE)
        for name, cell in (("given", structure), ("Niggli", reduced))
        for factor in (0.5, 1, 2)
    }
    found["angles free"] = _group_number(structure, SYMPREC, -1)
    if len(set(found.values())) == 1:
        return ""
    return "it hangs on cell and tolerance, " + ", ".join(f"{k}: {n}" for k, n in found.items())


def _group_number(structure: Structure, symprec: float, angle_tolerance: float) -> int:
    try:
        return SpacegroupAnalyzer(structure, symprec, angle_tolerance).get_space_group_number()
    except SymmetryUndeterminedError:
        return 0


class Sample:
    """A part of a source: `limit` rows at equal distances."""

    def __init__(self, source: Source, limit: int) -> None:
        self._source, self._limit = source, min(limit, len(source))
        self._step = len(source) // max(self._limit, 1)
        self.description = {**source.description, "limit": str(limit)}
        self.offers = source.offers

    def __len__(self) -> int:
        return self._limit

    def __iter__(self) -> Iterator[RawEntry]:
        for index, entry in enumerate(self._source):
            if index % self._step == 0 and index // self._step < self._limit:
                yield entry


def label(source: Source, labeller: Labeller, workers: int | None) -> dict[str, Record | str]:
    """Records of a source by id, or why no row of an id has one; kept in the cache."""
    report = import_cached(source, cache_dir(), workers, label=labeller)
    labels: dict[str, Record | str] = {r.material_id: r for r in read_records(report.path)}
    for line in report.quarantine_path.read_text("utf-8").splitlines():
        refused = json.loads(line)
        reason = f"{refused['reason']}: {refused['detail']}"
        labels.setdefault(refused["material_id"], reason)
    return labels


def comparisons(rows: list[Row], workers: int | None) -> Iterator[Comparison]:
    """Compare rows, in order, in several processes."""
    with worker_pool(workers) as pool:
        yield from pool.map(compare, rows, chunksize=32)


def published_groups() -> dict[str, int]:
    """Space groups by id from the data folder's table; none without it."""
    path = data_dir() / PUBLISHED
    if not path.is_file():
        return {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return {row["material_id"]: int(row["spacegroup_number"]) for row in csv.DictReader(file)}


def published_differences(labels: dict[str, Record | str]) -> tuple[int, list[Comparison]]:
    """How many rows the published table has as well, and those in another group there."""
    published = published_groups()
    both = [r for r in labels.values() if isinstance(r, Record) and r.material_id in published]
    differences = []
    for record in both:
        number = published[record.material_id]
        if record.crystal.space_group != number:
            assert record.structure is not None
            detail = f"{record.crystal.space_group}; {PUBLISHED}: {number}"
            explanation = sensitivity(record.structure)
            differences.append(_different(record.material_id, detail, explanation))
    return len(both), differences


def main(
    data: Annotated[str, typer.Option(help="train, val, extra, or a CSV file.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Compare this many rows.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: all.")] = None,
) -> None:
    """Compare the two ways to label, row by row."""
    location = data_dir() / DATASETS[data] if data in DATASETS else Path(data)
    source = open_source(location, cache_dir())
    if not len(source):
        raise UserError(f"{data}: no rows to compare")
    source = source if limit is None else Sample(source, limit)
    fast = label(source, label_structure, workers)
    reference = label(source, label_structure_reference, workers)
    rows = [Row(key, labelled, reference[key]) for key, labelled in fast.items()]
    found = list(track(comparisons(rows, workers), "comparing", total=len(rows)))
    both, others = published_differences(fast)
    console = Console()
    console.print(_table(found, both, others))
    for comparison in found + others:
        if comparison.detail:
            console.print(f"{comparison.material_id}: {comparison.detail}", highlight=False)
    unexplained = [c for c in found + others if c.outcome is Outcome.UNEXPLAINED]
    sys.exit(1 if unexplained else 0)


def _table(found: list[Comparison], both: int, others: list[Comparison]) -> Table:
    table = Table(title="label_structure and label_structure_reference")
    table.add_column("outcome")
    table.add_column("rows", justify="right")
    table.add_column("%", justify="right")
    counts = Counter(comparison.outcome for comparison in found)
    for outcome in Outcome:
        table.add_row(outcome, str(counts[outcome]), f"{100 * counts[outcome] / len(found):.2f}")
    if both:
        same = both - len(others)
        table.add_row(f"space group as in {PUBLISHED}", str(same), f"{100 * same / both:.2f}")
    return table


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
