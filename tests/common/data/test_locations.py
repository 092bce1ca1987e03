"""Data sets by name or path, and the commands of `uni-mdm data`."""

import re
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter
from typer.testing import CliRunner

from common.data import locations
from common.data.cli import app
from common.data.store import fingerprint, read_records, write_records
from common.errors import UserError


@pytest.fixture
def csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a validation set of four binary salts."""
    monkeypatch.setenv("UNI_MDM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("UNI_MDM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "data" / "mp_20" / "val.csv.gz"
    file.parent.mkdir(parents=True)
    rows = ["material_id,band_gap,formation_energy_per_atom,cif"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, cation in enumerate(["Na", "K", "Rb", "Cs"]):
            salt = Structure(Lattice.cubic(4.1), [cation, "Cl"], [[0, 0, 0], [0.5] * 3])
            rows.append(f'mp-{k},{k},-2,"{CifWriter(salt)}"')
    file.write_text("\n".join([*rows, "mp-9,1,-2,broken"]))
    return file


def test_data_set_by_name_and_by_path(csv_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_name = locations.dataset("val", workers=1)
    assert [record.material_id for record in by_name] == ["mp-0", "mp-1", "mp-2", "mp-3"]
    said = capsys.readouterr().err
    assert "val: 1 of 5 rows cannot be used (1 " in said
    assert ".quarantine.jsonl" in said
    assert locations.dataset_path("val") == locations.dataset_path(csv_file)
    assert locations.dataset_path("val").is_relative_to(locations.cache_dir())
    parquet = locations.dataset_path("val")
    assert locations.dataset_path(parquet) == parquet


def test_data_sets_joined_by_a_plus(csv_file: Path, tmp_path: Path) -> None:
    """Known ones and files, in this order; a file may have a plus in its own name."""
    mine, odd = tmp_path / "mine.parquet", tmp_path / "a+b.parquet"
    write_records(locations.dataset("val", workers=1)[:2], mine)
    write_records(locations.dataset("val")[2:3], odd)
    ids = [record.material_id for record in locations.dataset(f"{mine}+val")]
    assert ids == ["mp-0", "mp-1", "mp-0", "mp-1", "mp-2", "mp-3"]
    assert [record.material_id for record in locations.dataset(odd)] == ["mp-2"]
    locations.check_dataset(f"{mine}+val")
    for wrong in ("val+none.csv", f"none.csv+{mine}"):
        with pytest.raises(UserError, match=r"no data set at none\.csv"):
            locations.check_dataset(wrong)
    with pytest.raises(UserError, match=r"no data set at x\+y\.csv"):
        locations.check_dataset("x+y.csv")
    for empty in ("val+", "+val", f"{mine}++val"):
        with pytest.raises(UserError, match=re.escape(f"no data set at {empty}: ")):
            locations.check_dataset(empty)


def test_addresses_are_not_joined(csv_file: Path) -> None:
    for whole in ("https://host/a+b.csv", "https://host/a.csv+val"):
        locations.check_dataset(whole)
    joined = "val+https://host/a+b.csv"
    with pytest.raises(UserError, match=re.escape(f"{joined}: an address cannot be joined")):
        locations.check_dataset(joined)


def test_missing_data_sets_are_user_errors(csv_file: Path) -> None:
    with pytest.raises(UserError, match="UNI_MDM_DATA"):
        locations.dataset("train")
    with pytest.raises(UserError, match="one of train, val, extra"):
        locations.dataset("nonsense")


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UNI_MDM_DATA", "UNI_MDM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    repository = Path(locations.__file__).resolve().parents[2]
    assert locations.data_dir() == repository.parent / "shared" / "data"
    assert locations.cache_dir() == Path.home() / ".cache" / "uni-mdm"


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_commands(csv_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    printed = invoke("import", "--source", csv_file, "--out", out, "--workers", 1)
    assert "rows written" in printed
    assert "refused: unparsable" in printed
    assert out.with_name("out.parquet.quarantine.jsonl").read_text().count("\n") == 1
    records = read_records(out)
    assert invoke("fingerprint", out).strip() == fingerprint(records)
    assert invoke("fingerprint", "val").strip() == fingerprint(records)
    table = pq.read_table(out)  # as an earlier version wrote it
    stored = table.schema.metadata[b"uni_mdm"].decode().replace(fingerprint(records), "9" * 64)
    former = tmp_path / "former.parquet"
    pq.write_table(table.replace_schema_metadata({b"uni_mdm": stored}), former)
    assert invoke("fingerprint", former).strip() == fingerprint(records)
    printed = invoke("info", out)
    assert "221 (4)" in printed
    assert "val.csv.gz" in printed
    invoke("split", out, "--out", tmp_path / "parts", "--fractions", "0.5,0.25,0.25")
    names = [tmp_path / "parts" / f"{part}.parquet" for part in ("train", "val", "test")]
    parted = [record.material_id for name in names for record in read_records(name)]
    assert sorted(parted) == ["mp-0", "mp-1", "mp-2", "mp-3"]


def test_bad_options_are_user_errors(csv_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(UserError, match="no such file"):
        invoke("import", "--source", tmp_path / "no.csv", "--out", out)
    with pytest.raises(UserError, match="fractions"):
        invoke("split", csv_file, "--out", tmp_path, "--fractions", "0.5,x")
    with pytest.raises(UserError, match="at least 1"):
        invoke("import", "--source", csv_file, "--out", out, "--workers", 0)
    assert not out.exists()


def test_no_source_is_overwritten(csv_file: Path, tmp_path: Path) -> None:
    content = csv_file.read_bytes()
    for out in (csv_file, tmp_path / "out"):
        with pytest.raises(UserError, match=r"ends in \.parquet"):
            invoke("import", "--source", csv_file, "--out", out)
    assert csv_file.read_bytes() == content
    whole = tmp_path / "train.parquet"
    invoke("import", "--source", csv_file, "--out", whole, "--workers", 1)
    content = whole.read_bytes()
    with pytest.raises(UserError, match="give another --out"):
        invoke("split", whole, "--out", tmp_path)
    assert whole.read_bytes() == content
