"""Wyckoff letters that a change of origin or axes exchanges.

The same crystal can be described in one setting of its space group with different letters: SrTiO3
has Sr on 1a and Ti on 1b, or the reverse. The changes of basis that leave the group as it is form
its affine normaliser; each of them permutes the letters. Derived here from the operations alone.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from common.crystal.lattice import crystal_system
from common.crystal.symmetry import SpaceGroup, WyckoffPosition, nearest_zero, space_group, wrap

Array = NDArray[np.float64]

# Origin shifts of normalisers are multiples of 1/8 and 1/3 of the cell's axes.
_SHIFTS = np.array(list(product(range(24), repeat=3))) / 24
_GENERIC = np.array([0.1357, 0.2719, 0.4283])


def _linear_parts(group: SpaceGroup, generators: bool = True) -> list[Array]:
    """Changes of axes [3,3] that keep the lattice and the point group.

    One of each coset of the point group: the others differ from it by the group's own operations,
    which exchange no letters.

    Args:
        group: the space group.
        generators: enough to generate all, or else all with entries from -1 to 1 (triclinic) and
            from -2 to 2 (monoclinic).
    """
    system = crystal_system(group.number)
    if system == 0:
        candidates = _matrices(1, 1, 1, 1, 1, 1, 1, 1, 1)
        candidates = [m for m in candidates if _is_shear(m)] if generators else candidates
    elif system == 1:
        candidates = _matrices(2, 0, 2, 0, 1, 0, 2, 0, 2)
    elif system == 4:
        candidates = _matrices(1, 1, 0, 1, 1, 0, 0, 0, 1)
    else:
        candidates = _signed_permutations()
    matrices = np.array(candidates)
    in_primitive = group.to_primitive @ matrices @ np.linalg.inv(group.to_primitive)
    off_lattice = np.abs(in_primitive - np.rint(in_primitive)).max(axis=(1, 2))
    points = {_key(rotation) for rotation in group.rotations}
    kept, covered = [], set(points)
    for matrix in matrices[off_lattice < 1e-6]:
        if _key(matrix) in covered:
            continue
        images = matrix @ group.rotations @ np.linalg.inv(matrix)
        if all(_key(image) in points for image in images):
            kept.append(matrix)
            covered |= {_key(other) for other in matrix @ group.rotations}
    return kept


def _key(matrix: Array) -> bytes:
    return np.rint(matrix).astype(np.int8).tobytes()


def _is_shear(matrix: Array) -> bool:
    """Whether a matrix is the identity but for one entry; these generate all of determinant 1."""
    return bool((np.diag(matrix) == 1).all() and np.count_nonzero(matrix) <= 4)


@cache
def _signed_permutations() -> list[Array]:
    """Those that exchange the axes, and reverse some of them."""
    return [m for m in _matrices(1, 1, 1, 1, 1, 1, 1, 1, 1) if np.count_nonzero(m) == 3]


@cache
def _matrices(*largest: int) -> list[Array]:
    """Integer matrices of determinant 1 or -1 whose entries, row by row, are no larger than these.

    The groups share them: they are never edited.
    """
    ranges = [range(-x, x + 1) for x in largest]
    matrices = np.array(list(product(*ranges)), dtype=float).reshape(-1, 3, 3)
    determinants = np.abs(np.linalg.det(matrices))
    return list(matrices[np.abs(determinants - 1) < 1e-6])


def _generators(group: SpaceGroup) -> tuple[Array, Array]:
    """One operation per rotation; with the lattice's translations they make up the group."""
    _, first = np.unique(group.rotations.reshape(-1, 9), axis=0, return_index=True)
    return group.rotations[first], group.translations[first]


def _shifts(group: SpaceGroup, linear: Array, only_first: bool) -> Array:
    """Origin shifts [N,3] that make a change of axes conjugate the group to itself.

    (W,w) (R,t) (W,w)^-1 = (R', W t + w - R' w) with R' = W R W^-1 must be in the group.
    """
    rotations, translations = _generators(group)
    images = np.rint(linear @ rotations @ np.linalg.inv(linear))
    order = [int(np.flatnonzero((rotations == image).all(axis=(1, 2)))[0]) for image in images]
    rests = translations @ linear.T - translations[order]

    def fitting(candidates: Array) -> Array:
        for image, rest in zip(images, rests, strict=True):
            moved = (rest + candidates - candidates @ image.T) @ group.to_primitive.T
            off_lattice = np.abs(nearest_zero(moved)).T
            candidates = candidates[(off_lattice < 1e-6).all(axis=0)]
            if not len(candidates):
                break
        return candidates

    if not only_first:
        return fitting(_SHIFTS)
    parts = (fitting(part) for part in np.split(_SHIFTS, 24))
    return next((part[:1] for part in parts if len(part)), _SHIFTS[:0])


def _permutation(group: SpaceGroup, linear: Array, shift: Array) -> tuple[int, ...]:
    """Where a change of basis takes each letter, as indices in the order of the letters."""
    positions = list(group.wyckoff.values())
    kinds = [(position.multiplicity, position.dof) for position in positions]
    images = []
    for position, kind in zip(positions, kinds, strict=True):
        alike = [index for index, other in enumerate(kinds) if other == kind]
        point = linear @ (position.rotations[0] @ _GENERIC + position.translations[0]) + shift
        # The last needs no test: the image is on one of them.
        tests = (i for i in alike[:-1] if _lie_on(point[None], positions[i])[0])
        images.append(next(tests, alike[-1]))
    return tuple(images)


