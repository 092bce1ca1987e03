"""Labelled crystals on disk: one Parquet row per crystal, splits, fingerprints.

A file carries its schema version, the fingerprint of its rows and where they came from, so that a
checkpoint can name exactly what it was trained on.
"""

import hashlib
import json
import math
import os
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pymatgen.core import Composition, Element, Structure

from common.crystal.structure import Crystal, Site
from common.crystal.wyckoff import wyckoff_summary
from common.elements import NUM_ELEMENTS
from common.errors import UserError
from common.files import atomic_path

SCHEMA_VERSION = 1
PROPERTIES = ("band_gap", "formation_energy", "e_above_hull")
"""Property columns: eV, eV/atom, eV/atom. None where unknown."""

#: How fingerprints begin. Those of earlier versions, 64 digits and nothing else, took in the last
#: bits of lattices and labels and so depended on the processor.
_SCHEME = "v2:"
#: Steps of a fingerprint per A, degree and cell edge.
_STEPS = 1e8
_METADATA_KEY = b"uni_mdm"
_SCHEMA = pa.schema(
    [
        pa.field("material_id", pa.string(), nullable=False),
        pa.field("reduced_formula", pa.string(), nullable=False),
        pa.field("space_group", pa.int16(), nullable=False),
        pa.field("num_atoms", pa.int32(), nullable=False),
        pa.field("letters", pa.string(), nullable=False),
        pa.field("atomic_numbers", pa.list_(pa.int16()), nullable=False),
        pa.field("free_params", pa.list_(pa.float64()), nullable=False),
        pa.field("lattice", pa.list_(pa.float64()), nullable=False),
        pa.field("structure_lattice", pa.list_(pa.float64())),
        pa.field("structure_numbers", pa.list_(pa.int16())),
        pa.field("structure_frac_coords", pa.list_(pa.float64())),
        *(pa.field(name, pa.float64()) for name in PROPERTIES),
    ]
)


@dataclass(frozen=True, eq=False)
class Cell:
    """A structure as plain arrays, any cell: what a pymatgen Structure is built from.

    lattice [3,3] rows in A; atomic_numbers [A]; frac_coords [A,3] as given (not wrapped).
    """

    lattice: NDArray[np.float64]
    atomic_numbers: NDArray[np.int16]
    frac_coords: NDArray[np.float64]

    @classmethod
    def from_structure(cls, structure: Structure) -> "Cell":
        """Keep lattice, elements and positions; oxidation states and site properties are dropped.

        Raises UserError for a disordered structure.
        """
        if not structure.is_ordered:
            raise UserError("structure with partial occupancy: only ordered crystals can be stored")
        return cls(
            np.array(structure.lattice.matrix, dtype=np.float64),
            np.array(structure.atomic_numbers, dtype=np.int16),
            np.array(structure.frac_coords, dtype=np.float64).reshape(-1, 3),
        )

    def to_structure(self) -> Structure:
        return Structure(
            self.lattice, [_element(int(z)) for z in self.atomic_numbers], self.frac_coords
        )


class Record:
    """A labelled crystal: identity, symmetric description, the structure as given, properties.

    `structure` is the cell the source gave (usually primitive), or None; given as a Cell it is
    turned into a pymatgen Structure only when asked for. `properties` has the keys PROPERTIES, each
    a finite number or None.
    """

    def __init__(
        self,
        material_id: str,
        crystal: Crystal,
        structure: Structure | Cell | None = None,
        properties: Mapping[str, float | None] | None = None,
    ) -> None:
        self.material_id = material_id
        self.crystal = crystal
        self.cell = (
            Cell.from_structure(structure) if isinstance(structure, Structure) else structure
        )
        self.properties = _checked_properties(material_id, properties or {})

    @cached_property
    def structure(self) -> Structure | None:
        return None if self.cell is None else self.cell.to_structure()

    @cached_property
    def reduced_formula(self) -> str:
        return reduced_formula(self.crystal.formula_counts)

    def __repr__(self) -> str:
        return f"Record({self.material_id!r}, {self.reduced_formula}, {self.crystal.space_group})"


