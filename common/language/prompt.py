"""The one place where symmetries become text and text becomes symmetries.

The instruction is the paper's (section 3.1). The input is the composition, properties of its
elements and a target property. The answer is a chain: a space group, the Wyckoff positions of that
group, the number of formula units in the conventional cell, and the sites of every element::

    Composition: Sr 1, Ti 1, O 3
    Element Sr: group 2, period 5, electronegativity 0.95, radius 2.00, oxidation states 2
    Element Ti: group 4, period 4, electronegativity 1.54, radius 1.40, oxidation states 4
    Element O: group 16, period 2, electronegativity 3.44, radius 0.60, oxidation states -2
    Band gap: 1.77 eV

    Space group: 221 Pm-3m
    Candidate positions: 1a 1b 3c 3d 6e 6f 8g 12h 12i 12j 24k 24l 24m 48n
    Formula units: 1
    Sites: Sr 1a Ti 1b O 3c

A question may tell of known crystals as well, before the property: of polymorphs of the
composition, and of analogues, with how many per cent of the votes they have (``analogues``)::

    Known: 140 I4/mcm 4, Sr 4b Ti 4c O 4a 8h
    Analogue: 44 221 Pm-3m 1, Sr 1a Ti 1b O 3c as Ba Ti O

Every element, group, number and position follows one blank, and every line ends with a letter or a
digit. Tokenizers of the GPT family split words there, so that the tokens of an answer are the
tokens of its pieces; ``grammar`` builds on it.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import groupby
from types import MappingProxyType

from pymatgen.core import Element

from common.crystal.structure import Crystal
from common.crystal.wyckoff import Sites, wyckoff_summary
from common.elements import formula_order
from common.templates import RoleLetters, ordered_sites, reduce_counts, relabelled

INSTRUCTION = (
    "Output a crystal structure space group and wyckoff position based on the type of input "
    "element and the required properties."
)

COMPOSITION = "Composition:"
ELEMENT = "\nElement"
#: What is said of an element; see ``element_properties``.
ELEMENT_LABELS = (": group", ", period", ", electronegativity", ", radius", ", oxidation states")
NO_VALUE = " none"
NO_PROPERTY = "\nProperty: none"
KNOWN = "\nKnown:"
ANALOGUE = "\nAnalogue:"
REPLACED = " as"

SPACE_GROUP = "Space group:"
CANDIDATES = "\nCandidate positions:"
FORMULA_UNITS = "\nFormula units:"
SITES = "\nSites:"


@dataclass(frozen=True)
class PropertyText:
    """How a target property is written: its label, unit and digits after the point."""

    label: str
    unit: str
    digits: int


PROPERTY_TEXTS: Mapping[str, PropertyText] = MappingProxyType(
    {
        "band_gap": PropertyText("\nBand gap:", " eV", 2),
        "formation_energy": PropertyText("\nFormation energy:", " eV/atom", 3),
    }
)


class AnswerError(ValueError):
    """Text that is no question or no answer of ours; says where it stops being one."""


@dataclass(frozen=True)
class Symmetry:
    """A space group and the positions that are occupied, without coordinates.

    Attributes:
        space_group: number 1-230.
        units: formula units in the conventional cell.
        sites: atomic number and letter of every orbit.
    """

    space_group: int
    units: int
    sites: Sites

    @classmethod
    def of(cls, space_group: int, sites: Iterable[tuple[int, str]]) -> "Symmetry":
        """The symmetry of some sites, in canonical form."""
        listed = tuple(sites)
        table = wyckoff_summary(space_group).letters
        counts: dict[int, int] = {}
        for atomic_number, letter in listed:
            counts[atomic_number] = counts.get(atomic_number, 0) + table[letter][0]
        return cls(space_group, math.gcd(*counts.values()), listed).canonical

    @classmethod
    def of_crystal(cls, crystal: Crystal) -> "Symmetry":
        """A crystal's symmetry, in canonical form."""
        return cls.of(crystal.space_group, ((s.atomic_number, s.letter) for s in crystal.sites))

    @property
    def canonical(self) -> "Symmetry":
        """One and the same form for all descriptions of a crystal's sites.

        Elements stand as in the composition. Of all relabellings by the group's normaliser the one
        is taken whose first element has the first letters, then the second element, and so on.
        """
        sites = ordered_sites(self.sites, self.space_group)
        roles = [
            (atomic_number, "".join(letter for _, letter in group))
            for atomic_number, group in groupby(sites, key=lambda site: site[0])
        ]
        letters = _first_relabelling(self.space_group, tuple(letters for _, letters in roles))
        named = ((z, letter) for (z, _), own in zip(roles, letters, strict=True) for letter in own)
        return Symmetry(self.space_group, self.units, ordered_sites(named, self.space_group))


@lru_cache(maxsize=100_000)
def _first_relabelling(space_group: int, letters: RoleLetters) -> RoleLetters:
    return min(relabelled(space_group, letters))


