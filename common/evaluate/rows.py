"""Result rows: what one method did on one set of references, and their JSON file.

A row has how it was run, one outcome per reference, and figures that follow from the outcomes. Rows
read back from a report can be set beside new ones.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.errors import UserError
from common.evaluate.match import STANDARD, CandidateMatch
from common.evaluate.statistics import PairedTest, Rate, mcnemar, mean
from common.evaluate.strata import FREEDOM, freedom_class
from common.evaluate.symmetry import SymmetryLabel

FORMAT = "uni-mdm evaluation 1"


@dataclass(frozen=True)
class TrainingCost:
    """What it took to train a method.

    Attributes:
        seconds: of optimiser steps, the preparation of batches included, validation not.
        steps: of the optimiser.
        flops: floating-point operations of all steps; see ``common.speed.network_flops``.
        parameters: of the network.
    """

    seconds: float
    steps: int
    flops: float
    parameters: int


@dataclass(frozen=True)
class RunInfo:
    """How a row was made.

    Attributes:
        name: of the method, unique in a report.
        split: which references, such as ``val``.
        k: candidates per reference.
        given: what the method was told, such as ``true symmetry``.
        relaxed: whether candidates were relaxed before matching.
        training_set, training_size: what it learned from, and the number of rows.
        checkpoint: hash of the checkpoint; None for a method without one.
        sampler: its name.
        network_calls: per candidate; 0 for a method without network.
        seed: None for a deterministic method.
        wall_time: seconds to make all candidates.
        device: in words.
        peak_memory: MiB; None if not measured.
        symmetry_model: name and hash of what ranked symmetries; None where they were given.
        training: what it cost; None if not known.
        flops: floating-point operations per candidate; None if not known.
        full_seconds: what ``wall_time`` would be if no call of the network had rows that only fill
            it, as in a long run; None if not known.
        seen_ids, seen_symmetry: references that have the id, or formula, space group and sites, of
            a training row; None if not known.
    """

    name: str
    split: str
    k: int
    given: str
    relaxed: bool
    training_set: str
    training_size: int
    checkpoint: str | None
    sampler: str
    network_calls: int
    seed: int | None
    wall_time: float
    device: str
    peak_memory: float | None = None
    symmetry_model: str | None = None
    training: TrainingCost | None = None
    flops: float | None = None
    full_seconds: float | None = None
    seen_ids: int | None = None
    seen_symmetry: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one reference.

    Attributes:
        material_id: identifies the reference in paired tests.
        formula: its reduced formula.
        num_free_coords: free coordinates of the reference's sites.
        candidates: its own candidates, best rank first.
        pooled: further candidates, made for other references of this composition.
        symmetry: what became of the requested group, per candidate; empty if not looked at.
        composition_exact: per candidate; empty if not looked at.
        seen_composition, seen_prototype: in training; None if not known.
    """

    material_id: str
    formula: str
    num_free_coords: int
    candidates: tuple[CandidateMatch, ...]
    pooled: tuple[CandidateMatch, ...] = ()
    symmetry: tuple[SymmetryLabel, ...] = ()
    composition_exact: tuple[bool, ...] = ()
    seen_composition: bool | None = None
    seen_prototype: bool | None = None

    @property
    def first_rms(self) -> float | None:
        """Rms distance of the candidate ranked first; None without a match."""
        return self.candidates[0].rms if self.candidates else None

    def best_rms(self, k: int | None = None, pooled: bool = False) -> float | None:
        """Smallest rms distance among the first k candidates, or all of the composition's."""
        considered = self.candidates[:k] + (self.pooled if pooled else ())
        return min((one.rms for one in considered if one.rms is not None), default=None)


@dataclass(frozen=True)
class Stratum:
    """Match rate and RMSE (top candidate) of one class of references."""

    kind: str
    label: str
    match_rate: Rate
    rmse: float | None


