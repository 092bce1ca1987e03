"""How often a ranking of symmetries has the true one among its first k."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.crystal.structure import Crystal
from common.crystal.wyckoff import SymmetryKey
from common.data.store import Record
from common.language.prompt import AnswerError, parse_answer
from common.legal_sites import legal_units
from common.prior import SymmetryCandidate, TemplatePrior

CUTOFFS = (1, 5, 20)
_BINS = 10


@dataclass(frozen=True)
class Outcome:
    """Where the truth stands in one ranking.

    Attributes:
        group, assignment: place of the true space group among the distinct ones, and of the true
            group and sites (up to relabelling by the group's normaliser); None if they are absent.
        first: probability of the first candidate; 0 without any.
        legal: whether every candidate adds up to the composition on positions of its group.
    """

    group: int | None
    assignment: int | None
    first: float
    legal: bool


def outcome_of(crystal: Crystal, candidates: Sequence[SymmetryCandidate]) -> Outcome:
    """Compares a ranking, the likeliest first, with a crystal's own symmetry."""
    groups = list(dict.fromkeys(c.space_group for c in candidates))
    return Outcome(
        groups.index(crystal.space_group) if crystal.space_group in groups else None,
        first_place(candidates, {crystal.symmetry_key}),
        candidates[0].probability if candidates else 0.0,
        all(legal_units(c.space_group, c.sites, crystal.formula_counts) for c in candidates),
    )


def first_place(
    candidates: Sequence[SymmetryCandidate], wanted: Collection[SymmetryKey]
) -> int | None:
    """Place of the first candidate that is one of those wanted; None without any."""
    groups = {group for group, _ in wanted}
    for index, c in enumerate(candidates):
        if c.space_group in groups and c.key in wanted:
            return index
    return None


def legal_answers(answers: Sequence[str], crystals: Sequence[Crystal]) -> float:
    """Share of texts that are an answer, and a legal one for the composition.

    That is one whose sites exist in its group, and add up to as many formula units as it says.
    """

    def legal(answer: str, crystal: Crystal) -> bool:
        try:
            symmetry = parse_answer(answer)
        except AnswerError:
            return False
        own = legal_units(symmetry.space_group, symmetry.sites, crystal.formula_counts)
        return own == symmetry.units

    return float(np.mean([legal(a, c) for a, c in zip(answers, crystals, strict=True)]))


def rates(outcomes: Sequence[Outcome], new: Sequence[bool]) -> dict[str, Any]:
    """Shares of rows by cutoff.

    Args:
        outcomes: of every row.
        new: whether no row of training has its reduced formula.

    Returns:
        ``space_group`` and ``assignment`` by cutoff, of all rows and, as ``*_new_formula``, of the
        new ones; ``seen_formula``, the share of the others, which are other polymorphs.
    """
    result: dict[str, Any] = {
        "rows": len(outcomes),
        "seen_formula": round(1 - sum(new) / max(len(new), 1), 4),
    }
    unseen = [outcome for outcome, is_new in zip(outcomes, new, strict=True) if is_new]
    for name, places in (("space_group", "group"), ("assignment", "assignment")):
        for suffix, rows in (("", outcomes), ("_new_formula", unseen)):
            found = [getattr(outcome, places) for outcome in rows]
            result[name + suffix] = {
                k: round(sum(p is not None and p < k for p in found) / max(len(found), 1), 4)
                for k in CUTOFFS
            }
    return result


@dataclass(frozen=True)
class Reliability:
    """First candidates of about one probability.

    Attributes:
        rows: how many.
        sure: mean of their probabilities.
        right: how many of them are the truth.
    """

    rows: int
    sure: float
    right: int


def reliability(outcomes: Sequence[Outcome]) -> list[Reliability]:
    """First candidates in bins of a tenth of their probability; bins without any are left out."""
    sure = np.array([outcome.first for outcome in outcomes])
    right = np.array([outcome.assignment == 0 for outcome in outcomes])
    bins = (sure * _BINS).astype(int).clip(max=_BINS - 1)
    return [
        Reliability(
            int((bins == b).sum()), float(sure[bins == b].mean()), int(right[bins == b].sum())
        )
        for b in np.unique(bins)
    ]


def calibration_error(outcomes: Sequence[Outcome]) -> float:
    """Expected calibration error of the first candidate's probability, in bins of a tenth.

    The mean over rows of the distance between how sure and how often right its bin is.
    """
    distances = (abs(one.rows * one.sure - one.right) for one in reliability(outcomes))
    return float(sum(distances) / len(outcomes))


def evaluate_prior(
    prior: TemplatePrior, records: Iterable[Record], given: str | None = None
) -> dict[str, Any]:
    """Ranks the symmetries of every record's composition and looks for its own.

    Args:
        prior: fitted on other records.
        records: what to rank.
        given: ``band_gap`` or ``formation_energy``: the property is told as well; rows without it
            are left out.

    Returns:
        ``rates``, with ``given`` and the name of the ``prior``.
    """
    outcomes, new = [], []
    for record in records:
        value = None if given is None else record.properties[given]
        if given is not None and value is None:
            continue
        counts = record.crystal.formula_counts
        properties = {} if given is None or value is None else {given: value}
        candidates = prior.rank(counts, properties, top=max(CUTOFFS))
        outcomes.append(outcome_of(record.crystal, candidates))
        new.append(not prior.reference.rows_of_formula(counts))
    return {"given": given, "prior": prior.hash, **rates(outcomes, new)}
