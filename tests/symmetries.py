"""Random symmetries, made without the grammar: any group, any letters, and what they add up to."""

from collections import Counter

from hypothesis import assume
from hypothesis import strategies as st

from common.composition import MAX_PRIMITIVE_ATOMS, Formula
from common.crystal.wyckoff import Sites, wyckoff_summary
from common.language.prompt import Symmetry
from common.templates import reduce_counts


@st.composite
def placements(draw: st.DrawFn, max_sites: int = 8) -> tuple[int, Sites]:
    """A space group and legal sites of up to five elements, in any order and setting."""
    number = draw(st.integers(1, 230))
    table = wyckoff_summary(number).letters
    elements = draw(st.lists(st.integers(1, 118), min_size=1, max_size=5, unique=True))
    sites, used = [], set()
    for _ in range(draw(st.integers(1, max_sites))):
        letter = draw(st.sampled_from(list(table)))
        if letter not in used:
            sites.append((draw(st.sampled_from(elements)), letter))
        if table[letter][1] == 0:
            used.add(letter)
    atoms = sum(table[letter][0] for _, letter in sites)
    assume(atoms <= MAX_PRIMITIVE_ATOMS * wyckoff_summary(number).centering)
    return number, tuple(sites)


def symmetries() -> st.SearchStrategy[Symmetry]:
    """The same in canonical form."""
    return placements().map(lambda placement: Symmetry.of(*placement))


def formula_of(symmetry: Symmetry) -> Formula:
    """The reduced formula of a symmetry's sites."""
    return Formula(tuple(sorted(reduce_counts(atom_counts(symmetry))[0].items())))


def atom_counts(symmetry: Symmetry) -> dict[int, int]:
    """Atoms of each element in the conventional cell."""
    table = wyckoff_summary(symmetry.space_group).letters
    counts: Counter[int] = Counter()
    for atomic_number, letter in symmetry.sites:
        counts[atomic_number] += table[letter][0]
    return dict(counts)
