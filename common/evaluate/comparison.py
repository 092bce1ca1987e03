"""The table of a contest: every figure of every contestant, and the paired tests between them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from common.evaluate.contest import Plan
from common.evaluate.report import paired_table, strata_lines
from common.evaluate.rows import EvaluationRow, NamedTest, named_tests, paired_test, summary
from common.evaluate.statistics import mean
from common.evaluate.tables import number, percent, table, text
from common.files import write_together

FORMAT = "uni-mdm comparison 1"
#: Ratio of the time that training took to the time it was given, beyond which the table says so.
DRIFT = 1.1


def paired_tests(rows: Sequence[EvaluationRow]) -> list[NamedTest]:
    """Every row against every later one; two seeds meet only if one row is a control's."""
    return [
        (first, second, paired_test(first, second))
        for first, second in combinations(rows, 2)
        if first.run.training is None
        or second.run.training is None
        or first.run.seed == second.run.seed
    ]


def to_markdown(plan: Plan, rows: Sequence[EvaluationRow]) -> str:
    """All figures in one table with a column for each row, and the paired tests."""
    parts = [
        "# Models compared",
        _LEGEND,
        "\n".join(f"- {line}" for line in notes(plan, rows)),
        table(["", *(row.run.name for row in rows)], [*_lines(rows)]),
        "## Paired tests",
        "McNemar's exact test on the match.",
        paired_table(paired_tests(rows)),
    ]
    if spread := _seeds(plan, rows):
        parts += ["## Over the seeds", "Mean (smallest to largest).", spread]
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "Match rates in % of all references with Wilson 95 % intervals, one sample each, not relaxed. "
    "Valid: prediction and reference also pass the composition and distance filter. Tight: stol "
    "0.3, 5 degrees, ltol 0.2 instead of 0.5, 10 degrees, 0.3. RMSE: mean over matches, in units "
    "of (V/N)^(1/3); cRMSE: unmatched counted as 0.5. By kind of structure: match rate, RMSE, "
    "number of references. Full calls: without the rows that only fill a call of the network. "
    "Operations are those of products of matrices, "
    "training's with padding."
)


def notes(plan: Plan, rows: Sequence[EvaluationRow]) -> Iterator[str]:
    """How the comparison was made, and where training took longer than it was given."""
    machine = plan.machine
    yield (
        f"{plan.minutes:g} min of training each, backend {machine.backend}, device "
        f"{machine.device}, threads: {machine.threads}"
    )
    for config, cost in zip(plan.configs, plan.costs, strict=True):
        steps = plan.steps(cost)
        yield (
            f"{config['name']}: {cost.seconds:.3f} s per step when timed in turn with the others, "
            f"hence {steps} steps ({steps / cost.epoch:.2f} epochs), within which its learning "
            "rate rises and falls"
        )
    for row in rows:
        if row.run.training is None:
            continue
        ratio = row.run.training.seconds / (60 * plan.minutes)
        if not 1 / DRIFT <= ratio <= DRIFT:
            yield (
                f"{row.run.name} took {row.run.training.seconds / 60:.1f} minutes: the machine "
                "was slower or faster than when the steps were timed"
            )


def _lines(rows: Sequence[EvaluationRow]) -> Iterator[list[str]]:
    """Lines of the table, a name and a cell for each row."""
    before: tuple[tuple[str, Callable[[EvaluationRow], object]], ...] = (
        ("given", lambda row: row.run.given),
        ("match", lambda row: percent(row.metrics.match_rate, interval=True)),
        ("valid", lambda row: percent(row.metrics.match_valid, interval=True)),
        ("tight", lambda row: percent(row.metrics.match_tight, interval=True)),
        ("RMSE", lambda row: number(row.metrics.rmse)),
        ("RMSE valid", lambda row: number(row.metrics.rmse_valid)),
        ("RMSE tight", lambda row: number(row.metrics.rmse_tight)),
        ("cRMSE", lambda row: number(row.metrics.crmse)),
    )
    after: tuple[tuple[str, Callable[[EvaluationRow], object]], ...] = (
        ("symmetry kept", lambda row: percent(row.metrics.symmetry_kept)),
        ("network calls", lambda row: row.run.network_calls),
        ("s / crystal", lambda row: number(row.seconds_per_structure)),
        ("s / crystal, full calls", lambda row: number(_full_seconds(row))),
        ("GFLOP / crystal", lambda row: _scaled(row.run.flops, 1e-9)),
        ("parameters", lambda row: _of_training(row, "parameters", 1.0, 0)),
        ("training (min)", lambda row: _of_training(row, "seconds", 1 / 60, 1)),
        ("training steps", lambda row: _of_training(row, "steps", 1.0, 0)),
        ("training (TFLOP)", lambda row: _of_training(row, "flops", 1e-12, 1)),
        ("training rows", lambda row: row.run.training_size),
        ("references", lambda row: f"{row.num_structures} of {row.run.split}"),
        ("seed", lambda row: row.run.seed),
        ("checkpoint", lambda row: row.run.checkpoint),
        ("device", lambda row: row.run.device),
    )
    for name, get in before:
        yield [name, *(text(get(row)) for row in rows)]
    yield from strata_lines(rows)
    for name, get in after:
        yield [name, *(text(get(row)) for row in rows)]


def _of_training(row: EvaluationRow, name: str, scale: float, digits: int) -> str | None:
    cost = row.run.training
    return None if cost is None else f"{scale * getattr(cost, name):.{digits}f}"


def _full_seconds(row: EvaluationRow) -> float | None:
    """Per crystal."""
    full = row.run.full_seconds
    return None if full is None else full / row.num_structures


def _scaled(value: float | None, scale: float) -> str | None:
    return None if value is None else f"{scale * value:.3g}"


def _seeds(plan: Plan, rows: Sequence[EvaluationRow]) -> str:
    """Figures of every contestant over its seeds; empty where there is but one."""
    figures: dict[str, Callable[[EvaluationRow], float | None]] = {
        "match": lambda row: _share(row.metrics.match_rate.value),
        "valid": lambda row: _share(row.metrics.match_valid.value),
        "tight": lambda row: _share(row.metrics.match_tight.value),
        "RMSE": lambda row: row.metrics.rmse,
        "cRMSE": lambda row: row.metrics.crmse,
    }
    lines = []
    for config in plan.configs:
        own = [row for row in rows if row.run.name.split(", seed ")[0] == config["name"]]
        if len(own) > 1:
            cells = (_spread([get(row) for row in own]) for get in figures.values())
            lines.append([config["name"], str(len(own)), *cells])
    return table(["", "seeds", *figures], lines) if lines else ""


def _share(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{number(mean(known))} ({min(known):.4f} to {max(known):.4f})"


def write_comparison(folder: Path, plan: Plan, rows: Sequence[EvaluationRow], name: str) -> Path:
    """Writes NAME.md and NAME.json, both or neither; returns the path of the first.

    Raises:
        UserError: if the system refuses.
    """
    data = {
        "format": FORMAT,
        "plan": asdict(plan),
        "notes": list(notes(plan, rows)),
        "rows": [summary(row) for row in rows],
        "paired_tests": named_tests(paired_tests(rows)),
    }
    path = folder / f"{name}.md"
    written = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_together({path: to_markdown(plan, rows), path.with_suffix(".json"): written})
    return path