def reduced_formula(counts: Mapping[int, int]) -> str:
    """pymatgen's reduced formula of {atomic number: count}."""
    divisor = math.gcd(*counts.values())
    return _formula(tuple(sorted((z, n // divisor) for z, n in counts.items())))


def lacking(records: Iterable[Record], name: str) -> int:
    """How many records have no value of a property."""
    return sum(record.properties[name] is None for record in records)


def lacking_lines(
    where: str, records: Sequence[Record], names: Iterable[str], fate: str
) -> list[str]:
    """A line for each property that some of the records lack: how many, and what becomes of them.

    Args:
        where: names the records.
        records: to be looked at.
        names: of properties.
        fate: ends the line.
    """
    counts = {name: lacking(records, name) for name in names}
    return [
        f"{where}: {count} of {len(records)} rows have no {name} and are {fate}"
        for name, count in counts.items()
        if count
    ]


def write_records(
    records: Iterable[Record],
    path: str | os.PathLike[str],
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write records in the given order; `source` (JSON-able) says where they came from.

    The same records and source give the same bytes. Raises UserError when `path` is not writable.
    """
    rows = list(records)
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint(rows),
        "rows": len(rows),
        "source": dict(source or {}),
    }
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    table = pa.Table.from_pydict(_columns(rows), schema=schema)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file in its order.

    Raises UserError for a missing, truncated or foreign file, and for a row that is no crystal's.
    """
    _check_metadata(path, _file_schema(path))
    try:
        # use_threads=False: a thread pool gains nothing here and breaks later forks.
        table = pq.read_table(path, page_checksum_verification=True, use_threads=False)
        return list(_records(table))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise _unreadable(path, error) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """schema_version, fingerprint, rows and source of a file.

    The rows are read only where an earlier version wrote the file, for their fingerprint.

    Raises UserError for a missing, truncated or foreign file.
    """
    metadata = _check_metadata(path, _file_schema(path))
    if not is_fingerprint(str(metadata.get("fingerprint"))):
        metadata["fingerprint"] = fingerprint(read_records(path))
    return metadata


def fingerprint(records: Iterable[Record]) -> str:
    """Names rows by their content: "v2:" and a SHA-256 (hex), the same on every processor.

    Of a row enter its id, space group, letters, the sites' elements, its properties with all bits,
    and the structure as given, in steps of 1e-8: lengths (A) and angles (deg) of the cell, whether
    it is right-handed, and the atoms' elements and fractional coordinates. Two equal rows count
    twice. These make no difference: the order of rows, how the cell is turned in space, whole cells
    added to a coordinate, and the label's own lattice and free coordinates, which follow from the
    structure, but whose last digits depend on the processor, as numpy's cosines and products of
    matrices do.

    What a text gives with up to 8 decimals, as pymatgen writes CIFs, lies on the steps, where no
    rounding error leads to another one. A value with more decimals may go to either of two steps if
    it is within such an error (1e-13) of the middle between them.

    A row without a structure enters with its label's lattice and free coordinates in the same
    steps, for nothing else says where its atoms are: such rows have one name wherever a file of
    them is read, but not if they are labelled on different processors.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        digests = sorted(hashlib.sha256(_canonical(record)).digest() for record in records)
    return _SCHEME + hashlib.sha256(b"".join(digests)).hexdigest()


def is_fingerprint(text: str) -> bool:
    """Whether a fingerprint can be compared: False for what earlier versions made of rows."""
    return text.startswith(_SCHEME)


def split_by_formula(
    records: Iterable[Record], fractions: Sequence[float], seed: int = 0
) -> list[list[Record]]:
    """Part records so that a reduced formula falls into one part only.

    The part depends on the hash of seed and formula alone, so adding, removing or reordering rows
    never moves another row: parts of a set agree whatever else is left out of it. They have the
    requested `fractions` (sum 1) of the formulas in expectation, not exactly; `deal_by_formula`
    makes them even. Rows keep their order.

    Raises UserError for fractions that are negative or do not sum to 1.
    """
    _check_fractions(fractions)
    bounds = np.cumsum(fractions)[:-1]
    parts: list[list[Record]] = [[] for _ in fractions]
    for record in records:
        position = _uniform_hash(f"{seed}:{record.reduced_formula}")
        parts[int(np.searchsorted(bounds, position, side="right"))].append(record)
    return parts


def deal_by_formula(
    records: Iterable[Record], fractions: Sequence[float], seed: int = 0
) -> list[list[Record]]:
    """Part records so that a reduced formula falls into one part only, and parts come out even.

    They have the requested `fractions` (sum 1) of the rows as nearly as whole formulas allow: those
    with most rows are dealt first, then those with fewer in an order that the seed decides, each to
    the part that is furthest behind. The order of the rows makes no difference, but other rows may
    move all of them. Rows keep their order.

    Raises UserError for fractions that are negative or do not sum to 1.
    """
    _check_fractions(fractions)
    rows = list(records)
    sizes = Counter(record.reduced_formula for record in rows)
    order = sorted(sizes, key=lambda f: (-sizes[f], _uniform_hash(f"{seed}:{f}"), f))
    shares, counts = np.array(fractions), np.zeros(len(fractions))
    part_of: dict[str, int] = {}
    dealt = 0
    for formula in order:
        dealt += sizes[formula]
        part = part_of[formula] = int(np.argmax(shares * dealt - counts))
        counts[part] += sizes[formula]
    parts: list[list[Record]] = [[] for _ in fractions]
    for record in rows:
        parts[part_of[record.reduced_formula]].append(record)
    return parts


def _check_fractions(fractions: Sequence[float]) -> None:
    if not fractions or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise UserError(f"split fractions {list(fractions)}: give numbers >= 0 that sum to 1")


@lru_cache(maxsize=128)
def _element(atomic_number: int) -> Element:
    return Element.from_Z(atomic_number)


@lru_cache(maxsize=200_000)
def _formula(counts: tuple[tuple[int, int], ...]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # elements without electronegativity
        return str(Composition({_element(z): n for z, n in counts}).reduced_formula)


def _uniform_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def _checked_properties(
    material_id: str, properties: Mapping[str, float | None]
) -> dict[str, float | None]:
    unknown = set(properties) - set(PROPERTIES)
    if unknown:
        raise UserError(f"{material_id}: unknown property {sorted(unknown)}; known: {PROPERTIES}")
    checked: dict[str, float | None] = {}
    for name in PROPERTIES:
        value = properties.get(name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{material_id}: {name} is {value}; give a finite number or none")
        checked[name] = None if value is None else float(value)
    return checked


def _canonical(record: Record) -> bytes:
    """The bytes that identify a row: every variable-length part is preceded by its length."""
    crystal, cell = record.crystal, record.cell
    numbers = [site.atomic_number for site in crystal.sites]
    coords = [site.free_params for site in crystal.sites] if cell is None else cell.frac_coords
    parts = [
        record.material_id.encode("utf-8"),
        struct.pack("<i", crystal.space_group),
        "".join(site.letter for site in crystal.sites).encode("ascii"),
        np.asarray(numbers, dtype="<i2").tobytes(),
        _float_bytes(_lattice_steps(crystal.lattice if cell is None else cell.lattice)),
        b"" if cell is None else cell.atomic_numbers.astype("<i2").tobytes(),
        _float_bytes(np.mod(_steps(coords), _STEPS)),
        *(
            b"" if record.properties[name] is None else _float_bytes(record.properties[name])
            for name in PROPERTIES
        ),
    ]
    return b"".join(struct.pack("<q", len(part)) + part for part in parts)


def _lattice_steps(lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """[7]: lengths and angles of a lattice [3,3] (rows, A) in steps, and the sign of its volume.

    In Python's arithmetic, which is the same everywhere; numpy's products and cosines are not.
    """
    a, b, c = np.asarray(lattice, dtype=np.float64).tolist()
    lengths = [math.sqrt(_dot(vector, vector)) for vector in (a, b, c)]
    angles = [_angle(*pair) for pair in ((b, c), (c, a), (a, b))]
    return np.append(_steps(lengths + angles), np.sign(np.linalg.det(lattice)))


def _angle(u: Sequence[float], v: Sequence[float]) -> float:
    """Between two vectors, degrees; 0 where a length is 0 or too large for a number."""
    product = math.sqrt(_dot(u, u)) * math.sqrt(_dot(v, v))
    if not 0 < product < math.inf:
        return 0.0
    return math.degrees(math.acos(max(-1.0, min(1.0, _dot(u, v) / product))))


def _dot(u: Sequence[float], v: Sequence[float]) -> float:
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


def _steps(values: Any) -> NDArray[np.float64]:
    """Whole numbers of steps; floats, which hold them exactly or, beyond 2^53, as they are."""
    return np.rint(np.asarray(values, dtype=np.float64) * _STEPS)


def _float_bytes(values: Any) -> bytes:
    """Little-endian float64, with -0.0 written as 0.0."""
    return (np.asarray(values, dtype="<f8") + 0.0).tobytes()


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Column lists of the schema."""
    crystals = [record.crystal for record in records]
    cells = [record.cell for record in records]
    columns: dict[str, list[Any]] = {
        "material_id": [record.material_id for record in records],
        "reduced_formula": [record.reduced_formula for record in records],
        "space_group": [crystal.space_group for crystal in crystals],
        "num_atoms": [crystal.num_atoms for crystal in crystals],
        "letters": ["".join(site.letter for site in crystal.sites) for crystal in crystals],
        "atomic_numbers": [[site.atomic_number for site in c.sites] for c in crystals],
        "free_params": [[x for site in c.sites for x in site.free_params] for c in crystals],
        "lattice": [np.asarray(c.lattice, dtype=np.float64).ravel() for c in crystals],
        "structure_lattice": [None if c is None else c.lattice.ravel() for c in cells],
        "structure_numbers": [None if c is None else c.atomic_numbers for c in cells],
        "structure_frac_coords": [None if c is None else c.frac_coords.ravel() for c in cells],
    }
    for name in PROPERTIES:
        columns[name] = [record.properties[name] for record in records]
    return columns


def _check_rows(table: pa.Table) -> None:
    """Raises ValueError for the first row that no crystal has, as after an edit by hand."""
    ids = table["material_id"].to_pylist()
    for name in ("atomic_numbers", "structure_numbers"):
        _check_values(table, name, ids, lambda z: (z >= 1) & (z < NUM_ELEMENTS), "no element")
    for name in ("free_params", "structure_frac_coords", "lattice", "structure_lattice"):
        _check_values(table, name, ids, np.isfinite, "not finite")
    for name in ("lattice", "structure_lattice"):
        given = [
            (i, row) for i, row in zip(ids, _arrays(table, name), strict=True) if row is not None
        ]
        for material_id, row in given:
            if len(row) != 9:
                raise ValueError(f"{material_id}: {name} has {len(row)} numbers, not 9")
        volumes = np.linalg.det(np.array([row for _, row in given]).reshape(-1, 3, 3))
        if (volumes == 0).any():
            raise ValueError(f"{given[int(np.argmax(volumes == 0))][0]}: {name} has no volume")
    groups, letters = table["space_group"].to_pylist(), table["letters"].to_pylist()
    for material_id, group, row in zip(ids, groups, letters, strict=True):
        if not 1 <= group <= 230:
            raise ValueError(f"{material_id}: space group {group} is not in 1-230")
        if not row or not wyckoff_summary(group).letters.keys() >= set(row):
            raise ValueError(f"{material_id}: letters {row!r} are none of space group {group}")


def _check_values(
    table: pa.Table,
    name: str,
    ids: Sequence[str],
    good: Callable[[NDArray[Any]], NDArray[np.bool_]],
    problem: str,
) -> None:
    values, offsets = _flat(table, name)
    bad = ~good(values)
    if bad.any():
        first = int(np.argmax(bad))
        row = int(np.searchsorted(offsets, first, side="right")) - 1
        raise ValueError(f"{ids[row]}: {name} has {values[first]}, {problem}")


def _records(table: pa.Table) -> Iterator[Record]:
    _check_rows(table)
    plain = {name: table[name].to_pylist() for name in ("material_id", "reduced_formula")}
    plain |= {name: table[name].to_pylist() for name in ("space_group", "letters", *PROPERTIES)}
    numbers, free, lattices = (
        _arrays(table, name) for name in ("atomic_numbers", "free_params", "lattice")
    )
    cells = [
        _arrays(table, name)
        for name in ("structure_lattice", "structure_numbers", "structure_frac_coords")
    ]
    for i, material_id in enumerate(plain["material_id"]):
        lattice = lattices[i]
        if lattice is None:
            raise ValueError(f"{material_id}: no lattice")
        sites = _sites(material_id, numbers[i], plain["letters"][i], free[i])
        record = Record(
            material_id,
            Crystal(plain["space_group"][i], sites, lattice.reshape(3, 3)),
            _cell(*(column[i] for column in cells)),
            {name: plain[name][i] for name in PROPERTIES},
        )
        record.__dict__["reduced_formula"] = plain["reduced_formula"][i]  # fills the cached value
        yield record


def _sites(
    material_id: str, numbers: NDArray[Any] | None, letters: str, free: NDArray[Any] | None
) -> tuple[Site, ...]:
    if numbers is None or free is None:
        raise ValueError(f"{material_id}: no sites")
    if not len(numbers) == len(letters) == len(free) / 3:
        raise ValueError(f"{material_id}: atomic_numbers, letters and free_params do not agree")
    triples = free.reshape(-1, 3).tolist()
    return tuple(
        Site(z, letter, (x, y, w))
        for z, letter, (x, y, w) in zip(numbers.tolist(), letters, triples, strict=True)
    )


def _cell(
    lattice: NDArray[Any] | None, numbers: NDArray[Any] | None, frac_coords: NDArray[Any] | None
) -> Cell | None:
    if lattice is None or numbers is None or frac_coords is None:
        return None
    return Cell(lattice.reshape(3, 3), numbers, frac_coords.reshape(len(numbers), 3))


def _arrays(table: pa.Table, name: str) -> list[NDArray[Any] | None]:
    """One array per row of a list column; None where the row has none."""
    values, offsets = _flat(table, name)
    valid = table[name].is_valid().to_pylist()
    bounds = pairwise(offsets.tolist())
    return [
        values[start:stop] if ok else None for (start, stop), ok in zip(bounds, valid, strict=True)
    ]


def _flat(table: pa.Table, name: str) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """The numbers of a list column, and where each row begins, and the last one ends, in them."""
    column = table[name].combine_chunks()
    return column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()


def _file_schema(path: str | os.PathLike[str]) -> pa.Schema:
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}; make it with 'uni-mdm data import'")
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _check_metadata(path: str | os.PathLike[str], schema: pa.Schema) -> dict[str, Any]:
    try:
        metadata = json.loads((schema.metadata or {})[_METADATA_KEY])
        version = metadata["schema_version"]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: a Parquet file, but not one of ours; make it with 'uni-mdm data import'"
        ) from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; import again"
        )
    if not schema.equals(_SCHEMA):
        raise UserError(f"{path}: unexpected columns; make it again with 'uni-mdm data import'")
    return dict(metadata)


def _unreadable(path: str | os.PathLike[str], error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"cannot read {path}: truncated, edited or not a Parquet file of ours ({reason}); "
        "make it again with 'uni-mdm data import'"
    )
