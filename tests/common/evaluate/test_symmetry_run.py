"""Rankings of textbook crystals by a small model that was shown them, and by its controls."""

import json
from pathlib import Path

import pytest

from common.cli import run
from common.data.store import Record, write_records
from common.evaluate.symmetry_run import SymmetryEvaluation, properties_of, training_of
from common.prior import TemplatePrior
from common.ranking import load_ranker
from tests.training import textbook_records

RECORDS = textbook_records()


@pytest.fixture(scope="module")
def prior() -> TemplatePrior:
    return TemplatePrior.load()


def evaluation(prior: TemplatePrior, training: list[Record], target: str) -> SymmetryEvaluation:
    return SymmetryEvaluation(RECORDS, "textbook", target, training, "some", prior)


def test_model_and_controls(prior: TemplatePrior, textbook_model: Path) -> None:
    ranker = load_ranker([], textbook_model)
    assert ranker.model is not None
    known = [record for record in RECORDS if record.reduced_formula != "NaCl"]
    measured = evaluation(prior, known, "band_gap")
    model, average = measured.model(ranker.model, "tiny", 7)
    rows = [model, average, *measured.controls()]
    for row in rows:
        assert row.ids == tuple(record.material_id for record in RECORDS)
        assert row.legal.hits == len(RECORDS)
        new = [name for name, is_new in zip(row.ids, row.new, strict=True) if is_new]
        assert new == [r.material_id for r in RECORDS if r.reduced_formula == "NaCl"]
        assert (row.run.split, row.run.target) == ("textbook", "band_gap")
    assert (model.run.model, model.run.seed) == (ranker.model.name, 7)
    assert (model.run.training_set, model.run.training_size) == ("some", len(known))
    assert model.rate("assignment", 20).hits > len(RECORDS) // 2, "it was shown all of them"
    assert model.figures["nats_of_truth"] > 0
    assert 0 < model.answers.rouge["rouge_chinese"]["rouge-1"] <= 100
    plain, new_only, majority, nearest = rows[2:]
    assert [row.run.name for row in rows[1:]] == [
        "tiny and template prior",
        "template prior",
        "template prior, known polymorphs excluded",
        "majority template",
        "nearest composition",
    ]
    assert (plain.run.training_set, plain.run.training_size) == ("train", len(prior.reference))
    assert plain.run.model == prior.hash
    assert plain.rate("assignment", 20).hits > len(RECORDS) // 2
    assert new_only.rate("assignment", 1).hits < plain.rate("assignment", 1).hits
    assert nearest.rate("assignment", 1).hits >= majority.rate("assignment", 1).hits
    assert nearest.run.model is None


def test_any_polymorph(prior: TemplatePrior, textbook_model: Path) -> None:
    """Known ones count, and whoever is asked for any crystal does not pass them over."""
    ranker = load_ranker([], textbook_model)
    assert ranker.model is not None
    measured = evaluation(prior, RECORDS[:4], "none")
    model, average = measured.model(ranker.model, "tiny", 7)
    plain, new_only, *_ = measured.controls()
    assert model.polymorphs is None, "it was asked for others"
    assert new_only.polymorphs is None
    for row in (average, plain):
        assert row.polymorphs is not None
        assert len(row.polymorphs) == len(RECORDS)
    # The perovskite is in MP-20's training set: it is passed over only where it is not wanted.
    index = [record.reduced_formula for record in RECORDS].index("SrTiO3")
    assert average.polymorphs is not None
    assert average.polymorphs[index] == 0
    assert new_only.outcomes[index].assignment != 0
    for row in (plain, *measured.controls()[2:]):
        assert row.polymorphs is not None
        pairs = zip(row.outcomes, row.polymorphs, strict=True)
        assert all(
            place is not None and place <= outcome.assignment
            for outcome, place in pairs
            if outcome.assignment is not None
        )


def test_polymorphs_of_training_count(prior: TemplatePrior) -> None:
    """Wurtzite is asked for, zincblende is ranked before it."""
    blende, wurtzite = (record for record in RECORDS if record.reduced_formula == "ZnS")
    without, with_it = (
        SymmetryEvaluation([wurtzite], "one", "none", training, "some", prior).controls()[0]
        for training in ([], [blende])
    )
    (own,), (any_known,) = without.polymorphs, with_it.polymorphs
    assert own == with_it.outcomes[0].assignment
    assert any_known < own


def test_answers_of_controls_are_their_first(prior: TemplatePrior) -> None:
    """Exact as text is exact as symmetry; no answer is neither exact nor legal."""
    rows = evaluation(prior, RECORDS[:3], "none").controls()
    for row in rows:
        assert row.answers.exact == pytest.approx(row.rate("assignment", 1).value)
    missing = sum(outcome.first == 0 for outcome in rows[2].outcomes)
    assert 0 < missing < len(RECORDS)
    assert rows[2].answers.legal == pytest.approx(1 - missing / len(RECORDS))


def test_property_of_a_row() -> None:
    record = next(r for r in RECORDS if r.properties["formation_energy"] is None)
    assert properties_of(record, "formation_energy") == {}
    assert properties_of(record, "none") == {}
    assert properties_of(RECORDS[2], "band_gap") == {"band_gap": 1.0}


def test_settings_of_training(textbook_model: Path, tmp_path: Path) -> None:
    assert training_of(textbook_model)["steps"] == 120
    assert training_of(tmp_path) == {}


def test_command(
    textbook_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measured on what the model was trained on; a table, and three files."""
    monkeypatch.setenv("COLUMNS", "250")
    data = tmp_path / "rows.parquet"
    write_records(RECORDS[:4], data)
    command = ["evaluate", "symmetry", "--data", str(data), "--out", str(tmp_path / "out")]
    assert run([*command, "--model", str(textbook_model), "--limit", "3"]) == 0
    output = capsys.readouterr().out
    for word in ("template prior", "majority template", "nearest composition", "calibration"):
        assert word in output
    assert "symmetry.md" in output
    report = json.loads((tmp_path / "out" / "symmetry.json").read_text())
    assert [row["rows"] for row in report["rows"]] == [3] * 6
    own = report["rows"][0]
    assert own["run"]["training_size"] == len(RECORDS)
    assert own["run"]["seed"] == 0
    assert own["new_formulas"] == 0
    assert len(report["paired_tests"]) == 5
    assert (tmp_path / "out" / "symmetry.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["symmetry", "--model", "absent"], "absent"),
        (["symmetry", "--data", "absent.csv", "--model", "MODEL"], "absent.csv"),
        (["symmetry", "--target", "mass"], "band_gap"),
        (["--data", "val", "symmetry"], "--data stands before 'symmetry'"),
        (["symmetry", "--limit", "1", "--limit", "2"], "--limit is given twice"),
        (["--limit", "1", "--limit", "2"], "--limit is given twice"),
        (["metry"], "symmetry"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    part: str,
    textbook_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(textbook_model) if word == "MODEL" else word for word in arguments]
    assert run(["evaluate", *given]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
