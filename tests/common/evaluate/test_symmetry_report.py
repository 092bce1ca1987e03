"""Figures of symmetry rankings worked out by hand, and the files of a report."""

import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from common.errors import UserError
from common.evaluate.statistics import Rate
from common.evaluate.symmetry_prediction import Outcome
from common.evaluate.symmetry_report import (
    Answers,
    SymmetryRow,
    SymmetryRun,
    paired_test,
    polymorph_test,
    to_markdown,
    to_png,
    to_summary,
    write_symmetry_report,
)
from common.evaluate.tables import Shown

ROUGE = {"rouge_score": {"rouge-1": 61.25, "rouge-l": 50.0}}
IDS = ("m-1", "m-2", "m-3", "m-4")
#: Place of the group, of the assignment; the first two rows are of formulas that training has.
PLACES = ((0, 0), (0, 4), (7, 19), (None, None))


def row(name: str = "model", places: tuple = PLACES, **changes: object) -> SymmetryRow:
    run = SymmetryRun(name, "val", "band_gap", "train", 25505, "0123abcd", 3, 12.34)
    outcomes = tuple(Outcome(group, site, 0.75, group is not None) for group, site in places)
    answers = Answers("without constraint", 0.5, 0.25, ROUGE)
    made = SymmetryRow(run, IDS, outcomes, (False, False, True, True), answers)
    return replace(made, **changes)


def test_rates_by_hand() -> None:
    made = row()
    assert [made.rate("group", k) for k in (1, 5, 20)] == [Rate(2, 4), Rate(2, 4), Rate(3, 4)]
    assert [made.rate("assignment", k) for k in (1, 5, 20)] == [Rate(1, 4), Rate(2, 4), Rate(3, 4)]
    assert made.rate("assignment", 20, new=True) == Rate(1, 2)
    assert made.rate("assignment", 1, new=False) == Rate(1, 2)
    assert made.legal == Rate(3, 4)
    assert made.calibration_error == pytest.approx(0.5)
    assert [(one.rows, one.sure, one.right) for one in made.reliability] == [(4, 0.75, 1)]


def test_paired_test_counts_first_assignments() -> None:
    other = row("other", ((0, 1), (0, 0), (0, 0), (0, 0)))
    found = paired_test(row(), other)
    assert (found.first_only, found.second_only, found.both, found.neither) == (1, 3, 0, 0)
    found = paired_test(row(), other, new=False)
    assert (found.first_only, found.second_only, found.both, found.neither) == (1, 1, 0, 0)
    with pytest.raises(ValueError, match="other references"):
        paired_test(row(), row(ids=IDS[::-1]))


def test_polymorphs_by_hand() -> None:
    first, other = row(polymorphs=(0, 3, None, 20)), row("other", polymorphs=(0, 0, 0, None))
    assert [first.polymorph_rate(k) for k in (1, 5, 20)] == [Rate(1, 4), Rate(2, 4), Rate(2, 4)]
    assert first.polymorph_rate(5, new=False) == Rate(2, 2)
    assert first.polymorph_rate(5, new=True) == Rate(0, 2)
    found = polymorph_test(first, other, 1)
    assert (found.first_only, found.second_only, found.both, found.neither) == (0, 2, 1, 1)
    assert polymorph_test(first, other, 5).second_only == 1
    assert polymorph_test(first, other, 1, new=True).second_only == 1
    with pytest.raises(ValueError, match="'beside' was not asked for any polymorph"):
        polymorph_test(first, row("beside"), 1)
    with pytest.raises(ValueError, match="other references"):
        polymorph_test(first, row(ids=IDS[::-1], polymorphs=(0, 0, 0, 0)), 1)
    text = to_markdown([first, row("beside"), other])
    assert "## Any polymorph" not in to_markdown([row()])
    asked = text.split("## Any polymorph")[1].split("## Paired")[0]
    assert "beside" not in asked
    assert column(asked, "model") == [
        *("25.00 (4.6 to 69.9)", "50.00", "50.00"),
        *("0.00 (0.0 to 65.8)", "0.00", "0.00"),
        *("50.00 (9.5 to 90.5)", "100", "100"),
        "-",
    ]
    paired = text.split("## Paired tests")[1].split("## Answers")[0]
    assert cells(paired, "model against beside") == ["0 : 0, 1", "0 : 0, 1", "-", "-", "-"]
    assert cells(paired, "model against other")[2:] == ["0 : 2, 0.5", "0 : 1, 1", "0 : 1, 1"]
    assert "## Paired tests" not in to_markdown([row()])


def test_calibration_where_any_polymorph_is_asked_for() -> None:
    """Of the row's own symmetry, in rankings that are not those of the first table."""
    plain = tuple(Outcome(0, place, 0.55, True) for place in (0, 1, 0, 0))
    made = row(polymorphs=(0, 0, 0, 0), plain=plain)
    assert made.calibration_error == pytest.approx(0.5)
    assert made.plain_calibration_error == pytest.approx(0.2)
    assert row().plain_calibration_error is None
    asked = to_markdown([made]).split("## Any polymorph")[1]
    assert cells(asked, "calibration error") == ["0.2000"]


