"""What a model of symmetries must beat: templates of the training set, by count or by likeness."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from common.data.store import Record
from common.elements import element_table, formula_order, pair_differences
from common.language.prompt import Symmetry
from common.prior import SymmetryCandidate
from common.templates import Stoichiometry, reduce_counts, role_order, role_permutations

#: Space group, formula units, and letters of the elements in the order of the formula.
_Pattern = tuple[int, int, tuple[str, ...]]


class TemplateControls:
    """Rankings without a model.

    Args:
        records: the training set.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._patterns: dict[Stoichiometry, Counter[_Pattern]] = defaultdict(Counter)
        self._rows: dict[Stoichiometry, list[tuple[list[int], Symmetry]]] = defaultdict(list)
        self._difference = pair_differences(element_table()).mean(axis=-1)
        for record in records:
            counts, _ = reduce_counts(record.crystal.formula_counts)
            symmetry = Symmetry.of_crystal(record.crystal)
            self._patterns[_in_formula_order(counts)][_pattern(symmetry)] += 1
            order = role_order(counts)
            self._rows[tuple(counts[z] for z in order)].append((order, symmetry))

    def majority(self, counts: Mapping[int, int], top: int = 20) -> list[SymmetryCandidate]:
        """Templates of the anonymous formula, the most frequent first.

        Elements are told apart by their order in the formula (electronegativity).
        """
        counts, _ = reduce_counts(counts)
        elements = sorted(counts, key=formula_order)
        patterns = self._patterns.get(_in_formula_order(counts), Counter())
        candidates = []
        for (number, units, letters), count in patterns.most_common(top):
            sites = tuple(
                (z, letter) for z, own in zip(elements, letters, strict=True) for letter in own
            )
            share = count / patterns.total()
            candidates.append(SymmetryCandidate(number, sites, units, share, "template"))
        return candidates

    def nearest(self, counts: Mapping[int, int], top: int = 20) -> list[SymmetryCandidate]:
        """Symmetries of the training compositions with the most similar elements, substituted.

        Elements are compared by the mean difference of what ``pair_differences`` lists; those of
        equal count may be exchanged. The nearest shares its probability with none.
        """
        counts, _ = reduce_counts(counts)
        order = role_order(counts)
        stoichiometry = tuple(counts[z] for z in order)
        rows = self._rows.get(stoichiometry, [])
        if not rows:
            return []
        elements = np.array(order)[np.array(role_permutations(stoichiometry))]  # [P,R]
        present = np.array([roles for roles, _ in rows])  # [N,R]
        costs = self._difference[elements[:, None], present[None]].sum(axis=-1)  # [P,N]
        found: dict[Symmetry, None] = {}
        for index in np.argsort(costs, axis=None, kind="stable").tolist():
            way, row = divmod(index, len(rows))
            roles, symmetry = rows[row]
            other = dict(zip(roles, elements[way].tolist(), strict=True))
            sites = ((other[z], letter) for z, letter in symmetry.sites)
            found.setdefault(Symmetry.of(symmetry.space_group, sites))
            if len(found) == top:
                break
        return [
            SymmetryCandidate(s.space_group, s.sites, s.units, float(not rank), "template")
            for rank, s in enumerate(found)
        ]


def _in_formula_order(counts: Mapping[int, int]) -> Stoichiometry:
    return tuple(counts[z] for z in sorted(counts, key=formula_order))


def _pattern(symmetry: Symmetry) -> _Pattern:
    letters: dict[int, str] = {}
    for atomic_number, letter in symmetry.sites:
        letters[atomic_number] = letters.get(atomic_number, "") + letter
    return symmetry.space_group, symmetry.units, tuple(letters.values())
