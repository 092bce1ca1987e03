"""Which Wyckoff letters may be chosen next so that the sites can still add up: an exact search.

The elements are placed one after the other, each on letters in the group's order; a position
without freedom is occupied once in all, others any number of times. Positions without freedom of
one multiplicity are interchangeable for the elements that are still to come, so what these need is
asked of counts alone and remembered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

from common.composition import MAX_PRIMITIVE_ATOMS
from common.crystal.wyckoff import wyckoff_summary

#: Sums that positions with freedom can make are known up to so many atoms of one element.
_MAX_ATOMS = 4 * MAX_PRIMITIVE_ATOMS


@dataclass(frozen=True)
class Progress:
    """How far the sites have come.

    Attributes:
        element: index of the element that is being placed; their number at the end.
        left: atoms of it that are still without a site.
        first: index of the first letter that may come next.
        used: a bit for each letter without freedom that is occupied.
    """

    element: int
    left: int
    first: int = 0
    used: int = 0


@dataclass(frozen=True)
class _Letters:
    """A group's letters as the search needs them.

    Attributes:
        multiplicities: of each letter.
        kinds: of each letter, the index of its multiplicity among ``fixed``; -1 with freedom.
        fixed: multiplicities that positions without freedom have.
        sums: for each index, bit n says whether letters with freedom from there on make n atoms.
    """

    multiplicities: tuple[int, ...]
    kinds: tuple[int, ...]
    fixed: tuple[int, ...]
    sums: tuple[int, ...]

    def available(self, first: int, used: int) -> tuple[int, ...]:
        """Positions without freedom from an index on that are not occupied, by multiplicity."""
        counts = [0] * len(self.fixed)
        for index in range(first, len(self.kinds)):
            if self.kinds[index] >= 0 and not used >> index & 1:
                counts[self.kinds[index]] += 1
        return tuple(counts)

    def ways(self, atoms: int, available: Sequence[int], first: int) -> Iterator[tuple[int, ...]]:
        """How many positions of each fixed multiplicity may be taken to make a number of atoms."""
        ranges = [
            range(min(count, atoms // multiplicity) + 1)
            for multiplicity, count in zip(self.fixed, available, strict=True)
        ]
        for taken in product(*ranges):
            left = atoms - sum(m * n for m, n in zip(self.fixed, taken, strict=True))
            if left >= 0 and self.sums[first] >> left & 1:
                yield taken


@cache
def _letters(space_group: int) -> _Letters:
    table = list(wyckoff_summary(space_group).letters.values())
    fixed = tuple(sorted({m for m, freedom in table if not freedom}))
    sums = [1]
    for multiplicity, freedom in reversed(table):
        sums.append(_with_coin(sums[-1], multiplicity) if freedom else sums[-1])
    return _Letters(
        tuple(m for m, _ in table),
        tuple(-1 if freedom else fixed.index(m) for m, freedom in table),
        fixed,
        tuple(reversed(sums)),
    )


def _with_coin(sums: int, coin: int) -> int:
    """Sums (bits) that become possible with any number of one more coin."""
    step = coin
    while step <= _MAX_ATOMS:
        sums |= sums << step
        step *= 2
    return sums & ((2 << _MAX_ATOMS) - 1)


class SiteSolver:
    """Letters for given numbers of atoms of each element in one space group."""

    def __init__(self, space_group: int, needed: Sequence[int]) -> None:
        """Prepares.

        Args:
            space_group: number 1-230.
            needed: atoms of each element in the conventional cell, in the order of placement.
        """
        assert all(0 < atoms <= _MAX_ATOMS for atoms in needed)
        self._needed = tuple(needed)
        self._table = _letters(space_group)
        self._rest: dict[tuple[int, tuple[int, ...]], bool] = {}
        self._choices: dict[Progress, tuple[int, ...]] = {}

    @property
    def start(self) -> Progress:
        """Before the first site."""
        return Progress(0, self._needed[0])

    def is_done(self, progress: Progress) -> bool:
        """Whether all elements have their sites."""
        return progress.element == len(self._needed)

    def solvable(self) -> bool:
        """Whether there are sites at all."""
        return self._placeable(0, self._table.available(0, 0))

    def place(self, progress: Progress, letter: int) -> Progress:
        """After one more site, on the letter of an index."""
        table = self._table
        fixed = table.kinds[letter] >= 0
        used = progress.used | (1 << letter if fixed else 0)
        left = progress.left - table.multiplicities[letter]
        if left:
            return Progress(progress.element, left, letter + fixed, used)
        following = progress.element + 1
        atoms = self._needed[following] if following < len(self._needed) else 0
        return Progress(following, atoms, 0, used)

    def choices(self, progress: Progress) -> tuple[int, ...]:
        """Indices of the letters that may come next; each can be completed."""
        found = self._choices.get(progress)
        if found is None:
            found = tuple(self._find(progress))
            self._choices[progress] = found
        return found

    def _find(self, progress: Progress) -> Iterator[int]:
        if self.is_done(progress):
            return
        table = self._table
        for letter in range(progress.first, len(table.kinds)):
            if progress.used >> letter & 1 or table.multiplicities[letter] > progress.left:
                continue
            if self._completable(self.place(progress, letter)):
                yield letter

    def _completable(self, progress: Progress) -> bool:
        """Whether all that is left can be placed, the current element on later letters only."""
        table = self._table
        everywhere = table.available(0, progress.used)
        if self.is_done(progress) or progress.left == self._needed[progress.element]:
            return self._placeable(progress.element, everywhere)
        later = table.available(progress.first, progress.used)
        return any(
            self._placeable(progress.element + 1, _without(everywhere, taken))
            for taken in table.ways(progress.left, later, progress.first)
        )

    def _placeable(self, element: int, available: tuple[int, ...]) -> bool:
        """Whether the elements from an index on fit, given the free fixed positions."""
        if element == len(self._needed):
            return True
        key = (element, available)
        found = self._rest.get(key)
        if found is None:
            found = any(
                self._placeable(element + 1, _without(available, taken))
                for taken in self._table.ways(self._needed[element], available, 0)
            )
            self._rest[key] = found
        return found


def _without(available: Sequence[int], taken: Sequence[int]) -> tuple[int, ...]:
    return tuple(a - t for a, t in zip(available, taken, strict=True))


@lru_cache(maxsize=4096)
def site_solver(space_group: int, needed: tuple[int, ...]) -> SiteSolver:
    """The solver of a group and numbers of atoms, with what it has found out so far."""
    return SiteSolver(space_group, needed)
