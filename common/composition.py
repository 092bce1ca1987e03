"""Formulas and Wyckoff sites as a user types them.

A formula is either reduced (``SrTiO3``: any number of formula units per cell) or has the cell's
real count (``Sr2Ti2O6``: two formula units in the primitive or in the conventional cell). What is
written with the atoms of its molecule (``O2``, ``Na2O2``) is no count: it is reduced (O, NaO).
Everything that is not such a formula is refused with one line that says why.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from pymatgen.core import Element

from common.crystal.wyckoff import wyckoff_summary
from common.elements import formula_text
from common.errors import UserError

#: Largest number of atoms a formula may count; the networks are trained on cells of up to 20.
MAX_FORMULA_ATOMS = 120
#: Largest number of atoms in the primitive cell that is proposed.
MAX_PRIMITIVE_ATOMS = 120
#: Largest number of atoms in the primitive cell that is generated, if z or the sites ask for it.
MAX_GIVEN_ATOMS = 200

_MAX_TEXT = 400
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SIGNS = "+-^\N{MINUS SIGN}\N{SUPERSCRIPT PLUS SIGN}\N{SUPERSCRIPT MINUS}"
_BRACKETS = {")": "(", "]": "["}
_WHOLE = (
    "counts must be whole numbers, for a site has one element: LiCo2O4, not Li0.5CoO2; "
    "a hydrate has * or \N{MIDDLE DOT}, CuSO4*5H2O"
)
_DOTS = re.compile(
    r"[*\N{MIDDLE DOT}\N{BULLET}\N{BULLET OPERATOR}\N{DOT OPERATOR}\N{ASTERISK OPERATOR}"
    r"\N{HYPHENATION POINT}\N{HALFWIDTH KATAKANA MIDDLE DOT}\N{MULTIPLICATION SIGN}]"
)
#: An oxidation state, which would be read as iodine and vanadium; pymatgen writes Ca(VI)2, though.
_OXIDATION_STATE = re.compile(
    r"[(\[][ \t]*(?:"
    r"(?:I{2,3}|IV|VI{2,3})[ \t]*[)\]]"
    r"|(?:I|VI?)[ \t]*[)\]](?![ \t]*[0-9])"
    r")"
)
_TOKEN = re.compile(r"(?P<element>[A-Z][a-z]*)|(?P<bracket>[()\[\]])|(?P<space>[ \t]+)")
_COUNT = re.compile(r"[0-9]+")
_SITE = re.compile(r"(?P<element>[A-Za-z]+):(?P<multiplicity>[0-9]{0,4})(?P<letter>[a-zA])")
_ATOMIC_NUMBERS: dict[str, int] = {
    element.symbol: element.Z for element in Element if element.symbol not in ("D", "T")
}


#: Reduced formulas that everybody writes twice: H2, N2, O2, F2, Cl2, Br2, I2, and the peroxides of
#: H, Li, Na, K, Rb and Cs.
_DOUBLED = {
    *(((z, 1),) for z in (1, 7, 8, 9, 17, 35, 53)),
    *(tuple(sorted([(z, 1), (8, 1)])) for z in (1, 3, 11, 19, 37, 55)),
}


@dataclass(frozen=True)
class Formula:
    """A parsed formula.

    Attributes:
        reduced: atomic number and count of every element in one formula unit, by atomic number.
        units: formula units the text counted; 1 means reduced, so any number per cell will do.
        doubled: whether the text had twice these counts and yet means no cell: O2.
    """

    reduced: tuple[tuple[int, int], ...]
    units: int = 1
    doubled: bool = field(default=False, compare=False)

    @cached_property
    def counts(self) -> dict[int, int]:
        """Atoms of each atomic number in one formula unit."""
        return dict(self.reduced)

    @property
    def num_atoms(self) -> int:
        """Atoms in one formula unit."""
        return sum(self.counts.values())

    @property
    def text(self) -> str:
        """The formula of one formula unit."""
        return formula_text(self.counts)


@dataclass(frozen=True)
class SiteRequest:
    """One site of a user's list: ``O:3c``; without a multiplicity (``O:c``) it is None."""

    atomic_number: int
    letter: str
    multiplicity: int | None = None

    def __str__(self) -> str:
        symbol = Element.from_Z(self.atomic_number).symbol
        return f"{symbol}:{self.multiplicity or ''}{self.letter}"


