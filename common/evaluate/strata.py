"""Classes of crystals that a result is broken down by: freedom, and what training has shown."""

from collections.abc import Iterable
from dataclasses import dataclass

from common.crystal.normalizer import letter_permutations
from common.crystal.structure import Crystal
from common.data.store import reduced_formula

FREEDOM = ("0", "1-2", "3-5", "6-8", "9+")
"""Classes of the number of free coordinates."""
_LAST = (0, 2, 5, 8)


def freedom_class(num_free_coords: int) -> str:
    """The class of a number of free coordinates."""
    return FREEDOM[sum(num_free_coords > last for last in _LAST)]


def prototype_key(crystal: Crystal) -> str:
    """What crystals of one prototype share: the space group and which positions elements occupy.

    Elements are anonymous, coordinates do not count. Descriptions that differ only by a change of
    origin or axes (Sr on 1a and Ti on 1b, or the reverse) have the same key. Looser than "same
    structure type": parameters may still tell two types apart.
    """
    letters = list(crystal.group.wyckoff)
    descriptions = []
    for permutation in letter_permutations(crystal.space_group):
        table = dict(zip(letters, permutation, strict=True))
        occupied: dict[int, list[str]] = {}
        for site in crystal.sites:
            occupied.setdefault(site.atomic_number, []).append(table[site.letter])
        descriptions.append(" ".join(sorted("".join(sorted(one)) for one in occupied.values())))
    return f"{crystal.space_group} {min(descriptions)}"


@dataclass(frozen=True)
class TrainingIndex:
    """Compositions (reduced formulas) and prototypes that occur in a training set."""

    formulas: frozenset[str]
    prototypes: frozenset[str]

    @classmethod
    def of(cls, crystals: Iterable[Crystal]) -> "TrainingIndex":
        formulas, prototypes = set(), set()
        for crystal in crystals:
            formulas.add(reduced_formula(crystal.formula_counts))
            prototypes.add(prototype_key(crystal))
        return cls(frozenset(formulas), frozenset(prototypes))

    def has_composition(self, crystal: Crystal) -> bool:
        """Whether the crystal's reduced formula was seen."""
        return reduced_formula(crystal.formula_counts) in self.formulas

    def has_prototype(self, crystal: Crystal) -> bool:
        """Whether the crystal's prototype was seen."""
        return prototype_key(crystal) in self.prototypes
