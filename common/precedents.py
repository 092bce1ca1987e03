"""Known crystals to start from: same prototype as the wanted one, and the most similar elements.

A precedent is a training crystal whose elements are replaced by the wanted ones, its lattice scaled
to the volume expected of them, and which is described with the letters that were asked for. Where
no known crystal has the prototype, isopointal ones stand in, whose atoms are on the same Wyckoff
positions but are shared out among elements in another way: each letter's sites get the elements
wanted there that are most like the former ones. In training every crystal gets the best precedent
but itself, and is described as near to it as it can be.
"""

import gzip
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from scipy.optimize import linear_sum_assignment

from common.checkpoint import PRECEDENTS
from common.crystal.descriptions import aligned, with_sites
from common.crystal.structure import Crystal
from common.crystal.wyckoff import wyckoff_summary
from common.data.batch import BatchItem, Precedent
from common.data.locations import cache_dir
from common.data.store import Record, read_records, write_records
from common.elements import element_table, pair_differences
from common.errors import UserError
from common.files import one_at_a_time, output_folder, write_atomic
from common.machine import cpu_count, start_worker, worker_pool
from common.prior import SHIPPED, TemplatePrior, load_prior
from common.templates import (
    Assignment,
    Template,
    assign,
    cheapest_automorphism,
    permutes_all,
    wyckoff_sequence,
)

Array = NDArray[np.float64]

#: Of the cached descriptions; another number makes them anew.
_CACHE_VERSION = 5
#: Rows that are tried, for each precedent that is asked for, until one takes the letters.
_TRIES = 4
#: Crystals per process below which none is started.
_CHUNK = 32