def parse_formula(text: str) -> Formula:
    """The formula of a user's text; parentheses may be nested, hydrates have dots or stars.

    Raises:
        UserError: if it is empty, too long, or holds an unknown element, deuterium, a charge, a
            count that is not a positive integer, or brackets that do not pair.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError("the formula is empty: give one such as SrTiO3 or Sr2Ti2O6")
    if len(text) > _MAX_TEXT:
        raise UserError(f"the formula has {len(text)} characters: at most {_MAX_TEXT} are read")
    formula = text.strip().translate(_SUBSCRIPTS)
    if state := _OXIDATION_STATE.search(formula):
        raise UserError(
            f"formula {_shown(text)}: oxidation states are not part of it; leave {state[0]} out"
        )
    counts = _count_parts(_DOTS.split(formula), text)
    total = sum(counts.values())
    if total > MAX_FORMULA_ATOMS:
        raise UserError(
            f"formula {_shown(text)} counts {total} atoms: "
            f"at most {MAX_FORMULA_ATOMS} are supported"
        )
    units = math.gcd(*counts.values())
    reduced = tuple(sorted((z, n // units) for z, n in counts.items()))
    doubled = units == 2 and reduced in _DOUBLED
    return Formula(reduced, 1 if doubled else units, doubled)


def _count_parts(parts: Sequence[str], text: str) -> Counter[int]:
    """Atoms of each element in ``CuSO4`` and ``5H2O``, what dots part; the first has no count."""
    counts: Counter[int] = Counter()
    for index, part in enumerate(parts):
        part = part.strip(" \t")
        number, start = _read_count(part, 0, text) if index else (1, 0)
        if start == len(part):
            raise UserError(f"formula {_shown(text)}: nothing stands on one side of a dot or star")
        for atomic_number, found in _count_atoms(part[start:], text).items():
            counts[atomic_number] += number * found
    return counts


def _count_atoms(formula: str, text: str) -> Counter[int]:
    """Atoms of each element; the brackets still open are a stack of partial counts."""
    stack: list[tuple[str, Counter[int]]] = [("", Counter())]
    position = 0
    while position < len(formula):
        token = _TOKEN.match(formula, position)
        if token is None:
            raise UserError(_why_not(formula[position:], text))
        position = token.end()
        if token["space"]:
            continue
        if token["bracket"] and token["bracket"] not in _BRACKETS:
            stack.append((token["bracket"], Counter()))
            continue
        if token["element"]:
            group = Counter({_atomic_number(token["element"], text): 1})
        else:
            opened, group = stack.pop()
            if opened != _BRACKETS[token["bracket"]] or not group:
                raise UserError(f"formula {_shown(text)}: '{token['bracket']}' closes nothing")
        count, position = _read_count(formula, position, text)
        for atomic_number, number in group.items():
            stack[-1][1][atomic_number] += number * count
    if len(stack) > 1:
        raise UserError(f"formula {_shown(text)}: '{stack[-1][0]}' is never closed")
    return stack[0][1]


def _read_count(formula: str, position: int, text: str) -> tuple[int, int]:
    """The count that starts here (1 without one), and where it ends."""
    digits = _COUNT.match(formula, position)
    following = formula[digits.end() if digits else position :][:1]
    if following and following in ".,/":
        raise UserError(f"formula {_shown(text)}: {_WHOLE}")
    if digits is None:
        return 1, position
    if len(digits[0].lstrip("0")) > 5:
        raise UserError(f"formula {_shown(text)}: the count {digits[0][:12]}... is too large")
    if int(digits[0]) == 0:
        raise UserError(f"formula {_shown(text)}: a count is zero; leave the element out")
    return int(digits[0]), digits.end()


def _why_not(rest: str, text: str) -> str:
    """What to say about text that is no formula, where `rest` is what could not be read."""
    shown = f"formula {_shown(text)}"
    if rest[0] in _SIGNS:
        return f"{shown}: charges and signs are not part of it; write SO4, not SO4^2-"
    if rest[0] in "0123456789":
        return f"{shown}: a count must follow an element or a bracket"
    if rest[0] in ".,/":
        return f"{shown}: {_WHOLE}"
    if rest[0].islower():
        return f"{shown}: elements begin with a capital letter, as in SrTiO3"
    return f"{shown}: cannot read {_shown(rest[:12])}; write elements and counts, SrTiO3"


def _atomic_number(symbol: str, text: str) -> int:
    """The element of a symbol."""
    if symbol in ("D", "T"):
        raise UserError(
            f"formula {_shown(text)}: isotopes are not told apart; write H, not {symbol}"
        )
    if symbol not in _ATOMIC_NUMBERS:
        raise UserError(
            f"formula {_shown(text)}: unknown element '{symbol[:12]}' (upper and lower case matter)"
        )
    return _ATOMIC_NUMBERS[symbol]


def _shown(text: str) -> str:
    """A user's text, printable and on one line."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def parse_sites(text: str) -> tuple[SiteRequest, ...]:
    """Sites of a text such as ``Sr:1a Ti:1b O:3c`` (separated by blanks, commas or semicolons).

    Raises:
        UserError: if a part is not element, colon, multiplicity (optional) and letter.
    """
    parts = [part for part in re.split(r"[\s,;]+", text) if part] if text else []
    if not parts:
        raise UserError("the list of sites is empty: give one such as 'Sr:1a Ti:1b O:3c'")
    if len(parts) > MAX_GIVEN_ATOMS:
        raise UserError(f"{len(parts)} sites: at most {MAX_GIVEN_ATOMS} are supported")
    sites = []
    for part in parts:
        match = _SITE.fullmatch(part)
        if match is None:
            raise UserError(
                f"site {_shown(part)}: write element:multiplicity and letter (a to z, or A), "
                "as in O:3c"
            )
        if match["element"] not in _ATOMIC_NUMBERS:
            raise UserError(f"site {_shown(part)}: unknown element '{match['element'][:12]}'")
        multiplicity = int(match["multiplicity"]) if match["multiplicity"] else None
        sites.append(SiteRequest(_ATOMIC_NUMBERS[match["element"]], match["letter"], multiplicity))
    return tuple(sites)


