"""Symmetries without their elements: which letters each role of a stoichiometry occupies.

A *role* is an element's place in an anonymous formula: SrTiO3 is (1,1,3), with three roles, two of
which have the same count and can be exchanged. A *template* is a space group, the formula units per
conventional cell and the letters of every role, up to relabelling by the group's normaliser and to
exchange of equal roles.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby, permutations, product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from common.crystal.structure import Crystal
from common.crystal.wyckoff import Sites, wyckoff_summary
from common.elements import formula_order

#: Counts of an anonymous formula unit, ascending.
Stoichiometry = tuple[int, ...]
#: Letters of every role, as one sorted string each.
RoleLetters = tuple[str, ...]

#: So many permutations of roles are gone through at most: those of six equal ones.
MAX_PERMUTATIONS = 720


@dataclass(frozen=True)
class Template:
    """See the module.

    Attributes:
        stoichiometry: counts of the roles.
        space_group, units: number, and formula units per conventional cell.
        letters: of each role, the smallest of the equivalent descriptions.
    """

    stoichiometry: Stoichiometry
    space_group: int
    units: int
    letters: RoleLetters

    @property
    def automorphisms(self) -> tuple[tuple[int, ...], ...]:
        """Those of ``role_permutations`` that give the same template, the identity first."""
        return _automorphisms(self.stoichiometry, self.space_group, self.letters)


@dataclass(frozen=True)
class Assignment:
    """A crystal's template, and the atomic number in each role of it.

    ``as_labelled`` are the letters as the crystal itself has them, role by role.
    """

    template: Template
    roles: tuple[int, ...]
    as_labelled: RoleLetters


def reduce_counts(counts: Mapping[int, int]) -> tuple[dict[int, int], int]:
    """One formula unit, and how many of them there are."""
    units = math.gcd(*counts.values())
    return {z: n // units for z, n in counts.items()}, units


def role_order(counts: Mapping[int, int]) -> list[int]:
    """Atomic numbers by count in the formula unit, then by themselves."""
    return sorted(counts, key=lambda z: (counts[z], z))


@cache
def role_permutations(stoichiometry: Stoichiometry) -> tuple[tuple[int, ...], ...]:
    """Permutations of the roles that keep their counts, the identity first.

    All of them, or a group of at most MAX_PERMUTATIONS, in which only the first few of many equal
    roles change places.
    """
    blocks = _equal_roles(stoichiometry)
    exchanged = [len(block) for block in blocks]
    while math.prod(map(math.factorial, exchanged)) > MAX_PERMUTATIONS:
        exchanged[exchanged.index(max(exchanged))] -= 1
    parts = [
        [(*head, *block[size:]) for head in permutations(block[:size])]
        for block, size in zip(blocks, exchanged, strict=True)
    ]
    return tuple(tuple(x for part in chosen for x in part) for chosen in product(*parts))


def permutes_all(stoichiometry: Stoichiometry) -> bool:
    """Whether ``role_permutations`` are all that keep the counts."""
    sizes = map(len, _equal_roles(stoichiometry))
    return math.prod(map(math.factorial, sizes)) <= MAX_PERMUTATIONS


def _equal_roles(stoichiometry: Stoichiometry) -> list[list[int]]:
    return [
        [role for role, _ in block]
        for _, block in groupby(enumerate(stoichiometry), key=lambda item: item[1])
    ]


def assign(crystal: Crystal) -> Assignment:
    """The template of a crystal."""
    counts, units = reduce_counts(crystal.formula_counts)
    order = role_order(counts)
    of_element: dict[int, list[str]] = {z: [] for z in order}
    for site in crystal.sites:
        of_element[site.atomic_number].append(site.letter)
    letters = tuple("".join(sorted(of_element[z])) for z in order)
    stoichiometry = tuple(counts[z] for z in order)
    canonical, permutation = _canonical(stoichiometry, crystal.space_group, letters)
    return Assignment(
        Template(stoichiometry, crystal.space_group, units, canonical),
        tuple(order[role] for role in permutation),
        tuple(letters[role] for role in permutation),
    )


@lru_cache(maxsize=100_000)
def _canonical(
    stoichiometry: Stoichiometry, space_group: int, letters: RoleLetters
) -> tuple[RoleLetters, tuple[int, ...]]:
    """The smallest equivalent letters, and which of the given roles takes each place in them."""
    best: tuple[RoleLetters, tuple[int, ...]] | None = None
    for image in relabelled(space_group, letters):
        # Equal roles may be exchanged: sort them by their letters.
        order = sorted(range(len(letters)), key=lambda r: (stoichiometry[r], image[r], r))
        candidate = tuple(image[r] for r in order), tuple(order)
        if best is None or candidate < best:
            best = candidate
    assert best is not None
    return best


@lru_cache(maxsize=100_000)
def _automorphisms(
    stoichiometry: Stoichiometry, space_group: int, letters: RoleLetters
) -> tuple[tuple[int, ...], ...]:
    images = relabelled(space_group, letters)
    return tuple(
        permutation
        for permutation in role_permutations(stoichiometry)
        if tuple(letters[role] for role in permutation) in images
    )


def cheapest_automorphism(template: Template, costs: NDArray[np.float64]) -> tuple[int, ...]:
    """Of all permutations of the roles that give the same template, that with the least costs.

    Args:
        costs: [R,R], summed are those of every role and the one in its place.
    """
    kinds = list(zip(template.stoichiometry, template.letters, strict=True))
    best, least = tuple(range(len(kinds))), float(np.trace(costs))
    for image in sorted(relabelled(template.space_group, template.letters)):
        wanted = list(zip(template.stoichiometry, image, strict=True))
        if Counter(wanted) != Counter(kinds):
            continue
        allowed = np.array([[kind == other for kind in kinds] for other in wanted])
        rows, columns = linear_sum_assignment(np.where(allowed, costs, np.inf))
        total = float(costs[rows, columns].sum())
        if total < least:
            best, least = tuple(columns.tolist()), total
    return best


@lru_cache(maxsize=256)
def relabelled(space_group: int, letters: RoleLetters) -> frozenset[RoleLetters]:
    """All descriptions of the same letters, role by role."""
    return frozenset(
        tuple("".join(sorted(role.translate(table))) for role in letters)
        for table in _relabellings(space_group)
    )


@cache
def _relabellings(space_group: int) -> tuple[dict[int, int], ...]:
    """For ``str.translate``: what becomes of each letter in each description."""
    summary = wyckoff_summary(space_group)
    names = "".join(summary.letters)
    return tuple(str.maketrans(names, permutation) for permutation in summary.permutations)


def wyckoff_sequence(template: Template) -> str:
    """The letters of all sites, whatever is on them; the same for all equivalent descriptions.

    Crystals of one space group that share it are isopointal.
    """
    return _sequence(template.space_group, "".join(sorted("".join(template.letters))))


@lru_cache(maxsize=100_000)
def _sequence(space_group: int, letters: str) -> str:
    return min(relabelled(space_group, (letters,)))[0]


def ordered_sites(sites: Iterable[tuple[int, str]], space_group: int) -> Sites:
    """Sites as formulas are written, the least electronegative element first, then by letter."""
    order = list(wyckoff_summary(space_group).letters)
    return tuple(sorted(sites, key=lambda s: (*formula_order(s[0]), order.index(s[1]))))


def template_sites(roles: Sequence[int], letters: RoleLetters, space_group: int) -> Sites:
    """Atomic number and letter of every site, ordered."""
    sites = [(z, letter) for z, role in zip(roles, letters, strict=True) for letter in role]
    return ordered_sites(sites, space_group)
