"""`uni-mdm evaluate --given composition`, with networks at birth."""

import json
from pathlib import Path

import pytest
import yaml

from common.cli import run
from common.data.label import label_structure
from common.data.store import Record, write_records
from tests.crystals import textbook

CRYSTALS = ("rock salt NaCl", "CsCl", "perovskite SrTiO3")
MODEL = {"layers": 1, "width": 16, "edge_width": 16, "heads": 2, "properties": ["band_gap"]}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of three textbook crystals, with a network that has seen them twice."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = str(folder / "rows.parquet")
    records = [
        Record(name, label_structure(textbook(name)), properties={"band_gap": 1.0 + index})
        for index, name in enumerate(CRYSTALS)
    ]
    write_records(records, Path(rows))
    train = {"steps": 2, "batch_size": 4, "warmup": 1, "data": rows, "validation": rows}
    config = {"name": "tiny", "model": MODEL, "diffusion": {"steps": 2}, "train": train}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    out = folder / "run"
    assert run(["train", str(folder / "tiny.yaml"), "--out", str(out), "--threads", "1"]) == 0
    options = ["--data", rows, "--checkpoint", str(out / "final"), "--workers", "1"]
    return ["evaluate", *options]


def report(command: list[str], out: Path, *arguments: str) -> dict:
    assert run([*command, "--out", str(out), *arguments]) == 0
    return json.loads((out / "evaluation.json").read_text())


def test_a_report_is_not_replaced_unasked(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run([*command, "--no-controls"]) == 0
    names = sorted(path.parent.name for path in tmp_path.glob("runs/*/evaluation.json"))
    assert names == ["evaluate-tiny-rows", "evaluate-tiny-rows-2"]


def test_given_composition(command: list[str], tmp_path: Path) -> None:
    options = ["--given", "composition", "--top", "3", "--symmetry-model", "prior"]
    rows = report(command, tmp_path / "a", *options)["rows"]
    assert [row["run"]["name"] for row in rows] == [
        "template prior",
        "template prior, known polymorphs excluded",
        "nearest composition",
    ]
    for row in rows:
        assert (row["run"]["k"], row["num_structures"]) == (3, 3)
        assert row["run"]["given"] == "composition, band_gap"
        assert list(row["metrics"]["match_at"]) == ["1", "2", "3"]
        assert 3 <= row["metrics"]["composition_exact"]["total"] <= 9
    assert "## Among the first candidates" in (tmp_path / "a" / "evaluation.md").read_text()
    again = report(command, tmp_path / "b", *options)["rows"]
    assert [row["outcomes"] for row in again] == [row["outcomes"] for row in rows]
    null = report(command, tmp_path / "c", *options, "--property", "null", "--no-controls")["rows"]
    assert [row["run"]["given"] for row in null] == ["composition"]


def test_language_model_is_asked_for_new_and_for_any(
    command: list[str], textbook_model: Path, tmp_path: Path
) -> None:
    options = ["--given", "composition", "--top", "3", "--symmetry-model", str(textbook_model)]
    options += ["--property", "shuffled", "--no-controls"]
    rows = report(command, tmp_path / "a", *options)["rows"]
    name = rows[0]["run"]["name"]
    assert name.endswith(" and template prior")
    assert [row["run"]["name"] for row in rows] == [name, f"{name}, as generate ranks"]
    assert [row["run"]["given"] for row in rows] == ["composition, shuffled band_gap"] * 2
    new, of_any = (row["metrics"]["match_at"]["1"]["hits"] for row in rows)
    assert new < of_any, "all three are known, and the first was asked for others"


def test_properties_with_true_symmetry(command: list[str], tmp_path: Path) -> None:
    for kind, given in (
        ("true", "true symmetry, band_gap"),
        ("shuffled", "true symmetry, shuffled band_gap"),
        ("null", "true symmetry"),
    ):
        rows = report(command, tmp_path / kind, "--no-controls", "--property", kind)["rows"]
        assert rows[0]["run"]["given"] == given


def test_rows_that_were_trained_on_are_counted(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One by its id, one by what it is; a report of rows that are new says nothing."""
    crystals = [
        label_structure(textbook(name)) for name in ("perovskite SrTiO3", "CsCl", "zinc blende ZnS")
    ]
    names = ("another id", "rock salt NaCl", "new")
    records = [Record(*row) for row in zip(names, crystals, strict=True)]
    own = [command[0], "--data", str(tmp_path / "rows.parquet"), *command[3:], "--no-controls"]
    for chosen, ids, same in ((records, 1, 2), (records[2:], 0, 0)):
        write_records(chosen, tmp_path / "rows.parquet")
        (row,) = report(own, tmp_path / "out")["rows"]
        assert (row["run"]["seen_ids"], row["run"]["seen_symmetry"]) == (ids, same)
        note = f"{ids} of {len(chosen)} references have the id of a row of"
        for text in ((tmp_path / "out" / "evaluation.md").read_text(), capsys.readouterr().out):
            assert (note in " ".join(text.split())) == (ids > 0)


def test_ids_that_are_there_twice(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is sampled: what is counted per id would be wrong."""
    record = Record("twice", label_structure(textbook(CRYSTALS[0])))
    data = tmp_path / "twice.parquet"
    write_records([record, record], data)
    assert run([command[0], "--data", str(data), *command[3:]]) == 2
    assert "such as twice" in capsys.readouterr().err.splitlines()[-1]


def test_rows_without_the_property_are_counted(command: list[str], tmp_path: Path) -> None:
    """They are evaluated without it, by networks and by what ranks symmetries."""
    records = [
        Record(name, label_structure(textbook(name)), properties={"band_gap": gap})
        for name, gap in zip(CRYSTALS, (1.0, None, 2.0), strict=True)
    ]
    data = tmp_path / "gaps.parquet"
    write_records(records, data)
    own = [command[0], "--data", str(data), *command[3:]]
    told = "band_gap (2 of 3 rows)"
    rows = report(own, tmp_path / "a", "--no-controls")["rows"]
    assert rows[0]["run"]["given"] == f"true symmetry, {told}"
    assert rows[0]["num_structures"] == 3
    options = ["--given", "composition", "--top", "2", "--symmetry-model", "prior"]
    rows = report(own, tmp_path / "b", *options)["rows"]
    assert {row["run"]["given"] for row in rows} == {f"composition, {told}"}
    assert told in (tmp_path / "b" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--top", "3"], "--top goes with --given composition"),
        (["--symmetry-model", "prior"], "--symmetry-model goes with"),
        (["--given", "composition", "--num-samples", "2"], "--num-samples goes with"),
        (["--given", "composition", "--symmetry-model", "absent"], "absent"),
        (["--property", "some"], "shuffled"),
    ],
)
def test_mistakes(
    command: list[str],
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