def _lie_on(points: Array, position: WyckoffPosition) -> NDArray[np.bool_]:
    """Whether an atom of an orbit can be at points [N,3], up to whole translations: [N]."""
    group = space_group(position.space_group)
    images = np.einsum("gij,nj->gni", group.rotations, points) + group.translations[:, None]
    found: NDArray[np.bool_] = (position.solve(images)[1] < 1e-6).any(axis=0)
    return found


@cache
def letter_permutations(number: int) -> tuple[str, ...]:
    """All relabellings of a group's letters by its affine normaliser, the identity first.

    Each is a string of letters: the k-th is what the k-th letter of the group becomes.
    """
    group = space_group(number)
    letters = list(group.wyckoff)
    if len(letters) == 1:
        return (letters[0],)
    identity = tuple(range(len(letters)))
    generators = {identity}
    for shift in _shifts(group, np.eye(3), only_first=False):
        generators.add(_permutation(group, np.eye(3), shift))
    for linear in _linear_parts(group):
        for shift in _shifts(group, linear, only_first=True):
            generators.add(_permutation(group, linear, shift))
    closed = _closure(sorted(generators), identity)
    return tuple("".join(letters[i] for i in permutation) for permutation in closed)


def _closure(generators: list[tuple[int, ...]], identity: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All products of permutations, the identity first."""
    found = {identity}
    frontier = [identity]
    while frontier:
        following = []
        for permutation in frontier:
            for generator in generators:
                composed = tuple(generator[i] for i in permutation)
                if composed not in found:
                    found.add(composed)
                    following.append(composed)
        frontier = following
    return [identity, *sorted(found - {identity})]


@cache
def normalizer_translations(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Translations that leave a space group as it is.

    Returns:
        [n,3], the discrete ones modulo the group's own (zero first), and [3,3], a projector (acting
        on rows) onto the polar directions, in which any translation does.
    """
    group = space_group(number)
    polar = group.rotations.mean(axis=0).T
    twelfths = np.array([0, 3, 4, 6, 8, 9]) / 12
    grid = np.array(list(product(twelfths, repeat=3)))
    grid = grid[np.abs(grid @ polar).max(axis=1) < 1e-6]
    moved = np.einsum("gij,nj->gni", group.rotations - np.eye(3), grid)
    keeps = _is_lattice_vector(moved, group.centering).all(axis=0)
    kept: list[np.ndarray] = []
    for shift in grid[keeps]:
        if not any(_is_lattice_vector(shift - other, group.centering) for other in kept):
            kept.append(shift)
    return np.array(kept), polar


def _is_lattice_vector(vectors: np.ndarray, centering: np.ndarray) -> NDArray[np.bool_]:
    """Whether fractional vectors [...,3] are sums of lattice and centring vectors."""
    rest = nearest_zero(vectors[..., None, :] - centering)
    result: NDArray[np.bool_] = (np.abs(rest) < 1e-6).all(axis=-1).any(axis=-1)
    return result


@dataclass(frozen=True)
class ChangesOfBasis:
    """The affine normaliser of a space group, modulo the group, as x -> linear @ x + shift.

    Every product of an entry of ``linear`` (with its own ``origin``) and one of ``shifts``, and
    any shift along the polar directions. For triclinic and monoclinic groups, which have infinitely
    many, those with small entries.

    Attributes:
        linear: [N,3,3], the identity first.
        origin: [N,3], a shift that belongs to each of them.
        shifts: [M,3], zero first.
        polar: [3,3], projector (acting on rows) onto the polar directions.
    """

    linear: Array
    origin: Array
    shifts: Array
    polar: Array


@cache
def changes_of_basis(number: int) -> ChangesOfBasis:
    """The normaliser of a group; see ``ChangesOfBasis``."""
    group = space_group(number)
    shifts, polar = normalizer_translations(number)
    found = [(np.eye(3), np.zeros(3))]
    linears = sorted(_linear_parts(group, generators=False), key=lambda m: np.abs(m).sum())
    for linear in linears:
        if crystal_system(number) == 0:
            found.append((linear, np.zeros(3)))
            continue
        for shift in _shifts(group, linear, only_first=True):
            found.append((linear, shift - shift @ polar))
    return ChangesOfBasis(
        np.stack([linear for linear, _ in found]),
        np.stack([shift for _, shift in found]),
        shifts,
        polar,
    )


@cache
def letter_images(number: int, letter: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which letters a position becomes, as indices in the order of the group's letters.

    Under a change of axes and a shift after it, the image is the shift's of the axes' one.

    Returns:
        [N], under every ``linear`` of the group's changes of basis with its ``origin``, and [M],
        under every one of their ``shifts``.
    """
    changes = changes_of_basis(number)
    positions = list(space_group(number).wyckoff.values())
    own = space_group(number).wyckoff[letter]
    kind = own.multiplicity, own.dof
    alike = [i for i, other in enumerate(positions) if (other.multiplicity, other.dof) == kind]
    point = own.rotations[0] @ _GENERIC + own.translations[0]
    moved = np.concatenate([changes.linear @ point + changes.origin, point + changes.shifts])
    # Thousands of changes take a centre of inversion to one of eight points.
    points, which = np.unique(np.round(wrap(moved), 9), axis=0, return_inverse=True)
    images = np.full(len(points), alike[-1])  # the image is on one of them
    for index in alike[-2::-1]:
        images[_lie_on(points, positions[index])] = index
    of_moved = images[which.ravel()]
    return of_moved[: len(changes.linear)], of_moved[len(changes.linear) :]
