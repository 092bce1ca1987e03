"""Space groups and Wyckoff positions as arrays, in the standard settings of International Tables A.

Settings: unique axis b (cell choice 1), origin choice 2, hexagonal axes for rhombohedral groups.
The tables themselves come from pyxtal; everything else here is derived from them.

An *orbit* is the set of atoms that one Wyckoff position makes of one point. Its atoms are affine
functions of the variables x, y, z of the orbit's first position:
``position_m = rotations[m] @ free_params + translations[m]``. On special positions these matrices
are singular; the variables that really occur are marked in ``free_mask``.
"""

import csv
import importlib.util
import os
import re
import warnings
from ast import literal_eval
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import spglib
from numpy.typing import NDArray
from pymatgen.core.operations import SymmOp

Array = NDArray[np.float64]

NUM_SPACE_GROUPS = 230
NUM_HALL_SYMBOLS = 530
# What spglib calls our settings, see above.
_STANDARD_CHOICES = ("", "b", "b1", "2", "H")
_LETTERS = ascii_lowercase + "A"

# That spglib finds no symmetry is an answer, which whoever asked deals with, not a line on stderr.
os.environ.setdefault("SPGLIB_WARNING", "OFF")


def wrap(frac_coords: Array) -> Array:
    """Fractional coordinates in [0,1); values within 1e-9 below one become zero."""
    wrapped = np.mod(frac_coords, 1.0)
    return np.where(wrapped > 1 - 1e-9, 0.0, wrapped)


def nearest_zero(difference: Array) -> Array:
    """Fractional differences wrapped to [-0.5,0.5]."""
    return difference - np.round(difference)


@dataclass(frozen=True)
class WyckoffPosition:
    """One Wyckoff position of one space group.

    Attributes:
        space_group: number 1-230.
        letter: Wyckoff letter; ``A`` follows ``z`` in group 47.
        multiplicity: atoms of the orbit in the conventional cell, M.
        rotations, translations: [M,3,3] and [M,3], see the module.
        free_mask: [3], which of x, y, z occur.
        frames: [M,3,3], rotation of a space-group operation that takes the first atom to atom m.
        primitive: [Mp], indices of the orbit's atoms modulo the centring translations.
    """

    space_group: int
    letter: str
    multiplicity: int
    rotations: Array
    translations: Array
    free_mask: NDArray[np.bool_]
    frames: Array
    primitive: NDArray[np.int64]

    @property
    def dof(self) -> int:
        """Number of free coordinates."""
        return int(self.free_mask.sum())

    @cached_property
    def _left_inverse(self) -> Array:
        return np.linalg.pinv(self.rotations[0])

    def positions(self, free_params: Array) -> Array:
        """Fractional coordinates [...,M,3] of the orbit's atoms, in [0,1), of variables [...,3]."""
        return wrap(
            np.einsum("mij,...j->...mi", self.rotations, np.asarray(free_params, dtype=float))
            + self.translations
        )

    @cached_property
    def _pivots(self) -> tuple[NDArray[np.int64], Array]:
        """For each variable a row of the first position that holds it alone, [3], and its sign."""
        first = self.rotations[0]
        alone = (np.abs(first).sum(axis=1, keepdims=True) == 1) & (first != 0)
        assert (alone.any(axis=0) == self.free_mask).all(), "a variable never stands alone"
        rows = alone.argmax(axis=0)
        return rows, first[rows, range(3)] * self.free_mask

    def solve(self, frac_coords: Array) -> tuple[Array, Array]:
        """Variables that bring the orbit's first position nearest to points.

        Args:
            frac_coords: [...,3].

        Returns:
            variables [...,3] in [0,1), zero where not free, and the largest fractional deviation
            that they leave, [...].
        """
        first, shift = self.rotations[0], self.translations[0]
        targets = np.asarray(frac_coords, dtype=float) - shift
        rows, signs = self._pivots
        # Whole numbers drop out: the matrix has integer entries, and each pivot is a unit.
        params = targets[..., rows] * signs
        residual = nearest_zero(targets - params @ first.T)
        correction = residual @ self._left_inverse.T
        deviation = np.abs(residual - correction @ first.T).max(axis=-1)
        return np.where(self.free_mask, wrap(params + correction), 0.0), deviation

    def free_params(self, frac_coords: Array, tolerance: float = 1e-3) -> Array | None:
        """Variables that put the orbit's first position onto a point of it, or None.

        Args:
            frac_coords: [3], the position of any atom of the orbit.
            tolerance: largest fractional deviation accepted.

        Returns:
            [3] in [0,1), zero where not free; None if the first position cannot be there.
        """
        params, deviation = self.solve(frac_coords)
        return None if deviation > tolerance else params

    @cached_property
    def equivalents(self) -> tuple[Array, Array]:
        """Affine maps [E,3,3], [E,3] of the variables that leave the orbit as a set unchanged.

        They say which variables describe the same atoms with another one of them first. The
        identity comes first.
        """
        return self.equivalents_after(np.zeros(3))

    def equivalents_after(self, origin_shift: Array) -> tuple[Array, Array]:
        """Affine maps of the variables that move the whole orbit by a fractional shift [3].

        There are none, [0,3,3] and [0,3], if the moved orbit is not on this position.
        """
        return self.maps_onto(self, np.eye(3), origin_shift)

    def maps_onto(
        self, other: "WyckoffPosition", linear: Array, shift: Array
    ) -> tuple[Array, Array]:
        """Affine maps from these variables to another position's after a change of basis.

        Args:
            other: a position of the same group.
            linear, shift: [3,3] and [3], take a point x (fractional) to linear @ x + shift.

        Returns:
            [E,3,3] and [E,3], one map for every atom of the orbit that can be the first one there;
            none if the moved orbit is not on the other position.
        """
        rotations = linear @ self.rotations
        solved = other._left_inverse @ rotations  # [M,3,3]
        offsets, deviations = other.solve(self.translations @ linear.T + shift)
        unexplained = np.abs(other.rotations[0] @ solved - rotations).reshape(-1, 9).T
        fits = (unexplained < 1e-6).all(axis=0) & (deviations < 1e-6)
        return np.rint(solved[fits]), offsets[fits]


