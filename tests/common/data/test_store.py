"""Labelled crystals survive the disk bit by bit; damaged files are refused in one line."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition, Lattice, Structure

from common.crystal.structure import Crystal, Site
from common.data.store import (
    PROPERTIES,
    Cell,
    Record,
    deal_by_formula,
    fingerprint,
    read_metadata,
    read_records,
    reduced_formula,
    split_by_formula,
    write_records,
)
from common.errors import UserError

finite = st.floats(-1e6, 1e6)
unit = st.floats(0, 1, exclude_max=True)
ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any P1 record: elements, positions, properties with gaps, perhaps no structure."""
    numbers = draw(st.lists(st.integers(1, 118), min_size=1, max_size=5))
    coords = [tuple(draw(unit) for _ in range(3)) for _ in numbers]
    lattice = np.array(draw(st.lists(finite, min_size=9, max_size=9))).reshape(3, 3)
    assume(np.linalg.det(lattice) != 0)
    sites = tuple(Site(z, "a", c) for z, c in zip(numbers, coords, strict=True))
    cell = Cell(lattice, np.array(numbers, dtype=np.int16), np.array(coords))
    properties = {name: draw(st.none() | finite) for name in PROPERTIES}
    kept = draw(st.sampled_from([cell, None]))
    return Record(draw(ids), Crystal(1, sites, lattice), kept, properties)


def perovskite(name: str = "mp-1", a: float = 3.905, gap: float | None = 1.8) -> Record:
    structure = Structure.from_spacegroup(
        221, Lattice.cubic(a), ["Sr", "Ti", "O"], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0]]
    )
    sites = (Site(38, "a", (0.0,) * 3), Site(22, "b", (0.0,) * 3), Site(8, "c", (0.0,) * 3))
    return Record(name, Crystal(221, sites, np.eye(3) * a), structure, {"band_gap": gap})


