"""Bad input to `uni-mdm generate`: one line on stderr, exit code 2, nothing written."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.checkpoint import CONFIG, MANIFEST, MODEL, save_checkpoint
from common.cli import run
from common.errors import UserError
from common.pipeline import make_query
from common.requests import COLUMNS, read_requests

CUBIC = "Sr:1a Ti:1b O:3c"
UNI_MDM = Path(sys.executable).with_name("uni-mdm")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A function that runs the command in an empty folder and returns its one line."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def refuse(*arguments: str) -> str:
        capsys.readouterr()
        assert run(["generate", *arguments]) == 2
        output, errors = capsys.readouterr()
        assert not output.strip()
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert not list(work.iterdir()), "nothing is written"
        return errors

    return refuse


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Sound files, though no network fits them."""
    save_checkpoint(
        tmp_path / "checkpoint",
        config={"name": "test", "model": {"properties": ["band_gap"]}},
        model={"w": np.ones(100, dtype=np.float32)},
    )
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("Xx2O3", "'Xx'"),
        ("srtio3", "capital letter"),
        ("CuSO4.5H2O", "CuSO4*5H2O"),
        ("Fe3+", "charge"),
        ("SO4^2-", "charge"),
        ("Na+Cl-", "charge"),
        ("Sr-1TiO3", "Sr-1TiO3"),
        ("SrTi0O3", "zero"),
        ("Sr0.5TiO3", "whole numbers"),
        ("Fe0.5Ni0.5", "LiCo2O4, not Li0.5CoO2"),
        ("Sr(TiO3", "never closed"),
        ("SrTi)O3", "closes nothing"),
        ("3SrO", "count must follow"),
        ("O99999", "atoms"),
        ("O" + "9" * 50, "too large"),
        ("SrTiO3" * 1000, "characters"),
        ("D2O", "isotopes"),
        ("--help-me", "--help-me"),
        ("Sr\nTi", "Sr"),
        ("\x1b[31mSr", "Sr"),
        ("\udcff", "udcff"),
    ],
)
def test_formula(refused, formula: str, expected: str) -> None:
    assert expected in refused(f"--formula={formula}", "--band-gap", "1")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give a formula or --input"),
        (["--band-gap", "1"], "give a formula or --input"),
        (["Xx2O3"], "'Xx'"),
        ([""], "the formula is empty"),
        (["SrTiO3", "GaAs"], "GaAs"),
        (["SrTiO3", "--formula", "SrTiO3"], "the formula is given twice"),
        (["SrTiO3", "--input", "file.csv"], "one of them"),
        (["--formula", "SrTiO3", "--formula", "GaAs"], "--formula is given twice"),
        (
            ["--formula", "SrTiO3", "--band-gap", "1", "--band-gap", "2"],
            "--band-gap is given twice",
        ),
        (["--formula", "SrTiO3", "--band-gap", "1", "--formation-energy", "-1"], "not both"),
        (["--formula", "SrTiO3", "--band-gap", "nan"], "nan"),
        (["--formula", "SrTiO3", "--band-gap", "inf"], "inf"),
        (["--formula", "SrTiO3", "--band-gap=-1"], "-1"),
        (["--formula", "SrTiO3", "--band-gap", "wide"], "'--band-gap'"),
        (["--formula", "SrTiO3", "--formation-energy", "NaN"], "nan"),
        (["--formula", "SrTiO3", "--formation-energy=-1e9"], "-1"),
        (["--formula", "SrTiO3", "--space-group", "0"], "1 to 230"),
        (["--formula", "SrTiO3", "--space-group", "231"], "1 to 230"),
        (["--formula", "SrTiO3", "--space-group", "pnma"], "like it: Pnma"),
        (["--formula", "SrTiO3", "--z", "0"], "z is 0"),
        (["--formula", "SrTiO3", "--z=-1"], "z is -1"),
        (["--formula", "SrTiO3", "--z", "1000000"], "1000000"),
        (["--formula", "SrTiO3", "--top", "0"], "top"),
        (["--formula", "SrTiO3", "--num-samples", "0"], "num_samples"),
        (["--formula", "SrTiO3", "--steps=-5"], "steps"),
        (["--formula", "SrTiO3", "--seed=-1"], "seed"),
        (["--formula", "SrTiO3", "--seed", "x"], "'--seed'"),
        (["--formula", "SrTiO3", "--sites", ""], "empty"),
        (["--formula", "SrTiO3", "--sites", "Sr1a"], "'Sr1a'"),
        (["--formula", "SrTiO3", "--sites", "Xx:1a"], "'Xx'"),
        (["--formula", "SrTiO3", "--space-group", "221", "--sites", "Sr:1z Ti:1b O:3c"], "'z'"),
        (["--formula", "SrTiO3", "--space-group", "221", "--sites", "Sr:2a Ti:1b O:3c"], "1"),
        (["--formula", "SrTiO3", "--space-group", "221", "--sites", "Sr:1a Ti:1a O:3c"], "once"),
        (["--formula", "SrTiO3", "--space-group", "221", "--sites", "Sr:1a Ti:1b"], "SrTiO3"),
        (["SrTiO3", "--sites", "Sr:1a Ti:1b O:3q"], "site O:3q: no space group has a position 3q"),
        (["--formula", "SrTiO3", "--z", "2", "--space-group", "221", "--sites", CUBIC], "z is 2"),
        (["--formula", "SrTiO3", "--input", "file.csv"], "one of them"),
        (["--input", "absent.csv"], "absent.csv"),
        (["--input", "absent.csv", "--z", "1"], "--z"),
        (["--input", "."], "directory"),
        (["--input", "absent.csv", "--nonsense"], "--nonsense"),
    ],
)
def test_request(refused, arguments: list[str], expected: str) -> None:
    assert expected in refused(*arguments)


