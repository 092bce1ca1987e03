"""Space groups by number and symbol; the oracle of the symbols is moyopy's table of settings."""

import moyopy
import pytest

from common.crystal.symbols import parse_space_group
from common.crystal.symmetry import NUM_HALL_SYMBOLS, NUM_SPACE_GROUPS
from common.crystal.wyckoff import wyckoff_summary
from common.errors import UserError


def test_symbols_of_all_settings() -> None:
    for hall in range(1, NUM_HALL_SYMBOLS + 1):
        entry = moyopy.HallSymbolEntry(hall)
        for symbol in (entry.hm_short, entry.hm_full, entry.hm_short.replace(" ", "")):
            assert parse_space_group(symbol)[0] == entry.number, symbol


def test_own_symbols_are_of_the_standard_setting() -> None:
    for number in range(1, NUM_SPACE_GROUPS + 1):
        assert parse_space_group(wyckoff_summary(number).symbol) == (number, "")
        assert parse_space_group(str(number)) == (number, "")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Fm-3m", 225),
        (" F m -3 m ", 225),
        ("P6_3/mmc", 194),
        ("P63/mmc", 194),
        ("P 63/m m c", 194),
        ("P2_1/c", 14),
        ("P 1 21/c 1", 14),
        ("P4/m-32/m", 221),
        ("P3m1", 156),
        ("P31m", 157),
        ("P121", 3),
        ("Abm2", 39),
        ("Aba2", 41),
        ("Cmca", 64),
        ("Cmma", 67),
        ("Ccca", 68),
        ("225.0", 225),
    ],
)
def test_standard_setting(text: str, number: int) -> None:
    assert parse_space_group(text) == (number, "")


@pytest.mark.parametrize(
    ("text", "number", "usual"),
    [
        ("P21/n", 14, "P21/c"),
        ("P 1 1 2_1/b", 14, "P21/c"),
        ("I2/a", 15, "C2/c"),
        ("Pbnm", 62, "Pnma"),
        ("P m c n", 62, "Pnma"),
        ("B2/b", 15, "C2/c"),
    ],
)
def test_other_setting_is_said(text: str, number: int, usual: str) -> None:
    found, note = parse_space_group(text)
    assert found == number
    assert "in another setting" in note
    assert note.endswith(f"the standard one, {usual}")
    assert "\n" not in note


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "fm-3m",
            "'fm-3m': give a number from 1 to 230, or a symbol such as Fm-3m; like it: Fm-3m",
        ),
        ("Fm3m", "like it: Fm-3m"),
        ("P21/q", "P21/c"),
        ("", "unknown space group ''"),
        ("0", "space group 0: give a number from 1 to 230"),
        ("231", "space group 231: "),
        ("1.5", "space group 1.5: "),
        ("nan", "space group nan: "),
        ("inf", "space group inf: "),
        ("9" * 5000, "space group 99999999999999999999: "),
        ("P" * 5000, "unknown space group 'PPPPPPPPPPPPPPPPPPPP...'"),
    ],
)
def test_what_is_no_group(text: str, expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_space_group(text)
    assert expected in str(refusal.value)
    assert len(str(refusal.value)) < 200
