"""Wyckoff tables of all 230 groups, against pyxtal, spglib and moyopy."""

import subprocess
import sys
import warnings
from functools import cache
from itertools import product

import moyopy
import numpy as np
import pytest
import spglib
from pymatgen.core import Structure

from common.crystal.symmetry import (
    NUM_SPACE_GROUPS,
    SpaceGroup,
    WyckoffPosition,
    nearest_zero,
    space_group,
    wrap,
)
from tests.crystals import as_points, random_crystal, random_params

GROUPS = range(1, NUM_SPACE_GROUPS + 1)
all_groups = pytest.mark.parametrize("number", GROUPS)


@cache
def pyxtal_group(number: int) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pyxtal.symmetry import Group

        return Group(number)


def draws(position: WyckoffPosition) -> tuple[np.ndarray, np.ndarray]:
    """Random variables of a position [3] and its orbit [M,3]."""
    rng = np.random.default_rng([position.space_group, ord(position.letter)])
    params = np.array(random_params(position, rng))
    return params, position.positions(params)


def images(group: SpaceGroup, points: np.ndarray) -> np.ndarray:
    """Points [N,3] under every operation: [G,N,3]."""
    moved = np.einsum("gij,nj->gni", group.rotations, points)
    return moved + group.translations[:, None]


@all_groups
def test_positions_are_pyxtals(number: int) -> None:
    table, group = pyxtal_group(number), space_group(number)
    assert (group.symbol, group.hall_number) == (table.symbol, table.hall_number)
    assert [p.letter for p in reversed(table.Wyckoff_positions)] == list(group.wyckoff)
    for theirs in table.Wyckoff_positions:
        ours = group.wyckoff[theirs.letter]
        matrices = np.array([op.affine_matrix for op in theirs.ops])
        assert np.array_equal(ours.rotations, matrices[:, :3, :3])
        assert np.abs(nearest_zero(ours.translations - matrices[:, :3, 3])).max() < 1e-3


