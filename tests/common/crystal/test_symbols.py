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


def test_former_cubic_symbols_are_of_one_group_each() -> None:
    own = {n: wyckoff_summary(n).symbol for n in range(1, NUM_SPACE_GROUPS + 1)}
    former = {n: own[n].replace("-3", "3") for n in range(200, NUM_SPACE_GROUPS + 1)}
    former = {n: symbol for n, symbol in former.items() if symbol != own[n]}
    assert len(former) == 17  # the groups of classes m-3 and m-3m
    assert not set(former.values()) & set(own.values())
    for number, symbol in former.items():
        assert parse_space_group(symbol) == (number, "")


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
        ("Fm3m", 225),
        ("Fd3m", 227),
        ("P a 3", 205),
        ("P4/m32/m", 221),
        ("F23", 196),
        ("R3m", 160),
        ("225.0", 225),
        ("P2(1)/c", 14),
        ("P 2(1)2(1)2(1)", 19),
        ("P6(3)/mmc", 194),
        ("Fd-3m:2", 227),
        ("F d -3 m :2", 227),
        ("Fd-3mZ", 227),
        ("Fd3m:2", 227),
        ("R-3m:H", 166),
        ("R -3 m H", 166),
        ("R3c:h", 161),
        ("P21/c:b1", 14),
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
        ("P2(1)/n", 14, "P21/c"),
        ("Fd-3m:1", 227, "Fd-3m:2"),
        ("F d -3 m S", 227, "Fd-3m:2"),
        ("R-3m:R", 166, "R-3m:H"),
        ("R-3mR", 166, "R-3m:H"),
        ("Pncb:2", 50, "Pban:2"),
        ("P21/n:b2", 14, "P21/c:b1"),
    ],
)
def test_other_setting_is_said(text: str, number: int, usual: str) -> None:
    found, note = parse_space_group(text)
    assert found == number
    assert "in another setting" in note
    assert note.endswith(f"the standard one, {usual}")
    assert "\n" not in note


def test_every_choice_of_every_group() -> None:
    """The choices are those of moyopy's table."""
    for hall in range(1, NUM_HALL_SYMBOLS + 1):
        entry = moyopy.HallSymbolEntry(hall)
        if entry.setting:
            found, note = parse_space_group(f"{entry.hm_short}:{entry.setting}")
            assert found == entry.number
            assert bool(note) == (entry.setting not in ("b", "b1", "2", "H"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Fd-3m:3", "space group 'Fd-3m:3': Fd-3m has no setting '3'; it has 1, 2"),
        ("Fd-3m:H", "Fd-3m has no setting 'H'; it has 1, 2"),
        ("P3m1:H", "P3m1 has no setting 'H'; it has only one"),
        ("R-3m:2", "R-3m has no setting '2'; it has H, R"),
        ("Fm-3mS", "Fm-3m has no setting 'S'; it has only one"),
        ("Fd-3m:", "unknown space group 'Fd-3m:'"),
        ("Fd-3q:1", "unknown space group 'Fd-3q:1'"),
        ("P2(7)/c", "unknown space group 'P2(7)/c'"),
        (
            "fm-3m",
            "'fm-3m': give a number from 1 to 230, or a symbol such as Fm-3m; like it: Fm-3m",
        ),
        ("Fn3m", "like it: "),
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