@dataclass(frozen=True)
class Metrics:
    """Figures of a row. Rates count all references unless said otherwise.

    Attributes:
        match_rate, match_valid, match_tight: of the candidate ranked first; valid: it and the
            reference pass the validity filter too; tight: at the tight tolerance.
        rmse, rmse_valid, rmse_tight: mean over the matches of that rate.
        volume_error: mean over the matches of the first rate of |V / V0 - 1|, V and V0 the volumes
            per atom; None without a match, or in reports of earlier versions.
        match_at: any of the first n candidates, for n = 1, 2, 5, 10, ... and k (the oracle).
        rmse_at: mean of the best of the first n, over matched references.
        metre: references matched by any candidate of their composition.
        crmse: mean best rms of those, unmatched counted as the tolerance.
        symmetry_kept, symmetry_higher: of all candidates, requested group held (exactly or with
            more symmetry), and held with more; None if not looked at.
        composition_exact: of all candidates; None if not looked at.
        failures: candidates that could not be compared at all.
    """

    match_rate: Rate
    match_valid: Rate
    match_tight: Rate
    rmse: float | None
    rmse_valid: float | None
    rmse_tight: float | None
    volume_error: float | None
    match_at: dict[int, Rate]
    rmse_at: dict[int, float | None]
    metre: Rate
    crmse: float | None
    symmetry_kept: Rate | None
    symmetry_higher: Rate | None
    composition_exact: Rate | None
    failures: int


@dataclass(frozen=True)
class EvaluationRow:
    """One method on one set of references; the figures follow from the outcomes."""

    run: RunInfo
    outcomes: tuple[Outcome, ...]

    def __post_init__(self) -> None:
        counts = Counter(one.material_id for one in self.outcomes)
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"references that occur more than once: {', '.join(repeated[:5])}")

    @property
    def num_structures(self) -> int:
        """References, the denominator of every match rate."""
        return len(self.outcomes)

    @property
    def seconds_per_structure(self) -> float | None:
        """Wall time per candidate made."""
        made = self.num_structures * self.run.k
        return self.run.wall_time / made if made else None

    @cached_property
    def metrics(self) -> Metrics:
        """All figures."""
        return _metrics(self.outcomes, self.run.k)

    @cached_property
    def strata(self) -> tuple[Stratum, ...]:
        """Match rate by freedom, and by what training has shown where that is known."""
        return tuple(_strata(self.outcomes))


#: Two rows and the test of the first against the second.
NamedTest = tuple[EvaluationRow, EvaluationRow, PairedTest]


def paired_test(first: EvaluationRow, second: EvaluationRow) -> PairedTest:
    """McNemar's exact test on the match (top candidate) of two rows.

    Raises ValueError if they are not about the same references.
    """
    hits = [
        {o.material_id: o.first_rms is not None for o in row.outcomes} for row in (first, second)
    ]
    if hits[0].keys() != hits[1].keys():
        raise ValueError(
            f"rows {first.run.name!r} and {second.run.name!r} are not about the same references"
        )
    return mcnemar(list(hits[0].values()), [hits[1][key] for key in hits[0]])