def test_the_summary_is_a_line_per_row_in_a_terminal() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Shown(to_summary([row(), row("template prior, known polymorphs excluded")])))
    shown = console.export_text().splitlines()
    assert sum("25.00 (4.6 to 69.9)" in line for line in shown) == 2
    (own,) = (line for line in shown if line.startswith(" model"))
    assert " ".join(own.split()) == "model 25.00 (4.6 to 69.9) 50.00 75.00 50.00"
    assert "Known from training" not in to_summary([row()])
    seen = row()
    seen = replace(seen, run=replace(seen.run, seen_ids=1, seen_symmetry=2, seen_in="train"))
    for text in (to_summary([seen]), to_markdown([seen])):
        assert "1 of 4 references have the id of a row of train, 2 the formula" in text


def cells(text: str, start: str) -> list[str]:
    """Of the first line of a table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def column(text: str, name: str) -> list[str]:
    """Of the only table of a text."""
    head, _, *lines = (line for line in text.splitlines() if line.startswith("|"))
    place = [cell.strip() for cell in head.split("|")].index(name)
    return [line.split("|")[place].strip() for line in lines]


def test_markdown() -> None:
    other = row("prior", ((0, 1), (0, 0), (0, 0), (0, 0)), figures={"nats_of_truth": 4.81234})
    text = to_markdown([row(), other], plot="symmetry.png")
    assert column(text.split("## Formulas")[0], "model") == [
        *("50.00 (15.0 to 85.0)", "50.00", "75.00"),
        *("25.00 (4.6 to 69.9)", "50.00", "75.00"),
        *("75.00", "0.5000"),
    ]
    assert cells(text, "model against prior") == ["1 : 3, 0.62", "0 : 2, 0.5"]
    new, known, answers = (
        text.split(f"## {part}")[1].split("\n## ")[0] for part in ("Formulas", "Other", "Answers")
    )
    assert "2 of 4 rows" in new
    assert column(new, "model")[3:] == ["0.00 (0.0 to 65.8)", "0.00", "50.00"]
    assert column(known, "model")[3:] == ["50.00 (9.5 to 90.5)", "100", "100"]
    assert column(answers, "model") == ["without constraint", "50.00", "25.00", "61.25", "50.00"]
    for name, value in (
        ("split", "val"),
        ("rows", "4"),
        ("property told", "band_gap"),
        ("training set", "train"),
        ("training rows", "25505"),
        ("model", "0123abcd"),
        ("seed", "3"),
        ("ranking (s)", "12.3"),
    ):
        assert cells(text.split("## How")[1], name) == [value, value]
    assert cells(text, "nats of truth") == ["-", "4.8123"]
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_files(tmp_path: Path) -> None:
    other_row = row("other", polymorphs=(0, 3, None, 20), plain=row().outcomes)
    paths = write_symmetry_report([row(), other_row], tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["symmetry.json", "symmetry.md", "symmetry.png"]
    data = json.loads(paths["json"].read_text())
    first = data["rows"][0]
    assert first["assignment"]["all"]["5"]["percent"] == 50
    assert first["assignment"]["new_formula"]["20"]["hits"] == 1
    assert first["outcomes"][3] == {
        "material_id": "m-4",
        "new_formula": True,
        "group": None,
        "assignment": None,
        "first": 0.75,
        "legal": False,
    }
    other = data["rows"][1]
    assert [outcome["polymorph"] for outcome in other["outcomes"]] == [0, 3, None, 20]
    assert other["polymorphs"]["known_formula"]["5"]["hits"] == 2
    assert first["polymorphs"] is None
    assert first["plain_calibration_error"] is None
    assert other["plain_calibration_error"] == 0.5
    assert other["outcomes"][1]["plain_assignment"] == 4
    assert other["outcomes"][1]["plain_first"] == 0.75
    (tested,) = data["paired_tests"]
    assert (tested["first"], tested["second"]) == ("model", "other")
    assert tested["tests"].keys() == {"assignment @1", "assignment @1, new formulas"}
    assert tested["tests"]["assignment @1"]["p_value"] == 1
    assert matplotlib.image.imread(paths["png"]).shape[0] > 300
    before = {suffix: path.read_bytes() for suffix, path in paths.items()}
    write_symmetry_report([row(), other_row], tmp_path / "new")
    assert {suffix: path.read_bytes() for suffix, path in paths.items()} == before
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_symmetry_report([row()], tmp_path / "file")


def test_plots_of_extreme_rows() -> None:
    nothing = row(places=((None, None),) * 4, new=(True,) * 4)
    everything = row("all", ((0, 0),) * 4, new=(False,) * 4)
    for rows in ([nothing], [everything], [nothing, everything]):
        assert to_png(rows).startswith(b"\x89PNG")
