"""The training structures in short, and which of them is nearest to a new crystal."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pymatgen.core import Structure

from common.crystal.lattice import k_constraints, k_to_lattice, lattice_to_k
from common.crystal.structure import Crystal, Site
from common.crystal.wyckoff import wyckoff_summary
from common.evaluate.match import PERFECT, STANDARD, Cell, cell_distance, reduced_cell
from common.templates import reduce_counts

#: Free coordinates are kept to a 65,536th of the cell, about 0.0002 A.
_STEPS = 65536
#: Training structures compared at most with one crystal: of its prototype, of its composition (of
#: which MP-20 has 24 at most), and their atoms.
MAX_COMPARED = 10
MAX_POLYMORPHS = 100
MAX_COMPARED_ATOMS = 60

REFERENCE_SCHEMA = (
    pa.field("material_id", pa.string(), nullable=False),
    pa.field("space_group", pa.uint8(), nullable=False),
    pa.field("letters", pa.string(), nullable=False),
    pa.field("atomic_numbers", pa.list_(pa.uint8()), nullable=False),
    pa.field("free", pa.list_(pa.uint16()), nullable=False),
    pa.field("lattice", pa.list_(pa.float32()), nullable=False),
    pa.field("band_gap", pa.float32()),
    pa.field("formation_energy", pa.float32()),
)


@dataclass(frozen=True)
class Nearest:
    """The training structure nearest to a crystal.

    Attributes:
        material_id: as in the training set.
        formula: of the training structure.
        space_group: of the training structure.
        distance: root mean square displacement of pymatgen's StructureMatcher, in units of
            (volume per atom)^(1/3), after scaling to equal volume.
        kind: ``same composition``, or ``same prototype`` where the training structure's elements
            were replaced by the crystal's.
        volume_change: by how much the crystal's volume per atom is larger than the training
            structure's, relatively; None where that has other elements.
    """

    material_id: str
    formula: str
    space_group: int
    distance: float
    kind: str
    volume_change: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "material_id": self.material_id,
            "formula": self.formula,
            "space_group": self.space_group,
            "distance": round(self.distance, 6),
            "kind": self.kind,
            "volume_change": None if self.volume_change is None else round(self.volume_change, 6),
        }


def volume_text(nearest: Mapping[str, Any]) -> str:
    """``volume_change`` of what ``Nearest.to_dict`` gave, as ``+4 %``; empty if it has none."""
    change = nearest.get("volume_change")  # results of earlier versions have none
    return "" if change is None else f"{round(100 * change):+d} %"


def reference_columns(records: Sequence[Any]) -> dict[str, list[Any]]:
    """Columns of REFERENCE_SCHEMA of training records."""
    crystals = [record.crystal for record in records]
    return {
        "material_id": [record.material_id for record in records],
        "space_group": [crystal.space_group for crystal in crystals],
        "letters": ["".join(site.letter for site in crystal.sites) for crystal in crystals],
        "atomic_numbers": [[site.atomic_number for site in c.sites] for c in crystals],
        "free": [_free_coordinates(crystal) for crystal in crystals],
        "lattice": [_free_lattice(crystal) for crystal in crystals],
        "band_gap": [record.properties.get("band_gap") for record in records],
        "formation_energy": [record.properties.get("formation_energy") for record in records],
    }


def _free_coordinates(crystal: Crystal) -> list[int]:
    steps = []
    for site, position in zip(crystal.sites, crystal.positions, strict=True):
        values = np.array(site.free_params)[position.free_mask]
        steps += (np.rint(values * _STEPS).astype(int) % _STEPS).tolist()
    return steps


def _free_lattice(crystal: Crystal) -> list[float]:
    mask, _ = k_constraints(crystal.space_group)
    free: NDArray[np.float64] = lattice_to_k(crystal.lattice)[mask]
    return free.tolist()


class ReferenceIndex:
    """Training structures by reduced formula and by anonymous formula."""

    def __init__(self, table: pa.Table) -> None:
        self._ids = table["material_id"].to_pylist()
        self._groups = table["space_group"].to_numpy()
        self._letters = table["letters"].to_pylist()
        self._numbers = _lists(table, "atomic_numbers")
        self._free = _lists(table, "free")
        self._lattices = _lists(table, "lattice")
        self._roles = _lists(table, "roles")
        self._template = table["template"].to_numpy()

    def __len__(self) -> int:
        return len(self._ids)

    @cached_property
    def _by_elements(self) -> dict[tuple[int, ...], list[int]]:
        rows = defaultdict(list)
        for row in range(len(self)):
            rows[tuple(sorted(self._roles(row).tolist()))].append(row)
        return rows

    def rows_of_formula(self, counts: Mapping[int, int]) -> list[int]:
        """Rows whose composition is a multiple of these counts."""
        formula, _ = reduce_counts(counts)
        rows = self._by_elements.get(tuple(sorted(formula)), [])
        return [row for row in rows if reduce_counts(self._counts(row))[0] == formula]

    def roles(self, row: int) -> list[int]:
        """Atomic number in each role of the row's template."""
        numbers: list[int] = self._roles(row).tolist()
        return numbers

    def roles_of(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """The same of N rows of one template of R roles: [N,R]."""
        return np.stack([self._roles(row) for row in rows]).astype(np.int64)

    def material_id(self, row: int) -> str:
        """The row's id in its source."""
        return str(self._ids[row])

    def _counts(self, row: int) -> dict[int, int]:
        table = wyckoff_summary(int(self._groups[row])).letters
        counts: dict[int, int] = defaultdict(int)
        for z, letter in zip(self._numbers(row).tolist(), self._letters[row], strict=True):
            counts[z] += table[letter][0]
        return counts

    def crystal(self, row: int) -> Crystal:
        """The training structure of a row."""
        number = int(self._groups[row])
        sites = [
            Site(int(z), letter)
            for z, letter in zip(self._numbers(row), self._letters[row], strict=True)
        ]
        mask, lattice_k = k_constraints(number)
        lattice_k = lattice_k.copy()
        lattice_k[mask] = self._lattices(row)
        crystal = Crystal(number, tuple(sites), k_to_lattice(lattice_k))
        values = iter(self._free(row).astype(float) / _STEPS)
        placed = []
        for site, position in zip(sites, crystal.positions, strict=True):
            x, y, z = (next(values) if free else 0.0 for free in position.free_mask)
            placed.append(Site(site.atomic_number, site.letter, (x, y, z)))
        return Crystal(number, tuple(placed), crystal.lattice)

    def closest(
        self, structure: Structure, rows: Sequence[int], replace: Sequence[Mapping[int, int]]
    ) -> tuple[int, float] | None:
        """The row that matches a structure with the smallest displacement, and that distance.

        Cells are compared as they are, the smaller one repeated if need be: StructureMatcher's own
        reduction to primitive cells would average distortions of up to 0.25 A away.

        Args:
            structure: in a primitive cell.
            rows: to compare with; of equally near ones the first is taken.
            replace: for each row, what to put in place of its elements.

        Returns:
            None if nothing matches within StructureMatcher's tolerances (ltol 0.3, stol 0.5,
            angle_tol 10).
        """
        own: Cell | None = None
        best: tuple[int, float] | None = None
        for row, elements in zip(rows, replace, strict=True):
            crystal = self.crystal(row)
            sizes = sorted((len(structure), crystal.num_primitive_atoms))
            if sizes[1] > MAX_COMPARED_ATOMS or sizes[1] % sizes[0] or sizes[1] > 4 * sizes[0]:
                continue
            sites = [replaced(site, elements) for site in crystal.sites]
            other = Crystal(crystal.space_group, tuple(sites), crystal.lattice)
            compared = other.to_structure(primitive=True)
            if sizes[0] == sizes[1]:
                own = own or reduced_cell(structure, primitive=False)
                distance = cell_distance(own, reduced_cell(compared, primitive=False), STANDARD)
            else:
                distance = _repeated_distance(structure, compared)
            if distance is not None and (best is None or distance < best[1] - PERFECT):
                best = row, distance
                if distance < PERFECT:
                    break
        return best


def _repeated_distance(structure: Structure, other: Structure) -> float | None:
    """The distance of two cells, of which the smaller one is repeated; None without a match."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    matcher = StructureMatcher(
        STANDARD.ltol,
        STANDARD.stol,
        STANDARD.angle_tol,
        primitive_cell=False,
        attempt_supercell=True,
    )
    match = matcher.get_rms_dist(structure, other)
    return None if match is None else float(match[0])


def replaced(site: Site, elements: Mapping[int, int]) -> Site:
    """A site with its element replaced."""
    return Site(elements[site.atomic_number], site.letter, site.free_params)


def _lists(table: pa.Table, name: str) -> Any:
    """A function from the row to the array of a list column."""
    column = table[name].combine_chunks()
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return lambda row: values[offsets[row] : offsets[row + 1]]
