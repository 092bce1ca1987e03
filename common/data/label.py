"""From a structure to its space group, Wyckoff sites and free coordinates.

Two ways give the same crystal. ``label_structure_reference`` is the protocol of the paper and of
DiffCSP++: Niggli reduction, pymatgen's ``SpacegroupAnalyzer`` at symprec 0.1, then pyxtal.
``label_structure`` calls spglib directly and reads the sites off its standardised cell, hundreds of
times a second.
"""

import warnings
from collections import Counter

import numpy as np
import spglib
from numpy.typing import NDArray
from pymatgen.core import Structure

from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import WyckoffPosition, nearest_zero, space_group

Array = NDArray[np.float64]
Cell = tuple[Array, Array, NDArray[np.int64]]

#: Part of the key of cached labels: raise it when labels change.
LABEL_VERSION = 1
#: Why a structure can have no label.
LABEL_REASONS = ("disorder", "not_finite", "overlap", "symmetry", "sites")
#: Atoms nearer than this (A) overlap.
MIN_DISTANCE = 0.5

SYMPREC = 0.1
ANGLE_TOLERANCE = 5.0
# Tolerances of the second search, on the refined cell: pyxtal's, then the one to fall back on.
_SITE_TOLERANCES = (0.01, 1e-4)


class LabelError(ValueError):
    """A structure that cannot be labelled.

    Attributes:
        reason: one of ``LABEL_REASONS``.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in LABEL_REASONS
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def label_structure(structure: Structure, symprec: float = SYMPREC) -> Crystal:
    """Space group and sites of a structure, in the group's standard setting.

    Args:
        structure: ordered, periodic in three dimensions.
        symprec: distance tolerance in angstrom.

    Raises:
        LabelError: if the structure is disordered, not finite, has overlapping atoms, or no
            consistent symmetry is found.
    """
    check_structure(structure)
    cell = (
        structure.lattice.matrix,
        structure.frac_coords,
        np.array([site.specie.Z for site in structure]),
    )
    refined = _standard_cell(_dataset(cell, symprec))
    problems = []
    for tolerance in _SITE_TOLERANCES:
        try:
            return _crystal(refined, tolerance)
        except LabelError as error:
            problems.append(error)
    raise problems[0]


def check_structure(structure: Structure) -> None:
    """Raises LabelError if a structure is disordered, not finite or has overlapping atoms."""
    if not structure.is_ordered:
        raise LabelError("disorder", "a site is partially occupied or shared by elements")
    finite = (
        np.isfinite(structure.frac_coords).all() and np.isfinite(structure.lattice.matrix).all()
    )
    if not finite or structure.volume <= 0:
        raise LabelError("not_finite", "a coordinate or the lattice is not finite")
    distances = structure.distance_matrix
    pairs = distances[np.triu_indices(len(structure), k=1)]
    nearest = min(pairs.min(initial=np.inf), min(structure.lattice.abc))
    if nearest < MIN_DISTANCE:
        raise LabelError("overlap", f"two atoms are {nearest:.3f} A apart")


def _dataset(cell: Cell, symprec: float, hall_number: int = 0) -> spglib.SpglibDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = spglib.get_symmetry_dataset(
            cell,  # type: ignore[arg-type]  # arrays are accepted; the stubs name sequences
            symprec=symprec,
            angle_tolerance=ANGLE_TOLERANCE,
            hall_number=hall_number,
        )
    if dataset is None:
        raise LabelError("symmetry", f"spglib finds no space group at symprec {symprec}")
    return dataset


def _standard_cell(dataset: spglib.SpglibDataset) -> Cell:
    return dataset.std_lattice, dataset.std_positions, dataset.std_types


def _crystal(refined: Cell, tolerance: float) -> Crystal:
    """Sites of a refined cell, from the symmetry found there at a tight tolerance."""
    dataset = _dataset(refined, tolerance)
    group = space_group(dataset.number)
    if dataset.hall_number != group.hall_number:
        dataset = _dataset(refined, tolerance, group.hall_number)
    if dataset.number != group.number:
        raise LabelError("symmetry", f"no standard setting of group {group.number} fits")
    lattice, positions, numbers = _standard_cell(dataset)
    # The letters belong to the input's atoms: carry them over through the primitive cell.
    by_primitive = dict(
        zip(
            dataset.mapping_to_primitive,
            zip(dataset.crystallographic_orbits, dataset.wyckoffs, strict=True),
            strict=True,
        )
    )
    labels = [by_primitive[index] for index in dataset.std_mapping_to_primitive]
    orbits: dict[int, list[int]] = {}
    for atom, (orbit, _) in enumerate(labels):
        orbits.setdefault(orbit, []).append(atom)
    sites = []
    for atoms in orbits.values():
        letter = labels[atoms[0]][1]
        params = orbit_params(group.wyckoff[letter], positions[atoms])
        sites.append(Site(int(numbers[atoms[0]]), letter, tuple(params.tolist())))
    return Crystal(group.number, tuple(sites), np.asarray(lattice))


def orbit_params(position: WyckoffPosition, atoms: Array, tolerance: float = 1e-3) -> Array:
    """Variables of a Wyckoff position that give an orbit's atoms.

    Args:
        position: the Wyckoff position.
        atoms: [M,3], fractional coordinates of the whole orbit.
        tolerance: largest fractional deviation of any atom.

    Returns:
        [3], see ``Site``.

    Raises:
        LabelError: if no variables give these atoms.
    """
    if len(atoms) != position.multiplicity:
        raise LabelError(
            "sites", f"{len(atoms)} atoms on position {position.multiplicity}{position.letter}"
        )
    for atom in atoms:
        params = position.free_params(atom, tolerance)
        if params is None:
            continue
        distances = np.abs(nearest_zero(position.positions(params)[:, None] - atoms)).max(axis=2)
        if (distances.min(axis=1) < tolerance).all() and (distances.min(axis=0) < tolerance).all():
            return params
    raise LabelError("sites", f"atoms do not fit position {position.multiplicity}{position.letter}")


def label_structure_reference(structure: Structure, symprec: float = SYMPREC) -> Crystal:
    """The same by ``SpacegroupAnalyzer`` and pyxtal, slowly, as in the paper and in DiffCSP++.

    Raises:
        LabelError: as ``label_structure``; also if pyxtal returns a crystal without sites or with
            another composition, which it does without saying so.
    """
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
    from pyxtal import pyxtal

    check_structure(structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analyzer = SpacegroupAnalyzer(structure.get_reduced_structure(), symprec=symprec)
        refined = analyzer.get_refined_structure()
        for tolerance in _SITE_TOLERANCES:
            crystal = pyxtal()
            try:
                crystal.from_seed(refined, tol=tolerance)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
                continue
            result = _from_pyxtal(crystal, refined)
            if result is not None:
                return result
    raise LabelError("sites", "pyxtal does not describe the refined structure")


def _from_pyxtal(crystal: object, refined: Structure) -> Crystal | None:
    """A pyxtal crystal in our terms, or None if it lost atoms."""
    number = crystal.group.number  # type: ignore[attr-defined]
    group = space_group(number)
    sites = []
    counts: Counter[str] = Counter()
    for site in crystal.atom_sites:  # type: ignore[attr-defined]
        position = group.wyckoff[site.wp.letter]
        params = position.free_params(np.asarray(site.position, dtype=float))
        if params is None:
            return None
        sites.append(Site(_atomic_number(site.specie), site.wp.letter, tuple(params.tolist())))
        counts[site.specie] += position.multiplicity
    result = Crystal(
        number,
        tuple(sites),
        crystal.lattice.matrix,  # type: ignore[attr-defined]
    )
    expected = refined.composition.reduced_composition
    if not sites or result.to_structure().composition.reduced_composition != expected:
        return None
    return result


def _atomic_number(specie: str | int) -> int:
    from pymatgen.core import Element

    return specie if isinstance(specie, int) else Element(specie).Z