def binary(index: int) -> Record:
    """A P1 crystal whose formula is different for every index."""
    numbers = [1 + index % 90, 1 + (index + 1 + index // 90) % 90]
    sites = tuple(Site(z, "a", (0.1 * k, 0.2, 0.3)) for k, z in enumerate(numbers))
    return Record(f"x-{index}", Crystal(1, sites, np.eye(3) * 4))


def contents(record: Record) -> tuple[object, ...]:
    cell = record.cell
    return (
        record.material_id,
        record.reduced_formula,
        record.crystal.space_group,
        record.crystal.sites,
        np.asarray(record.crystal.lattice).tolist(),
        record.properties,
        None if cell is None else (cell.lattice.tolist(), cell.atomic_numbers.tolist()),
        None if cell is None else cell.frac_coords.tolist(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("store")


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(records(), max_size=6))
def test_round_trip_is_exact(folder: Path, rows: list[Record]) -> None:
    path = folder / "round.parquet"
    write_records(rows, path)
    again = read_records(path)
    assert [contents(record) for record in again] == [contents(record) for record in rows]
    assert fingerprint(again) == fingerprint(rows) == read_metadata(path)["fingerprint"]


def test_structure_comes_back_as_pymatgen_gave_it(tmp_path: Path) -> None:
    record = perovskite()
    write_records([record], tmp_path / "a.parquet")
    (again,) = read_records(tmp_path / "a.parquet")
    expected = Structure.from_spacegroup(
        221, Lattice.cubic(3.905), ["Sr", "Ti", "O"], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0]]
    )
    assert again.structure == expected
    assert again.structure is again.structure
    assert again.reduced_formula == "SrTiO3"
    assert again.properties == {"band_gap": 1.8, "formation_energy": None, "e_above_hull": None}


def test_columns_are_those_documented(tmp_path: Path) -> None:
    """Read with plain pyarrow: what other programs see."""
    write_records([perovskite()], tmp_path / "a.parquet", {"kind": "csv", "name": "x.csv"})
    (row,) = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert row["space_group"] == 221
    assert row["num_atoms"] == 5
    assert (row["letters"], row["atomic_numbers"]) == ("abc", [38, 22, 8])
    assert row["lattice"] == [3.905, 0, 0, 0, 3.905, 0, 0, 0, 3.905]
    assert len(row["free_params"]) == 9
    assert len(row["structure_frac_coords"]) == 15
    assert row["formation_energy"] is None
    assert read_metadata(tmp_path / "a.parquet")["source"] == {"kind": "csv", "name": "x.csv"}


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_records([perovskite(), binary(3)], tmp_path / name, {"name": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture(scope="module")
def intact(folder: Path) -> tuple[list[Record], bytes]:
    rows = [perovskite(), binary(5), binary(6)]
    write_records(rows, folder / "intact.parquet")
    return rows, (folder / "intact.parquet").read_bytes()


def refusal(path: Path) -> str | None:
    """The message that reading gives, or None when it gives rows."""
    try:
        read_records(path)
    except UserError as error:
        return str(error)
    return None


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_file_is_a_user_error(
    folder: Path, intact: tuple[list[Record], bytes], data: st.DataObject
) -> None:
    """Cut anywhere, or one bit flipped: never a traceback, never other rows than were written."""
    rows, content = intact
    path, raw = folder / "damaged.parquet", bytearray(content)
    position = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw = raw[:position]
    else:
        raw[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    message = refusal(path)
    if message is None:
        again = [contents(record) for record in read_records(path)]
        assert again == [contents(record) for record in rows]
    else:
        assert "\n" not in message
        assert str(path) in message


@pytest.mark.parametrize("content", [b"", b"PAR1", b"material_id,cif\n", b"PAR1" * 100])
def test_foreign_bytes_are_a_user_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    for read in (read_records, read_metadata):
        with pytest.raises(UserError, match="cannot read"):
            read(tmp_path / "a.parquet")


def test_other_parquet_files_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match="no such file"):
        read_records(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match="not one of ours"):
        read_records(path)
    metadata = b'{"schema_version": 999}'
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({b"uni_mdm": metadata}), path)
    with pytest.raises(UserError, match="schema version 999"):
        read_records(path)
    metadata = b'{"schema_version": 1}'
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({b"uni_mdm": metadata}), path)
    with pytest.raises(UserError, match="unexpected columns"):
        read_records(path)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("space_group", 231, "space group 231 is not in 1-230"),
        ("space_group", -1, "space group -1 is not in 1-230"),
        ("letters", "abz", "letters 'abz' are none of space group 221"),
        ("letters", "ab\u00e9", "are none of space group 221"),
        ("letters", "ab", "do not agree"),
        ("atomic_numbers", [38, 0, 8], "atomic_numbers has 0, no element"),
        ("atomic_numbers", [38, None, 8], "atomic_numbers has nan, no element"),
        ("structure_numbers", [38, 22, 8, 8, 119], "structure_numbers has 119, no element"),
        ("free_params", [0.0, math.nan, *[0.0] * 7], "free_params has nan, not finite"),
        ("structure_frac_coords", [math.inf] * 15, "has inf, not finite"),
        ("structure_frac_coords", [0.5] * 14, "cannot reshape"),
        ("lattice", [0.0] * 9, "lattice has no volume"),
        ("structure_lattice", [4.0] * 9, "structure_lattice has no volume"),
        ("lattice", [4.0] * 8, "lattice has 8 numbers, not 9"),
        ("band_gap", math.nan, "band_gap is nan"),
    ],
)
def test_rows_edited_by_hand_are_user_errors(
    tmp_path: Path, column: str, value: object, problem: str
) -> None:
    """The row is named; nothing is left to fail later."""
    path = tmp_path / "a.parquet"
    write_records([perovskite(), perovskite("mp-2"), binary(3)], path)
    table = pq.read_table(path)
    index = table.schema.get_field_index(column)
    values = table[column].to_pylist()
    values[1] = value
    field = table.schema.field(index)
    pq.write_table(table.set_column(index, field, pa.array(values, field.type)), path)
    message = refusal(path)
    assert message is not None
    assert problem in message
    assert "mp-2" in message or problem == "cannot reshape"
    assert "\n" not in message


def test_sites_that_are_gone_are_a_user_error(tmp_path: Path) -> None:
    write_records([Record("mp-3", Crystal(221, (), np.eye(3)))], tmp_path / "a.parquet")
    assert "mp-3: letters '' are none of space group 221" in str(refusal(tmp_path / "a.parquet"))


def turned(record: Record, sign: float = 1.0) -> Cell:
    """A record's cell turned in space, and mirrored where the sign is -1."""
    assert record.cell is not None
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    rotation *= sign * np.sign(np.linalg.det(rotation))
    return replace(record.cell, lattice=record.cell.lattice @ rotation)


