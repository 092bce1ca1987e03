"""Space groups as a user types them: a number, or a Hermann-Mauguin symbol of any setting."""

from difflib import get_close_matches
from functools import cache

from common.crystal.symmetry import NUM_SPACE_GROUPS, hall_settings, standard_settings
from common.errors import UserError

#: What the groups with an e-glide plane were called until 1995 (International Tables A, 5th ed.,
#: section 1.3).
_FORMER = {"Aem2": "Abm2", "Aea2": "Aba2", "Cmce": "Cmca", "Cmme": "Cmma", "Ccce": "Ccca"}
_MONOCLINIC = range(3, 16)
#: Whose "-3" was written "3" until 1983, Fm3m for Fm-3m; no other cubic group is called so.
_CUBIC = range(195, 231)
_LONGEST = 20
_ADVICE = "give a number from 1 to 230, or a symbol such as Fm-3m"


def parse_space_group(text: str) -> tuple[int, str]:
    """The number of a space group, and what is to be said of its setting.

    Args:
        text: a number, or a short or full symbol; blanks and underscores do not count.

    Returns:
        The number, 1-230, and one line if the symbol is not of the standard setting (see
        ``common.crystal.symmetry``), else nothing.

    Raises:
        UserError: if it is no number of a group and no symbol; names the symbols most like it.
    """
    try:
        number = float(text)
    except ValueError:
        return _of_symbol(text)
    if not 1 <= number <= NUM_SPACE_GROUPS or number != int(number):
        raise UserError(f"space group {text.strip()[:_LONGEST]}: {_ADVICE}")
    return int(number), ""


def _of_symbol(text: str) -> tuple[int, str]:
    symbol = _plain(text)
    standard, others = _symbols()
    if symbol in standard:
        return standard[symbol], ""
    if symbol not in others:
        shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
        raise UserError(f"unknown space group {shown!r}: {_ADVICE}{_like(symbol[:_LONGEST])}")
    number = others[symbol]
    usual = _plain(standard_settings()[number].international_short)
    return number, (
        f"{symbol} is space group {number} in another setting: crystals, sites and letters are "
        f"those of the standard one, {usual}"
    )


def _plain(symbol: str) -> str:
    return "".join(symbol.replace("_", "").split())


def _like(symbol: str) -> str:
    """The known symbols most like one, whatever their case."""
    known = {name.lower(): name for names in _symbols() for name in names}
    found = get_close_matches(symbol.lower(), known, n=3)
    return f"; like it: {', '.join(known[name] for name in found)}" if found else ""


@cache
def _symbols() -> tuple[dict[str, int], dict[str, int]]:
    """The groups by the symbols of their standard settings, and by those of others alone."""
    standard: dict[str, int] = {}
    others: dict[str, int] = {}
    usual = {entry.hall_number for entry in standard_settings().values()}
    for entry in hall_settings():
        full = entry.international_full
        names = [entry.international_short, full, *entry.international.split("=")]
        if entry.number in _MONOCLINIC:  # P 1 21/n 1 is written P21/n
            names.append("".join(part for part in full.split() if part != "1"))
        names += [_FORMER[name] for name in names if name in _FORMER]
        if entry.number in _CUBIC:
            names += [name.replace("-3", "3") for name in names]
        found = standard if entry.hall_number in usual else others
        found.update((_plain(name), entry.number) for name in names)
    return standard, {name: number for name, number in others.items() if name not in standard}
