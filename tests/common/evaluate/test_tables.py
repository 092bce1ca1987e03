"""Tables in a terminal."""

import io
from collections import Counter

from rich.console import Console

from common.evaluate.tables import Shown, table

#: What ``evaluate symmetry`` sets side by side.
METHODS = [
    "glm4_tiny_fm",
    "glm4_tiny_fm and template prior",
    "template prior",
    "template prior, known polymorphs excluded",
    "majority template",
    "nearest composition",
]


def lines_of(markdown: str, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(Shown(markdown))
    return console.export_text().splitlines()


def characters(lines: list[str]) -> Counter[str]:
    """But for blanks and the rule."""
    return Counter(c for c in "".join(lines) if c not in " \N{BOX DRAWINGS LIGHT HORIZONTAL}")


def test_nothing_is_cut_off() -> None:
    lines = [
        ["assignment @1", *["64.35 (63.4 to 65.3)"] * len(METHODS)],
        ["model", *["1c8b949ef624, 82bb42238bc4"] * len(METHODS)],
    ]
    markdown = table(["", *METHODS], lines)
    narrow, wide = lines_of(markdown, 80), lines_of(markdown, 500)
    assert len(wide) < 8 < len(narrow)
    assert max(map(len, narrow)) <= 80
    assert characters(narrow) == characters(wide)
