"""Rankings of textbook crystals by a small model that was shown them, and by its controls."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from common.checkpoint import save_checkpoint, shipped_language
from common.cli import run
from common.crystal.structure import Crystal, Site
from common.data.store import Record, write_records
from common.errors import UserError
from common.evaluate.symmetry_report import to_markdown
from common.evaluate.symmetry_run import History, SymmetryEvaluation, properties_of
from common.language.model import rank_questions
from common.language.prompt import Question
from common.prior import TemplatePrior
from common.ranking import SHARPNESS, Ranker, load_ranker, pooled, sharpened
from tests.training import textbook_records

RECORDS = textbook_records()


@pytest.fixture(scope="module")
def prior() -> TemplatePrior:
    return TemplatePrior.load()


def evaluation(
    prior: TemplatePrior,
    training: list[Record],
    target: str,
    references: list[Record] = RECORDS,
) -> SymmetryEvaluation:
    return SymmetryEvaluation(references, "textbook", target, training, "some", prior)


def test_rows_without_the_property_are_counted(prior: TemplatePrior) -> None:
    row, *_ = evaluation(prior, RECORDS, "formation_energy").controls()
    assert len(row.ids) == len(RECORDS)
    told = f"formation_energy ({len(RECORDS) - 1} of {len(RECORDS)} rows)"
    assert row.run.target == told
    assert told in to_markdown([row])


def test_rows_that_were_trained_on_are_counted(prior: TemplatePrior) -> None:
    row, *_ = evaluation(prior, RECORDS[:3], "none", RECORDS[2:]).controls()
    assert (row.run.seen_ids, row.run.seen_symmetry, row.run.seen_in) == (1, 1, "some")
    note = f"1 of {len(RECORDS) - 2} references have the id of a row of some, 1 the formula"
    assert note in to_markdown([row])
    row, *_ = evaluation(prior, RECORDS[:3], "none", RECORDS[3:]).controls()
    assert (row.run.seen_ids, row.run.seen_symmetry) == (0, 0)
    assert "the id of a row" not in to_markdown([row])


def test_model_and_controls(prior: TemplatePrior, textbook_model: Path) -> None:
    ranker = load_ranker([], textbook_model)
    assert ranker.model is not None
    known = [record for record in RECORDS if record.reduced_formula != "NaCl"]
    measured = evaluation(prior, known, "band_gap")
    history = History((("further", 90), ("others", 40)), 7)
    model, average = measured.model(ranker.model, "tiny", history)
    rows = [model, average, *measured.controls()]
    for row in rows:
        assert row.ids == tuple(record.material_id for record in RECORDS)
        assert row.legal.hits == len(RECORDS)
        new = [name for name, is_new in zip(row.ids, row.new, strict=True) if is_new]
        assert new == [r.material_id for r in RECORDS if r.reduced_formula == "NaCl"]
        assert (row.run.split, row.run.target) == ("textbook", "band_gap")
    assert (model.run.model, model.run.seed) == (ranker.model.name, 7)
    for row in (model, average):
        assert (row.run.training_set, row.run.training_size) == ("further, then others", 90)
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
    model, average = measured.model(ranker.model, "tiny", History())
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
    # What it is called there is what `generate` says of it.
    assert average.plain is not None
    query = [(RECORDS[index].crystal.formula_counts, {})]
    (ranking,) = Ranker(prior, ranker.model).rank(query, 20)
    assert average.plain[index].first == pytest.approx(ranking[0].probability, abs=1e-4)
    assert average.outcomes[index].first != pytest.approx(ranking[0].probability, abs=1e-2)
    assert plain.plain == plain.outcomes
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


def test_sharpness_that_truths_ask_for(prior: TemplatePrior, textbook_model: Path) -> None:
    """The figure is of the plain average: the likeliest exponent, none of its neighbours is."""
    ranker = load_ranker([], textbook_model)
    assert ranker.model is not None
    _, average = evaluation(prior, [], "none").model(ranker.model, "tiny", History())
    counts = [record.crystal.formula_counts for record in RECORDS]
    asked = rank_questions(ranker.model, [Question.ask(own) for own in counts], known=True)
    plain = [
        pooled(found.candidates, prior.rank_new(own, top=20), ranker.share)
        for found, own in zip(asked, counts, strict=True)
    ]

    def nats(exponent: float) -> float:
        return -sum(
            math.log(candidate.probability)
            for pool, record in zip(plain, RECORDS, strict=True)
            for candidate in sharpened(pool, exponent)
            if candidate.key == record.crystal.symmetry_key and candidate.probability
        )

    best = average.figures["best_sharpness"]
    assert abs(best - 1) > 0.02
    assert nats(best) < min(nats(best * 0.98), nats(best * 1.02))


def test_history_of_a_model(textbook_model: Path, tmp_path: Path) -> None:
    """An adapter has seen what its base has, and the shipped base further rows before its last."""
    ((name, rows),) = History.of(textbook_model).data
    assert (name.endswith(".parquet"), rows) == (True, len(RECORDS))
    assert History.of(textbook_model).seed == 0
    unknown = History.of(tmp_path)
    assert (unknown, unknown.training) == (History(), ("unknown", 0))
    bare = tmp_path / "bare"
    save_checkpoint(bare, config={"name": "bare"}, model={"weight": np.zeros(1, np.float32)})
    assert History.of(bare) == History(), "no training settings"
    shipped = shipped_language()
    base = History.of(shipped["glm4_tiny"])
    assert base.data == (("train+extra", 41866), ("train", 25505))
    assert base.training == ("train+extra, then train", 41866)
    adapter = History.of(shipped["glm4_tiny_fm"])
    assert adapter.data == (*base.data, ("train", 25505))
    assert adapter.training == base.training


def test_larger_cells_than_a_model_answers_are_named(prior: TemplatePrior) -> None:
    sites = tuple(Site(6, "a", (x / 125, 0.0, 0.0)) for x in range(121))
    large = Record("mp-1", Crystal(1, sites, np.diag([30.0, 9.0, 9.0])))
    asked = evaluation(prior, [], "none", [large])
    with pytest.raises(UserError, match=r"mp-1 has 121 atoms .* at most 120: leave it out"):
        asked.model(None, "model", History())  # type: ignore[arg-type]


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
    for word in ("template prior", "majority template", "nearest composition", "sites @20"):
        assert word in output
    assert "calibration" in (tmp_path / "out" / "symmetry.md").read_text()
    assert "symmetry.md" in output
    report = json.loads((tmp_path / "out" / "symmetry.json").read_text())
    assert [row["rows"] for row in report["rows"]] == [3] * 6
    own = report["rows"][0]
    assert own["run"]["training_size"] == len(RECORDS)
    assert own["run"]["seed"] == 0
    assert own["new_formulas"] == 0
    assert [row["figures"].keys() for row in report["rows"][:2]] == [
        {"sequences_scored", "nats_of_truth", "best_temperature"},
        {"sharpness", "best_sharpness"},
    ]
    assert report["rows"][1]["figures"]["sharpness"] == SHARPNESS
    assert len(report["paired_tests"]) == 15
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