class Known(Protocol):
    """Training crystals by row, as ``common.reference.ReferenceIndex`` has them."""

    def roles_of(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """Atomic number in each role [N,R] of N rows of one template."""
        ...

    def crystal(self, row: int) -> Crystal:
        """The crystal."""
        ...

    def material_id(self, row: int) -> str:
        """Its name."""
        ...


@dataclass(frozen=True)
class _KnownRecords:
    crystals: Sequence[Crystal]
    names: Sequence[str]
    assignments: Sequence[Assignment]

    def roles_of(self, rows: Sequence[int]) -> NDArray[np.int64]:
        return np.array([self.assignments[row].roles for row in rows])

    def crystal(self, row: int) -> Crystal:
        return self.crystals[row]

    def material_id(self, row: int) -> str:
        return self.names[row]


class PrecedentIndex:
    """The training crystals by prototype.

    Args:
        known: the crystals.
        rows: of every template.
        element_volume: [119], A^3 per atom, by atomic number.
    """

    def __init__(
        self, known: Known, rows: Mapping[Template, Sequence[int]], element_volume: Array
    ) -> None:
        self._known = known
        # Of equally similar ones the first is taken, which is not to hang on the order of rows.
        self._rows = {
            template: sorted(members, key=known.material_id) for template, members in rows.items()
        }
        self._volume = element_volume
        self._difference = pair_differences(element_table()).mean(axis=-1)
        self._sequences: dict[int, dict[str, list[Template]]] = {}
        self._roles: dict[Template, NDArray[np.int64]] = {}

    @classmethod
    def of_crystals(
        cls, crystals: Sequence[Crystal], names: Sequence[str], element_volume: Array
    ) -> "PrecedentIndex":
        """Of crystals and what they are called."""
        assignments = [assign(crystal) for crystal in crystals]
        rows: dict[Template, list[int]] = defaultdict(list)
        for row, assignment in enumerate(assignments):
            rows[assignment.template].append(row)
        return cls(_KnownRecords(crystals, names, assignments), dict(rows), element_volume)

    @classmethod
    def of_prior(cls, prior: TemplatePrior, element_volume: Array) -> "PrecedentIndex":
        """Of the rows that a prior was fitted on."""
        return cls(prior.reference, prior.rows_of_template, element_volume)

    @property
    def volumes_sha256(self) -> str:
        """Of the elements' volumes, but for roundings, which differ between processors."""
        return hashlib.sha256(np.round(self._volume, 3).tobytes()).hexdigest()

    def find(
        self,
        crystal: Crystal,
        count: int = 1,
        exclude: str | None = None,
        *,
        isopointal: bool = True,
    ) -> list[Precedent]:
        """The precedents of a symmetry, those of its prototype first, each by similar elements.

        Args:
            crystal: of which only the symmetry is used.
            count: so many, if there are.
            exclude: the name of a row that is left out.
            isopointal: whether others may stand in where there are too few of its prototype.
        """
        found: list[Precedent] = []
        ranked = self._of_prototype(crystal, exclude)
        if isopointal:
            ranked = chain(ranked, self._isopointal(crystal, exclude))
        for row, elements in islice(ranked, _TRIES * count):
            precedent = self._substituted(crystal, row, elements)
            if precedent is not None:
                found.append(precedent)
                if len(found) == count:
                    break
        return found

    def _of_prototype(
        self, crystal: Crystal, exclude: str | None
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Rows of the crystal's template by similarity, and the new element of each site."""
        wanted = assign(crystal)
        rows = self._rows.get(wanted.template)
        if rows is None:
            return
        if wanted.template not in self._roles:
            self._roles[wanted.template] = self._known.roles_of(rows)
        filled = self._roles[wanted.template]  # [N,R]
        elements = self._most_alike(wanted, filled)  # [N,R]
        costs = self._difference[filled, elements].sum(axis=1)
        for index in np.argsort(costs, kind="stable").tolist():
            if self._known.material_id(rows[index]) == exclude:
                continue
            new = dict(zip(filled[index].tolist(), elements[index].tolist(), strict=True))
            sites = self._known.crystal(rows[index]).sites
            yield rows[index], tuple(new[site.atomic_number] for site in sites)

    def _most_alike(self, wanted: Assignment, filled: NDArray[np.int64]) -> NDArray[np.int64]:
        """The wanted elements in the roles where they are most like those that are there [N,R]."""
        template, roles = wanted.template, np.array(wanted.roles)
        if permutes_all(template.stoichiometry):
            orders = roles[np.array(template.automorphisms)]  # [O,R]
            costs = self._difference[filled[:, None], orders].sum(axis=-1)  # [N,O]
            return orders[costs.argmin(axis=1)]
        exchanges = self._difference[filled[:, :, None], roles]  # [N,R,R]
        return roles[np.array([cheapest_automorphism(template, costs) for costs in exchanges])]

    def _isopointal(
        self, crystal: Crystal, exclude: str | None
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Rows of other templates with the crystal's Wyckoff sequence, as ``_of_prototype``."""
        own = assign(crystal).template
        others = self._by_sequence(crystal.space_group).get(wyckoff_sequence(own), ())
        rows = [row for one in others if one != own for row in self._rows[one]]
        ranked = []
        for row in self._without(rows, exclude):
            cost, elements = self._cheapest(crystal, self._known.crystal(row))
            ranked.append((cost, self._known.material_id(row), row, elements))
        for _, _, row, elements in sorted(ranked):
            yield row, elements

    def _cheapest(self, crystal: Crystal, known: Crystal) -> tuple[float, tuple[int, ...]]:
        """Which elements to put on the sites of a known crystal, and how unlike they are per atom.

        Over all relabellings that bring its sites to the wanted letters.
        """
        summary = wyckoff_summary(crystal.space_group)
        wanted: dict[str, list[int]] = defaultdict(list)
        for site in crystal.sites:
            wanted[site.letter].append(site.atomic_number)
        members: dict[str, list[int]] = defaultdict(list)
        for index, site in enumerate(known.sites):
            members[site.letter].append(index)

        @cache
        def exchange(letter: str, image: str) -> tuple[float, list[int]] | None:
            """Of the elements on one letter for those wanted on another, if it has as many."""
            new = wanted.get(image, [])
            if len(new) != len(members[letter]):
                return None
            former = [known.sites[index].atomic_number for index in members[letter]]
            costs = self._difference[np.ix_(former, new)]
            _, columns = linear_sum_assignment(costs)
            cost = float(costs[np.arange(len(new)), columns].sum())
            return summary.letters[letter][0] * cost, [new[j] for j in columns]

        places = [list(summary.letters).index(letter) for letter in members]
        images = dict.fromkeys(tuple(p[i] for i in places) for p in summary.permutations)
        best: tuple[float, tuple[int, ...]] | None = None
        for image in images:
            parts = [exchange(*pair) for pair in zip(members, image, strict=True)]
            found = [part for part in parts if part is not None]
            total = sum(cost for cost, _ in found)
            if len(found) < len(parts) or (best is not None and total >= best[0]):
                continue
            elements = [0] * len(known.sites)
            for sites, (_, new) in zip(members.values(), found, strict=True):
                for index, z in zip(sites, new, strict=True):
                    elements[index] = z
            best = total, tuple(elements)
        assert best is not None, "the letters differ"
        return best[0] / known.num_atoms, best[1]

    def _by_sequence(self, space_group: int) -> dict[str, list[Template]]:
        """The templates of a space group by Wyckoff sequence."""
        if space_group not in self._sequences:
            templates = defaultdict(list)
            for template in self._of_group.get(space_group, ()):
                templates[wyckoff_sequence(template)].append(template)
            self._sequences[space_group] = dict(templates)
        return self._sequences[space_group]

    @cached_property
    def _of_group(self) -> dict[int, list[Template]]:
        """The templates by space group."""
        templates = defaultdict(list)
        for template in self._rows:
            templates[template.space_group].append(template)
        return dict(templates)

    def _without(self, rows: Iterable[int], exclude: str | None) -> list[int]:
        if exclude is None:
            return list(rows)
        return [row for row in rows if self._known.material_id(row) != exclude]

    def _substituted(self, crystal: Crystal, row: int, elements: Sequence[int]) -> Precedent | None:
        known = self._known.crystal(row)
        sites = tuple(
            replace(site, atomic_number=z) for site, z in zip(known.sites, elements, strict=True)
        )
        scale = (self._guess(crystal) / self._guess(known)) ** (1 / 3)
        new = Crystal(known.space_group, sites, known.lattice * scale)
        wanted = tuple((site.atomic_number, site.letter) for site in crystal.sites)
        found = with_sites(new, wanted)
        if found is None:
            return None
        described, order = found
        numbers = tuple(known.sites[index].atomic_number for index in order)
        differences = tuple(
            float(self._difference[old, z]) for old, (z, _) in zip(numbers, wanted, strict=True)
        )
        return Precedent(described, differences, numbers, self._known.material_id(row))

    def _guess(self, crystal: Crystal) -> float:
        return float(sum(self._volume[z] * n for z, n in crystal.formula_counts.items()))


def load_precedents(folder: Path, trained_on: str, element_volume: Array) -> PrecedentIndex:
    """The crystals that a checkpoint starts from.

    Args:
        folder: the checkpoint.
        trained_on: fingerprint of its training rows.
        element_volume: as in ``PrecedentIndex``.

    Raises:
        UserError: if they cannot be read, or are not there.
    """
    path = folder / PRECEDENTS
    if path.exists():
        records = read_records(path)
        names = [record.material_id for record in records]
        return PrecedentIndex.of_crystals([r.crystal for r in records], names, element_volume)
    return PrecedentIndex.of_prior(_shipped_table(folder, trained_on), element_volume)


def _shipped_table(folder: Path, trained_on: str) -> TemplatePrior:
    """The rows of a checkpoint that has none of its own beside it."""
    prior = load_prior()
    if not trained_on:
        raise UserError(
            f"{folder}: nothing says which rows it was trained on, from which it starts: convert "
            f"it again with --config from the run's checkpoint folder, or its {PRECEDENTS} beside"
        )
    if prior.metadata["source"].get("fingerprint") != trained_on:
        raise UserError(
            f"{folder}: {PRECEDENTS} is missing, and the shipped table {SHIPPED.name} holds other "
            "crystals than it was trained on: copy the file from the run that made the checkpoint"
        )
    return prior


def former_rows(folder: Path, trained_on: str) -> list[Record]:
    """The crystals that a checkpoint starts from, by ``load_precedents``'s rules."""
    path = folder / PRECEDENTS
    if path.exists():
        return read_records(path)
    known = _shipped_table(folder, trained_on).reference
    return [Record(known.material_id(i), known.crystal(i)) for i in range(len(known))]


def unlike(records: Sequence[Record], others: Iterable[Record]) -> list[Record]:
    """Those of other records that cannot be one of some rows, for formula or prototype differ."""
    own = {_formula_and_template(record) for record in records}
    return [other for other in others if _formula_and_template(other) not in own]


def _formula_and_template(record: Record) -> tuple[str, Template]:
    return record.reduced_formula, assign(record.crystal).template


def precedents_file(records: Sequence[Record], indexed: str, trained_on: str) -> dict[str, bytes]:
    """What must lie beside a checkpoint: what it starts from, unless the shipped table holds that.

    Args:
        records: crystals that it starts from.
        indexed: their fingerprint.
        trained_on: fingerprint of its training rows.

    Returns:
        at most one file by its name.
    """
    if load_prior().metadata["source"].get("fingerprint") == indexed == trained_on:
        return {}
    with TemporaryDirectory() as folder:
        path = Path(folder, PRECEDENTS)
        write_records([Record(record.material_id, record.crystal) for record in records], path)
        return {PRECEDENTS: path.read_bytes()}


def training_items(
    records: Sequence[Record],
    index: PrecedentIndex,
    indexed: str,
    count: int = 1,
    workers: int | None = None,
) -> list[BatchItem]:
    """Rows with their precedents, each described as near to it as it can be; kept in the cache.

    Args:
        records: a row never is its own precedent.
        index: of the crystals to start from.
        indexed: fingerprint of these.
        count: items for every row, with another precedent each as far as there are.
        workers: processes; one per CPU without it.
    """
    key = f"{_CACHE_VERSION} {indexed} {count} {_labels_sha256(records)} {index.volumes_sha256}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_dir() / "precedents" / f"{name}.json.gz"
    rows = _read_cached(path)
    if rows is None:
        refusal = "set UNI_MDM_CACHE to another folder"
        waiting = "waiting for another process, which looks for the rows' precedents"
        with output_folder(path.parent, refusal), one_at_a_time(path, waiting):
            rows = _read_cached(path)  # which another process may have made meanwhile
            if rows is None:
                rows = list(_described(records, index, count, workers))
                text = "".join(json.dumps(row) + "\n" for row in rows)
                write_atomic(path, gzip.compress(text.encode(), compresslevel=6, mtime=0))
    each = (_items(record, found, count) for record, found in zip(records, rows, strict=True))
    return [item for items in each for item in items]


def _labels_sha256(records: Iterable[Record]) -> str:
    """Of the rows' labels, every bit of them and in their order; a fingerprint has neither."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.material_id, record.crystal.to_dict()]).encode())
    return digest.hexdigest()


#: Of one training row, a mapping for each of its precedents.
_Row = list[dict[str, Any]]


def _read_cached(path: Path) -> list[_Row] | None:
    """The rows of a file, or None if it is not there or damaged."""
    try:
        lines = gzip.decompress(path.read_bytes()).splitlines()  # none of an empty file
        return [json.loads(line) for line in lines] or None
    except (OSError, EOFError, zlib.error, ValueError):
        return None


def _items(record: Record, found: Sequence[Mapping[str, Any]], count: int) -> list[BatchItem]:
    if not found:
        return [BatchItem(record.crystal, record.properties)] * count
    items = [_item(record, row) for row in found]
    return [items[i % len(items)] for i in range(count)]


def _item(record: Record, row: Mapping[str, Any]) -> BatchItem:
    precedent = Precedent(
        Crystal.from_dict(row["precedent"]),
        tuple(row["differences"]),
        tuple(row["numbers"]),
        row["material_id"],
    )
    return BatchItem(Crystal.from_dict(row["crystal"]), record.properties, precedent)


def _described(
    records: Sequence[Record], index: PrecedentIndex, count: int, workers: int | None
) -> Iterable[_Row]:
    crystals = [record.crystal for record in records]
    names = [record.material_id for record in records]
    show = partial(track, description="Finding precedents", total=len(records))
    workers = min(workers or cpu_count(), 1 + len(records) // (4 * _CHUNK))
    if workers == 1:
        rows = zip(crystals, names, strict=True)
        yield from show(_describe(index, count, *row) for row in rows)
        return
    with worker_pool(workers, _start, (index, count)) as pool:
        yield from show(pool.map(_describe_here, crystals, names, chunksize=_CHUNK))


_given: tuple[PrecedentIndex, int] | None = None


def _start(index: PrecedentIndex, count: int) -> None:
    global _given
    start_worker()
    _given = index, count


def _describe_here(crystal: Crystal, name: str) -> _Row:
    assert _given is not None
    return _describe(*_given, crystal, name)


def _describe(index: PrecedentIndex, count: int, crystal: Crystal, name: str) -> _Row:
    """A row's precedents, and its nearest description to each of them, as JSON types."""
    return [
        {
            "crystal": aligned(crystal, precedent.crystal)[0].to_dict(),
            "precedent": precedent.crystal.to_dict(),
            "differences": list(precedent.differences),
            "numbers": list(precedent.numbers),
            "material_id": precedent.material_id,
        }
        for precedent in index.find(crystal, count, exclude=name)
    ]