def test_impossible_number_of_formula_units(refused) -> None:
    # Every position of Fd-3m has a multiplicity of at least 8: one CsCl does not fit.
    message = refused("--formula", "CsCl", "--space-group", "227", "--z", "1")
    assert "CsCl" in message
    assert "z = 1" in message


def test_backend_that_is_not_there(refused) -> None:
    assert "'abacus'" in refused("--formula", "SrTiO3", "--backend", "abacus")


@pytest.mark.parametrize(
    ("option", "name", "shipped"),
    [
        ("--checkpoint", "crystal_dit_large_fm", "crystal_dit_paper_bg, crystal_dit_paper_fm, "),
        ("--symmetry-model", "glm5", "shipped: glm4_tiny, glm4_tiny_bg, glm4_tiny_fm\n"),
    ],
)
def test_unknown_names_are_answered_with_the_known(
    refused, option: str, name: str, shipped: str
) -> None:
    message = refused("--formula", "SrTiO3", option, name)
    assert f"'{name}' does not exist" in message
    assert shipped in message


def test_what_knows_the_property_is_said(refused) -> None:
    message = refused(
        "--formula", "SrTiO3", "--band-gap", "1", "--checkpoint", "crystal_dit_paper_fm"
    )
    assert "another --checkpoint: crystal_dit_paper_bg or crystal_dit_small_bg\n" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "formula"),
        (b"name\nSrTiO3\n", "formula"),
        (b"formula\n", "no request"),
        (b"formula,band_gap\nSrTiO3,1\nXx,1\n", "line 3"),
        (b"formula,band_gap\nSrTiO3,nan\n", "line 2"),
        (b"formula,band_gap\nSrTiO3,1,2\n", "line 2"),
        (b"formula,colour\nSrTiO3,red\n", "colour"),
        (b"formula;band_gap\nSrTiO3;1\n", "with commas between"),
        (b"formula,formula\nSrTiO3,SrTiO3\n", "twice"),
        (b"formula,z\nSrTiO3,1.5\n", "line 2"),
        (b"formula,space_group\nSrTiO3,pnma\n", "line 2: unknown space group 'pnma'"),
        (b"formula\n\xff\xfe\n", "UTF-8"),
        (b'formula\n"SrTiO3\n', "not CSV"),
        (b"formula\nSr\x00TiO3\n", "line 2"),
    ],
)
def test_csv_file(refused, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "requests.csv").write_bytes(content)
    assert expected in refused("--input", str(tmp_path / "requests.csv"))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        "null",
        '{"formula": null}',
        '{"formula": ["Sr"]}',
        '{"formula": 3}',
        '{"formula": "SrTiO3", "band_gap": "x"}',
        '{"formula": "SrTiO3", "band_gap": true}',
        '{"formula": "SrTiO3", "z": 1e400}',
        '{"formula": "SrTiO3", "z": []}',
        '{"formula": "SrTiO3", "space_group": []}',
        '{"formula": "SrTiO3", "space_group": 1.5}',
        '{"formula": "SrTiO3", "space_group": "pnma"}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:40],
)
def test_jsonl_file(refused, tmp_path: Path, line: str) -> None:
    (tmp_path / "requests.jsonl").write_text(f'{{"formula": "GaAs"}}\n{line}\n')
    assert "line 2" in refused("--input", str(tmp_path / "requests.jsonl"))


