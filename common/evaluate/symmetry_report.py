"""Rows of symmetry prediction set side by side: JSON, Markdown tables, a plot."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.evaluate.statistics import PairedTest, Rate, mcnemar
from common.evaluate.symmetry_prediction import (
    CUTOFFS,
    Outcome,
    Reliability,
    calibration_error,
    reliability,
)
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

FORMAT = "uni-mdm symmetry evaluation 1"
#: Rows in a bin of the reliability diagram below which it says nothing.
_FEWEST = 5

Place = Literal["group", "assignment"]


@dataclass(frozen=True)
class SymmetryRun:
    """How a row was made.

    Attributes:
        name: of the method, unique in a report.
        split: which references.
        target: the property that was told, and how many rows were if not all; or ``none``.
        training_set, training_size: what it learned from, and the number of rows.
        model: hash of what was learned; None where that is the rows themselves.
        seed: that it was trained with; None where there is none, for ranking has no randomness.
        seconds: to rank all rows.
        seen_ids, seen_symmetry: rows that have the id, or formula, space group and sites, of a
            training row; None if not known.
        seen_in: the training rows that were looked at: the last set of a model that had several.
    """

    name: str
    split: str
    target: str
    training_set: str
    training_size: int
    model: str | None
    seed: int | None
    seconds: float
    seen_ids: int | None = None
    seen_symmetry: int | None = None
    seen_in: str = ""


@dataclass(frozen=True)
class Answers:
    """What answers are worth as text.

    Attributes:
        kind: how they were made.
        legal: share that is an answer, and a legal one of the composition.
        exact: share that is the true text.
        rouge: F1 in %, by library and name; see ``common.evaluate.language``.
    """

    kind: str
    legal: float
    exact: float
    rouge: dict[str, dict[str, float]]


@dataclass(frozen=True)
class SymmetryRow:
    """One method on one set of references; the figures follow from the outcomes.

    Attributes:
        run: how it was made.
        ids: of the references.
        outcomes: where the truth stands in each ranking.
        new: whether training has no row of the reference's reduced formula.
        answers: as text.
        figures: what there is besides.
        polymorphs: where the first symmetry stands that some known crystal of the composition has,
            if any is asked for rather than one beside those of training; None for a method that
            leaves these out.
        plain: where the truth stands in the rankings of ``polymorphs``; None without them.
    """

    run: SymmetryRun
    ids: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    new: tuple[bool, ...]
    answers: Answers
    figures: dict[str, float] = field(default_factory=dict)
    polymorphs: tuple[int | None, ...] | None = None
    plain: tuple[Outcome, ...] | None = None

    def rate(self, place: Place, cutoff: int, new: bool | None = None) -> Rate:
        """How often the truth is among the first so many.

        Args:
            place: of the space group or of group and sites.
            cutoff: that number.
            new: only rows of new formulas, or only of known ones.
        """
        return self._rate([getattr(o, place) for o in self.outcomes], cutoff, new)

    def polymorph_rate(self, cutoff: int, new: bool | None = None) -> Rate:
        """How often some polymorph is among the first so many; see ``rate``.

        Raises:
            ValueError: if the row has no ``polymorphs``.
        """
        if self.polymorphs is None:
            raise ValueError(f"{self.run.name!r} was not asked for any polymorph")
        return self._rate(self.polymorphs, cutoff, new)

    def _rate(self, places: Sequence[int | None], cutoff: int, new: bool | None) -> Rate:
        rows = zip(places, self.new, strict=True)
        found = [place for place, is_new in rows if new in (None, is_new)]
        return Rate.of(place is not None and place < cutoff for place in found)

    @cached_property
    def legal(self) -> Rate:
        """Rankings all of whose candidates are legal."""
        return Rate.of(outcome.legal for outcome in self.outcomes)

    @cached_property
    def calibration_error(self) -> float:
        """See ``symmetry_prediction.calibration_error``."""
        return calibration_error(self.outcomes)

    @cached_property
    def plain_calibration_error(self) -> float | None:
        """That of the rankings of ``polymorphs``; None without them."""
        return None if self.plain is None else calibration_error(self.plain)

    @cached_property
    def reliability(self) -> list[Reliability]:
        """See ``symmetry_prediction.reliability``."""
        return reliability(self.outcomes)

    @property
    def first_right(self) -> list[bool]:
        """Whether the first candidate of each ranking is the truth."""
        return [outcome.assignment == 0 for outcome in self.outcomes]


def paired_test(first: SymmetryRow, second: SymmetryRow, new: bool | None = None) -> PairedTest:
    """McNemar's exact test on exact first candidates.

    Args:
        first, second: of the same references.
        new: as in ``SymmetryRow.rate``.

    Raises:
        ValueError: if the rows are not about the same references in the same order.
    """
    return _tested((first, first.first_right), (second, second.first_right), new)


def polymorph_test(
    first: SymmetryRow, second: SymmetryRow, cutoff: int, new: bool | None = None
) -> PairedTest:
    """McNemar's exact test on whether some polymorph is among the first so many.

    Args:
        first, second, new: as in ``paired_test``.
        cutoff: that number.

    Raises:
        ValueError: as ``paired_test``, and if a row has no ``polymorphs``.
    """
    return _tested(
        (first, _polymorph_found(first, cutoff)), (second, _polymorph_found(second, cutoff)), new
    )


def _polymorph_found(row: SymmetryRow, cutoff: int) -> list[bool]:
    if row.polymorphs is None:
        raise ValueError(f"{row.run.name!r} was not asked for any polymorph")
    return [place is not None and place < cutoff for place in row.polymorphs]


def _tested(
    first: tuple[SymmetryRow, Sequence[bool]],
    second: tuple[SymmetryRow, Sequence[bool]],
    new: bool | None,
) -> PairedTest:
    if first[0].ids != second[0].ids:
        raise ValueError(f"{first[0].run.name!r} and {second[0].run.name!r} have other references")
    kept = [
        [hit for hit, is_new in zip(hits, row.new, strict=True) if new in (None, is_new)]
        for row, hits in (first, second)
    ]
    return mcnemar(*kept)


def paired_tests(rows: Sequence[SymmetryRow]) -> list[tuple[str, str, dict[str, PairedTest]]]:
    """Names of any two rows, and by name the tests that there are between them."""
    found = []
    for first, second in combinations(rows, 2):
        tests = {
            "assignment @1": paired_test(first, second),
            "assignment @1, new formulas": paired_test(first, second, new=True),
        }
        if first.polymorphs is not None and second.polymorphs is not None:
            tests |= {
                "any polymorph @1": polymorph_test(first, second, 1),
                "any polymorph @1, new formulas": polymorph_test(first, second, 1, new=True),
                "any polymorph @5": polymorph_test(first, second, 5),
            }
        found.append((first.run.name, second.run.name, tests))
    return found


def write_symmetry_report(
    rows: Sequence[SymmetryRow], folder: Path, name: str = "symmetry"
) -> dict[str, Path]:
    """Write ``<name>.json``, ``<name>.md`` and ``<name>.png``, all three or none.

    Args:
        rows: the method in question first.
        folder: made if missing.

    Returns:
        The paths by suffix. Raises UserError if a file cannot be written.
    """
    return write_trio(
        folder, name, to_json(rows), to_png(rows), lambda plot: to_markdown(rows, plot=plot)
    )


def to_json(rows: Sequence[SymmetryRow]) -> str:
    """The rows with their figures and every outcome."""
    data = {
        "format": FORMAT,
        "rows": [
            {
                "run": asdict(row.run),
                "rows": len(row.outcomes),
                "new_formulas": sum(row.new),
                "space_group": _rates(row, "group"),
                "assignment": _rates(row, "assignment"),
                "polymorphs": _by_kind(row.polymorph_rate) if row.polymorphs else None,
                "legal": _plain(row.legal),
                "calibration_error": row.calibration_error,
                "plain_calibration_error": row.plain_calibration_error,
                "reliability": [asdict(one) for one in row.reliability],
                "answers": asdict(row.answers),
                "figures": row.figures,
                "outcomes": _outcomes(row),
            }
            for row in rows
        ],
        "paired_tests": [
            {"first": first, "second": second, "tests": {k: asdict(v) for k, v in tests.items()}}
            for first, second, tests in paired_tests(rows)
        ],
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _outcomes(row: SymmetryRow) -> list[dict[str, Any]]:
    listed = [
        {"material_id": name, "new_formula": new, **asdict(outcome)}
        for name, new, outcome in zip(row.ids, row.new, row.outcomes, strict=True)
    ]
    for own, place in zip(listed, row.polymorphs or (), strict=False):
        own["polymorph"] = place
    for own, outcome in zip(listed, row.plain or (), strict=False):
        own |= {"plain_assignment": outcome.assignment, "plain_first": outcome.first}
    return listed


def _rates(row: SymmetryRow, place: Place) -> dict[str, Any]:
    return _by_kind(partial(row.rate, place))


def _by_kind(rate: Callable[[int, bool | None], Rate]) -> dict[str, Any]:
    kinds: dict[str, bool | None] = {"all": None, "new_formula": True, "known_formula": False}
    return {name: {str(k): _plain(rate(k, new)) for k in CUTOFFS} for name, new in kinds.items()}


def _plain(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    share = None if rate.value is None else 100 * rate.value
    return {
        "hits": rate.hits,
        "total": rate.total,
        "percent": share,
        "interval_percent": [100 * low, 100 * high],
    }


_LEGEND = (
    "Share of rows (%) whose space group, and whose group with all Wyckoff sites (assignment, up "
    "to relabelling by the group's normaliser), is among the first 1, 5 and 20 of a ranking, with "
    "Wilson 95 % intervals. Legal: rankings all of whose symmetries add up to the composition. "
    "Calibration error: of the first candidate's probability, in bins of a tenth."
)


def to_markdown(rows: Sequence[SymmetryRow], plot: str | None = None) -> str:
    """Results by kind of formula, answers as text, and how each row was made, as tables."""
    first = rows[0]
    counts = Rate(sum(first.new), len(first.new))
    parts = ["# Symmetry prediction", _LEGEND, _results_table(rows), *_seen(first)]
    parts += [f"## Formulas that training has not ({counts.hits} of {counts.total} rows)"]
    parts += [_kind_table(rows, True)]
    parts += ["## Other polymorphs of known formulas", _kind_table(rows, False)]
    asked = [row for row in rows if row.polymorphs is not None]
    if asked:
        parts += ["## Any polymorph", _POLYMORPHS, _polymorph_table(asked)]
    if len(rows) > 1:
        parts += ["## Paired tests", _PAIRED, _paired_table(rows)]
    if plot:
        parts.append(f"![Reliability, and share of exact assignments]({plot})")
    parts += ["## Answers as text", _ANSWERS, _answers_table(rows)]
    parts += ["## How the rows were made", _run_table(rows)]
    return "\n\n".join(parts) + "\n"


def to_summary(rows: Sequence[SymmetryRow]) -> str:
    """What matters most, as Markdown that a terminal of 80 columns shows well: a line per row."""
    lines = [
        [
            row.run.name,
            *(percent(row.rate("assignment", k), interval=k == 1) for k in CUTOFFS),
            percent(row.rate("group", 1)),
        ]
        for row in rows
    ]
    header = ["", *(f"sites @{k}" for k in CUTOFFS), "group @1"]
    return "\n\n".join([_SUMMARY, table(header, lines), *_seen(rows[0])]) + "\n"


def _seen(row: SymmetryRow) -> list[str]:
    run = row.run
    return seen_note(run.seen_ids, run.seen_symmetry, len(row.new), run.seen_in)


_SUMMARY = (
    "Share of rows (%) whose space group with all Wyckoff sites, and whose group, is among the "
    "first n, with 95 % intervals."
)

_ANSWERS = (
    "Legal and exact: share of answers (%) that are legal, and that are the true text. ROUGE: F1 "
    "in %, by rouge-score and by rouge-chinese as MindFormers computes it. It rewards text, not "
    "crystallography: compare with what a majority template gets."
)


_POLYMORPHS = (
    "Who asks for any crystal of a composition is content with each of its polymorphs, those that "
    "training has included. Share of rows (%) for which the symmetry of one, of training or the "
    "references, is among the first 1, 5 and 20. Calibration error: of the first candidate's "
    "probability in these rankings, which `generate` shows as Prob., as that of the row's own "
    "symmetry. It is not that of any polymorph: probabilities add up to one, but several "
    "polymorphs are right, so that one of them stands first more often than its probability says, "
    "and nearly always where the formula is known."
)


def _polymorph_table(rows: Sequence[SymmetryRow]) -> str:
    kinds = (("all", None), ("new formulas", True), ("known formulas", False))
    lines = [
        [f"{kind} @{k}", *(percent(row.polymorph_rate(k, new), interval=k == 1) for row in rows)]
        for kind, new in kinds
        for k in CUTOFFS
    ]
    lines.append(["calibration error", *(number(row.plain_calibration_error) for row in rows)])
    return _by_method(rows, lines)


def _by_method(rows: Sequence[SymmetryRow], lines: Iterable[Sequence[str]]) -> str:
    """A line for each figure: with a column for each, terminals would cut them off."""
    return table(["", *(row.run.name for row in rows)], lines)


def _results_table(rows: Sequence[SymmetryRow]) -> str:
    lines = _cutoff_lines(rows)
    lines.append(["legal", *(percent(row.legal) for row in rows)])
    lines.append(["calibration error", *(number(row.calibration_error) for row in rows)])
    return _by_method(rows, lines)


_PAIRED = (
    "McNemar's exact test: rows that only the first method has right, those that only the second "
    "has, and p."
)


def _paired_table(rows: Sequence[SymmetryRow]) -> str:
    tests = paired_tests(rows)
    names = list(dict.fromkeys(name for _, _, own in tests for name in own))
    lines = []
    for first, second, own in tests:
        cells = (_paired_cell(own[name]) if name in own else "-" for name in names)
        lines.append([f"{first} against {second}", *cells])
    return table(["", *names], lines)


def _paired_cell(test: PairedTest) -> str:
    return f"{test.first_only} : {test.second_only}, {p_value(test.p_value)}"


def _kind_table(rows: Sequence[SymmetryRow], new: bool) -> str:
    return _by_method(rows, _cutoff_lines(rows, new))


def _cutoff_lines(rows: Sequence[SymmetryRow], new: bool | None = None) -> list[list[str]]:
    places: tuple[Place, ...] = ("group", "assignment")
    return [
        [f"{place} @{k}", *(percent(row.rate(place, k, new), interval=k == 1) for row in rows)]
        for place in places
        for k in CUTOFFS
    ]


def _answers_table(rows: Sequence[SymmetryRow]) -> str:
    lines = [
        ["made", *(row.answers.kind for row in rows)],
        ["legal", *(number(100 * row.answers.legal, 2) for row in rows)],
        ["exact", *(number(100 * row.answers.exact, 2) for row in rows)],
    ]
    for library, own in rows[0].answers.rouge.items():
        for name in own:
            scores = (number(row.answers.rouge[library][name], 2) for row in rows)
            lines.append([f"{library} {name}", *scores])
    return _by_method(rows, lines)


def _run_table(rows: Sequence[SymmetryRow]) -> str:
    fields: list[tuple[str, Callable[[SymmetryRow], object]]] = [
        ("split", lambda row: row.run.split),
        ("rows", lambda row: len(row.outcomes)),
        ("property told", lambda row: row.run.target),
        ("training set", lambda row: row.run.training_set),
        ("training rows", lambda row: row.run.training_size),
        ("model", lambda row: row.run.model),
        ("seed", lambda row: row.run.seed),
        ("ranking (s)", lambda row: f"{row.run.seconds:.1f}"),
    ]
    lines = [[name, *(text(get(row)) for row in rows)] for name, get in fields]
    for name in dict.fromkeys(name for row in rows for name in row.figures):
        lines.append([name.replace("_", " "), *(_figure(row.figures, name) for row in rows)])
    return _by_method(rows, lines)


def _figure(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.5g}" if name in figures else "-"


def to_png(rows: Sequence[SymmetryRow]) -> bytes:
    """How sure and how often right the first candidates are, and exact assignments by cutoff."""
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _plot_reliability(left, rows)
    _plot_cutoffs(right, rows)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    return png(figure)


def _plot_reliability(axes: Axes, rows: Sequence[SymmetryRow]) -> None:
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=1, linestyle="--")
    for index, row in enumerate(rows):
        bins = [one for one in row.reliability if one.rows >= _FEWEST]
        rates = [Rate(one.right, one.rows) for one in bins]
        shares = np.array([100 * one.right / one.rows for one in bins])
        bounds = np.array([rate.interval for rate in rates]).reshape(-1, 2)
        axes.errorbar(
            [100 * one.sure for one in bins],
            shares,
            yerr=np.abs(100 * bounds.T - shares),
            fmt=_marker(index),
            linestyle="-",
            linewidth=1,
            markersize=5,
            color=_colour(index),
            capsize=2,
        )
    axes.set_xlim(-2, 102)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("probability of the first candidate (%)")
    axes.set_ylabel("first candidate right (%), 95 % intervals")
    axes.grid(alpha=0.3)


def _plot_cutoffs(axes: Axes, rows: Sequence[SymmetryRow]) -> None:
    """Bars of all rows; a mark where rows of new formulas alone stand."""
    width = 0.8 / max(len(rows), 1)
    for index, row in enumerate(rows):
        places = np.arange(len(CUTOFFS)) + (index - (len(rows) - 1) / 2) * width
        rates = [row.rate("assignment", k) for k in CUTOFFS]
        shares = np.array([100 * (rate.value or 0.0) for rate in rates])
        bounds = np.array([rate.interval for rate in rates])
        axes.bar(
            places,
            shares,
            0.9 * width,
            yerr=np.abs(100 * bounds.T - shares),
            color=_colour(index),
            alpha=0.75,
            capsize=2,
            label=row.run.name,
        )
        new = [row.rate("assignment", k, new=True).value for k in CUTOFFS]
        marked = [(x, 100 * y) for x, y in zip(places, new, strict=True) if y is not None]
        for x, y in marked:
            axes.scatter(x, y, marker="_", s=90, color="black", zorder=3)
    axes.set_xticks(np.arange(len(CUTOFFS)), [f"first {k}" for k in CUTOFFS])
    axes.set_ylim(0, 100)
    axes.set_ylabel("exact assignment (%); line: new formulas alone")
    axes.grid(axis="y", alpha=0.3)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]
