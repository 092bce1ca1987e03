"""What `uni-mdm data` says of data sets."""

from pathlib import Path

import pytest

from common.cli import run
from common.crystal.structure import Crystal, Site
from common.data.store import Record, read_records, write_records

SALTS = [(3, 9), (11, 17), (19, 35), (37, 53)]  # LiF, NaCl, KBr, RbI


def salt(cation: int, anion: int) -> Crystal:
    sites = (Site(cation, "a", (0.0, 0.0, 0.0)), Site(anion, "b", (0.0, 0.0, 0.0)))
    return Crystal(225, sites, ((5.6, 0, 0), (0, 5.6, 0), (0, 0, 5.6)))


@pytest.fixture
def salts(tmp_path: Path) -> Path:
    """Four crystals of one formula each."""
    path = tmp_path / "salts.parquet"
    write_records([Record(str(i), salt(*pair)) for i, pair in enumerate(SALTS)], path)
    return path


def test_part_that_gets_nothing_is_told(salts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = salts.parent / "parts"
    run(["data", "split", str(salts), "--out", str(out)])
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        f"{out}/{name}.parquet: {rows} rows"
        for name, rows in (("train", 3), ("val", 1), ("test", 0))
    ]
    (line,) = told.err.splitlines()
    assert line.startswith(f"{out}/test.parquet is empty: 4 formulas are too few for 0.1 of them")
    assert read_records(out / "test.parquet") == []


def test_part_that_should_get_nothing_is_not(
    salts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["data", "split", str(salts), "--out", str(salts.parent), "--fractions", "0.5,0.5,0"])
    told = capsys.readouterr()
    assert [line.split(": ")[1] for line in told.out.splitlines()] == ["2 rows", "2 rows", "0 rows"]
    assert told.err == ""


def test_properties_that_belong_to_no_file_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNI_MDM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cifs"
    folder.mkdir()
    (folder / "salt.cif").write_text(salt(11, 17).to_cif("salt"))
    (folder / "properties.csv").write_text("material_id,band_gap\nsalt,5\nSalt,6\nsalt2,7\n")
    out = str(tmp_path / "salt.parquet")
    run(["data", "import", "--source", str(folder), "--out", out, "--workers", "1"])
    assert "properties.csv: no CIF for 2 ids: Salt, salt2\n" in capsys.readouterr().err
    (record,) = read_records(out)
    assert record.properties["band_gap"] == 5
    single = str(folder / "salt.cif")
    run(["data", "import", "--source", single, "--out", out, "--workers", "1"])
    assert "no CIF" not in capsys.readouterr().err
