"""Intervals and tests against scipy's, and against numbers worked out by hand."""

import pytest
from scipy.stats import binomtest

from common.evaluate.statistics import Rate, mcnemar, mean


@pytest.mark.parametrize(
    ("hits", "total"), [(0, 10), (10, 10), (1, 7), (812, 1000), (500, 1000), (1, 9047)]
)
def test_wilson_interval_is_scipys(hits: int, total: int) -> None:
    expected = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert Rate(hits, total).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rate_of_nothing() -> None:
    assert Rate.of([]).value is None
    assert Rate.of([]).interval == (0.0, 1.0)
    assert Rate.of([True, False, True, True]) == Rate(3, 4)
    assert Rate(3, 4).value == 0.75


def test_mcnemar_by_hand() -> None:
    # 5 cases only for the first, 1 only for the second: p = 2 (1 + 6) / 2^6.
    first = [True] * 5 + [False] + [True] * 3 + [False] * 2
    second = [False] * 5 + [True] + [True] * 3 + [False] * 2
    test = mcnemar(first, second)
    assert (test.first_only, test.second_only, test.both, test.neither) == (5, 1, 3, 2)
    assert test.p_value == pytest.approx(14 / 64)
    assert mcnemar(second, first).p_value == pytest.approx(14 / 64)


@pytest.mark.parametrize(("first_only", "second_only"), [(30, 12), (3, 3), (0, 8), (100, 99)])
def test_mcnemar_is_the_binomial_test(first_only: int, second_only: int) -> None:
    first = [True] * first_only + [False] * second_only + [True]
    second = [False] * first_only + [True] * second_only + [True]
    expected = binomtest(first_only, first_only + second_only).pvalue
    assert mcnemar(first, second).p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_equal_methods_and_of_unequal_lengths() -> None:
    assert mcnemar([True, False], [True, False]).p_value == 1
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


def test_mean() -> None:
    assert mean([]) is None
    assert mean([1.0, 2.0, 6.0]) == 3.0
