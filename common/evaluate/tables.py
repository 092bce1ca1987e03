"""Markdown tables, and how figures are written in their cells."""

from collections.abc import Iterable, Sequence

from common.evaluate.statistics import Rate


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    names = [name.replace("|", "\\|") for name in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, marks, *cells))


def percent(rate: Rate | None, interval: bool = False) -> str:
    """A rate in %, if wanted with its 95 % interval; a dash where there is none."""
    if rate is None or rate.value is None:
        return "-"
    # Rounding must not turn 99.97 % into "all".
    share = "100" if rate.hits == rate.total else f"{min(100 * rate.value, 99.99):.2f}"
    if not interval:
        return share
    low, high = rate.interval
    return f"{share} ({100 * low:.1f} to {100 * high:.1f})"


def number(value: float | None, digits: int = 4) -> str:
    """With so many decimals; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def text(value: object) -> str:
    """As Python prints it; a dash for None."""
    return "-" if value is None else str(value)
