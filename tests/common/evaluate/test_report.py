"""Figures of a row worked out by hand, and the files of a report."""

import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from common.errors import UserError
from common.evaluate.match import CandidateMatch
from common.evaluate.report import (
    EvaluationRow,
    Outcome,
    RunInfo,
    paired_test,
    read_rows,
    to_markdown,
    to_png,
    to_summary,
    write_report,
)
from common.evaluate.statistics import Rate
from common.evaluate.symmetry import SymmetryLabel
from common.evaluate.tables import Shown

EXACT, HIGHER, LOST = SymmetryLabel.EXACT, SymmetryLabel.HIGHER, SymmetryLabel.LOST
MISS = CandidateMatch(None, None, valid=True)
FAILED = CandidateMatch(None, None, valid=False, failure="broken cell")


def hit(rms: float, tight: bool = True, valid: bool = True) -> CandidateMatch:
    return CandidateMatch(rms, rms if tight else None, valid)


def run(name: str = "model", k: int = 2, **changes: object) -> RunInfo:
    info = RunInfo(
        name=name,
        split="val",
        k=k,
        given="true symmetry",
        relaxed=False,
        training_set="mp_20/train",
        training_size=25505,
        checkpoint="0123abcd",
        sampler="few-step",
        network_calls=20,
        seed=1,
        wall_time=24.0,
        device="2 CPU cores",
        peak_memory=812.3,
    )
    return replace(info, **changes)  # type: ignore[arg-type]


def five() -> tuple[Outcome, ...]:
    """Two polymorphs of AB (m-1 found only by a candidate made for m-2), and three more."""
    return (
        Outcome(
            "m-1",
            "AB",
            0,
            (MISS, MISS),
            (hit(0.1), hit(0.4)),
            (EXACT, EXACT),
            (True, True),
            True,
            True,
        ),
        Outcome(
            "m-2",
            "AB",
            2,
            (hit(0.1), hit(0.4)),
            (MISS, MISS),
            (EXACT, HIGHER),
            (True, True),
            True,
            False,
        ),
        Outcome(
            "m-3",
            "CD",
            3,
            (hit(0.3, tight=False), hit(0.2)),
            (),
            (EXACT, EXACT),
            (True, True),
            False,
            False,
        ),
        Outcome(
            "m-4",
            "EF",
            8,
            (hit(0.02, valid=False), MISS),
            (),
            (EXACT, LOST),
            (True, False),
            False,
            False,
        ),
        Outcome(
            "m-5",
            "GH",
            9,
            (FAILED, hit(0.45, tight=False)),
            (),
            (EXACT, EXACT),
            (True, True),
            False,
            False,
        ),
    )


def test_figures_by_hand() -> None:
    metrics = EvaluationRow(run(), five()).metrics
    assert metrics.match_rate == Rate(3, 5)
    assert metrics.rmse == pytest.approx((0.1 + 0.3 + 0.02) / 3)
    assert metrics.match_valid == Rate(2, 5)
    assert metrics.rmse_valid == pytest.approx((0.1 + 0.3) / 2)
    assert metrics.match_tight == Rate(2, 5)
    assert metrics.rmse_tight == pytest.approx((0.1 + 0.02) / 2)
    assert metrics.match_at == {1: Rate(3, 5), 2: Rate(4, 5)}
    assert metrics.rmse_at[2] == pytest.approx((0.1 + 0.2 + 0.02 + 0.45) / 4)
    assert metrics.metre == Rate(5, 5), "m-1 was found by a candidate of its composition"
    assert metrics.crmse == pytest.approx((0.1 + 0.1 + 0.2 + 0.02 + 0.45) / 5)
    assert metrics.symmetry_kept == Rate(9, 10)
    assert metrics.symmetry_higher == Rate(1, 10)
    assert metrics.composition_exact == Rate(9, 10)
    assert metrics.failures == 1


def test_unmatched_references_count_as_the_tolerance() -> None:
    alone = replace(five()[0], pooled=())
    metrics = EvaluationRow(run(), (alone, five()[1])).metrics
    assert metrics.metre == Rate(1, 2)
    assert metrics.crmse == pytest.approx((0.5 + 0.1) / 2)


