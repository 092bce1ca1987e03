"""The validity filter against chemistry everyone knows and distances computed by hand."""

import math

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from smact.screening import smact_validity

from common.evaluate.validity import (
    cell_is_sound,
    closest_pair,
    composition_is_valid,
    geometry_is_valid,
    is_valid,
    min_distance,
)
from tests.crystals import TEXTBOOK, textbook


@pytest.mark.parametrize("formula", ["NaCl", "SrTiO3", "TiO2", "MgAl2O4", "Si", "O2", "AlNi"])
def test_ordinary_compositions_metals_and_elements_pass(formula: str) -> None:
    assert composition_is_valid(formula)


@pytest.mark.parametrize(
    ("formula", "why"),
    [("Na2Cl", "not neutral"), ("NaCl3", "not neutral"), ("HeO", "no oxidation states")],
)
def test_impossible_compositions_fail(formula: str, why: str) -> None:
    assert not composition_is_valid(formula), why


def test_oxidation_states_are_the_2014_list_not_smacts_default() -> None:
    assert composition_is_valid("AlV2O4")
    assert not smact_validity("AlV2O4"), "the default changed: choose another example"


def test_composition_does_not_depend_on_the_number_of_formula_units() -> None:
    assert composition_is_valid("Sr8Ti8O24")
    assert not composition_is_valid("Na8Cl4")


@pytest.mark.parametrize("name", TEXTBOOK)
def test_textbook_crystals_are_valid(name: str) -> None:
    assert is_valid(textbook(name))


@pytest.mark.parametrize("name", TEXTBOOK)
def test_distance_between_neighbours(name: str) -> None:
    assert math.isclose(min_distance(textbook(name)), TEXTBOOK[name].bond, abs_tol=6e-3)


def test_distance_to_own_image_in_a_skewed_cell() -> None:
    # Copper: the nearest image of the only atom is not along any of these cell vectors.
    lattice = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 3.61 / 2
    skewed = np.array([[1, 2, 0], [0, 1, 3], [0, 0, 1]]) @ lattice
    copper = Structure(Lattice(skewed), ["Cu"], [[0.3, 0.3, 0.3]])
    assert math.isclose(min_distance(copper), 3.61 / 2**0.5, rel_tol=1e-9)


def test_the_closest_pair_is_so_for_its_size() -> None:
    """Radii of Ti 1.60, O 0.66 and Cs 2.44 A; a caesium atom is near its own image."""
    lattice = Lattice.orthorhombic(10, 10, 3)
    crystal = Structure(lattice, ["Ti", "O", "Cs"], [[0, 0, 0], [0.18, 0, 0], [0.5, 0.5, 0]])
    assert math.isclose(min_distance(crystal), 1.8, rel_tol=1e-9)
    found = closest_pair(crystal)
    assert found.symbols == ("Cs", "Cs")
    assert math.isclose(found.distance, 3, rel_tol=1e-9)
    assert math.isclose(found.share, 3 / 4.88, rel_tol=1e-9)
    without = closest_pair(Structure.from_sites(crystal[:2]))
    assert without.symbols == ("Ti", "O")
    assert math.isclose(without.share, 1.8 / 2.26, rel_tol=1e-9)


def test_atoms_too_close_across_a_face_fail() -> None:
    close = Structure(Lattice.cubic(10), ["Na", "Cl"], [[0.01, 0, 0], [0.97, 0, 0]])
    assert math.isclose(min_distance(close), 0.4, rel_tol=1e-9)
    assert not geometry_is_valid(close)
    apart = Structure(Lattice.cubic(10), ["Na", "Cl"], [[0.03, 0, 0], [0.97, 0, 0]])
    assert geometry_is_valid(apart)


def test_an_atom_too_close_to_its_own_image_fails() -> None:
    assert not geometry_is_valid(Structure(Lattice.orthorhombic(5, 5, 0.45), ["Na"], [[0, 0, 0]]))
    assert geometry_is_valid(Structure(Lattice.orthorhombic(5, 5, 0.55), ["Na"], [[0, 0, 0]]))
    # Along no vector of the cell: the difference of two of them is 0.4 A long.
    skewed = Lattice([[5, 0, 0], [5, 0.4, 0], [0, 0, 5]])
    assert not geometry_is_valid(Structure(skewed, ["Na"], [[0, 0, 0]]))


BROKEN = {
    "nan coordinate": Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.5, np.nan, 0.5]]),
    "nan lattice": Structure(Lattice(np.full((3, 3), np.nan)), ["Na"], [[0, 0, 0]]),
    "flat": Structure(Lattice([[3, 0, 0], [0, 3, 0], [3, 3, 1e-7]]), ["Na"], [[0, 0, 0]]),
    "zero": Structure(Lattice(np.zeros((3, 3))), ["Na"], [[0, 0, 0]]),
    "huge": Structure(Lattice.orthorhombic(1e7, 3, 3), ["Na"], [[0, 0, 0]]),
    "thin": Structure(Lattice.hexagonal(45.174, 0.151), ["Na"], [[0, 0, 0]]),
    "no atoms": Structure(Lattice.cubic(4), [], []),
    "disordered": Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_structures_fail_without_an_exception(name: str) -> None:
    assert not cell_is_sound(BROKEN[name])
    assert not is_valid(BROKEN[name])


def test_a_tiny_cell_fails() -> None:
    assert not is_valid(Structure(Lattice.cubic(0.4), ["Na"], [[0, 0, 0]]))
    # Its atoms are 0.51 A apart, its volume is 0.094 A^3.
    close = Structure(
        Lattice(np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 0.51 / 2**0.5), ["Na"], [[0, 0, 0]]
    )
    assert min_distance(close) > 0.5
    assert not is_valid(close)
