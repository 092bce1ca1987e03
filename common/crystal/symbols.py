"""Space groups as a user types them: a number, or a Hermann-Mauguin symbol of any setting."""

import re
from difflib import get_close_matches
from functools import cache

import spglib

from common.crystal.symmetry import NUM_SPACE_GROUPS, hall_settings, standard_settings
from common.errors import UserError

#: What the groups with an e-glide plane were called until 1995 (International Tables A, 5th ed.,
#: section 1.3).
_FORMER = {"Aem2": "Abm2", "Aea2": "Aba2", "Cmce": "Cmca", "Cmme": "Cmma", "Ccce": "Ccca"}
_MONOCLINIC = range(3, 16)
#: Whose "-3" was written "3" until 1983, Fm3m for Fm-3m; no other cubic group is called so.
_CUBIC = range(195, 231)
#: A screw axis as SHELX writes it, P2(1)/c.
_SCREW = re.compile(r"(?<=[2346])\(([1-5])\)")
#: A symbol and which of its settings is meant: Fd-3m:2, R-3m:H; the ICSD writes Fd-3mZ, R-3mH.
_WITH_CHOICE = re.compile(r"(?P<symbol>[^:]+?)(?::(?P<choice>[-\w]+)|(?P<letter>[SZHR]))")
_CHOICES = {"S": "1", "Z": "2", "h": "H", "r": "R"}
_LONGEST = 20
_ADVICE = "give a number from 1 to 230, or a symbol such as Fm-3m"


def parse_space_group(text: str) -> tuple[int, str]:
    """The number of a space group, and what is to be said of its setting.

    Args:
        text: a number, or a short or full symbol; blanks, underscores and the brackets of P2(1)/c
            do not count. After the symbol may stand which setting is meant: the origin (``:1``,
            ``:2``; ``S`` or ``Z``), the axes of a rhombohedral group (``:H``, ``:R``; ``H`` or
            ``R``), or spglib's name of it (``:b1``).

    Returns:
        The number, 1-230, and one line if the symbol is not of the standard setting (see
        ``common.crystal.symmetry``), else nothing.

    Raises:
        UserError: if it is no number of a group and no symbol; names the symbols most like it. If
            the symbol has no such setting; names those that it has.
    """
    try:
        number = float(text)
    except ValueError:
        return _of_symbol(text)
    if not 1 <= number <= NUM_SPACE_GROUPS or number != int(number):
        raise UserError(f"space group {text.strip()[:_LONGEST]}: {_ADVICE}")
    return int(number), ""


def _of_symbol(text: str) -> tuple[int, str]:
    whole = symbol = _plain(text)
    choice = ""
    if match := _WITH_CHOICE.fullmatch(whole):
        symbol, choice = match["symbol"], match["choice"] or match["letter"]
    shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    if symbol not in _symbols():
        raise UserError(f"unknown space group {shown!r}: {_ADVICE}{_like(symbol[:_LONGEST])}")
    entries = _symbols()[symbol]
    meant = [entry for entry in entries if _is_choice(choice, entry.choice)]
    if not meant:
        known = ", ".join(sorted({entry.choice for entry in entries if entry.choice}))
        has = f"it has {known}" if known else "it has only one"
        raise UserError(f"space group {shown!r}: {symbol} has no setting {choice!r}; {has}")
    number = meant[0].number
    usual = standard_settings()[number]
    if usual.hall_number in {entry.hall_number for entry in meant}:
        return number, ""
    name = _plain(usual.international_short) + (f":{usual.choice}" if choice else "")
    return number, (
        f"{whole} is space group {number} in another setting: crystals, sites and letters are "
        f"those of the standard one, {name}"
    )


def _plain(symbol: str) -> str:
    return _SCREW.sub(r"\1", "".join(symbol.replace("_", "").split()))


def _is_choice(asked: str, own: str) -> bool:
    """Whether what a user writes after a symbol is spglib's choice; of 1cab, 1 is the origin's."""
    asked = _CHOICES.get(asked, asked)
    return asked in ("", own) or (asked in ("1", "2") and own.startswith(asked))


def _like(symbol: str) -> str:
    """The known symbols most like one, whatever their case."""
    known = {name.lower(): name for name in _symbols()}
    found = get_close_matches(symbol.lower(), known, n=3)
    return f"; like it: {', '.join(known[name] for name in found)}" if found else ""


@cache
def _symbols() -> dict[str, list[spglib.SpaceGroupType]]:
    """spglib's entries of all symbols; of two groups' entries those that hold the standard one."""
    usual = {entry.hall_number for entry in standard_settings().values()}
    found: dict[str, list[spglib.SpaceGroupType]] = {}
    for entry in sorted(hall_settings(), key=lambda entry: entry.hall_number not in usual):
        full = entry.international_full
        names = [entry.international_short, full, *entry.international.split("=")]
        if entry.number in _MONOCLINIC:  # P 1 21/n 1 is written P21/n
            names.append("".join(part for part in full.split() if part != "1"))
        names += [_FORMER[name] for name in names if name in _FORMER]
        if entry.number in _CUBIC:
            names += [name.replace("-3", "3") for name in names]
        for name in dict.fromkeys(map(_plain, names)):
            entries = found.setdefault(name, [])
            if not entries or entries[0].number == entry.number:
                entries.append(entry)
    return found
