"""What the viewer draws of a crystal: balls, sticks, coordination polyhedra and the unit cell."""

import warnings
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pymatgen.core import Element, Structure

from common.elements import electronegativity

Array = NDArray[np.float64]

#: Larger cells are drawn without copies of atoms on the far faces, and without polyhedra.
MAX_ATOMS = 160
_ON_FACE = 0.015  # fraction of the cell
_BOND_SLACK = 0.45  # A beyond the sum of the radii
_BOND_SPREAD = 1.25  # times the distance to the nearest neighbour
_LARGEST_CENTER = 1.75  # A; polyhedra of Sr, K, La ... hide everything else
_STEPS = np.array(list(product((-1, 0, 1), repeat=3)), dtype=float)


@cache
def _colors() -> dict[str, list[int]]:
    """Jmol's colours, as pymatgen ships them."""
    import pymatgen.vis

    path = Path(pymatgen.vis.__file__).parent / "ElementColorSchemes.yaml"
    scheme: dict[str, list[int]] = yaml.safe_load(path.read_text(encoding="utf-8"))["Jmol"]
    return scheme


def element_color(symbol: str) -> str:
    """Colour of an element, ``#rrggbb``."""
    red, green, blue = _colors().get(symbol, [255, 20, 147])
    return f"#{red:02x}{green:02x}{blue:02x}"


@cache
def element_radius(symbol: str) -> float:
    """Radius of an element in angstrom (Slater; 1.5 where pymatgen has none)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        radius = Element(symbol).atomic_radius
    return float(radius) if radius else 1.5


def _electronegativity(symbol: str) -> float:
    return electronegativity(Element(symbol).Z)


def scene(structure: Structure) -> dict[str, Any]:
    """Atoms ``[element, x, y, z]``, bonds ``[atom, atom]``, faces ``[element, atom, atom, atom]``.

    Coordinates are Cartesian, in angstrom; elements are indices of ``elements``. Atoms on faces of
    the cell are repeated on the opposite ones, and atoms outside are added where they complete the
    coordination of one inside.
    """
    symbols = [site.specie.symbol for site in structure]
    elements = sorted(set(symbols), key=lambda s: (_electronegativity(s), s))
    frac = np.mod(structure.frac_coords, 1.0)
    bonds = _bonds(frac, np.asarray(structure.lattice.matrix), symbols)
    large = len(structure) > MAX_ATOMS
    atoms = _Atoms(frac)
    inside = [(i, shift) for i in range(len(frac)) for shift in _shifts_on_faces(frac[i], large)]
    for index, shift in inside:
        atoms.add(index, shift)
    sticks, faces = set(), []
    for index, shift in inside:
        center = atoms.add(index, shift)
        corners = []
        for other, step in bonds[index]:
            completes = _electronegativity(symbols[index]) < _electronegativity(symbols[other])
            end = atoms.find(other, shift + step)
            if end is None and completes and not large:
                end = atoms.add(other, shift + step)
            if end is not None:
                sticks.add((min(center, end), max(center, end)))
                corners.append(end)
        if len(corners) >= 4 and not large and _is_center(index, bonds, symbols):
            faces += [(elements.index(symbols[index]), *t) for t in _hull(atoms, center, corners)]
    lattice = np.asarray(structure.lattice.matrix)
    positions = atoms.positions() @ lattice
    return {
        "elements": [
            {"symbol": s, "color": element_color(s), "radius": element_radius(s)} for s in elements
        ],
        "atoms": [
            [elements.index(symbols[i]), *_rounded(x)]
            for i, x in zip(atoms.indices, positions, strict=True)
        ],
        "bonds": [list(pair) for pair in sorted(sticks)],
        "faces": [list(face) for face in faces],
        "cell": [_rounded(vector) for vector in lattice],
    }


def _rounded(values: Array) -> list[float]:
    return [round(float(x), 3) for x in values]


def _shifts_on_faces(frac: Array, large: bool) -> list[Array]:
    """Whole-cell shifts that put an atom into the cell or onto its faces."""
    if large:
        return [np.zeros(3)]
    axes = []
    for x in frac:
        moves = [0.0]
        if x < _ON_FACE:
            moves.append(1.0)
        if x > 1 - _ON_FACE:
            moves.append(-1.0)
        axes.append(moves)
    return [np.array(shift) for shift in product(*axes)]


class _Atoms:
    """Atoms to draw: an atom of the cell moved by whole cells, each once."""

    def __init__(self, frac: Array) -> None:
        self._frac = frac
        self._places: dict[tuple[int, ...], int] = {}
        self.indices: list[int] = []
        self._shifts: list[Array] = []

    def find(self, index: int, shift: Array) -> int | None:
        return self._places.get((index, *np.rint(shift).astype(int).tolist()))

    def add(self, index: int, shift: Array) -> int:
        known = self.find(index, shift)
        if known is not None:
            return known
        self._places[(index, *np.rint(shift).astype(int).tolist())] = len(self.indices)
        self.indices.append(index)
        self._shifts.append(shift)
        return len(self.indices) - 1

    def positions(self) -> Array:
        """Fractional, [N,3]."""
        return self._frac[self.indices] + np.array(self._shifts)


def _bonds(frac: Array, lattice: Array, symbols: list[str]) -> list[list[tuple[int, Array]]]:
    """For every atom, its bonded neighbours and the whole-cell shifts to them.

    Bonded means not much farther than the nearest neighbour of either, within the sum of the radii
    plus a slack, and not between two metals where there is a non-metal.
    """
    # Step by step: vectors between all atoms and all images would take gigabytes.
    distance = np.stack(
        [np.linalg.norm((frac + step - frac[:, None]) @ lattice, axis=-1) for step in _STEPS],
        axis=1,
    )
    distance[distance < 1e-3] = np.inf
    nearest = distance.min(axis=(1, 2))
    radii = np.array([element_radius(s) for s in symbols])
    negativity = np.array([_electronegativity(s) for s in symbols])
    limit = np.minimum(
        _BOND_SPREAD * np.minimum(nearest[:, None], nearest),
        radii[:, None] + radii + _BOND_SLACK,
    )
    if negativity.max() > 2.5:
        both_metals = (negativity[:, None] < 2.0) & (negativity < 2.0)
        limit[both_metals] = 0.0
    bonded = distance <= limit[:, None, :]
    return [
        [(int(j), _STEPS[step]) for step, j in np.argwhere(bonded[i])] for i in range(len(frac))
    ]


def _is_center(index: int, bonds: list[list[tuple[int, Array]]], symbols: list[str]) -> bool:
    """Whether an atom is a cation, not too large a one, amid anions."""
    own = _electronegativity(symbols[index])
    if element_radius(symbols[index]) > _LARGEST_CENTER:
        return False
    return all(_electronegativity(symbols[j]) > own + 0.4 for j, _ in bonds[index])


def _hull(atoms: _Atoms, center: int, corners: list[int]) -> list[tuple[int, int, int]]:
    """Triangles of the convex hull of some atoms; none unless it encloses the central one."""
    from scipy.spatial import ConvexHull, QhullError

    positions = atoms.positions()
    try:
        hull = ConvexHull(positions[corners])
    except QhullError:
        return []
    if (hull.equations @ np.append(positions[center], 1.0) > -1e-3).any():
        return []
    return [(corners[a], corners[b], corners[c]) for a, b, c in hull.simplices]
