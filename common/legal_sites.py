"""Which sites of a space group add up to a formula: the likeliest ones first.

A beam over the elements looks for these; whether anything is legal at all is decided exactly. How
likely: the frequency of the group for formula units of this size, of the number of atoms in the
primitive cell, and of every letter in its group, all counted in the training set (smoothed) and
taken to be independent.
"""

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from common.composition import (
    MAX_GIVEN_ATOMS,
    MAX_PRIMITIVE_ATOMS,
    Formula,
    SiteRequest,
    check_sites,
)
from common.crystal.wyckoff import Sites, WyckoffTable, wyckoff_summary
from common.errors import UserError
from common.templates import reduce_counts

#: Partial assignments kept after each element, and choices looked at per element.
_BEAM = 40
_MAX_OPTIONS = 400
#: Atoms in the primitive cell where nothing is said of it; in a group that holds the formula only
#: in larger cells, twice as many are tried, and so on.
_USUAL_ATOMS = 20

LetterCounts = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class LegalSites:
    """One way to place a formula: its group, formula units per conventional cell, and sites."""

    space_group: int
    units: int
    sites: Sites
    log_weight: float


#: Upper bounds of the sizes of formula units that share their statistics of groups.
_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def size_class(formula_atoms: int) -> int:
    """Index of the class of formula units with about as many atoms."""
    return bisect.bisect_left(_SIZES, formula_atoms)


@dataclass(frozen=True)
class SiteStatistics:
    """Counts over the training set.

    Attributes:
        groups: structures in each space group, for each size class of the formula unit.
        atoms: structures with each number of atoms in the primitive cell.
        letters: sites on each letter of each group.
    """

    groups: Mapping[int, Mapping[int, int]]
    atoms: Mapping[int, int]
    letters: Mapping[int, Mapping[str, int]]

    @cached_property
    def _all_groups(self) -> dict[int, float]:
        """Share of every space group, over all sizes."""
        total: Counter[int] = Counter()
        for counts in self.groups.values():
            total.update(counts)
        return {n: (total[n] + 0.5) / (total.total() + 115) for n in range(1, 231)}

    def log_group(self, number: int, formula_atoms: int) -> float:
        """Log-probability of a space group for a size of the formula unit."""
        counts = self.groups.get(size_class(formula_atoms), {})
        overall = 20 * self._all_groups[number]
        return math.log((counts.get(number, 0) + overall) / (sum(counts.values()) + 20))

    def log_atoms(self, atoms: int) -> float:
        """Log-probability of a number of atoms in the primitive cell."""
        total = sum(self.atoms.values()) + MAX_PRIMITIVE_ATOMS / 10
        return math.log((self.atoms.get(atoms, 0) + 0.1) / total)

    def log_letters(self, number: int, table: WyckoffTable) -> dict[str, float]:
        """Log-probability of each letter of a space group."""
        counts = self.letters.get(number, {})
        total = sum(counts.values()) + len(table)
        return {letter: math.log((counts.get(letter, 0) + 1) / total) for letter in table}

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "groups": _plain(self.groups),
            "atoms": {str(k): v for k, v in sorted(self.atoms.items())},
            "letters": _plain(self.letters),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SiteStatistics":
        """What ``to_dict`` wrote."""
        return cls(
            {int(k): {int(a): int(b) for a, b in v.items()} for k, v in data["groups"].items()},
            {int(k): int(v) for k, v in data["atoms"].items()},
            {int(k): {a: int(b) for a, b in v.items()} for k, v in data["letters"].items()},
        )


def _plain(counts: Mapping[int, Mapping[Any, int]]) -> dict[str, dict[str, int]]:
    return {str(k): {str(a): b for a, b in sorted(v.items())} for k, v in sorted(counts.items())}


def legal_units(
    space_group: int, sites: Iterable[tuple[int, str]], counts: Mapping[int, int]
) -> int | None:
    """Formula units that some sites hold in a group's conventional cell; None if they are illegal.

    Args:
        space_group: number 1-230.
        sites: atomic number and letter of each.
        counts: atoms of each atomic number; only their ratio matters.
    """
    formula = Formula(tuple(sorted(reduce_counts(counts)[0].items())))
    requests = [SiteRequest(z, letter) for z, letter in sites]
    try:
        return check_sites(requests, space_group, formula)
    except UserError:
        return None


