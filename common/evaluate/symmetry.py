"""Which space group an emitted crystal really has, and whether it is the one that was requested.

A crystal built in a group may come out with more symmetry than asked for: it still holds the group
and is labelled ``higher``. That is decided by the operations themselves, not by comparing numbers:
a larger number is not a supergroup.
"""

import logging
import warnings
from collections.abc import Mapping
from enum import StrEnum

import moyopy
import numpy as np
import spglib
from numpy.typing import NDArray
from pymatgen.core import Structure

from common.crystal.symmetry import space_group
from common.evaluate.validity import cell_is_sound, cell_problem

Array = NDArray[np.float64]

# That moyopy moves atoms far to make them symmetric shows in the group that it finds.
logging.getLogger("moyo").setLevel(logging.ERROR)

SYMPREC = 0.01
"""Tolerance of all tests here (A)."""


class SymmetryLabel(StrEnum):
    """What became of the requested group.

    exact: spglib and moyopy both find it. higher: the crystal holds all its operations, and at
    least one of the programs finds another group with no fewer. lost: anything else.
    """

    EXACT = "exact"
    HIGHER = "higher"
    LOST = "lost"


def found_space_groups(structure: Structure, symprec: float = SYMPREC) -> dict[str, int]:
    """Space-group numbers by ``spglib`` and ``moyopy``; 0 where a program finds none."""
    return {name: number for name, (number, _) in _found(structure, symprec).items()}


def symmetry_kept(structure: Structure, requested: int, symprec: float = SYMPREC) -> SymmetryLabel:
    """Whether a crystal has the space group it was made for.

    Args:
        structure: the crystal in the conventional cell and standard setting of the group, as the
            emitted CIF gives it. In another setting ``exact`` is still recognised; more symmetry
            is not, and is reported as lost.
        requested: number of the group, 1-230.
        symprec: tolerance (A).
    """
    found = _found(structure, symprec).values()
    if all(number == requested for number, _ in found):
        return SymmetryLabel.EXACT
    order = len(space_group(requested).rotations)
    # Operations are counted in the cell given, so those of a supergroup cannot be fewer.
    if all(count >= order for _, count in found) and holds_group(structure, requested, symprec):
        return SymmetryLabel.HIGHER
    return SymmetryLabel.LOST


def holds_group(structure: Structure, number: int, symprec: float = SYMPREC) -> bool:
    """Whether every operation of a space group maps the crystal onto itself.

    The proof that does not depend on any program's label: lattice and atoms are compared with
    their images directly, in the standard setting of the group.

    Args:
        structure: conventional cell, standard setting.
        number: space group, 1-230.
        symprec: largest deviation of an atom or of a lattice vector (A).
    """
    if not cell_is_sound(structure):
        return False
    group = space_group(number)
    lattice = np.asarray(structure.lattice.matrix)
    if not _holds_lattice(lattice, group.rotations, symprec):
        return False
    numbers = np.array([site.specie.Z for site in structure])
    frac_coords = np.asarray(structure.frac_coords)
    for z in np.unique(numbers):
        atoms = frac_coords[numbers == z]
        images = np.einsum("gij,aj->gai", group.rotations, atoms) + group.translations[:, None]
        for image in images:
            if not _same_points(image, atoms, lattice, symprec):
                return False
    return True


def composition_is_exact(structure: Structure, counts: Mapping[int, int]) -> bool:
    """Whether a cell holds exactly the atoms {atomic number: count}, no more and no fewer."""
    if not structure.is_ordered:
        return False
    atoms, amounts = np.unique([site.specie.Z for site in structure], return_counts=True)
    return dict(zip(atoms.tolist(), amounts.tolist(), strict=True)) == dict(counts)


def _found(structure: Structure, symprec: float) -> dict[str, tuple[int, int]]:
    """Number of the group and of its operations in the cell given, by each program."""
    if cell_problem(structure):
        return {"spglib": (0, 0), "moyopy": (0, 0)}
    lattice = structure.lattice.matrix
    numbers = [site.specie.Z for site in structure]
    return {
        "spglib": _by_spglib(lattice, structure.frac_coords, numbers, symprec),
        "moyopy": _by_moyopy(lattice, structure.frac_coords, numbers, symprec),
    }


def _by_spglib(
    lattice: Array, frac_coords: Array, numbers: list[int], symprec: float
) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cell = (lattice.tolist(), frac_coords.tolist(), numbers)
            dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
    except spglib.SpglibError:
        return 0, 0
    return (0, 0) if dataset is None else (int(dataset.number), len(dataset.rotations))


def _by_moyopy(
    lattice: Array, frac_coords: Array, numbers: list[int], symprec: float
) -> tuple[int, int]:
    try:
        cell = moyopy.Cell(lattice.tolist(), frac_coords.tolist(), numbers)
        dataset = moyopy.MoyoDataset(cell, symprec=symprec)
    except ValueError:
        return 0, 0
    return int(dataset.number), len(dataset.operations)


def _holds_lattice(lattice: Array, rotations: Array, symprec: float) -> bool:
    """Whether rotations [G,3,3] leave lengths and angles of a lattice (rows) unchanged."""
    metric = lattice @ lattice.T
    lengths = np.sqrt(np.diag(metric))
    images = np.einsum("gki,kl,glj->gij", rotations, metric, rotations)
    image_lengths = np.sqrt(np.einsum("gii->gi", images))
    if (np.abs(image_lengths - lengths) > symprec).any():
        return False
    # A change of an angle moves the end of the vectors beside it by their length times the change.
    cosines = metric / np.outer(lengths, lengths)
    image_cosines = images / (image_lengths[:, :, None] * image_lengths[:, None, :])
    turns = np.arccos(np.clip(image_cosines, -1, 1)) - np.arccos(np.clip(cosines, -1, 1))
    reach = (lengths[:, None] + lengths) / 2
    off_diagonal = ~np.eye(3, dtype=bool)
    return bool((np.abs(np.sin(turns)) * reach <= symprec)[:, off_diagonal].all())


def _same_points(image: Array, atoms: Array, lattice: Array, symprec: float) -> bool:
    """Whether two sets of fractional positions [N,3] are the same up to lattice vectors."""
    difference = image[:, None] - atoms
    difference -= np.round(difference)
    close = np.linalg.norm(difference @ lattice, axis=2) <= symprec
    return bool(close.any(axis=1).all() and close.any(axis=0).all())