@dataclass(frozen=True)
class Analogue:
    """A symmetry that crystals of similar elements have.

    Attributes:
        symmetry: in canonical form, with the question's elements.
        percent: of the votes, 0 to 100.
        elements: that the most similar of these crystals has in place of the question's, in order.
    """

    symmetry: Symmetry
    percent: int
    elements: tuple[int, ...]


@dataclass(frozen=True)
class Analogues:
    """Symmetries that are known for a composition, and for similar ones."""

    known: tuple[Symmetry, ...] = ()
    similar: tuple[Analogue, ...] = ()


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        formula: atomic number and count of every element in one formula unit, the least
            electronegative first.
        target: ``band_gap`` (eV), ``formation_energy`` (eV/atom) or None.
        value: of the target, rounded as it is written; None without one.
        analogues: what it tells of known crystals.
    """

    formula: tuple[tuple[int, int], ...]
    target: str | None = None
    value: float | None = None
    analogues: Analogues = Analogues()

    @classmethod
    def ask(
        cls, counts: Mapping[int, int], properties: Mapping[str, float] | None = None
    ) -> "Question":
        """A question.

        Args:
            counts: atoms of each atomic number; only their ratio matters.
            properties: at most one of those in ``PROPERTY_TEXTS``.

        Raises:
            ValueError: for counts below one, more than one property, an unknown one, or one that
                is not finite.
        """
        if not counts or min(counts.values()) < 1:
            raise ValueError(f"counts {dict(counts)}: each must be at least 1")
        reduced, _ = reduce_counts(counts)
        formula = tuple((z, reduced[z]) for z in sorted(reduced, key=formula_order))
        if not properties:
            return cls(formula)
        if len(properties) > 1:
            raise ValueError(f"more than one property: {', '.join(properties)}")
        ((name, value),) = properties.items()
        if name not in PROPERTY_TEXTS or not math.isfinite(value):
            raise ValueError(f"property {name} = {value}")
        return cls(formula, name, round(value, PROPERTY_TEXTS[name].digits) + 0.0)

    @property
    def counts(self) -> dict[int, int]:
        """Atoms of each atomic number in one formula unit, in the order of the text."""
        return dict(self.formula)


@cache
def element_symbol(atomic_number: int) -> str:
    """Symbol of an element."""
    return str(Element.from_Z(atomic_number).symbol)


@cache
def element_properties(atomic_number: int) -> tuple[str, ...]:
    """Group, period, electronegativity (Pauling), atomic radius (A) and common oxidation states.

    From pymatgen, as they stand in the text; ``none`` where there is no value.
    """
    element = Element.from_Z(atomic_number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about elements without a value
        negativity = float(element.X)
        radius = element.atomic_radius or element.atomic_radius_calculated
    states = "".join(f" {state}" for state in sorted(element.common_oxidation_states))
    return (
        f" {element.group}",
        f" {element.row}",
        f" {negativity:.2f}" if math.isfinite(negativity) else NO_VALUE,
        f" {float(radius):.2f}" if radius else NO_VALUE,
        states or NO_VALUE,
    )


def element_piece(atomic_number: int) -> str:
    """An element before its sites."""
    return f" {element_symbol(atomic_number)}"


def group_piece(number: int) -> str:
    """A space group after its label."""
    return f" {number} {wyckoff_summary(number).symbol}"


def units_piece(units: int) -> str:
    """A number of formula units after its label."""
    return f" {units}"


@cache
def site_pieces(number: int) -> Mapping[str, str]:
    """Every position of a group by its letter, as ``3c`` with a blank before it."""
    letters = wyckoff_summary(number).letters
    return MappingProxyType({x: f" {multiplicity}{x}" for x, (multiplicity, _) in letters.items()})


@cache
def candidates_piece(number: int) -> str:
    """What follows a space group: its positions, and the label of the formula units."""
    return CANDIDATES + "".join(site_pieces(number).values()) + FORMULA_UNITS


def write_question(question: Question) -> str:
    """The input of a question; see the module."""
    counts = ",".join(f" {element_symbol(z)} {count}" for z, count in question.formula)
    text = COMPOSITION + counts
    for atomic_number, _ in question.formula:
        values = zip(ELEMENT_LABELS, element_properties(atomic_number), strict=True)
        text += f"{ELEMENT} {element_symbol(atomic_number)}"
        text += "".join(label + value for label, value in values)
    return text + _write_analogues(question.analogues) + write_target(question)


def write_target(question: Question) -> str:
    """Its last line: the target property."""
    if question.target is None or question.value is None:
        return NO_PROPERTY
    style = PROPERTY_TEXTS[question.target]
    return f"{style.label} {question.value:.{style.digits}f}{style.unit}"


def _write_analogues(analogues: Analogues) -> str:
    text = "".join(KNOWN + _write_symmetry(symmetry) for symmetry in analogues.known)
    return text + "".join(map(write_analogue, analogues.similar))


def write_analogue(analogue: Analogue) -> str:
    """Its line in a question."""
    text = f"{ANALOGUE} {analogue.percent}{_write_symmetry(analogue.symmetry)}{REPLACED}"
    return text + "".join(map(element_piece, analogue.elements))


def _write_symmetry(symmetry: Symmetry) -> str:
    """As one line without labels."""
    pieces = [group_piece(symmetry.space_group), units_piece(symmetry.units), ","]
    return "".join(pieces + _site_list(symmetry))


def parse_question(text: str) -> Question:
    """The question of an input.

    Raises:
        AnswerError: if the text is not exactly what ``write_question`` writes.
    """
    lines = text.split("\n")
    parts = re.findall(r" ([A-Z][a-z]?) (\d+)(?:,|$)", lines[0].removeprefix(COMPOSITION))
    try:
        counts = {Element(symbol).Z: int(count) for symbol, count in parts}
        question = Question.ask(counts, _parse_property("\n" + lines[-1]))
        question = replace(question, analogues=_parse_analogues(lines))
    except (ValueError, TypeError) as error:
        raise AnswerError(f"cannot read the question {lines[0][:80]!r}: {error}") from error
    if write_question(question) != text:
        raise AnswerError(f"not a question as it is written: {lines[0][:80]!r}")
    return question


def _parse_property(line: str) -> dict[str, float]:
    for name, style in PROPERTY_TEXTS.items():
        if line.startswith(style.label) and line.endswith(style.unit):
            return {name: float(line[len(style.label) : -len(style.unit)])}
    return {}


def _parse_analogues(lines: Sequence[str]) -> Analogues:
    known = [
        _parse_symmetry(line.removeprefix(KNOWN[1:]))
        for line in lines
        if line.startswith(KNOWN[1:])
    ]
    similar = []
    for line in lines:
        if line.startswith(ANALOGUE[1:]):
            percent, rest = line.removeprefix(ANALOGUE[1:]).strip().split(" ", 1)
            symmetry, elements = rest.split(REPLACED)
            numbers = tuple(Element(symbol).Z for symbol in elements.split())
            similar.append(Analogue(_parse_symmetry(symmetry), int(percent), numbers))
    return Analogues(tuple(known), tuple(similar))


def _parse_symmetry(text: str) -> Symmetry:
    number, _, units, *words = text.replace(",", "").split()
    return Symmetry(int(number), int(units), _parse_sites(int(number), words))


def answer_pieces(symmetry: Symmetry) -> list[str]:
    """The answer as the pieces that a grammar chooses or fills in; elements in the sites' order."""
    number = symmetry.space_group
    pieces = [SPACE_GROUP, group_piece(number), candidates_piece(number)]
    pieces += [units_piece(symmetry.units), SITES]
    return pieces + _site_list(symmetry)


