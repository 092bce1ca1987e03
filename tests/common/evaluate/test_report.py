"""Figures of a row worked out by hand, and the files of a report."""

import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from common.errors import UserError
from common.evaluate.report import to_markdown, to_png, to_summary, write_report
from common.evaluate.rows import EvaluationRow, Outcome
from common.evaluate.tables import Shown
from tests.evaluation_rows import MISS, control, five, hit, run


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