def test_fingerprint_ignores_order_and_sees_every_field() -> None:
    rows = [perovskite(), binary(1), binary(2)]
    reference = fingerprint(rows)
    assert fingerprint(rows[::-1]) == reference
    assert fingerprint(rows + rows[:1]) != reference
    assert fingerprint(rows[1:]) != reference
    crystal, cell = rows[0].crystal, rows[0].cell
    assert cell is not None
    gap = {"band_gap": 1.8}
    other_letter = Crystal(221, (Site(38, "b"), *crystal.sites[1:]), crystal.lattice)
    other_element = Crystal(221, (Site(56, "a"), *crystal.sites[1:]), crystal.lattice)
    other_group = Crystal(200, crystal.sites, crystal.lattice)
    shifts = np.zeros_like(cell.frac_coords)
    shifts[-1, 1] = 1e-4
    sheared = cell.lattice + 1e-4 * np.eye(3)[[1, 2, 0]]
    changed = [
        perovskite("mp-2"),
        perovskite(a=3.9051),
        perovskite(a=3.90500001),
        perovskite(gap=None),
        perovskite(gap=np.nextafter(1.8, 2)),
        Record("mp-1", crystal, None, gap),
        Record("mp-1", other_letter, cell, gap),
        Record("mp-1", other_element, cell, gap),
        Record("mp-1", other_group, cell, gap),
        Record("mp-1", crystal, cell, {"formation_energy": 1.8}),
        Record("mp-1", crystal, replace(cell, atomic_numbers=cell.atomic_numbers + 1), gap),
        Record("mp-1", crystal, replace(cell, frac_coords=cell.frac_coords + shifts), gap),
        Record("mp-1", crystal, replace(cell, lattice=sheared), gap),
        Record("mp-1", crystal, turned(rows[0], -1.0), gap),
    ]
    prints = {fingerprint([record, *rows[1:]]) for record in changed}
    assert len(prints) == len(changed)
    assert reference not in prints
    assert fingerprint([Record("mp-1", crystal, turned(rows[0]), gap), *rows[1:]]) == reference


def test_fingerprint_without_structure_sees_the_label() -> None:
    sites = binary(1).crystal.sites
    moved = (replace(sites[0], free_params=(1e-4, 0.2, 0.3)), sites[1])
    rows = [
        binary(1),
        Record("x-1", Crystal(1, moved, np.eye(3) * 4)),
        Record("x-1", Crystal(1, sites, np.eye(3) * 4.0001)),
    ]
    assert len({fingerprint([row]) for row in rows}) == len(rows)
    noisy = Record("x-1", Crystal(1, sites, np.eye(3) * 4 + 1e-15))
    assert fingerprint([noisy]) == fingerprint(rows[:1])


decimals = st.integers(0, 10**8 - 1)
noise = st.floats(-1, 1)


@settings(deadline=None)
@given(st.data())
def test_fingerprint_is_that_of_the_text_on_every_processor(data: st.DataObject) -> None:
    """Structures and labels that were computed with other rounding errors.

    Those of a lattice are 1e-15 A; where a coordinate is computed, 0 may become 1 - 1e-17.
    """
    lengths = [data.draw(st.integers(2 * 10**8, 30 * 10**8)) / 1e8 for _ in range(3)]
    angles = [data.draw(st.integers(60 * 10**8, 119 * 10**8)) / 1e8 for _ in range(3)]
    coords = np.array([[data.draw(decimals) / 1e8 for _ in range(3)] for _ in range(2)])
    coords[0, 0] = data.draw(st.sampled_from([0.0, 1 / 3, 2 / 3, 0.00000001, 0.99999999]))
    lattice = Lattice.from_parameters(*lengths, *angles).matrix
    errors = np.array([data.draw(noise) for _ in range(9)]).reshape(3, 3)
    numbers = np.array([11, 17], dtype=np.int16)

    def row(size: float) -> Record:
        found = coords + 1e-17 * size * errors[:2]
        cell = Cell(lattice + 1e-14 * size * errors, numbers, found - np.floor(found))
        free = coords + 1e-5 * size * errors[:2]
        sites = (Site(11, "a", tuple(free[0].tolist())), Site(17, "a", tuple(free[1].tolist())))
        return Record("x", Crystal(1, sites, lattice + 1e-5 * size * errors), cell)

    assert fingerprint([row(1.0)]) == fingerprint([row(0.0)])


def test_fingerprint_of_extreme_numbers() -> None:
    """No number is too large, and no cell too flat."""
    crystal, numbers = perovskite().crystal, np.array([11], dtype=np.int16)
    sizes = (0.0, 1.0, 1e12, 1e150, 1e300)
    cells = [Cell(np.eye(3) * size, numbers, np.zeros((1, 3))) for size in sizes]
    assert len({fingerprint([Record("x", crystal, cell)]) for cell in cells}) == len(sizes)
    for size in sizes:
        fingerprint([Record("x", crystal, Cell(np.eye(3), numbers, np.full((1, 3), -size)))])


def test_fingerprint_is_the_same_in_every_version() -> None:
    """Of rows whose numbers are exact: what shipped files and those of users are named by."""
    expected = "67ae0ab108f2eae672310197714e73b0fba39740e237ade3784a36b1e5ba1f66"
    assert fingerprint([perovskite(), binary(1)]) == f"v2:{expected}"


