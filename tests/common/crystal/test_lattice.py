"""Lattices as six numbers, against pymatgen's crystal families."""

import numpy as np
import pytest
from pymatgen.core import Lattice
from scipy.linalg import expm

from common.crystal.lattice import (
    LATTICE_BASIS,
    crystal_system,
    k_constraints,
    k_to_lattice,
    lattice_to_k,
    standard_orientation,
)
from tests.crystals import random_lattice

# First and last space group of each family, and pymatgen's lattice of that family.
FAMILIES = {
    "triclinic": ((1, 2), Lattice.from_parameters(5.1, 6.2, 7.3, 81, 95, 107)),
    "monoclinic": ((3, 15), Lattice.monoclinic(5.1, 6.2, 7.3, 107)),
    "orthorhombic": ((16, 74), Lattice.orthorhombic(5.1, 6.2, 7.3)),
    "tetragonal": ((75, 142), Lattice.tetragonal(5.1, 7.3)),
    "hexagonal": ((143, 194), Lattice.hexagonal(5.1, 7.3)),
    "cubic": ((195, 230), Lattice.cubic(5.1)),
}


def turned(lattice: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same lattice in another orientation."""
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return lattice @ rotation


def metric(lattice: np.ndarray) -> np.ndarray:
    return lattice @ np.swapaxes(lattice, -1, -2)


def test_basis_is_orthonormal() -> None:
    assert np.allclose(np.einsum("aij,bij->ab", LATTICE_BASIS, LATTICE_BASIS), np.eye(6))
    assert np.array_equal(LATTICE_BASIS, np.swapaxes(LATTICE_BASIS, 1, 2))


def test_round_trip_from_k() -> None:
    k = np.random.default_rng(0).normal(size=(4, 50, 6))
    assert np.allclose(lattice_to_k(k_to_lattice(k)), k, atol=1e-9)


def test_round_trip_from_lattices_keeps_lengths_and_angles() -> None:
    lattices = np.random.default_rng(1).normal(size=(200, 3, 3)) * 4
    again = k_to_lattice(lattice_to_k(lattices))
    assert np.allclose(metric(again), metric(lattices), rtol=1e-7, atol=1e-7)


def test_agrees_with_the_matrix_exponential() -> None:
    k = np.random.default_rng(2).normal(size=6)
    assert np.allclose(k_to_lattice(k), expm(np.einsum("k,kij->ij", k, LATTICE_BASIS)))


def test_orientation_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    lattice = Lattice.from_parameters(4, 5, 6, 70, 80, 100).matrix
    assert np.allclose(lattice_to_k(turned(lattice, rng)), lattice_to_k(lattice))


def test_volume_is_in_k5_alone() -> None:
    lattice = Lattice.from_parameters(4, 5, 6, 70, 80, 100)
    k = lattice_to_k(lattice.matrix)
    assert np.isclose(k[5], np.log(lattice.volume) / np.sqrt(3))
    larger = lattice_to_k(1.3 * lattice.matrix)
    assert np.allclose(larger[:5], k[:5])
    assert np.isclose(larger[5] - k[5], np.log(1.3**3) / np.sqrt(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_pymatgens_lattices_obey_the_constraints(family: str) -> None:
    (first, last), lattice = FAMILIES[family]
    for group in range(first, last + 1):
        mask, bias = k_constraints(group)
        assert np.allclose(lattice_to_k(lattice.matrix)[~mask], bias[~mask], atol=1e-12)
        assert not bias[mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_free_k_gives_a_lattice_of_the_family(family: str) -> None:
    (first, last), _ = FAMILIES[family]
    rng = np.random.default_rng(4)
    for group in (first, last):
        lattice = Lattice(random_lattice(group, 100.0, rng))
        (a, b, _), (alpha, beta, gamma) = lattice.abc, lattice.angles
        right = {
            "triclinic": [],
            "monoclinic": [alpha - 90, gamma - 90],
            "orthorhombic": [alpha - 90, beta - 90, gamma - 90],
            "tetragonal": [a - b, alpha - 90, beta - 90, gamma - 90],
            "hexagonal": [a - b, alpha - 90, beta - 90, gamma - 120],
            "cubic": [*np.diff(lattice.abc), alpha - 90, beta - 90, gamma - 90],
        }[family]
        assert np.allclose(right, 0, atol=1e-9)
        assert np.isclose(lattice.volume, 100.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_constraint_is_missing(family: str) -> None:
    """As many k are free as a lattice of the family has lengths and angles."""
    (first, last), _ = FAMILIES[family]
    free = dict(zip(FAMILIES, (6, 4, 3, 2, 2, 1), strict=True))[family]
    assert {int(k_constraints(group)[0].sum()) for group in range(first, last + 1)} == {free}
    assert len({crystal_system(group) for group in range(first, last + 1)}) == 1


def test_standard_orientation_is_that_of_a_cif() -> None:
    lattice = turned(Lattice.from_parameters(4, 5, 6, 70, 80, 100).matrix, np.random.default_rng(5))
    standard = standard_orientation(lattice)
    assert np.allclose(metric(standard), metric(lattice))
    assert np.allclose(standard[np.triu_indices(3, k=1)], 0)


@pytest.mark.parametrize("lattice", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.ones((3, 3))])
def test_no_lattice(lattice: np.ndarray) -> None:
    with pytest.raises(ValueError, match="volume above zero"):
        lattice_to_k(lattice)


@pytest.mark.parametrize("group", [-1, 0, 231])
def test_no_group(group: int) -> None:
    with pytest.raises(ValueError, match="not in 1-230"):
        k_constraints(group)
