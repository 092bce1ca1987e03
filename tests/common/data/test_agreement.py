"""The comparison of the two ways to label: what it counts, and what it cannot compare."""

import csv
import re
from pathlib import Path

import pytest

from common.data.agreement import main
from common.errors import UserError
from tests.crystals import textbook


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNI_MDM_CACHE", str(tmp_path / "cache"))


def written(path: Path, ids: list[str]) -> str:
    """The path of a CSV of as many rock salts."""
    cif = textbook("rock salt NaCl").to(fmt="cif")
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["material_id", "cif"], *([one, cif] for one in ids)])
    return str(path)


def test_a_repeated_id_does_not_hide_the_row_that_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(written(tmp_path / "rows.csv", ["a", "b", "a"]), None, 1)
    assert ended.value.code == 0
    counts = dict(re.findall(r"([a-z, ]+?) +\W +(\d+) ", capsys.readouterr().out))
    counted = {name.strip(): int(count) for name, count in counts.items()}
    assert counted["refused by both"] == 0
    assert sum(counted.values()) == 2


def test_nothing_to_compare_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows"):
        main(written(tmp_path / "rows.csv", []), None, 1)