@all_groups
def test_operations_are_spglibs(number: int) -> None:
    group = space_group(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = spglib.get_symmetry_from_database(group.hall_number)
    keys = [
        {
            (rotation.astype(int).tobytes(), int(point))
            for rotation, point in zip(rotations, as_points(translations), strict=True)
        }
        for rotations, translations in (
            (group.rotations, group.translations),
            (theirs["rotations"], theirs["translations"]),
        )
    ]
    assert keys[0] == keys[1]
    assert len(keys[0]) == len(group.rotations) == group.general.multiplicity


@all_groups
def test_orbits_are_closed_and_complete(number: int) -> None:
    group = space_group(number)
    for position in group.wyckoff.values():
        _, orbit = draws(position)
        points = as_points(orbit)
        assert len(set(points.tolist())) == position.multiplicity
        every = as_points(images(group, orbit))
        assert np.array_equal(np.unique(every), np.sort(points))


@all_groups
def test_frames_take_the_first_atom_to_each(number: int) -> None:
    group = space_group(number)
    for position in group.wyckoff.values():
        _, orbit = draws(position)
        moved = as_points(images(group, orbit[:1])[:, 0])
        for atom, frame in zip(as_points(orbit), position.frames, strict=True):
            same = (group.rotations == frame).all(axis=(1, 2))
            assert (moved[same] == atom).any()


@all_groups
def test_primitive_atoms_and_centring_make_the_orbit(number: int) -> None:
    group = space_group(number)
    for position in group.wyckoff.values():
        _, orbit = draws(position)
        copies = orbit[position.primitive][:, None] + group.centering
        assert np.array_equal(np.sort(as_points(copies).ravel()), np.sort(as_points(orbit)))


@all_groups
def test_primitive_basis(number: int) -> None:
    group = space_group(number)
    assert np.isclose(abs(np.linalg.det(group.to_primitive)), len(group.centering))
    lattice = np.concatenate([group.centering, np.eye(3)]) @ group.to_primitive.T
    assert np.allclose(lattice, np.rint(lattice))
    turned = group.to_primitive @ group.rotations @ np.linalg.inv(group.to_primitive)
    assert np.allclose(turned, np.rint(turned))


@all_groups
def test_equivalents_are_all_the_variables_of_the_orbit(number: int) -> None:
    for position in space_group(number).wyckoff.values():
        params, orbit = draws(position)
        linears, offsets = position.equivalents
        same = np.where(position.free_mask, linears @ params + offsets, 0.0)
        again = as_points(position.positions(same))
        assert np.array_equal(
            np.sort(again, axis=1), np.broadcast_to(np.sort(as_points(orbit)), again.shape)
        )
        assert np.allclose(wrap(same[0]), params)
        # Every atom that can be the first one gives one of them, and nothing else does.
        solved, deviation = position.solve(orbit)
        expected = set(as_points(solved[deviation < 1e-6]).tolist())
        assert set(as_points(same).tolist()) == expected
        assert len(same) == len(expected)


@all_groups
def test_variables_of_an_atom(number: int) -> None:
    for position in space_group(number).wyckoff.values():
        params, orbit = draws(position)
        found = position.free_params(orbit[0] + [1, -2, 3])
        assert found is not None
        assert np.allclose(nearest_zero(found - params), 0, atol=1e-9)
        assert not found[~position.free_mask].any()
        nudged = position.free_params(orbit[0] + 2e-4)
        assert nudged is not None
        assert np.abs(nearest_zero(position.positions(nudged)[0] - orbit[0])).max() < 6e-4
        if position.dof < 3:
            assert position.free_params([0.1234, 0.3771, 0.0519]) is None


def test_variables_agree_with_a_search_over_lattice_steps() -> None:
    """On planes and lines with oblique positions, as (x, 2x, z)."""
    rng = np.random.default_rng(0)
    steps = np.array(list(product(range(-3, 4), repeat=3)), dtype=float)
    for number, letter in ((164, "i"), (186, "c"), (194, "k"), (212, "d"), (230, "g"), (148, "c")):
        position = space_group(number).wyckoff[letter]
        for atom in position.positions(rng.random(3)):
            targets = atom + rng.normal(scale=1e-4, size=3) - position.translations[0] + steps
            least = np.linalg.lstsq(position.rotations[0], targets.T, rcond=None)[0].T
            misfit = np.abs(least @ position.rotations[0].T - targets).max(axis=1)
            found = position.free_params(targets[0] - steps[0] + position.translations[0])
            assert (found is None) == (misfit.min() > 1e-3)
            if found is not None:
                best = least[misfit.argmin()] * position.free_mask
                assert np.allclose(nearest_zero(found - best), 0, atol=1e-9)


@all_groups
def test_multiplicities_are_moyopys(number: int) -> None:
    group = space_group(number)
    *special, general = group.wyckoff
    # All positions together have the group's symmetry and no more; so have three general ones.
    letters = "".join(special) + general if special else general * 3
    crystal = random_crystal(number, letters, np.random.default_rng(number))
    dataset = moyo_dataset(crystal.to_structure())
    assert dataset.number == number
    first_atoms = np.cumsum([0] + [position.multiplicity for position in crystal.positions[:-1]])
    found = [dataset.wyckoffs[atom] for atom in first_atoms]
    # Another origin may exchange letters, but only among positions of one kind.
    assert sorted(found) == sorted(letters)
    for atom, theirs, built in zip(first_atoms, found, letters, strict=True):
        position = group.wyckoff[theirs]
        assert position.multiplicity == group.wyckoff[built].multiplicity
        assert position.multiplicity == dataset.orbits.count(dataset.orbits[atom])


def moyo_dataset(structure: Structure) -> moyopy.MoyoDataset:
    cell = moyopy.Cell(
        structure.lattice.matrix.tolist(),
        structure.frac_coords.tolist(),
        list(structure.atomic_numbers),
    )
    return moyopy.MoyoDataset(cell, symprec=1e-3, setting=moyopy.Setting.standard())


@pytest.mark.parametrize("number", [-1, 0, 231])
def test_no_group(number: int) -> None:
    with pytest.raises(ValueError, match="not in 1-230"):
        space_group(number)


def test_pyxtal_is_not_imported_for_the_tables() -> None:
    """It takes seconds, and everything else that needs a group would wait for it."""
    code = """
import sys
from common.crystal.symmetry import space_group
space_group(225)
sys.exit("pyxtal" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
