"""Crystals of all 230 groups, through CIF and back, judged by pymatgen, spglib and moyopy."""

import json
import warnings
from collections import Counter

import moyopy
import numpy as np
import pytest
import spglib
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import NUM_SPACE_GROUPS, nearest_zero, space_group
from common.data.label import label_structure
from tests.crystals import TEXTBOOK, random_crystal, textbook

SYMPREC = 0.01
# Large orbits are slow to read; groups with larger general positions get special ones instead.
MAX_ATOMS = 120

all_groups = pytest.mark.parametrize("number", range(1, NUM_SPACE_GROUPS + 1))
kinds = pytest.mark.parametrize("kind", ["special", "general", "mixed"])
exact_match = StructureMatcher(ltol=0.01, stol=0.01, angle_tol=0.1, primitive_cell=False)


def letters(number: int, kind: str, rng: np.random.Generator) -> str:
    """Sites of up to three elements on special, general or both kinds of positions."""
    *special, general = space_group(number).wyckoff
    chosen = rng.permutation(special)[: 3 if kind == "special" else 2 if kind == "mixed" else 0]
    found = "".join(chosen) + general * (kind != "special" or not special)
    sizes = [space_group(number).wyckoff[letter].multiplicity for letter in found]
    while sum(sizes) > MAX_ATOMS and len(sizes) > 1:
        largest = int(np.argmax(sizes[: None if kind == "special" else -1]))
        found, sizes = (
            found[:largest] + found[largest + 1 :],
            sizes[:largest] + sizes[largest + 1 :],
        )
    return found


def cell(structure: Structure) -> tuple[np.ndarray, np.ndarray, list[int]]:
    return structure.lattice.matrix, structure.frac_coords, list(structure.atomic_numbers)


