"""Result rows, and the report that sets them side by side: JSON, Markdown tables, a plot.

A row is what one method did on one set of references: how it was run, one outcome per reference,
and figures that follow from the outcomes. Rows read back from a report can be set beside new ones.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import TypeAdapter, ValidationError

from common.errors import UserError
from common.evaluate.match import STANDARD, CandidateMatch
from common.evaluate.statistics import PairedTest, Rate, mcnemar, mean
from common.evaluate.strata import FREEDOM, freedom_class
from common.evaluate.symmetry import SymmetryLabel
from common.evaluate.tables import (
    COLOURS,
    MARKERS,
    number,
    p_value,
    percent,
    png,
    seen_note,
    table,
    text,
    write_trio,
)

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


def write_report(
    rows: Sequence[EvaluationRow], folder: Path, name: str = "evaluation"
) -> dict[str, Path]:
    """Write ``<name>.json``, ``<name>.md`` and ``<name>.png``, all three or none.

    Args:
        rows: the method in question first; the others are tested against it.
        folder: made if missing.

    Returns:
        The paths by suffix. Raises UserError if a file cannot be written.
    """
    return write_trio(
        folder, name, to_json(rows), to_png(rows), lambda plot: to_markdown(rows, plot=plot)
    )


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
        "paired_tests": named_tests(_paired_tests(rows)),
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


def to_markdown(rows: Sequence[EvaluationRow], plot: str | None = None) -> str:
    """Results, strata, paired tests and how each row was made, as Markdown tables."""
    parts = ["# Evaluation", _LEGEND, _results_table(rows), *_seen(rows)]
    if any(row.run.k > 1 for row in rows):
        parts += ["## Among the first candidates", _FIRST, _first_table(rows)]
    parts.append("## By kind of structure")
    parts.append("Match rate of the first candidate (%), RMSE, number of references.")
    parts.append(_strata_table(rows))
    if plot:
        parts.append(f"![Match rate by free coordinates, and distances of the matches]({plot})")
    if tests := paired_table(_paired_tests(rows)):
        parts += [
            "## Paired tests",
            "McNemar's exact test on the match of the first candidate.",
            tests,
        ]
    parts += ["## How the rows were made", _run_table(rows)]
    return "\n\n".join(parts) + "\n"


def to_summary(rows: Sequence[EvaluationRow]) -> str:
    """What matters most, as Markdown that a terminal of 80 columns shows well: a line per row."""
    ranked = {n for row in rows for n in row.metrics.match_at}
    ranks = sorted(ranked & {5, max(ranked)} - {1})
    lines = [
        [
            row.run.name,
            percent(row.metrics.match_rate, interval=True),
            *(percent(row.metrics.match_at.get(n)) for n in ranks),
            number(row.metrics.rmse),
            percent(row.metrics.match_valid),
            percent(row.metrics.match_tight),
        ]
        for row in rows
    ]
    header = ["", "match", *(f"@{n}" for n in ranks), "RMSE", "valid", "tight"]
    return "\n\n".join([_SUMMARY, table(header, lines), *_seen(rows)]) + "\n"


def _seen(rows: Sequence[EvaluationRow]) -> list[str]:
    run = rows[0].run
    return seen_note(run.seen_ids, run.seen_symmetry, rows[0].num_structures, run.training_set)


def to_png(rows: Sequence[EvaluationRow]) -> bytes:
    """Match rate by free coordinates (95 % intervals), and the distribution of the distances."""
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot_strata(left, rows)
    _plot_distances(right, rows)
    # Below both: inside one it would hide points.
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    return png(figure)


_SUMMARY = (
    "Match rates in % of all references, with 95 % intervals: of the candidate ranked first, of "
    "any of the first n (@n). RMSE: mean over the matches of the first, in units of (V/N)^(1/3)."
)

_LEGEND = (
    "Match rates in % of all references, for the candidate ranked first, with Wilson 95 % "
    "intervals. RMSE: mean over matches, in units of (V/N)^(1/3). Valid: prediction and reference "
    "also pass the composition and distance filter. Tight: stol 0.3, 5 degrees, ltol 0.2 instead "
    "of 0.5, 10 degrees, 0.3. METRe: references matched by any candidate of their composition; "
    "cRMSE: mean best distance of those, unmatched counted as 0.5."
)


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


def _paired_tests(rows: Sequence[EvaluationRow]) -> list[NamedTest]:
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


def _results_table(rows: Sequence[EvaluationRow]) -> str:
    """A line for each figure: with a column for each, terminals would cut them off."""
    several = any(row.run.k > 1 for row in rows)
    figures: tuple[tuple[str, Callable[[EvaluationRow], str]], ...] = (
        ("match", lambda row: percent(row.metrics.match_rate, interval=True)),
        ("RMSE", lambda row: number(row.metrics.rmse)),
        ("valid", lambda row: percent(row.metrics.match_valid)),
        ("RMSE valid", lambda row: number(row.metrics.rmse_valid)),
        ("tight", lambda row: percent(row.metrics.match_tight)),
        ("RMSE tight", lambda row: number(row.metrics.rmse_tight)),
        *((("any of k", _any_of_k), ("RMSE any", _rmse_of_any)) if several else ()),
        ("METRe", lambda row: percent(row.metrics.metre)),
        ("cRMSE", lambda row: number(row.metrics.crmse)),
        ("symmetry kept", lambda row: percent(row.metrics.symmetry_kept)),
        ("composition exact", lambda row: percent(row.metrics.composition_exact)),
        ("network calls", lambda row: str(row.run.network_calls)),
        ("s / crystal", lambda row: number(row.seconds_per_structure, 3)),
    )
    lines = [[name, *(get(row) for row in rows)] for name, get in figures]
    return table(["", *(row.run.name for row in rows)], lines)


def _any_of_k(row: EvaluationRow) -> str:
    return f"{percent(row.metrics.match_at[row.run.k])} (k={row.run.k})"


def _rmse_of_any(row: EvaluationRow) -> str:
    return number(row.metrics.rmse_at[row.run.k])


_FIRST = "References matched by any of the first n candidates (%), and RMSE of the best of these."


def _first_table(rows: Sequence[EvaluationRow]) -> str:
    ranks = sorted({n for row in rows for n in row.metrics.match_at})
    lines = []
    for row in rows:
        at, rmse = row.metrics.match_at, row.metrics.rmse_at
        cells = [f"{percent(at.get(n), interval=True)}, {number(rmse.get(n))}" for n in ranks]
        lines.append([row.run.name, *cells])
    return table(["", *(f"@{n}" for n in ranks)], lines)


def _strata_table(rows: Sequence[EvaluationRow]) -> str:
    return table(["", *(row.run.name for row in rows)], strata_lines(rows))


def strata_lines(rows: Sequence[EvaluationRow]) -> list[list[str]]:
    """Lines of a table with a column for each row: match rate, RMSE and number of every class."""
    by_row = [{(one.kind, one.label): one for one in row.strata} for row in rows]
    keys = list(dict.fromkeys(key for strata in by_row for key in strata))
    return [
        [f"{kind}: {label}", *(_stratum_cell(strata.get((kind, label))) for strata in by_row)]
        for kind, label in keys
    ]


def _stratum_cell(stratum: Stratum | None) -> str:
    if stratum is None or not stratum.match_rate.total:
        return "-"
    rate = stratum.match_rate
    return f"{percent(rate, interval=True)}, {number(stratum.rmse)}, n={rate.total}"


def paired_table(tests: Iterable[NamedTest]) -> str:
    """Paired tests as a Markdown table; empty without any."""
    lines = [
        [
            f"{first.run.name} against {second.run.name}",
            *(str(n) for n in (test.first_only, test.second_only, test.both, test.neither)),
            p_value(test.p_value),
        ]
        for first, second, test in tests
    ]
    header = ["", "only the first", "only the second", "both", "neither", "p"]
    return table(header, lines) if lines else ""


def _run_table(rows: Sequence[EvaluationRow]) -> str:
    fields: tuple[tuple[str, Callable[[EvaluationRow], object]], ...] = (
        ("split", lambda row: row.run.split),
        ("structures", lambda row: row.num_structures),
        ("k", lambda row: row.run.k),
        ("given", lambda row: row.run.given),
        ("relaxed", lambda row: "yes" if row.run.relaxed else "no"),
        ("training set", lambda row: row.run.training_set),
        ("training rows", lambda row: row.run.training_size),
        ("symmetries ranked by", lambda row: row.run.symmetry_model),
        ("checkpoint", lambda row: row.run.checkpoint),
        ("sampler", lambda row: row.run.sampler),
        ("network calls", lambda row: row.run.network_calls),
        ("seed", lambda row: row.run.seed),
        ("wall time (s)", lambda row: f"{row.run.wall_time:.1f}"),
        ("device", lambda row: row.run.device),
        ("peak memory (MiB)", lambda row: row.run.peak_memory and f"{row.run.peak_memory:.0f}"),
        ("more symmetry than asked (%)", lambda row: percent(row.metrics.symmetry_higher)),
        ("not comparable", lambda row: row.metrics.failures),
    )
    lines = [[name, *(text(get(row)) for row in rows)] for name, get in fields]
    return table(["", *(row.run.name for row in rows)], lines)


def _plot_strata(axes: Axes, rows: Sequence[EvaluationRow]) -> None:
    places = np.arange(len(FREEDOM))
    offsets = (np.arange(len(rows)) - (len(rows) - 1) / 2) * 0.6 / max(len(rows), 1)
    for index, row in enumerate(rows):
        strata = [one for one in row.strata if one.kind == "free coordinates"]
        shown = [(i, one.match_rate) for i, one in enumerate(strata) if one.match_rate.total]
        values = np.array([rate.hits / rate.total for _, rate in shown])
        bounds = np.array([rate.interval for _, rate in shown]).reshape(-1, 2)
        axes.errorbar(
            places[[i for i, _ in shown]] + offsets[index],
            100 * values,
            yerr=100 * np.abs(bounds.T - values),
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            capsize=3,
            label=row.run.name,
        )
    axes.set_xticks(places, FREEDOM)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("free coordinates")
    axes.set_ylabel("match rate (%), 95 % intervals")
    axes.grid(axis="y", alpha=0.3)


def _plot_distances(axes: Axes, rows: Sequence[EvaluationRow]) -> None:
    """Share of all references whose first candidate is nearer than a distance."""
    edge = STANDARD.stol
    for index, row in enumerate(rows):
        distances = sorted(one.first_rms for one in row.outcomes if one.first_rms is not None)
        shares = 100 * np.arange(len(distances) + 1) / max(row.num_structures, 1)
        axes.step(
            [0, *distances, edge],
            [*shares, shares[-1]],
            where="post",
            color=COLOURS[index % len(COLOURS)],
            label=row.run.name,
        )
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_xlim(0, edge)
    axes.set_ylim(-2, 102)
    axes.set_xticks([0, 1e-3, 1e-2, 1e-1, edge], ["0", "0.001", "0.01", "0.1", f"{edge:g}"])
    axes.set_xlabel("rms distance, units of (V/N)^(1/3)")
    axes.set_ylabel("references matched within it (%)")
    axes.grid(alpha=0.3)
