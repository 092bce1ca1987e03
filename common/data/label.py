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
from common.crystal.symmetry import SpaceGroup, nearest_zero, space_group
from common.elements import NUM_ELEMENTS

Array = NDArray[np.float64]
Cell = tuple[Array, Array, NDArray[np.int64]]

#: Part of the key of cached labels: raise it when labels change.
LABEL_VERSION = 3
#: Why a structure can have no label.
LABEL_REASONS = ("disorder", "not_finite", "overlap", "volume", "symmetry", "sites")
#: Atoms nearer than this (A) overlap.
MIN_DISTANCE = 0.5
#: More room for an atom (A^3) is that of a cell in other units; MP-20's emptiest has 3,734, and one
#: in picometres a million times too much.
MAX_ATOM_VOLUME = 10_000.0

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
        LabelError: if the structure is disordered, not finite, has overlapping atoms or
            something else than elements, or no consistent symmetry is found.
    """
    check_structure(structure)
    cell = structure.lattice.matrix, structure.frac_coords, np.array(structure.atomic_numbers)
    return _spglib_symmetry(cell, symprec)


def check_structure(structure: Structure) -> None:
    """Raises LabelError for disorder, atoms that are no elements, overlap or are lost, and NaN."""
    if not structure.is_ordered:
        raise LabelError("disorder", "a site is partially occupied or shared by elements")
    if not all(1 <= number < NUM_ELEMENTS for number in structure.atomic_numbers):
        raise LabelError("sites", "an atom is no chemical element")
    lattice, frac_coords = structure.lattice.matrix, structure.frac_coords
    if not (np.isfinite(frac_coords).all() and np.isfinite(lattice).all()):
        raise LabelError("not_finite", "a coordinate or the lattice is not finite")
    if structure.volume <= 0:
        raise LabelError("not_finite", "the lattice has no volume")
    room = structure.volume / len(structure)
    if room > MAX_ATOM_VOLUME:
        raise LabelError(
            "volume",
            f"{room:,.0f} A^3 per atom, more than {MAX_ATOM_VOLUME:,.0f}: lengths must "
            "be in angstrom, not in picometres",
        )
    nearest = _shortest_distance(structure)
    if nearest < MIN_DISTANCE:
        raise LabelError("overlap", f"two atoms are {nearest:.3f} A apart")


def _shortest_distance(structure: Structure) -> float:
    """Between two atoms, images included, in A; right wherever it is below MIN_DISTANCE."""
    thickness = 1 / np.linalg.norm(np.linalg.inv(structure.lattice.matrix), axis=0)
    if thickness.min() > 2 * MIN_DISTANCE:
        # Then only differences wrapped to +-0.5 can be that short.
        coords = structure.frac_coords
        vectors = nearest_zero(coords[:, None] - coords) @ structure.lattice.matrix
        distances = np.sqrt((vectors**2).sum(axis=2))
        images = thickness.min()
    else:
        distances = structure.distance_matrix
        images = min(structure.lattice.get_lll_reduced_lattice().abc)
    pairs = distances[np.triu_indices(len(structure), k=1)]
    return float(pairs.min(initial=images))


def _spglib_symmetry(cell: Cell, symprec: float) -> Crystal:
    """The crystal by spglib, as ``SpacegroupAnalyzer`` and pyxtal use it."""
    dataset = _dataset(cell, symprec)
    refined = dataset.std_lattice, dataset.std_positions, dataset.std_types
    problems = []
    for tolerance in _SITE_TOLERANCES:
        try:
            return _refined_crystal(refined, tolerance)
        except LabelError as error:
            problems.append(error)
    raise problems[0]


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


def _refined_crystal(refined: Cell, tolerance: float) -> Crystal:
    """Sites of a refined cell, from the symmetry found there at a tight tolerance."""
    dataset = _dataset(refined, tolerance)
    group = space_group(dataset.number)
    if dataset.hall_number != group.hall_number:
        dataset = _dataset(refined, tolerance, group.hall_number)
    if dataset.number != group.number:
        raise LabelError("symmetry", f"no standard setting of group {group.number} fits")
    # The letters belong to the input's atoms: carry them over through the primitive cell.
    by_primitive = dict(
        zip(
            dataset.mapping_to_primitive,
            zip(dataset.crystallographic_orbits, dataset.wyckoffs, strict=True),
            strict=True,
        )
    )
    primitive, first = np.unique(dataset.std_mapping_to_primitive, return_index=True)
    labels = [by_primitive[index] for index in primitive]
    sites = _sites(group, dataset.std_positions[first], dataset.std_types[first], labels)
    return Crystal(group.number, sites, np.asarray(dataset.std_lattice))


def _sites(
    group: SpaceGroup,
    positions: Array,
    numbers: NDArray[np.int64],
    labels: list[tuple[int, str]],
) -> tuple[Site, ...]:
    """Sites of atoms [P] of one primitive cell.

    Args:
        positions: [P,3], fractional coordinates in the conventional standard cell.
        labels: [P], a name of the atom's orbit, and its letter.
    """
    orbits: dict[tuple[int, str], list[int]] = {}
    for atom, label in enumerate(labels):
        orbits.setdefault(label, []).append(atom)
    sites = []
    for (_, letter), atoms in orbits.items():
        params = orbit_params(group, letter, positions[atoms])
        sites.append(Site(int(numbers[atoms[0]]), letter, tuple(params.tolist())))
    return tuple(sites)


def orbit_params(group: SpaceGroup, letter: str, atoms: Array, tolerance: float = 1e-3) -> Array:
    """Variables of a Wyckoff position that give an orbit's atoms.

    Args:
        group, letter: the Wyckoff position.
        atoms: [Mp,3], fractional coordinates (conventional cell) of the orbit's atoms modulo the
            centring translations.
        tolerance: largest fractional deviation of any atom, in the primitive basis.

    Returns:
        [3], see ``Site``.

    Raises:
        LabelError: if no variables give these atoms.
    """
    position = group.wyckoff[letter]
    name = f"{position.multiplicity}{letter}"
    if len(atoms) != len(position.primitive):
        raise LabelError("sites", f"{len(atoms)} atoms per primitive cell on position {name}")
    images = (atoms[:, None] + group.centering).reshape(-1, 3)
    params, deviation = position.solve(images)
    for candidate in params[deviation < tolerance]:
        orbit = position.positions(candidate)[position.primitive]
        difference = nearest_zero((orbit[:, None] - atoms) @ group.to_primitive.T)
        near = np.abs(difference).max(axis=2) < tolerance
        if near.any(axis=1).all() and near.any(axis=0).all():
            return np.asarray(candidate)
    raise LabelError("sites", f"atoms do not fit position {name}")


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