def found_groups(structure: Structure) -> tuple[int, int]:
    """By spglib and by moyopy."""
    lattice, coords, numbers = cell(structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_spglib = spglib.get_symmetry_dataset((lattice, coords, numbers), symprec=SYMPREC)
    by_moyopy = moyopy.MoyoDataset(
        moyopy.Cell(lattice.tolist(), coords.tolist(), numbers), symprec=SYMPREC
    )
    assert by_spglib is not None
    return by_spglib.number, by_moyopy.number


def holds(structure: Structure, number: int) -> bool:
    """Whether every operation of a group maps a crystal in that group's setting onto itself."""
    group, coords = space_group(number), structure.frac_coords
    metric = structure.lattice.metric_tensor
    if not np.allclose(
        group.rotations.transpose(0, 2, 1) @ metric @ group.rotations, metric, atol=1e-4
    ):
        return False
    numbers = np.array(structure.atomic_numbers)
    for rotation, translation in zip(group.rotations, group.translations, strict=True):
        difference = nearest_zero((coords @ rotation.T + translation)[:, None] - coords)
        near = np.linalg.norm(difference @ structure.lattice.matrix, axis=2) < SYMPREC
        near &= numbers[:, None] == numbers
        if not (near.sum(axis=1) == 1).all():
            return False
    return True


@kinds
@all_groups
def test_group_and_composition_survive_a_cif(number: int, kind: str) -> None:
    rng = np.random.default_rng([number, len(kind)])
    crystal = random_crystal(number, letters(number, kind, rng), rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structure = Structure.from_str(crystal.to_cif(), fmt="cif")
    assert Counter(structure.atomic_numbers) == crystal.formula_counts
    assert set(found_groups(structure)) == {number} or holds(structure, number)


def test_a_moved_atom_does_not_hold_the_group() -> None:
    structure = textbook("spinel MgAl2O4")
    assert holds(structure, 227)
    structure.translate_sites([20], [0.003, 0, 0], to_unit_cell=True)
    assert not holds(structure, 227)


def test_a_strained_cell_does_not_hold_the_group() -> None:
    structure = textbook("CsCl")
    structure.apply_strain([0.01, 0, 0])
    assert not holds(structure, 221)


@pytest.mark.parametrize("number", range(1, NUM_SPACE_GROUPS + 1, 3))
def test_primitive_cell_is_the_same_crystal(number: int) -> None:
    rng = np.random.default_rng(number)
    crystal = random_crystal(number, letters(number, "special", rng), rng)
    conventional, primitive = crystal.to_structure(), crystal.to_structure(primitive=True)
    assert len(conventional) == crystal.num_atoms
    assert len(primitive) == crystal.num_primitive_atoms
    assert len(conventional) == len(primitive) * len(crystal.group.centering)
    assert found_groups(primitive) == found_groups(conventional)
    # Same setting: every primitive atom is an atom of the conventional cell, where it is.
    offsets = conventional.lattice.get_fractional_coords(primitive.cart_coords)
    difference = nearest_zero(offsets[:, None] - conventional.frac_coords)
    distances = np.linalg.norm(difference @ conventional.lattice.matrix, axis=2)
    nearest = distances.argmin(axis=1)
    assert distances.min(axis=1).max() < 1e-6
    assert primitive.species == [conventional.species[atom] for atom in nearest]


@pytest.mark.parametrize("name", TEXTBOOK)
def test_textbook_crystals_come_back(name: str) -> None:
    structure = textbook(name)
    crystal = label_structure(structure)
    assert crystal.space_group == TEXTBOOK[name].group
    again = crystal.to_structure()
    assert exact_match.fit(again, structure)
    assert exact_match.fit(
        crystal.to_structure(primitive=True), structure.get_primitive_structure()
    )
    assert crystal.formula_counts == Counter(structure.atomic_numbers)
    assert np.isclose(again.volume, structure.volume)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert exact_match.fit(Structure.from_str(crystal.to_cif("x"), fmt="cif"), structure)


def test_dict_round_trip_is_exact() -> None:
    rng = np.random.default_rng(0)
    crystal = random_crystal(62, "acd", rng)
    again = Crystal.from_dict(json.loads(json.dumps(crystal.to_dict())))
    assert again.space_group == 62
    assert again.sites == crystal.sites
    assert np.array_equal(again.lattice, crystal.lattice)


def test_counts() -> None:
    sites = (Site(38, "a"), Site(22, "b"), Site(8, "c"))
    crystal = Crystal(221, sites, 3.905 * np.eye(3))
    assert crystal.sites_string == "Sr:1a Ti:1b O:3c"
    assert crystal.formula_counts == {38: 1, 22: 1, 8: 3}
    assert (crystal.num_atoms, crystal.num_primitive_atoms, crystal.num_free_coords) == (5, 5, 0)
    rutile = Crystal(136, (Site(22, "a"), Site(8, "f", (0.305, 0, 0))), np.diag([4.59, 4.59, 2.96]))
    assert (rutile.num_atoms, rutile.num_free_coords) == (6, 1)


def test_cif_names_the_group_and_its_sites() -> None:
    crystal = label_structure(textbook("perovskite SrTiO3"))
    text = crystal.to_cif()
    assert "_symmetry_space_group_name_H-M   'Pm-3m'" in text
    assert "_symmetry_Int_Tables_number   221" in text
    assert text.count("'\n") - 2 == 48  # two quoted names, then the operations
    assert text.splitlines()[-1].split()[:4] == ["O", "O2", "3", "d"]


@pytest.mark.parametrize(
    ("numbers", "formula", "units"),
    [((8,), "O", 1), ((8,) * 4, "O", 4), ((11, 8), "NaO", 1), ((22, 8, 8) * 3, "TiO2", 3)],
)
def test_z_of_a_cif_counts_its_formula(numbers: tuple[int, ...], formula: str, units: int) -> None:
    sites = tuple(Site(z, "a", (i / 10, 0.2, 0.3)) for i, z in enumerate(numbers))
    lines = Crystal(1, sites, 9 * np.eye(3)).to_cif().splitlines()
    assert lines[0] == f"data_{formula}"
    assert f"_chemical_formula_structural   {formula}" in lines
    assert f"_cell_formula_units_Z   {units}" in lines


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Crystal(136, (Site(8, "f", (bad, 0, 0)),), np.eye(3)).to_structure()
    with pytest.raises(ValueError, match="finite"):
        Crystal(221, (Site(8, "a"),), np.full((3, 3), bad)).to_structure()


def test_unknown_letter() -> None:
    with pytest.raises(KeyError):
        Crystal(1, (Site(8, "b"),), np.eye(3)).to_structure()