def test_file_of_an_earlier_version(tmp_path: Path) -> None:
    """It is read as ever, and never named by what an earlier version called its rows."""
    rows, path = [perovskite(), binary(1)], tmp_path / "a.parquet"
    write_records(rows, path, {"name": "x"})
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"uni_mdm"]) | {"fingerprint": "9" * 64}
    pq.write_table(table.replace_schema_metadata({b"uni_mdm": json.dumps(metadata)}), path)
    assert [contents(record) for record in read_records(path)] == [contents(r) for r in rows]
    assert read_metadata(path) == metadata | {"fingerprint": fingerprint(rows)}


def test_split_keeps_formulas_together_and_ignores_the_order() -> None:
    rows = [binary(i) for i in range(2000)] + [perovskite(f"mp-{i}") for i in range(5)]
    parts = split_by_formula(rows, [0.8, 0.1, 0.1], seed=7)
    where = {record.material_id: k for k, part in enumerate(parts) for record in part}
    assert len(where) == len(rows)
    formulas = [{record.reduced_formula for record in part} for part in parts]
    assert not (formulas[0] & formulas[1] | formulas[0] & formulas[2] | formulas[1] & formulas[2])
    # 2001 draws: four standard deviations of a part of 10 % are 2.7 %.
    assert [len(part) / len(rows) for part in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    subset = random.Random(1).sample(rows, 700)
    for k, part in enumerate(split_by_formula(subset, [0.8, 0.1, 0.1], seed=7)):
        assert all(where[record.material_id] == k for record in part)
    assert split_by_formula(rows, [0.8, 0.1, 0.1], seed=8) != parts


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 5), st.randoms())
def test_dealt_parts_are_even(formulas: list[int], seed: int, order: random.Random) -> None:
    rows = [binary(i) for i in formulas]
    parts = deal_by_formula(rows, [0.8, 0.1, 0.1], seed)
    found = [{record.reduced_formula for record in part} for part in parts]
    assert sum(map(len, found)) == len(set.union(*found)) == len(set(formulas))
    assert sum(map(len, parts)) == len(rows)
    largest = max(map(formulas.count, formulas))
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert abs(len(part) - share * len(rows)) < largest, "by less than one formula"
    shuffled = order.sample(rows, len(rows))
    again = deal_by_formula(shuffled, [0.8, 0.1, 0.1], seed)
    assert [{record.reduced_formula for record in part} for part in again] == found


def test_small_sets_are_dealt_evenly() -> None:
    """Formulas with many rows do not keep the others from evening parts out."""
    for counts in ([1] * 19, [5, 4, *[1] * 10]):
        rows = [binary(i) for i, count in enumerate(counts) for _ in range(count)]
        for seed in range(5):
            parts = deal_by_formula(rows, [0.8, 0.1, 0.1], seed)
            assert [len(part) for part in parts] == [15, 2, 2]
            assert [row for row in rows if row in parts[0]] == parts[0], "in their order"
    several = {str(deal_by_formula(rows, [0.8, 0.1, 0.1], seed)[1]) for seed in range(5)}
    assert len(several) > 1, "the seed decides"
    assert [len(part) for part in deal_by_formula(rows, [1.0, 0.0], 0)] == [19, 0]


@pytest.mark.parametrize("parted", [split_by_formula, deal_by_formula])
@pytest.mark.parametrize("fractions", [[], [0.5, 0.4], [1.5, -0.5], [float("nan"), 1.0]])
def test_bad_fractions_are_user_errors(parted: Callable, fractions: list[float]) -> None:
    with pytest.raises(UserError, match="fractions"):
        parted([perovskite()], fractions)


@given(st.dictionaries(st.integers(1, 103), st.integers(1, 40), min_size=1, max_size=6))
def test_reduced_formula_is_that_of_pymatgen(counts: dict[int, int]) -> None:
    from pymatgen.core import Element

    expected = Composition({Element.from_Z(z): n for z, n in counts.items()}).reduced_formula
    assert reduced_formula(counts) == expected
    assert reduced_formula({z: 3 * n for z, n in counts.items()}) == expected


@pytest.mark.parametrize("properties", [{"band_gap": float("nan")}, {"gap": 1.0}])
def test_bad_properties_are_refused(properties: dict[str, float]) -> None:
    with pytest.raises(UserError, match="mp-9"):
        Record("mp-9", perovskite().crystal, None, properties)


def test_disordered_structure_is_refused() -> None:
    alloy = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    with pytest.raises(UserError, match="partial occupancy"):
        Record("x", perovskite().crystal, alloy)