def check_positions(sites: Sequence[SiteRequest]) -> None:
    """Refuses sites whose positions, one or all of them, are in no space group.

    Raises:
        UserError: names them, and what multiplicities the letter of a single one has.
    """
    groups = set(range(1, 231))
    for site in sites:
        known = _groups_of(site.letter)
        if site.multiplicity not in (None, *known):
            raise UserError(
                f"site {site}: no space group has a position {site.multiplicity}{site.letter}; "
                f"{site.letter} has multiplicity {', '.join(map(str, sorted(known)))}"
            )
        chosen = known.values() if site.multiplicity is None else [known[site.multiplicity]]
        groups &= set[int]().union(*chosen)
    if not groups:
        named = dict.fromkeys(f"{site.multiplicity or ''}{site.letter}" for site in sites)
        raise UserError(f"no space group has the positions {' '.join(named)} together")


@cache
def _groups_of(letter: str) -> dict[int, set[int]]:
    """The space groups that have a Wyckoff letter, by its multiplicity there."""
    groups: dict[int, set[int]] = {}
    for number in range(1, 231):
        if letter in (table := wyckoff_summary(number).letters):
            groups.setdefault(table[letter][0], set()).add(number)
    return groups


def _positions(space_group: int) -> str:
    """The positions of a group in short: ``1a 1b 3c 3d``."""
    letters = wyckoff_summary(space_group).letters
    return " ".join(f"{multiplicity}{letter}" for letter, (multiplicity, _) in letters.items())


def check_sites(sites: Sequence[SiteRequest], space_group: int, formula: Formula) -> int:
    """The number of formula units per conventional cell of a list of sites.

    Args:
        sites: as the user gave them.
        space_group: number 1-230.
        formula: what the sites must add up to.

    Raises:
        UserError: if a letter does not exist, has another multiplicity, has no freedom and is used
            twice, or the sites do not add up to the formula.
    """
    table = wyckoff_summary(space_group).letters
    used: Counter[str] = Counter()
    counts: Counter[int] = Counter()
    for site in sites:
        if site.letter not in table:
            raise UserError(
                f"site {site}: space group {space_group} has no Wyckoff letter "
                f"'{site.letter}'; the group has {_positions(space_group)}"
            )
        multiplicity, freedom = table[site.letter]
        if site.multiplicity not in (None, multiplicity):
            raise UserError(
                f"site {site}: position {site.letter} of space group {space_group} "
                f"has multiplicity {multiplicity}; the group has {_positions(space_group)}"
            )
        used[site.letter] += 1
        if freedom == 0 and used[site.letter] > 1:
            raise UserError(
                f"site {site}: position {multiplicity}{site.letter} of space group "
                f"{space_group} has no freedom and can be occupied only once"
            )
        counts[site.atomic_number] += multiplicity
    units, rest = divmod(sum(counts.values()), formula.num_atoms)
    if rest or dict(counts) != {z: n * units for z, n in formula.reduced}:
        found = " ".join(f"{Element.from_Z(z).symbol}{n}" for z, n in sorted(counts.items()))
        raise UserError(f"the sites hold {found}, which is no multiple of {formula.text}")
    return units
