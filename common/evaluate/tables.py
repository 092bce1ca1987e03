"""How reports write numbers, tables and plots."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from matplotlib.figure import Figure
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, MarkdownElement, TableElement
from rich.table import Table

from common.evaluate.statistics import Rate
from common.files import write_together

#: Of the rows of a report, in their order; told apart by the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    names = [name.replace("|", "\\|") for name in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, marks, *cells))


class _FoldedTable(TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            assert isinstance(part, Table)
            for column in part.columns:
                column.overflow = "fold"
            yield part


class Shown(Markdown):
    """Markdown for a terminal: words too long for a table's column are broken, not cut off."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "table_open": _FoldedTable,
    }


def percent(rate: Rate | None, interval: bool = False) -> str:
    """A rate in %, and its 95 % interval; a dash of no trials."""
    if rate is None or rate.value is None:
        return "-"
    # Rounding must not turn 99.97 % into "all".
    shown = "100" if rate.hits == rate.total else f"{min(100 * rate.value, 99.99):.2f}"
    if not interval:
        return shown
    low, high = rate.interval
    return f"{shown} ({100 * low:.1f} to {100 * high:.1f})"


def number(value: float | None, digits: int = 4) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def p_value(value: float) -> str:
    """A p-value; below what a float can hold, that it is."""
    return f"{value:.2g}" if value else "< 1e-300"


def text(value: object) -> str:
    """Anything, or a dash for None."""
    return "-" if value is None else str(value)


def seen_note(ids: int | None, symmetry: int | None, rows: int, training_set: str) -> list[str]:
    """A paragraph for a report some of whose references were trained on; none for others.

    Args:
        ids: of them, so many as have the id of a training row; None if not known.
        symmetry: so many as have its formula, space group and sites.
        rows: all of them.
        training_set: its name.
    """
    if not ids and not symmetry:
        return []
    return [
        f"**Known from training:** {ids} of {rows} references have the id of a row of "
        f"{training_set}, {symmetry} the formula, space group and sites of one. What is measured "
        "on these says little of crystals that are new."
    ]


def write_trio(
    folder: Path, name: str, data: str, plot: bytes, markdown: Callable[[str], str]
) -> dict[str, Path]:
    """Writes ``<name>.json``, ``<name>.png`` and ``<name>.md``, all three or none.

    Args:
        folder: made if missing.
        name: of the files.
        data: JSON.
        plot: PNG.
        markdown: gives the text, told the plot's file name.

    Returns:
        the paths by suffix.

    Raises:
        UserError: if a file cannot be written.
    """
    paths = {suffix: Path(folder) / f"{name}.{suffix}" for suffix in ("json", "md", "png")}
    text = markdown(paths["png"].name)
    write_together({paths["json"]: data, paths["png"]: plot, paths["md"]: text})
    return paths


def png(figure: Figure) -> bytes:
    """A figure as a file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
