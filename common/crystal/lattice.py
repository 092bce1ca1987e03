"""Lattices as six unconstrained numbers, and what each space group leaves free of them.

A lattice is a 3x3 matrix whose *rows* are the lattice vectors in angstrom. Up to a rotation it is
given by the symmetric matrix S = log sqrt(L L^T) = sum_i k_i B_i, with the orthonormal basis B
below (DiffCSP++, arXiv:2402.03992, eq. 4; here Frobenius-normalised). k5 is
ln(volume / A^3) / sqrt(3); the other five describe the shape.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_R2, _R3, _R6 = 1 / np.sqrt(2), 1 / np.sqrt(3), 1 / np.sqrt(6)

#: Basis of the symmetric 3x3 matrices, [6,3,3]: xy, xz, yz, diag(1,-1,0), diag(1,1,-2), identity.
LATTICE_BASIS: Array = np.array(
    [
        [[0, _R2, 0], [_R2, 0, 0], [0, 0, 0]],
        [[0, 0, _R2], [0, 0, 0], [_R2, 0, 0]],
        [[0, 0, 0], [0, 0, _R2], [0, _R2, 0]],
        [[_R2, 0, 0], [0, -_R2, 0], [0, 0, 0]],
        [[_R6, 0, 0], [0, _R6, 0], [0, 0, -2 * _R6]],
        [[_R3, 0, 0], [0, _R3, 0], [0, 0, _R3]],
    ]
)

#: k0 of a lattice with a = b and gamma = 120 degrees.
HEXAGONAL_K0 = -np.sqrt(2) / 4 * np.log(3)

# Last space group of each crystal system in the standard setting, and which k are free there.
_FREE_K: tuple[tuple[int, tuple[int, ...]], ...] = (
    (2, (0, 1, 2, 3, 4, 5)),  # triclinic
    (15, (1, 3, 4, 5)),  # monoclinic, unique axis b
    (74, (3, 4, 5)),  # orthorhombic
    (142, (4, 5)),  # tetragonal
    (194, (4, 5)),  # trigonal (hexagonal axes) and hexagonal
    (230, (5,)),  # cubic
)


def _apply_to_spectrum(matrix: Array, function: np.ufunc) -> Array:
    """A function of symmetric matrices [...,3,3] through their eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return np.einsum("...ij,...j,...kj->...ik", vectors, function(values), vectors)


def lattice_to_k(lattice: Array) -> Array:
    """Six numbers k of lattices.

    Args:
        lattice: [...,3,3], rows are the vectors in angstrom.

    Returns:
        [...,6].

    Raises:
        ValueError: if a lattice has no volume or is not finite.
    """
    lattice = np.asarray(lattice, dtype=np.float64)
    metric = lattice @ np.swapaxes(lattice, -1, -2)
    if not np.isfinite(metric).all() or (np.linalg.det(metric) <= 0).any():
        raise ValueError("a lattice must be finite and have a volume above zero")
    return np.einsum("...ij,kij->...k", 0.5 * _apply_to_spectrum(metric, np.log), LATTICE_BASIS)


def k_to_lattice(k: Array) -> Array:
    """The symmetric lattice matrix exp(sum_i k_i B_i), rows in angstrom: [...,6] -> [...,3,3]."""
    return _apply_to_spectrum(np.einsum("...k,kij->...ij", k, LATTICE_BASIS), np.exp)


def standard_orientation(lattice: Array) -> Array:
    """The same lattice with a along x and b in the xy plane, as in a CIF: [...,3,3], rows, A."""
    lower: Array = np.linalg.cholesky(lattice @ np.swapaxes(lattice, -1, -2))
    return lower


def k_constraints(space_group: int) -> tuple[NDArray[np.bool_], Array]:
    """Which k a space group leaves free, and the values of the others.

    Args:
        space_group: number 1-230, standard setting (unique axis b, hexagonal axes for trigonal).

    Returns:
        mask [6], true where free, and bias [6], the fixed values (zero where free).
    """
    if not 1 <= space_group <= 230:
        raise ValueError(f"space group {space_group} is not in 1-230")
    free = next(free for last, free in _FREE_K if space_group <= last)
    mask = np.zeros(6, dtype=bool)
    mask[list(free)] = True
    bias = np.zeros(6)
    if 143 <= space_group <= 194:
        bias[0] = HEXAGONAL_K0
    return mask, bias


def crystal_system(space_group: int) -> int:
    """0 triclinic, 1 monoclinic, 2 orthorhombic, 3 tetragonal, 4 trigonal or hexagonal, 5 cubic."""
    return next(i for i, (last, _) in enumerate(_FREE_K) if space_group <= last)
