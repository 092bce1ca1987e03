"""Figures of result rows, and their file."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.evaluate.report import write_report
from common.evaluate.rows import EvaluationRow, Outcome, paired_test, read_rows
from common.evaluate.statistics import Rate
from tests.evaluation_rows import HIGHER, MISS, control, five, hit, run


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


def test_paired_test_goes_by_reference_not_by_position() -> None:
    test = paired_test(EvaluationRow(run(), five()), control())
    assert (test.first_only, test.second_only, test.both, test.neither) == (3, 1, 0, 1)
    assert test.p_value == pytest.approx(2 * (1 + 4) / 2**4)


def test_paired_test_refuses_other_references() -> None:
    with pytest.raises(ValueError, match="same references"):
        paired_test(EvaluationRow(run(), five()), EvaluationRow(run("other"), five()[1:]))


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


def test_volume_error_is_of_matches_that_come_first() -> None:
    """And not known of reports that have no volumes."""
    ratios = (1.1, 0.8, None)
    outcomes = tuple(
        Outcome(str(i), "AB", 0, (replace(hit(0.1), volume_ratio=ratio), hit(0.2)))
        for i, ratio in enumerate(ratios)
    )
    row = EvaluationRow(run(), (*outcomes, Outcome("missed", "AB", 0, (MISS, hit(0.3)))))
    assert row.metrics.volume_error == pytest.approx((0.1 + 0.2) / 2)
    assert EvaluationRow(run(), five()).metrics.volume_error is None