def _site_list(symmetry: Symmetry) -> list[str]:
    """Every element and its positions."""
    pieces = []
    for atomic_number, sites in groupby(symmetry.sites, key=lambda site: site[0]):
        pieces.append(element_piece(atomic_number))
        pieces += [site_pieces(symmetry.space_group)[letter] for _, letter in sites]
    return pieces


def write_answer(symmetry: Symmetry) -> str:
    """The answer of a symmetry, the same for all equivalent descriptions."""
    return "".join(answer_pieces(symmetry.canonical))


_ANSWER = re.compile(
    re.escape(SPACE_GROUP)
    + r" (?P<group>\d{1,3}) [^\n]+"
    + re.escape(CANDIDATES)
    + r"[^\n]+"
    + re.escape(FORMULA_UNITS)
    + r" (?P<units>\d{1,4})"
    + re.escape(SITES)
    + r"(?P<sites>( [A-Z][a-z]?( \d{1,3}[a-zA])+)+)"
)


def parse_answer(text: str) -> Symmetry:
    """The symmetry of an answer, with the sites as they are written there.

    Only the form is checked, and that group, candidates and multiplicities belong together; see
    ``common.composition.check_sites`` for the rest.

    Raises:
        AnswerError: if it is no answer, or says something untrue of its group.
    """
    match = _ANSWER.fullmatch(text)
    if match is None:
        raise AnswerError(f"not an answer: {text[:80]!r}")
    number = int(match["group"])
    if not 1 <= number <= 230:
        raise AnswerError(f"space group {number} does not exist")
    sites = _parse_sites(number, match["sites"].split())
    symmetry = Symmetry(number, int(match["units"]), sites)
    if "".join(answer_pieces(symmetry)) != text:
        raise AnswerError(f"symbol, candidates or multiplicities are not those of group {number}")
    return symmetry


def _parse_sites(number: int, words: Iterable[str]) -> Sites:
    sites = []
    atomic_number = 0
    for word in words:
        if not word[0].isdigit():
            atomic_number = _atomic_number(word)
        elif word[-1] not in site_pieces(number):
            raise AnswerError(f"space group {number} has no position {word}")
        else:
            sites.append((atomic_number, word[-1]))
    return tuple(sites)


def _atomic_number(symbol: str) -> int:
    try:
        return int(Element(symbol).Z)
    except ValueError as error:
        raise AnswerError(f"unknown element {symbol}") from error