def test_strata_by_hand() -> None:
    strata = {(s.kind, s.label): s for s in EvaluationRow(run(), five()).strata}
    rates = {key: stratum.match_rate for key, stratum in strata.items()}
    assert rates == {
        ("free coordinates", "0"): Rate(0, 1),
        ("free coordinates", "1-2"): Rate(1, 1),
        ("free coordinates", "3-5"): Rate(1, 1),
        ("free coordinates", "6-8"): Rate(1, 1),
        ("free coordinates", "9+"): Rate(0, 1),
        ("composition", "seen in training"): Rate(1, 2),
        ("composition", "not seen"): Rate(2, 3),
        ("prototype", "seen in training"): Rate(0, 1),
        ("prototype", "not seen"): Rate(3, 4),
    }
    assert strata["composition", "not seen"].rmse == pytest.approx((0.3 + 0.02) / 2)
    assert strata["free coordinates", "0"].rmse is None


def test_what_is_not_known_is_not_claimed() -> None:
    unknown = tuple(
        replace(one, symmetry=(), composition_exact=(), seen_composition=None, seen_prototype=None)
        for one in five()
    )
    row = EvaluationRow(run(), unknown)
    assert row.metrics.symmetry_kept is None
    assert row.metrics.composition_exact is None
    assert {stratum.kind for stratum in row.strata} == {"free coordinates"}


def test_match_at_lists_ranks_up_to_k() -> None:
    outcome = Outcome("m", "AB", 1, (MISS,) * 6 + (hit(0.2),) + (MISS,) * 13)
    rates = EvaluationRow(run(k=20), (outcome,)).metrics.match_at
    assert {n: rate.hits for n, rate in rates.items()} == {1: 0, 2: 0, 5: 0, 10: 1, 20: 1}


def test_cost_is_per_candidate() -> None:
    assert EvaluationRow(run(k=2, wall_time=24.0), five()).seconds_per_structure == 24.0 / 10
    assert EvaluationRow(run(), ()).seconds_per_structure is None


def test_a_reference_counts_once() -> None:
    with pytest.raises(ValueError, match="m-1"):
        EvaluationRow(run(), (five()[0], five()[0]))


def control() -> EvaluationRow:
    """Misses everything but m-1, in another order."""
    outcomes = [replace(one, candidates=(MISS,), pooled=()) for one in reversed(five())]
    outcomes[-1] = replace(outcomes[-1], candidates=(hit(0.05),))
    info = run("random | draw", k=1, checkpoint=None, network_calls=0, peak_memory=None)
    return EvaluationRow(info, tuple(outcomes))


def test_paired_test_goes_by_reference_not_by_position() -> None:
    test = paired_test(EvaluationRow(run(), five()), control())
    assert (test.first_only, test.second_only, test.both, test.neither) == (3, 1, 0, 1)
    assert test.p_value == pytest.approx(2 * (1 + 4) / 2**4)


def test_paired_test_refuses_other_references() -> None:
    with pytest.raises(ValueError, match="same references"):
        paired_test(EvaluationRow(run(), five()), EvaluationRow(run("other"), five()[1:]))


def test_report_files(tmp_path: Path) -> None:
    rows = [EvaluationRow(run(), five()), control()]
    paths = write_report(rows, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "evaluation.png",
    ], "nothing temporary stays"
    data = json.loads(paths["json"].read_text())
    metrics = data["rows"][0]["metrics"]
    assert metrics["match_rate"]["percent"] == 60
    assert metrics["match_rate"]["interval_percent"] == pytest.approx([23.07, 88.24], abs=0.01)
    assert data["rows"][0]["strata"][1]["match_rate"]["hits"] == 1
    assert data["rows"][1]["run"]["checkpoint"] is None
    assert data["paired_tests"][0]["p_value"] == pytest.approx(0.625)
    assert data["rows"][0]["outcomes"][4]["candidates"][0]["failure"] == "broken cell"
    assert matplotlib.image.imread(paths["png"]).shape[0] > 300


def test_rows_read_back_are_the_rows_written(tmp_path: Path) -> None:
    rows = [EvaluationRow(run(), five()), control()]
    paths = write_report(rows, tmp_path)
    again = read_rows(paths["json"])
    assert again == rows
    assert again[0].outcomes[1].symmetry[1] is HIGHER
    before = {suffix: path.read_bytes() for suffix, path in paths.items()}
    write_report(again, tmp_path)
    assert {suffix: path.read_bytes() for suffix, path in paths.items()} == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "uni-mdm evaluation 1"}',
        '{"format": "uni-mdm evaluation 1", "rows": [{"run": {}, "outcomes": []}]}',
    ],
)
def test_a_file_that_is_no_report_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"evaluation\.json"):
        read_rows(path)
    with pytest.raises(UserError, match="missing"):
        read_rows(tmp_path / "missing")


