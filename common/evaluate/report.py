"""The report that sets result rows side by side: JSON, Markdown tables, a plot."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.evaluate.match import STANDARD
from common.evaluate.rows import EvaluationRow, NamedTest, Stratum, tests_against_first, to_json
from common.evaluate.strata import FREEDOM
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
    if tests := paired_table(tests_against_first(rows)):
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
    "of 0.5, 10 degrees, 0.3. Volume error: of the volume per atom in %, which RMSE does not "
    "count, mean over matches. METRe: references matched by any candidate of their composition; "
    "cRMSE: mean best distance of those, unmatched counted as 0.5."
)


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
        ("volume error", _volume_error),
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


def _volume_error(row: EvaluationRow) -> str:
    error = row.metrics.volume_error
    return "-" if error is None else f"{100 * error:.1f}"


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