def read_rows(path: Path) -> list[EvaluationRow]:
    """The rows of a report's JSON file.

    Raises UserError if the file is missing or is not such a report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise UserError(f"{path} is not a report of format {FORMAT!r}")
        return [
            EvaluationRow(
                TypeAdapter(RunInfo).validate_python(row["run"]),
                TypeAdapter(tuple[Outcome, ...]).validate_python(row["outcomes"]),
            )
            for row in data["rows"]
        ]
    except OSError as error:
        raise UserError(f"cannot read the report {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path} is not an evaluation report: write it again") from error


def to_json(rows: Sequence[EvaluationRow]) -> str:
    """The rows with their figures and every outcome."""
    data = {
        "format": FORMAT,
        "rows": [
            summary(row) | {"outcomes": [asdict(one) for one in row.outcomes]} for row in rows
        ],
        "paired_tests": named_tests(tests_against_first(rows)),
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def summary(row: EvaluationRow) -> dict[str, Any]:
    """A row as JSON types, without its outcomes."""
    return {
        "run": asdict(row.run),
        "num_structures": row.num_structures,
        "seconds_per_structure": row.seconds_per_structure,
        "metrics": _plain(row.metrics),
        "strata": [_plain(one) for one in row.strata],
    }


def named_tests(tests: Iterable[NamedTest]) -> list[dict[str, Any]]:
    """Paired tests as JSON types."""
    return [{"first": a.run.name, "second": b.run.name, **asdict(test)} for a, b, test in tests]


def _metrics(outcomes: Sequence[Outcome], k: int) -> Metrics:
    first = [one.candidates[0] if one.candidates else None for one in outcomes]
    standard = [one.rms if one else None for one in first]
    valid = [one.rms if one and one.valid else None for one in first]
    tight = [one.tight_rms if one else None for one in first]
    at = {n: [one.best_rms(n) for one in outcomes] for n in _ranks(k)}
    pooled = [one.best_rms(pooled=True) for one in outcomes]
    labels = [label for one in outcomes for label in one.symmetry]
    exact = [flag for one in outcomes for flag in one.composition_exact]
    return Metrics(
        match_rate=_found(standard),
        match_valid=_found(valid),
        match_tight=_found(tight),
        rmse=_mean_found(standard),
        rmse_valid=_mean_found(valid),
        rmse_tight=_mean_found(tight),
        volume_error=mean(
            abs(one.volume_ratio - 1) for one in first if one and one.volume_ratio is not None
        ),
        match_at={n: _found(values) for n, values in at.items()},
        rmse_at={n: _mean_found(values) for n, values in at.items()},
        metre=_found(pooled),
        crmse=mean(STANDARD.stol if value is None else value for value in pooled),
        symmetry_kept=_optional(label is not SymmetryLabel.LOST for label in labels),
        symmetry_higher=_optional(label is SymmetryLabel.HIGHER for label in labels),
        composition_exact=_optional(exact),
        failures=sum(m.failure is not None for one in outcomes for m in one.candidates),
    )


def _ranks(k: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... below k, and k."""
    steps = (base * 10**power for power, base in product(range(6), (1, 2, 5)))
    return [*(n for n in steps if n < k), k]


def _found(values: Iterable[float | None]) -> Rate:
    return Rate.of(value is not None for value in values)


def _mean_found(values: Iterable[float | None]) -> float | None:
    return mean(value for value in values if value is not None)


def _optional(flags: Iterable[bool]) -> Rate | None:
    rate = Rate.of(flags)
    return rate if rate.total else None


def _strata(outcomes: Sequence[Outcome]) -> Iterable[Stratum]:
    for label in FREEDOM:
        members = [one for one in outcomes if freedom_class(one.num_free_coords) == label]
        yield _stratum("free coordinates", label, members)
    kinds: tuple[tuple[str, Callable[[Outcome], bool | None]], ...] = (
        ("composition", lambda one: one.seen_composition),
        ("prototype", lambda one: one.seen_prototype),
    )
    for kind, seen in kinds:
        if any(seen(one) is not None for one in outcomes):
            for label, wanted in (("seen in training", True), ("not seen", False)):
                yield _stratum(kind, label, [one for one in outcomes if seen(one) is wanted])


def _stratum(kind: str, label: str, members: Sequence[Outcome]) -> Stratum:
    values = [one.first_rms for one in members]
    return Stratum(kind, label, _found(values), _mean_found(values))


def tests_against_first(rows: Sequence[EvaluationRow]) -> list[NamedTest]:
    """The first row against every other one about the same references."""
    ids = [{one.material_id for one in row.outcomes} for row in rows]
    return [
        (rows[0], row, paired_test(rows[0], row))
        for row, members in zip(rows[1:], ids[1:], strict=True)
        if members == ids[0]
    ]


def _plain(value: Any) -> Any:
    """Dataclasses as JSON types; a rate gets its percentage and interval."""
    if isinstance(value, Rate):
        share = value.value
        return {
            "hits": value.hits,
            "total": value.total,
            "percent": None if share is None else 100 * share,
            "interval_percent": [100 * bound for bound in value.interval],
        }
    if isinstance(value, Metrics | Stratum):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
