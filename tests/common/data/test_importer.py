"""Importing: every row is kept or named in quarantine, the same for any number of workers."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from common.crystal.structure import Crystal
from common.data import importer
from common.data.importer import (
    REASONS,
    ImportOptions,
    ImportReport,
    Rejection,
    import_cached,
    import_dataset,
    process_entry,
)
from common.data.label import label_structure
from common.data.sources import CsvSource, RawEntry
from common.data.store import Record, read_metadata, read_records
from common.errors import UserError
from common.properties import TARGETS

HEADER = ("material_id", "formation_energy_per_atom", "band_gap", "e_above_hull", "cif")
KILLER_ELEMENT = 36  # Kr


def text_of(structure: Structure) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(CifWriter(structure))


def rock_salt(a: float = 5.64, cation: str = "Na") -> Structure:
    half = a / 2
    face_centred = Lattice([[0, half, half], [half, 0, half], [half, half, 0]])
    return Structure(face_centred, [cation, "Cl"], [[0, 0, 0], [0.5] * 3])


def cubic(*coords: list[float], a: float = 4.0) -> str:
    return text_of(Structure(Lattice.cubic(a), ["Cs"] * len(coords), list(coords)))


GOOD = text_of(rock_salt())
DISORDERED = text_of(Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]]))
#: material_id, formation energy, gap, hull, cif; and the reason expected, None for a good row.
ROWS: list[tuple[tuple[str, ...], str | None]] = [
    (("good-1", "-2.0", "5.0", "", GOOD), None),
    (("cut", "-2.0", "5.0", "0", GOOD[:-30]), "unparsable"),
    (("text", "-2.0", "5.0", "0", "not a CIF"), "unparsable"),
    (("empty", "-2.0", "5.0", "0", ""), "unparsable"),
    (("close", "-2.0", "5.0", "0", cubic([0, 0, 0], [0, 0, 0.1])), "overlap"),
    (("image", "-2.0", "5.0", "0", cubic([0, 0, 0.01], [0, 0, 0.99])), "overlap"),
    (("alloy", "-2.0", "5.0", "0", DISORDERED), "disorder"),
    (("nan", "-2.0", "nan", "0", GOOD), "not_finite"),
    (("infinite", "inf", "5.0", "0", GOOD), "not_finite"),
    (("negative", "-2.0", "-5", "0", GOOD), "out_of_range"),
    (("placeholder", "-2.0", "1e9", "0", GOOD), "out_of_range"),
    (("in kJ/mol", "-411", "5.0", "0", GOOD), "out_of_range"),
    (("gapless", "-2.0", " ", "0", GOOD), None),
    (("word", "-2.0", "metal", "0", GOOD), "bad_label"),
    (("big", "-2.0", "5.0", "0", text_of(rock_salt() * (3, 2, 1))), "too_many_atoms"),
    (("", "-2.0", "5.0", "0", GOOD), "no_id"),
    (("short", "-2.0"), "malformed_row"),
    (("good-1", "-3.0", "5.0", "0", GOOD), "duplicate_id"),
    (("cut", "-2.0", "5.0", "nan", GOOD), None),  # the first row of this id was refused
    (("good-2", "-1.0", "0.0", "0.1", text_of(rock_salt(6.3, "K"))), None),
]


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> CsvSource:
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *rows])
    path.write_bytes(text.getvalue().encode())
    return CsvSource(path)


@pytest.fixture
def source(tmp_path: Path) -> CsvSource:
    return write_csv(tmp_path / "rows.csv", [row for row, _ in ROWS])


def run(source: CsvSource, out: Path, **options: Any) -> ImportReport:
    return import_dataset(source, out, **{"workers": 1, "show_progress": False} | options)


def quarantine(report: ImportReport) -> list[dict[str, str]]:
    return [json.loads(line) for line in report.quarantine_path.read_text().splitlines()]


def test_every_row_is_kept_or_named_with_its_reason(source: CsvSource, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out.parquet", max_atoms=10)
    expected = [(row[0], reason) for row, reason in ROWS if reason is not None]
    rows = quarantine(report)
    assert [(row["material_id"], row["reason"]) for row in rows] == expected
    assert [row["origin"] for row in rows] == [
        f"rows.csv row {k}" for k, (_, reason) in enumerate(ROWS, start=1) if reason is not None
    ]
    records = read_records(report.path)
    assert [record.material_id for record in records] == ["good-1", "gapless", "cut", "good-2"]
    assert (report.rows, report.written) == (len(ROWS), 4)
    assert report.lacking == {"band_gap": 1}
    assert records[1].properties == {"formation_energy": -2.0, "band_gap": None, "e_above_hull": 0}
    assert sum(report.reasons.values()) == len(rows)
    assert {reason for _, reason in expected} <= set(REASONS)


def test_labels_and_structure_of_a_good_row(source: CsvSource, tmp_path: Path) -> None:
    run(source, tmp_path / "out.parquet", max_atoms=10)
    record = read_records(tmp_path / "out.parquet")[-1]
    assert record.crystal.space_group == 225
    assert sorted(site.atomic_number for site in record.crystal.sites) == [17, 19]
    assert record.properties == {"formation_energy": -1.0, "band_gap": 0.0, "e_above_hull": 0.1}
    assert record.structure is not None
    assert record.structure.lattice.abc == pytest.approx(rock_salt(6.3, "K").lattice.abc)
    assert read_metadata(tmp_path / "out.parquet")["source"]["name"] == "rows.csv"


def test_any_number_of_workers_gives_the_same_bytes(source: CsvSource, tmp_path: Path) -> None:
    many = [row for row, _ in ROWS] * 3 + [
        (f"x-{k}", "-1", "1", "0", text_of(rock_salt(5 + k / 200))) for k in range(70)
    ]
    source = write_csv(tmp_path / "many.csv", many)
    contents = []
    for workers in (1, 2, 4):
        report = run(source, tmp_path / f"{workers}.parquet", workers=workers)
        contents.append((report.path.read_bytes(), report.quarantine_path.read_bytes()))
    assert contents[0] == contents[1] == contents[2]
    assert report.written == 75  # without a limit on atoms, "big" is a good row


def test_cache_is_used_until_something_changes(source: CsvSource, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = run(source, tmp_path / "a.parquet", cache=cache)
    again = run(source, tmp_path / "b.parquet", cache=cache)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert first.path.read_bytes() == again.path.read_bytes()
    assert first.quarantine_path.read_bytes() == again.quarantine_path.read_bytes()
    assert (again.rows, again.reasons) == (first.rows, first.reasons)
    assert again.lacking == first.lacking == {"band_gap": 1}
    assert not run(source, tmp_path / "c.parquet", cache=cache, max_atoms=3).from_cache
    (kept,) = [
        p
        for p in (cache / "imports").glob("*.parquet")
        if p.read_bytes() == first.path.read_bytes()
    ]
    kept.write_bytes(kept.read_bytes()[:-1])
    assert not run(source, tmp_path / "d.parquet", cache=cache).from_cache
    changed = write_csv(tmp_path / "rows.csv", [row for row, _ in ROWS[:-1]])
    assert not run(changed, tmp_path / "e.parquet", cache=cache).from_cache


def test_processes_that_need_the_same_rows_label_them_once(
    source: CsvSource, tmp_path: Path
) -> None:
    """As those of a training run by several processes do."""
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(import_cached, source, cache, show_progress=False) for _ in range(3)]
    reports = [job.result() for job in jobs]
    assert sorted(report.from_cache for report in reports) == [False, True, True]
    assert len({report.path for report in reports}) == 1
    assert not list((cache / "imports").glob(".*"))


def test_a_log_file_is_told_when_labelling_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_csv(tmp_path / "own[1].csv", [row for row, reason in ROWS if reason is None][:2])
    run(source, tmp_path / "a.parquet", show_progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "labelling own[1].csv: 2 rows"
    assert lines[-1].startswith("labelling own[1].csv ")
    assert " 2/2 " in lines[-1]
    run(source, tmp_path / "b.parquet", show_progress=False)
    assert capsys.readouterr().err == ""


def test_what_a_source_does_not_offer_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("material_id,cif\n" + f'x,"{GOOD}"\n')
    report = run(CsvSource(tmp_path / "a.csv"), tmp_path / "a.parquet")
    assert (report.written, report.lacking) == (1, {})


@pytest.mark.parametrize("options", [{"workers": 0}, {"max_atoms": 0}])
def test_senseless_options(source: CsvSource, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 1"):
        run(source, tmp_path / "out.parquet", **options)
    assert not (tmp_path / "out.parquet").exists()


def label_or_die(structure: Structure) -> Crystal:
    """Ends the process, as a fault in a compiled library does."""
    if KILLER_ELEMENT in structure.atomic_numbers:
        os._exit(11)
    return label_structure(structure)


def test_row_that_kills_its_process_is_refused_and_no_other(tmp_path: Path) -> None:
    rows = [(f"x-{k}", "-1", "1", "0", text_of(rock_salt(5 + k / 200))) for k in range(70)]
    deadly = text_of(rock_salt(cation="Kr"))
    rows[40] = ("deadly", "-1", "1", "0", deadly)
    report = run(
        write_csv(tmp_path / "rows.csv", rows),
        tmp_path / "o.parquet",
        workers=2,
        label=label_or_die,
    )
    assert report.reasons == {"crash": 1}
    assert [row["material_id"] for row in quarantine(report)] == ["deadly"]
    assert report.written == 69


def label_without_end(structure: Structure) -> Crystal:
    while KILLER_ELEMENT in structure.atomic_numbers:
        pass
    return label_structure(structure)


def test_row_that_never_ends_is_refused_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "PATIENCE", 15.0)
    rows = [("good", "-1", "1", "0", GOOD), ("x", "-1", "1", "0", text_of(rock_salt(cation="Kr")))]
    report = run(
        write_csv(tmp_path / "rows.csv", rows),
        tmp_path / "o.parquet",
        workers=2,
        label=label_without_end,
    )
    (refused,) = quarantine(report)
    assert (refused["material_id"], refused["reason"]) == ("x", "crash")
    assert "does not end" in refused["detail"]
    assert report.written == 1


def label_slowly(structure: Structure) -> Crystal:
    time.sleep(0.2)
    return label_structure(structure)


def processes_of_session(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
def test_killed_import_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = [(f"x-{k}", "-1", "1", "0", text_of(rock_salt(5 + k / 200))) for k in range(100)]
    write_csv(tmp_path / "rows.csv", rows)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_importer import CsvSource, label_slowly, import_dataset
from pathlib import Path
if __name__ == "__main__":
    folder = Path({str(tmp_path)!r})
    source = CsvSource(folder / "rows.csv")
    import_dataset(source, folder / "out.parquet", workers=2, label=label_slowly)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, str(script)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert wait_for(lambda: len(processes_of_session(process.pid)) >= 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "script.py"]
    assert wait_for(lambda: processes_of_session(process.pid) == [])


def wait_for(condition: Any, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


# Whatever a row holds.

cell_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
number_text = st.floats().map(str) | st.sampled_from(["", "NaN", "1e999", "0x1", "\u0661", "1_0"])
cif_text = st.sampled_from([GOOD, DISORDERED, GOOD[:-40]]) | cell_text
rows = st.lists(
    st.tuples(cell_text, number_text | cell_text, number_text | cell_text, number_text, cif_text)
    | st.lists(cell_text, min_size=1, max_size=8).map(tuple),
    max_size=6,
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(deadline=None, max_examples=40)
@given(rows)
def test_arbitrary_rows_are_kept_or_quarantined(folder: Path, made: list[tuple[str, ...]]) -> None:
    report = run(write_csv(folder / "any.csv", made), folder / "any.parquet")
    records = read_records(report.path)
    assert len(records) == report.written
    assert (
        report.written + len(quarantine(report))
        == report.rows
        == len(CsvSource(folder / "any.csv"))
    )
    assert {row["reason"] for row in quarantine(report)} <= set(REASONS)
    for name in TARGETS:
        known = [record.properties[name] for record in records]
        assert report.lacking.get(name, 0) == known.count(None)
        assert all(np.isfinite(value) for value in known if value is not None)


@settings(deadline=None, max_examples=80)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_imported_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "bytes.csv"
    path.write_bytes(b"material_id,cif\n" + content)
    report = run(CsvSource(path), folder / "bytes.parquet")
    assert report.written == 0


length = st.floats(0, 1e3) | st.sampled_from([1e-300, 1e300, 5e-324])
json_value = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(length, min_size=3, max_size=3),
    st.lists(st.floats(0.1, 179.9), min_size=3, max_size=3),
    st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_strange_cells_are_kept_or_refused(
    lengths: list[float], angles: list[float], coords: list[list[float]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lattice = Lattice.from_parameters(*lengths, *angles)
        except (ValueError, ZeroDivisionError):
            return
    structure = Structure(lattice, ["Si"] * len(coords), coords)
    outcome = process_entry(RawEntry("x", structure), ImportOptions())
    assert isinstance(outcome, Record) or outcome.reason in REASONS


@settings(deadline=None, max_examples=80)
@given(st.dictionaries(st.sampled_from(["lattice", "sites", "charge", "x"]), json_value))
def test_arbitrary_documents_are_refused(document: dict[str, Any]) -> None:
    outcome = process_entry(RawEntry("x", document), ImportOptions())
    assert isinstance(outcome, Rejection)
    assert outcome.reason in REASONS
