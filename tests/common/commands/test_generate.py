"""What `uni-mdm generate` says in the terminal."""

import io
from pathlib import Path

from rich.console import Console

from common.commands.generate import _show
from common.runs import Outcome

QUERY = {
    "name": "",
    "formula": "SrTiO3",
    "asked": None,
    "formula_units": None,
    "band_gap": 1.8,
    "formation_energy": None,
}
ROW = {
    "rank": 1,
    "space_group": 221,
    "space_group_symbol": "Pm-3m",
    "sites": "Sr:1a Ti:1b O:3c",
    "formula": "SrTiO3",
    "probability": 0.5,
    "density": 5.0,
    "nearest": None,
    "warnings": [],
}


def shown(rows: int, resumed: int = 0, **query: object) -> list[str]:
    entries = [{"status": "done", "query": QUERY | query, "crystals": [ROW]} for _ in range(rows)]
    console = Console(width=80, file=io.StringIO(), record=True)
    _show(console, [], Outcome(Path("out"), resumed, entries, [{"name": "prior", "hash": "1"}]))
    return console.export_text().splitlines()


def test_crystal_like_none_has_dashes() -> None:
    (line,) = (line for line in shown(1) if "Pm-3m" in line)
    assert line.split()[-4:] == ["5.00", "-", "-", "-"]


def test_brackets_of_a_formula_are_no_colours() -> None:
    title = "K3Fe(CN)6, asked as K3[Fe(CN)6], band gap 1.8 eV"
    assert title in map(str.strip, shown(1, formula="K3Fe(CN)6", asked="K3[Fe(CN)6]"))


def test_what_had_been_answered_are_requests() -> None:
    """The line before is about symmetries."""
    assert "2 of the 3 requests had been answered before" in shown(3, 2)
    assert not any("before" in line for line in shown(3))


def test_many_requests_say_what_went_wrong() -> None:
    warned = ROW | {"warnings": ["two atoms are only 0.50 A apart"]}
    failed = {
        "index": 1,
        "status": "failed",
        "query": QUERY | {"name": "mine"},
        "error": "no sites",
    }
    done = {"status": "done", "query": QUERY}
    entries = [done | {"crystals": [ROW, warned, warned]}, failed | {"crystals": []}]
    console = Console(width=80, file=io.StringIO(), record=True)
    _show(console, [], Outcome(Path("out"), 0, entries, []))
    lines = console.export_text().splitlines()
    assert "1 of 2 requests answered" in lines
    assert "2 of 3 crystals have warnings, which report.html shows" in lines
    assert "request 2 (mine): no sites" in lines
    assert not any("warnings" in line for line in shown(3))