def enumerate_sites(
    counts: Mapping[int, int],
    statistics: SiteStatistics,
    *,
    space_group: int | None = None,
    units: int | None = None,
    z: int | None = None,
    top: int = 20,
) -> list[LegalSites]:
    """The likeliest legal site assignments of a formula unit, as far as a beam finds them.

    Args:
        counts: atoms of each atomic number in one formula unit.
        statistics: of the training set.
        space_group: only this one.
        units: only so many formula units per primitive or conventional cell.
        z: only so many per conventional cell.
        top: how many.

    Returns:
        at most `top`, the likeliest first; empty only if nothing is legal with at most
        ``MAX_PRIMITIVE_ATOMS`` in the primitive cell, or with the given units.
    """
    limit = max(_USUAL_ATOMS, sum(counts.values()))
    found = _within(limit, counts, statistics, space_group, units, z, top)
    while not found and units is None and z is None and limit < MAX_PRIMITIVE_ATOMS:
        limit = min(2 * limit, MAX_PRIMITIVE_ATOMS)
        found = _within(limit, counts, statistics, space_group, units, z, top)
    return found


def _within(
    limit: int,
    counts: Mapping[int, int],
    statistics: SiteStatistics,
    space_group: int | None,
    units: int | None,
    z: int | None,
    top: int,
) -> list[LegalSites]:
    """See ``enumerate_sites``, with so many atoms in the primitive cell unless units are given."""
    formula_atoms = sum(counts.values())
    places = []
    for number in [space_group] if space_group else range(1, 231):
        centering = wyckoff_summary(number).centering
        for choice in unit_choices(counts, centering, units, z, limit):
            atoms = formula_atoms * choice // centering
            bound = statistics.log_group(number, formula_atoms) + statistics.log_atoms(atoms)
            places.append((bound, number, choice))
    # No assignment is likelier than its group and size: stop when the rest cannot enter the top.
    places.sort(key=lambda place: (-place[0], place[1], place[2]))
    found: list[LegalSites] = []
    for bound, number, choice in places:
        if len(found) == top and found[-1].log_weight >= bound:
            break
        found += _in_group(counts, number, choice, bound, statistics, top)
        found.sort(key=lambda legal: (-legal.log_weight, legal.space_group, legal.sites))
        del found[top:]
    return found


