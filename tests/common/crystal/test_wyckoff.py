"""The table of letters against the operations it was derived from, and relabelled crystals."""

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher

from common.crystal.lattice import k_constraints, k_to_lattice
from common.crystal.normalizer import letter_permutations
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import space_group
from common.crystal.wyckoff import derive, wyckoff_summary
from common.data.label import label_structure


@pytest.mark.parametrize("number", [1, 14, 62, 82, 99, 139, 148, 166, 194, 216, 227])
def test_shipped_table_is_what_the_operations_say(number: int) -> None:
    row = derive(number)
    summary = wyckoff_summary(number)
    assert (row["symbol"], row["centering"]) == (summary.symbol, summary.centering)
    assert {x: (m, d) for x, m, d in row["letters"]} == summary.letters
    assert tuple(row["permutations"]) == summary.permutations


def test_all_groups_have_their_letters() -> None:
    for number in range(1, 231):
        letters = wyckoff_summary(number).letters
        group = space_group(number).wyckoff
        assert letters == {x: (p.multiplicity, p.dof) for x, p in group.items()}
        for permutation in wyckoff_summary(number).permutations:
            assert sorted(permutation) == sorted(letters)
            for before, after in zip(letters, permutation, strict=True):
                assert letters[before] == letters[after]


@pytest.mark.parametrize(
    ("number", "size"), [(2, 1344), (62, 2), (194, 2), (216, 8), (221, 2), (225, 2), (230, 1)]
)
def test_number_of_relabellings(number: int, size: int) -> None:
    """Indices of the Euclidean normalisers on the letters, from International Tables A, 3.5."""
    assert len(letter_permutations(number)) == size


@pytest.mark.parametrize(
    ("number", "sites", "others"),
    [
        (221, [(38, "a"), (22, "b"), (8, "c")], [(22, "a"), (38, "b"), (8, "d")]),
        (225, [(11, "a"), (17, "b")], [(17, "a"), (11, "b")]),
        (216, [(30, "a"), (16, "c")], [(30, "b"), (16, "d")]),
        (194, [(30, "c"), (16, "d")], [(30, "d"), (16, "c")]),
    ],
)
def test_relabelled_sites_are_the_same_crystal(number, sites, others) -> None:
    summary = wyckoff_summary(number)
    assert summary.canonical(sites) == summary.canonical(others)
    mask, k = k_constraints(number)
    k = k + np.where(mask, [0, 0, 0, 0, 0.2, 2.6], 0)
    first, second = (
        Crystal(number, tuple(Site(z, x) for z, x in s), k_to_lattice(k)).to_structure()
        for s in (sites, others)
    )
    assert StructureMatcher().fit(first, second)


def test_different_sites_stay_apart() -> None:
    summary = wyckoff_summary(216)
    assert summary.canonical([(30, "a"), (16, "b")]) != summary.canonical([(30, "a"), (16, "c")])
    perovskite = wyckoff_summary(221)
    assert perovskite.canonical([(38, "a"), (22, "b"), (8, "c")]) != perovskite.canonical(
        [(38, "a"), (22, "b"), (8, "d")]
    )


@pytest.mark.parametrize("number", [2, 12, 47, 63, 99, 139, 166, 187, 216, 221])
def test_shifted_crystal_has_equivalent_letters(number: int) -> None:
    """Oracle: spglib's own labels of a crystal before and after a change of origin."""
    group = space_group(number)
    generator = np.random.default_rng(number)
    mask, k = k_constraints(number)
    k = k + np.where(mask, generator.uniform(-0.3, 0.3, 6), 0)
    k[5] += 4.2
    letters = list(group.wyckoff)[:3]
    sites = tuple(
        Site(z, x, tuple(generator.uniform(0.1, 0.9, 3) * group.wyckoff[x].free_mask))
        for z, x in zip((38, 22, 8), letters, strict=True)
    )
    structure = Crystal(number, sites, k_to_lattice(k)).to_structure(primitive=True)
    moved = structure.copy()
    moved.translate_sites(range(len(moved)), [0.5, 0.5, 0.5])
    summary = wyckoff_summary(number)
    found = []
    for candidate in (structure, moved):
        label = label_structure(candidate, symprec=1e-3)
        assert label.space_group == number
        found.append(summary.canonical([(s.atomic_number, s.letter) for s in label.sites]))
    assert found[0] == found[1] == summary.canonical([(s.atomic_number, s.letter) for s in sites])