def test_all_wrong_lines_are_named_at_once(refused, tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("formula,band_gap\nSrTiO3,1\nXx,1\nNaCl,nan\n\nKBr,1,2\n")
    message = refused("--input", str(path))
    assert "3 lines are wrong: line 3: formula 'Xx': " in message
    assert "; line 4: band gap is nan: give a number from 0 to 25 eV" in message
    assert "; line 6: more cells than the 2 columns" in message
    path = tmp_path / "requests.jsonl"
    path.write_text('{"formula": "NaCl"}\n' + "{\n[]\n" * 6)
    message = refused("--input", str(path))
    assert "12 lines are wrong: line 2: not an object such as " in message
    assert "; line 11: not an object such as " in message
    assert "line 12" not in message
    assert message.endswith("; and 2 more\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("requests.csv", "id,formula\na,NaCl\nb,NaCl\n a ,KBr\n"),
        (
            "requests.jsonl",
            '{"id": "1", "formula": "NaCl"}\n\n{"id": 1, "formula": "KBr"}\n',
        ),
    ],
)
def test_an_id_is_that_of_one_line(refused, tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    message = refused("--input", str(path))
    first, last = (2, 4) if name.endswith("csv") else (1, 3)
    assert f"line {last}: id " in message
    assert f"is that of line {first} too" in message


def test_requests_need_no_id(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("id,formula\n,NaCl\na,NaCl\n,NaCl\n")
    assert [query.name for query in read_requests(path)] == ["", "a", ""]


@pytest.mark.parametrize(
    ("name", "expected"), [("x" * 101, "101 characters"), ("a\nb", "one line")]
)
def test_ids_that_cannot_be_kept(refused, tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "requests.jsonl").write_text(json.dumps({"id": name, "formula": "NaCl"}))
    assert expected in refused("--input", str(tmp_path / "requests.jsonl"))


def test_a_json_list_is_told_from_lines(refused, tmp_path: Path) -> None:
    (tmp_path / "requests.json").write_text('[\n {"formula": "NaCl"}\n]\n')
    message = refused("--input", str(tmp_path / "requests.json"))
    assert 'line 1: not an object such as {"formula": "SrTiO3"}, one per line' in message


# Checkpoints


def refused_checkpoint(refused, path: Path) -> str:
    return refused("--formula", "SrTiO3", "--band-gap", "1", "--checkpoint", str(path))


def test_missing_checkpoint(refused, tmp_path: Path) -> None:
    assert "does not exist" in refused_checkpoint(refused, tmp_path / "absent")


def test_checkpoint_that_is_a_file(refused, checkpoint: Path) -> None:
    assert "not a folder" in refused_checkpoint(refused, checkpoint / MODEL)


@pytest.mark.parametrize("name", [CONFIG, MODEL, MANIFEST])
def test_truncated_checkpoint(refused, checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-10])
    assert name in refused_checkpoint(refused, checkpoint)


@pytest.mark.parametrize("name", [CONFIG, MODEL, MANIFEST])
def test_incomplete_checkpoint(refused, checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert name in refused_checkpoint(refused, checkpoint)


def test_unreadable_checkpoint(refused, checkpoint: Path) -> None:
    (checkpoint / MODEL).unlink()
    (checkpoint / MODEL).mkdir()  # Permissions would not stop the superuser.
    assert MODEL in refused_checkpoint(refused, checkpoint)


def test_checkpoint_of_another_property(refused, checkpoint: Path) -> None:
    arguments = ["--formula", "SrTiO3", "--formation-energy=-1", "--checkpoint", str(checkpoint)]
    assert "band_gap" in refused(*arguments)


@pytest.mark.parametrize("config", [{}, {"model": None}, {"model": {"properties": ["band_gap"]}}])
def test_checkpoint_of_another_program(refused, tmp_path: Path, config: dict) -> None:
    save_checkpoint(tmp_path / "other", config=config, model={"w": np.ones(1, dtype=np.float32)})
    assert "other" in refused_checkpoint(refused, tmp_path / "other")


# The process itself


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    command = [UNI_MDM, "generate", "--formula", "Fe3+", "--out", tmp_path / "out"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# 10,000 inputs made up by hypothesis: a checked request, or one line

many = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
TOKENS = ["Sr", "Ti", "O", "Fe", "Xx", "D", "(", ")", "[", "]", "0", "1", "2", "12", "99999", "-"]
TOKENS += ["+", "^", ".", "·", " ", "\n", "\x00", "₂", "²", "٣", "e", "1e9", "é", "\udcff", "O3"]
SITES = ["Sr:1a", "Ti:1b", "O:3c", "O:3d", "Sr:a", "Xx:1a", "O:", ":1a", "O:99999z", "O:1A", "O:8é"]
SITES += [",", ";", " ", "Sr:1a,", "\n", "\x00", "O:-1a", "O:3cc", "O3c"]
formulas = st.text(max_size=20) | st.lists(st.sampled_from(TOKENS), max_size=8).map("".join)
site_lists = st.text(max_size=20) | st.lists(st.sampled_from(SITES), max_size=6).map(" ".join)
cells = (
    st.sampled_from(
        ["", "1", "-1", "nan", "inf", "1e400", "1.5", "SrTiO3", "Sr2Ti2O6", "221", "Pm-3m", "Pbnm"]
    )
    | formulas
    | site_lists
    | st.integers().map(str)
    | st.floats().map(str)
)


@contextmanager
def one_line_at_most() -> Iterator[None]:
    """Nothing is raised in the block but a UserError of one line."""
    message = "accepted"
    try:
        yield
    except UserError as error:
        message = str(error).strip()
    assert "\n" not in message
    assert 0 < len(message) < 1000


@settings(many, max_examples=4000)
@given(formulas)
def test_any_formula(formula: str) -> None:
    with one_line_at_most():
        make_query(formula)


@settings(many, max_examples=3000)
@given(site_lists, st.sampled_from([None, 1, 62, 194, 221, 225, 227]), st.none() | st.integers())
def test_any_sites(sites: str, space_group: int | None, z: int | None) -> None:
    with one_line_at_most():
        make_query("SrTiO3", space_group=space_group, sites=sites, z=z)


@settings(many, max_examples=2500)
@given(st.lists(st.tuples(st.sampled_from(COLUMNS[2:]), cells), max_size=3), cells)
def test_any_csv_row(tmp_path: Path, others: list[tuple[str, str]], formula: str) -> None:
    path = tmp_path / "requests.csv"
    columns = [("formula", formula), *others]
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        csv.writer(file).writerows(zip(*columns, strict=True))
    with one_line_at_most():
        read_requests(path)


values = st.none() | st.booleans() | st.integers() | st.floats() | cells | st.lists(cells)


@settings(many, max_examples=500)
@given(st.lists(st.tuples(st.sampled_from(COLUMNS), values), max_size=4))
def test_any_json_line(tmp_path: Path, row: list[tuple[str, object]]) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(dict(row)))
    with one_line_at_most():
        read_requests(path)
