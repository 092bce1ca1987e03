"""Whether a crystal could be one: the filter behind the "valid" match rate.

The rule is DiffCSP's (Jiao et al., NeurIPS 2023): a composition that can be charge neutral with its
anions more electronegative than its cations, atoms at least 0.5 A apart, a cell of at least
0.1 A^3. A match counts as valid only if prediction and reference both pass.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.core.molecule_structure_comparator import CovalentRadius
from smact.screening import smact_validity

Array = NDArray[np.float64]

MIN_DISTANCE = 0.5
"""Smallest distance allowed between two atoms, an atom and its own images included (A)."""
MIN_VOLUME = 0.1
"""Smallest cell volume allowed (A^3)."""

_UNKNOWN_RADIUS = 1.69  # A; that of curium, the last in the table
_MAX_LENGTH = 1e4  # A; beyond it a cell is a numerical accident
_MAX_IMAGES = 3e5  # in a sphere of the longest vector; above, a cell is a needle
_MIN_FULLNESS = 1e-4  # volume / (a b c); below it the vectors are parallel but for rounding
_NEIGHBOURS = np.array([step for step in product((-1, 0, 1), repeat=3) if any(step)], dtype=float)


def cell_is_sound(structure: Structure) -> bool:
    """Whether the numbers describe an ordered crystal at all.

    All must be finite, with at least one atom and no lattice vector that is absurdly long, parallel
    to the others, or so short that atoms lie on their own images (`MIN_DISTANCE`). Geometry code
    may fail, never end or take all memory on what does not pass.
    """
    matrix = structure.lattice.matrix
    if len(structure) == 0 or not (
        np.isfinite(matrix).all() and np.isfinite(structure.frac_coords).all()
    ):
        return False
    lengths = np.linalg.norm(matrix, axis=1)
    if not MIN_DISTANCE <= lengths.min() <= lengths.max() <= _MAX_LENGTH:
        return False
    fullness = abs(np.linalg.det(matrix / lengths[:, None]))
    return bool(fullness >= _MIN_FULLNESS) and structure.is_ordered


def cell_problem(structure: Structure) -> str | None:
    """Why a cell is not to be reduced, compared or searched for symmetry; None if it is.

    That may fail, take hours or all memory where a cell is not sound, tiny, or shaped like a
    needle, as a network samples it that has learned little.
    """
    if not cell_is_sound(structure):
        return "broken cell"
    if structure.volume < MIN_VOLUME:
        return "tiny cell"
    if _images_within_longest(structure.lattice) > _MAX_IMAGES:
        return "needle-shaped cell"
    return None


def _images_within_longest(lattice: Lattice) -> float:
    """Cells around the origin that cover a sphere of the longest (reduced) lattice vector.

    Cell reduction lists them all; real crystals have hundreds, seldom thousands.
    """
    radius = np.linalg.norm(lattice.lll_matrix, axis=1).max()
    return float(np.prod(2 * radius * inverse_lengths(lattice.matrix) + 1))


def inverse_lengths(lattice: Array) -> Array:
    """Lengths of the reciprocal vectors (1/A, without 2 pi) of lattices [...,3,3]: [...,3]."""
    lengths: Array = np.linalg.norm(np.linalg.inv(lattice), axis=-2)
    return lengths


def min_distance(structure: Structure) -> float:
    """Smallest distance (A) between an atom and any other atom or any image of itself.

    The cell must be sound, see `cell_is_sound`.
    """
    return float(_distances(structure).min())


@dataclass(frozen=True)
class ClosePair:
    """Two atoms of a crystal.

    Attributes:
        symbols: their elements.
        distance: between them, A.
        share: of the sum of their covalent radii.
    """

    symbols: tuple[str, str]
    distance: float
    share: float


def closest_pair(structure: Structure) -> ClosePair:
    """The atoms that are nearest for their size.

    The cell must be sound, see `cell_is_sound`. Covalent radii are those of Cordero et al. (Dalton
    Trans. 2008, 2832).
    """
    symbols = [site.specie.symbol for site in structure]
    radii = np.array([CovalentRadius.radius.get(symbol, _UNKNOWN_RADIUS) for symbol in symbols])
    distances = _distances(structure)
    shares = distances / (radii[:, None] + radii)
    i, j = np.unravel_index(shares.argmin(), shares.shape)
    return ClosePair((symbols[i], symbols[j]), float(distances[i, j]), float(shares[i, j]))


def _distances(structure: Structure) -> NDArray[np.float64]:
    """Between the atoms and the nearest images of others, or of themselves (A): [N,N]."""
    distances: NDArray[np.float64] = np.array(structure.distance_matrix)
    own_images = np.linalg.norm(_NEIGHBOURS @ structure.lattice.lll_matrix, axis=1).min()
    np.fill_diagonal(distances, own_images)
    return distances


def geometry_is_valid(structure: Structure) -> bool:
    """Whether no atoms are closer than 0.5 A and the cell has at least 0.1 A^3."""
    return (
        cell_is_sound(structure)
        and structure.volume >= MIN_VOLUME
        and min_distance(structure) >= MIN_DISTANCE
    )


def composition_is_valid(composition: Composition | str) -> bool:
    """SMACT's test: one assignment of oxidation states is neutral and ordered as electronegativity.

    One state per element. Elements and alloys (metals only) pass. The states are those of SMACT's
    2014 list, the one DiffCSP's filter used; smact 4 has another default.
    """
    return _formula_is_valid(Composition(composition).reduced_formula)


@lru_cache(maxsize=65536)
def _formula_is_valid(reduced_formula: str) -> bool:
    composition = Composition(reduced_formula)
    if not all(math.isclose(amount, round(amount)) for amount in composition.values()):
        return False
    return bool(
        smact_validity(
            composition,
            use_pauling_test=True,
            include_alloys=True,
            oxidation_states_set="smact14",
        )
    )


def is_valid(structure: Structure) -> bool:
    """Whether a structure passes all three tests; never raises for a broken one."""
    return geometry_is_valid(structure) and composition_is_valid(structure.composition)