@dataclass(frozen=True)
class SpaceGroup:
    """One space group in its standard setting.

    Attributes:
        number, symbol: International number and short symbol.
        hall_number: of the standard setting, as spglib numbers them.
        rotations, translations: [G,3,3], [G,3], all operations of the conventional cell.
        centering: [n,3], centring translations, zero first.
        to_primitive: [3,3], takes fractional coordinates (columns) to a primitive basis.
        wyckoff: positions by letter, the most special (``a``) first.
    """

    number: int
    symbol: str
    hall_number: int
    rotations: Array
    translations: Array
    centering: Array
    to_primitive: Array
    wyckoff: dict[str, WyckoffPosition]

    @property
    def general(self) -> WyckoffPosition:
        """The general position."""
        return next(reversed(self.wyckoff.values()))

    @cached_property
    def operations_xyz(self) -> tuple[str, ...]:
        """All operations as CIF writes them, such as ``-x, y+1/2, -z``."""
        pairs = zip(self.rotations, self.translations, strict=True)
        return tuple(SymmOp.from_rotation_and_translation(*pair).as_xyz_str() for pair in pairs)


def _centering(rotations: Array, translations: Array) -> Array:
    pure = translations[(rotations == np.eye(3)).all(axis=(1, 2))]
    return pure[np.lexsort(pure.T[::-1])]


def _primitive_basis(centering: Array) -> Array:
    """Short vectors (rows, fractional) that span the lattice of the centring translations."""
    steps = np.array(list(product((0, 1, -1), repeat=3)), dtype=float)
    vectors = (centering[:, None] + steps).reshape(-1, 3)
    vectors = vectors[np.abs(vectors).max(axis=1) <= 1]
    order = np.lexsort((*np.round(-vectors.T, 6), np.round((vectors**2).sum(axis=1), 6)))
    vectors = vectors[order]
    basis: list[Array] = []
    volume = 1 / len(centering)
    for first in vectors:
        if (first == 0).all():
            continue
        for second in vectors:
            normal = np.cross(first, second)
            if (normal**2).sum() < 1e-9:
                continue
            determinants = vectors @ normal
            fits = np.flatnonzero(np.abs(determinants - volume) < 1e-6)
            if len(fits):
                basis = [first, second, vectors[fits[0]]]
                return np.stack(basis)
    raise AssertionError("the centring translations span no lattice")


def _same_maps(
    rotations: Array, translations: Array, others: tuple[Array, Array]
) -> NDArray[np.bool_]:
    """Whether affine maps [M] and [G] agree up to whole lattice vectors: [M,G]."""
    same = (np.abs(rotations[:, None] - others[0]) < 1e-6).all(axis=(2, 3))
    shift = nearest_zero(translations[:, None] - others[1])
    agree: NDArray[np.bool_] = same & (np.abs(shift) < 1e-6).all(axis=2)
    return agree