def unit_choices(
    counts: Mapping[int, int], centering: int, units: int | None, z: int | None, most: int
) -> list[int]:
    """Formula units per conventional cell that are to be tried in a group.

    Args:
        counts: atoms of each atomic number in one formula unit.
        centering: lattice points of the conventional cell.
        units: only so many per primitive or conventional cell.
        z: only so many per conventional cell.
        most: atoms in the primitive cell, if neither is given.
    """
    formula_atoms = sum(counts.values())
    if units is None and z is None:
        largest = most * centering // formula_atoms
        return [u for u in range(1, largest + 1) if u * formula_atoms % centering == 0]
    given = {z} if units is None else {units, units * centering}
    limit = max(MAX_GIVEN_ATOMS * centering // formula_atoms, 1)
    return sorted(u for u in given if u is not None and u <= limit and z in (None, u))


def _in_group(
    counts: Mapping[int, int],
    number: int,
    units: int,
    log_place: float,
    statistics: SiteStatistics,
    top: int,
) -> list[LegalSites]:
    """The likeliest assignments in one group for one number of formula units.

    The letters share the place's probability among the assignments looked at.
    """
    summary = wyckoff_summary(number)
    needed = {z: n * units for z, n in counts.items()}
    log_letters = statistics.log_letters(number, summary.letters)
    found: dict[Sites, tuple[float, Sites]] = {}
    for weight, sites in _assignments(needed, summary.letters, log_letters):
        found.setdefault(summary.canonical(sites), (weight, sites))
    if not found:
        return []
    highest = max(weight for weight, _ in found.values())
    log_total = math.log(sum(math.exp(w - highest) for w, _ in found.values())) + highest
    return [
        LegalSites(number, units, sites, log_place + weight - log_total)
        for weight, sites in list(found.values())[:top]
    ]


@dataclass(frozen=True)
class _Option:
    """Letters for all atoms of one element: their weight, sites, and bits of the fixed ones."""

    weight: float
    sites: Sites
    fixed: int


def _assignments(
    needed: Mapping[int, int], table: WyckoffTable, log_letters: Mapping[str, float]
) -> list[tuple[float, Sites]]:
    """Ways to place all elements, the likeliest first: a beam over the elements."""
    beam = [_Option(0.0, (), 0)]
    for atomic_number, atoms in sorted(needed.items(), key=lambda item: (item[1], item[0])):
        options = _options(atomic_number, atoms, table, log_letters)
        beam = _extended(beam, options)
    if not beam:
        legal = _first_legal(sorted(needed.items()), table, {})
        beam = [] if legal is None else [_Option(_weight(legal, log_letters), legal, 0)]
    order = {letter: index for index, letter in enumerate(table)}
    ranked = [
        (each.weight, tuple(sorted(each.sites, key=lambda site: (order[site[1]], site[0]))))
        for each in beam
    ]
    return sorted(ranked, key=lambda entry: (-entry[0], entry[1]))


def _extended(beam: Sequence[_Option], options: Sequence[_Option]) -> list[_Option]:
    """The likeliest of all pairs that do not share a fixed position."""
    pairs = [
        (old.weight + new.weight, old, new)
        for old in beam
        for new in options
        if not old.fixed & new.fixed
    ]
    if len(pairs) > _BEAM:
        # Only what can enter the beam is built.
        least = heapq.nlargest(_BEAM, (weight for weight, _, _ in pairs))[-1]
        pairs = [pair for pair in pairs if pair[0] >= least]
    built = [
        _Option(weight, old.sites + new.sites, old.fixed | new.fixed) for weight, old, new in pairs
    ]
    return sorted(built, key=lambda each: (-each.weight, each.sites))[:_BEAM]


def _options(
    atomic_number: int, atoms: int, table: WyckoffTable, log_letters: Mapping[str, float]
) -> list[_Option]:
    """Ways to make a number of atoms of one element out of the letters, the likeliest first."""
    weighed = [
        (sum(count * log_letters[letter] for letter, count in letters), letters)
        for letters in _partitions(atoms, table)
    ]
    bits = {x: 1 << i for i, (x, (_, freedom)) in enumerate(table.items()) if freedom == 0}
    return [
        _Option(
            weight,
            tuple((atomic_number, letter) for letter, count in letters for _ in range(count)),
            sum(bits.get(letter, 0) for letter, _ in letters),
        )
        for weight, letters in heapq.nsmallest(_BEAM, weighed, key=lambda x: (-x[0], x[1]))
    ]


def _partitions(atoms: int, table: WyckoffTable) -> list[LetterCounts]:
    """Multisets of letters whose multiplicities add up, fixed positions at most once.

    Those with large multiplicities first; at most _MAX_OPTIONS.
    """
    letters = sorted(table, key=lambda letter: (-table[letter][0], letter))
    divisors = [math.gcd(*(table[x][0] for x in letters[i:])) for i in range(len(letters) + 1)]
    found: list[LetterCounts] = []

    def extend(chosen: LetterCounts, left: int, start: int) -> None:
        if left == 0:
            found.append(chosen)
            return
        for index in range(start, len(letters)):
            multiplicity, freedom = table[letters[index]]
            divisor = divisors[index + 1]
            most = left // multiplicity
            for count in range(most if freedom else min(1, most), 0, -1):
                rest = left - count * multiplicity
                if rest and (not divisor or rest % divisor):
                    continue  # the letters that follow cannot add up to it
                extend((*chosen, (letters[index], count)), rest, index + 1)
                if len(found) == _MAX_OPTIONS:
                    return

    extend((), atoms, 0)
    return found


def _weight(sites: Sites, log_letters: Mapping[str, float]) -> float:
    return sum(log_letters[letter] for _, letter in sites)


def _first_legal(
    needed: Sequence[tuple[int, int]], table: WyckoffTable, used: Mapping[int, int]
) -> Sites | None:
    """Some legal assignment, or None if there is none; exact, unlike the beam.

    Fixed positions of one multiplicity are interchangeable, so only how many of them each element
    takes is searched; `used` counts those taken so far.
    """
    if not needed:
        return ()
    (atomic_number, atoms), rest = needed[0], needed[1:]
    fixed: dict[int, list[str]] = {}
    for letter, (multiplicity, freedom) in table.items():
        if freedom == 0:
            fixed.setdefault(multiplicity, []).append(letter)
    free = sorted({(m, x) for x, (m, freedom) in table.items() if freedom}, reverse=True)
    ranges = [
        range(min(len(letters) - used.get(m, 0), atoms // m) + 1) for m, letters in fixed.items()
    ]
    for taken in product(*ranges):
        left = atoms - sum(m * n for m, n in zip(fixed, taken, strict=True))
        coins = _change(left, free)
        if coins is None:
            continue
        now_used = {m: used.get(m, 0) + n for m, n in zip(fixed, taken, strict=True)}
        others = _first_legal(rest, table, now_used)
        if others is not None:
            chosen = [
                letter
                for (m, letters), n in zip(fixed.items(), taken, strict=True)
                for letter in letters[used.get(m, 0) : used.get(m, 0) + n]
            ]
            return (*((atomic_number, letter) for letter in (*chosen, *coins)), *others)
    return None


def _change(atoms: int, free: Sequence[tuple[int, str]]) -> tuple[str, ...] | None:
    """Letters of positions with freedom that make exactly a number of atoms, as few as possible."""
    if atoms < 0:
        return None
    best: list[tuple[str, ...] | None] = [()] + [None] * atoms
    for amount in range(1, atoms + 1):
        for multiplicity, letter in free:
            before = best[amount - multiplicity] if multiplicity <= amount else None
            current = best[amount]
            if before is not None and (current is None or len(before) + 1 < len(current)):
                best[amount] = (*before, letter)
    return best[atoms]