def test_a_report_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_report([control()], tmp_path / "file")


def cells(markdown: str, start: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")][1:]


def test_markdown_tables() -> None:
    text = to_markdown([EvaluationRow(run(), five()), control()])
    results = text.split("## Among")[0]
    assert cells(results, "match") == ["60.00 (23.1 to 88.2)", "20.00 (3.6 to 62.4)"]
    for name, figure in (
        ("RMSE", "0.1400"),
        ("valid", "40.00"),
        ("RMSE valid", "0.2000"),
        ("tight", "40.00"),
        ("RMSE tight", "0.0600"),
        ("any of k", "80.00 (k=2)"),
        ("RMSE any", "0.1925"),
        ("METRe", "100"),
        ("cRMSE", "0.1740"),
        ("symmetry kept", "90.00"),
        ("composition exact", "90.00"),
    ):
        assert cells(results, name)[0] == figure
    assert cells(text, "free coordinates: 9+") == [
        "0.00 (0.0 to 79.3), -, n=1",
        "0.00 (0.0 to 79.3), -, n=1",
    ]
    assert cells(text, "model against random \\| draw") == ["3", "1", "0", "1", "0.62"]
    assert cells(text, "checkpoint") == ["0123abcd", "-"]
    assert cells(text.split("## Among")[1], "model") == [
        "60.00 (23.1 to 88.2), 0.1400",
        "80.00 (37.6 to 96.4), 0.1925",
    ]
    assert "## Among" not in to_markdown([control()])
    assert cells(text, "not comparable") == ["1", "0"]
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines()}
        assert len(widths) == 1, table


def test_figures_are_whole_in_a_terminal() -> None:
    """Of 80 columns, with as many rows as a model has beside its controls."""
    rows = [EvaluationRow(run(), five())]
    rows += [replace(control(), run=run(name, k=1)) for name in ("random", "nearest", "precedent")]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Shown(to_markdown(rows)))
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    results = text.split("Among the first")[0]
    for figure in ("60.00", "0.1400", "0.0600", "(k=2)", "0.1740"):
        assert figure in results


def test_the_summary_is_a_line_per_row_in_a_terminal() -> None:
    """However long the names are, no figure is broken."""
    names = ("model", "template prior, known polymorphs excluded", "nearest composition")
    rows = [EvaluationRow(run(name), five()) for name in names]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Shown(to_summary(rows)))
    text = console.export_text()
    figures = [line for line in text.splitlines() if "60.00 (23.1 to 88.2)" in line]
    assert len(figures) == 3
    assert " ".join(figures[0].split()) == "model 60.00 (23.1 to 88.2) 80.00 0.1400 40.00 40.00"
    assert "@2" in text
    assert "@" not in to_summary([EvaluationRow(run(k=1), ())]).split("\n\n")[1]


def test_everything_a_row_must_carry_is_in_the_tables() -> None:
    text = to_markdown([EvaluationRow(run(), five())])
    for value in (
        "val",
        "true symmetry",
        "mp_20/train",
        "25505",
        "0123abcd",
        "few-step",
        "20",
        "24.0",
        "2 CPU cores",
        "812",
        "2.400",
    ):
        assert value in text


def test_almost_all_is_not_shown_as_all() -> None:
    outcomes = tuple(Outcome(str(i), "AB", 0, (hit(0.1),)) for i in range(30_000))
    short = EvaluationRow(run(k=1), (*outcomes, Outcome("last", "AB", 0, (MISS,))))
    assert "| match | 99.99 (" in to_markdown([short])
    assert "| match | 100 (" in to_markdown([EvaluationRow(run(k=1), outcomes)])


def test_a_p_value_is_never_zero() -> None:
    alike = tuple(Outcome(str(i), "AB", 0, (hit(0.1),)) for i in range(2000))
    missed = tuple(replace(one, candidates=(MISS,)) for one in alike)
    text = to_markdown([EvaluationRow(run(), alike), EvaluationRow(run("none"), missed)])
    assert cells(text, "model against none") == ["2000", "0", "0", "0", "< 1e-300"]


def test_plot_of_extreme_rows() -> None:
    nothing = EvaluationRow(run("none", k=1), (Outcome("m", "AB", 0, (MISS,)),))
    everything = EvaluationRow(run("all", k=1), (Outcome("m", "AB", 9, (hit(0.0),)),))
    for rows in ([nothing], [everything], [nothing, everything], [EvaluationRow(run("empty"), ())]):
        assert to_png(rows).startswith(b"\x89PNG")