def _frames(rotations: Array, translations: Array, group: tuple[Array, Array]) -> Array:
    """Rotation of one group operation per orbit atom that takes the first atom to it: [M,3,3]."""
    images = group[0] @ rotations[0], group[0] @ translations[0] + group[1]
    same = _same_maps(rotations, translations, images)
    assert same.any(axis=1).all(), "an orbit atom is no image of the first"
    frames: Array = group[0][same.argmax(axis=1)]
    return frames


def _primitive_atoms(rotations: Array, translations: Array, centering: Array) -> NDArray[np.int64]:
    """Indices of one atom per set that the centring translations join."""
    same = np.zeros((len(rotations), len(rotations)), dtype=bool)
    for shift in centering:
        same |= _same_maps(rotations, translations + shift, (rotations, translations))
    return np.flatnonzero(same.argmax(axis=1) == np.arange(len(rotations)))


@cache
def _affine(coordinate: str) -> tuple[Array, float]:
    """Coefficients [3] of x, y, z and the constant of one coordinate, as ``-x+y+1/2``."""
    linear, constant = np.zeros(3), Fraction(0)
    for term in re.findall(r"[+-]?[^+-]+", coordinate):
        if term[-1] in "xyz":
            factor = term[:-1]
            linear["xyz".index(term[-1])] += int(
                f"{factor}1" if factor in ("", "+", "-") else factor
            )
        else:
            constant += Fraction(term)
    return linear, float(constant)


def _parse(coordinates: list[str]) -> tuple[Array, Array]:
    """Matrices [M,3,3] and constants [M,3] of points written as ``x, -y+1/2, 0``."""
    rows = [_affine(part.strip()) for point in coordinates for part in point.split(",")]
    linear = np.array([row[0] for row in rows]).reshape(-1, 3, 3)
    return linear, np.array([row[1] for row in rows]).reshape(-1, 3)


@cache
def _coordinate_table() -> list[str]:
    """pyxtal's table of Wyckoff positions, one row per group.

    Read as a file: importing pyxtal takes seconds.
    """
    package = importlib.util.find_spec("pyxtal")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "database" / "wyckoff_list.csv"
    with path.open(newline="") as file:
        return [row[1] for row in csv.reader(file) if row[0].isdigit()]


@cache
def hall_settings() -> tuple[spglib.SpaceGroupType, ...]:
    """spglib's entries of all settings, by Hall number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about spglib's way to report errors
        entries = [spglib.get_spacegroup_type(hall) for hall in range(1, NUM_HALL_SYMBOLS + 1)]
    assert None not in entries
    return tuple(entry for entry in entries if entry is not None)


@cache
def standard_settings() -> dict[int, spglib.SpaceGroupType]:
    """spglib's entry of every group's standard setting."""
    settings: dict[int, spglib.SpaceGroupType] = {}
    for entry in hall_settings():
        if entry.choice in _STANDARD_CHOICES:
            settings.setdefault(entry.number, entry)
    return settings


@cache
def space_group(number: int) -> SpaceGroup:
    """The tables of one space group (cached).

    Raises:
        ValueError: if the number is not in 1-230.
    """
    if not 1 <= number <= NUM_SPACE_GROUPS:
        raise ValueError(f"space group {number} is not in 1-{NUM_SPACE_GROUPS}")
    # The table starts with an empty row for group 0, and each row with the general position.
    positions = [_parse(points) for points in literal_eval(_coordinate_table()[number])]
    group = positions[0]
    centering = _centering(*group)
    wyckoff = {
        letter: _wyckoff_position(number, letter, position, group, centering)
        for letter, position in zip(_LETTERS, reversed(positions), strict=False)
    }
    setting = standard_settings()[number]
    return SpaceGroup(
        number=number,
        symbol=setting.international_short.replace("_", ""),
        hall_number=setting.hall_number,
        rotations=group[0],
        translations=wrap(group[1]),
        centering=centering,
        to_primitive=np.linalg.inv(_primitive_basis(centering).T),
        wyckoff=wyckoff,
    )


def _wyckoff_position(
    number: int,
    letter: str,
    position: tuple[Array, Array],
    group: tuple[Array, Array],
    centering: Array,
) -> WyckoffPosition:
    rotations, translations = position
    return WyckoffPosition(
        space_group=number,
        letter=letter,
        multiplicity=len(rotations),
        rotations=rotations,
        translations=wrap(translations),
        free_mask=(np.abs(rotations[0]) > 0).any(axis=0),
        frames=_frames(rotations, translations, group),
        primitive=_primitive_atoms(rotations, translations, centering),
    )
