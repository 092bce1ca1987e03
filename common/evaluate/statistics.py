"""Rates with their uncertainty, and the paired test that a claimed difference must pass."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import binom, norm

_Z95 = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Rate:
    """So many hits of so many trials."""

    hits: int
    total: int

    @classmethod
    def of(cls, flags: Iterable[bool]) -> "Rate":
        values = list(flags)
        return cls(sum(values), len(values))

    @property
    def value(self) -> float | None:
        """Share of hits; None of no trials."""
        return self.hits / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (J. Am. Stat. Assoc. 22, 209 (1927)); (0, 1) of no trials."""
        if not self.total:
            return 0.0, 1.0
        share, weight = self.hits / self.total, _Z95**2 / self.total
        centre = (share + weight / 2) / (1 + weight)
        spread = share * (1 - share) / self.total + (weight / (2 * _Z95)) ** 2
        half = _Z95 * math.sqrt(spread) / (1 + weight)
        low = 0.0 if self.hits == 0 else centre - half
        high = 1.0 if self.hits == self.total else centre + half
        return low, high


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test of two methods on the same cases.

    Attributes:
        first_only, second_only: cases that only one of them got right.
        both, neither: cases that do not tell them apart.
        p_value: two-sided; how often as uneven a split would come from equally good methods.
    """

    first_only: int
    second_only: int
    both: int
    neither: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Test whether two methods differ, from the hits of both on the same cases in one order.

    Raises ValueError if they have different numbers of cases.
    """
    pairs = list(zip(first, second, strict=True))
    first_only = sum(a and not b for a, b in pairs)
    second_only = sum(b and not a for a, b in pairs)
    both = sum(a and b for a, b in pairs)
    discordant = first_only + second_only
    p_value = 2 * float(binom.cdf(min(first_only, second_only), discordant, 0.5))
    neither = len(pairs) - discordant - both
    return PairedTest(first_only, second_only, both, neither, min(1.0, p_value))


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None
