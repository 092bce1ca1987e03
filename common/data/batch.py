"""Crystals as padded arrays: the contract between the data and the networks of both frameworks.

B crystals, S sites (orbits), T tokens, A atoms. The network has one token per site and edges from
sites to the atoms of the primitive cell (view ``asymmetric``), or one token per atom of the
conventional cell and edges between all of them (view ``conventional``, as in DiffCSP++ and the
paper). In both views only the free variables of the sites and the free lattice numbers are
variables; every position is an affine function of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.crystal.lattice import k_constraints, lattice_to_k
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import space_group

View = Literal["asymmetric", "conventional"]
Float = NDArray[np.float32]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]

#: Columns of ``Batch.properties``: eV and eV/atom.
PROPERTY_NAMES = ("band_gap", "formation_energy")
#: Wyckoff letters in their order; ``A`` follows ``z``.
LETTERS = "abcdefghijklmnopqrstuvwxyzA"


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens and of atoms to which crystals are padded; beyond them multiples of one."""

    tokens: tuple[int, ...]
    atoms: tuple[int, ...]
    step: int


#: Few enough to compile a network for each in training, close enough to waste little.
FINE = Sizes(tokens=(2, 4, 6, 8, 12, 16, 20), atoms=(4, 8, 12, 16, 20), step=16)
#: For sampling where compiling takes as long as hundreds of crystals: twice the edges of ``FINE``
#: on average, in an eighth of the buckets.
COARSE = Sizes(tokens=(8, 20), atoms=(8, 20), step=32)


@dataclass(frozen=True)
class Batch:
    """Padded arrays of B crystals; see the module for S, T and A. Never edited in place.

    Attributes:
        atomic_numbers: [B,S], zero where padded.
        site_mask: [B,S].
        multiplicity: [B,S], atoms of the site in the conventional cell.
        letter: [B,S], index of the Wyckoff letter.
        free_params: [B,S,3], in [0,1): the variables that are diffused.
        free_mask: [B,S,3], which of them exist.
        token_site: [B,T], the site of a token.
        token_mask: [B,T].
        token_rot, token_trans: [B,T,3,3], [B,T,3]; position = rot @ free_params + trans.
        token_to_free: [B,T,3,3], takes a token's vector to its share of the site's variables.
        atom_token: [B,A], the token whose features an atom carries.
        atom_site: [B,A].
        atom_mask: [B,A].
        orbit_rot, orbit_trans: [B,A,3,3], [B,A,3]; position = rot @ free_params + trans.
        frame_inverse: [B,A,3,3], takes a fractional difference back to the frame in which the
            atom's token stands.
        to_primitive: [B,3,3], fractional differences: conventional to primitive basis.
        lattice_k: [B,6], see ``common.crystal.lattice``.
        k_mask: [B,6], which are free.
        k_bias: [B,6], the values of the others.
        num_atoms: [B], in the conventional cell.
        space_group: [B], 1-230.
        properties: [B,P], band gap (eV), formation energy (eV/atom); zero where not given.
        property_mask: [B,P], which are given.
        precedent_mask: [B], whether there is a known crystal to start from.
        precedent_params: [B,S,3], its free parameters, as ``free_params``.
        precedent_k: [B,6], its lattice, as ``lattice_k``.
        precedent_difference: [B,S], how unlike the element is that its own took the place of.
        precedent_numbers: [B,S], atomic number of that element, zero where there is none.
    """

    atomic_numbers: Int
    site_mask: Bool
    multiplicity: Int
    letter: Int
    free_params: Float
    free_mask: Bool
    token_site: Int
    token_mask: Bool
    token_rot: Float
    token_trans: Float
    token_to_free: Float
    atom_token: Int
    atom_site: Int
    atom_mask: Bool
    orbit_rot: Float
    orbit_trans: Float
    frame_inverse: Float
    to_primitive: Float
    lattice_k: Float
    k_mask: Bool
    k_bias: Float
    num_atoms: Int
    space_group: Int
    properties: Float
    property_mask: Bool
    precedent_mask: Bool
    precedent_params: Float
    precedent_k: Float
    precedent_difference: Float
    precedent_numbers: Int

    @property
    def size(self) -> int:
        """Number of crystals, B."""
        return len(self.space_group)

    @property
    def shape(self) -> tuple[int, int]:
        """Padded tokens and atoms, (T, A)."""
        return self.token_mask.shape[1], self.atom_mask.shape[1]

    def take(self, rows: Int | slice) -> "Batch":
        """The batch of some of the crystals."""
        return Batch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def replace(self, **arrays: np.ndarray) -> "Batch":
        """The batch with other arrays."""
        return replace(self, **arrays)


@dataclass(frozen=True)
class Precedent:
    """A known crystal to start from; see ``common.precedents``.

    Attributes:
        crystal: its sites have the elements and letters that are wanted, in their order.
        differences: how unlike the element that was there is to the new one, per site.
        numbers: atomic numbers of these elements.
        material_id: of the known crystal.
    """

    crystal: Crystal
    differences: tuple[float, ...]
    numbers: tuple[int, ...]
    material_id: str


@dataclass(frozen=True)
class BatchItem:
    """One crystal for a batch: its crystal (or only its symmetry) and its properties.

    A crystal whose geometry is still to be sampled has ``lattice`` and free parameters of any
    finite value.
    """

    crystal: Crystal
    properties: dict[str, float | None]
    precedent: Precedent | None = None


def symmetry_only(space_group_number: int, sites: Iterable[tuple[int, str]]) -> Crystal:
    """A crystal with a symmetry and no geometry yet: variables zero, lattice identity."""
    return Crystal(
        space_group_number,
        tuple(Site(number, letter) for number, letter in sites),
        np.eye(3),
    )


def view_sizes(crystal: Crystal, view: View) -> tuple[int, int]:
    """Tokens and atoms that a crystal has in a view."""
    if view == "asymmetric":
        return len(crystal.sites), crystal.num_primitive_atoms
    return crystal.num_atoms, crystal.num_atoms


def bucket(crystal: Crystal, view: View, sizes: Sizes = FINE) -> tuple[int, int]:
    """Padded tokens and atoms (T, A) of a crystal in a view."""
    tokens, atoms = view_sizes(crystal, view)
    padded_atoms = _padded(atoms, sizes.atoms, sizes.step)
    if view == "conventional":
        return padded_atoms, padded_atoms
    return min(_padded(tokens, sizes.tokens, sizes.step), padded_atoms), padded_atoms


def _padded(size: int, sizes: Sequence[int], step: int) -> int:
    larger = [s for s in sizes if s >= size]
    return larger[0] if larger else -(-size // step) * step


def batch_shape(items: Sequence[BatchItem], view: View) -> tuple[int, int]:
    """The smallest padded shape that holds all items."""
    shapes = [bucket(item.crystal, view) for item in items]
    return max(t for t, _ in shapes), max(a for _, a in shapes)


def collate(items: Sequence[BatchItem], view: View, shape: tuple[int, int] | None = None) -> Batch:
    """Pads crystals to one shape.

    Args:
        items: the crystals, at least one.
        view: see the module.
        shape: padded tokens and atoms (T, A); the smallest bucket that fits without it.

    Raises:
        ValueError: if a crystal does not fit the shape.
    """
    tokens, atoms = shape or batch_shape(items, view)
    # Sites are padded like tokens: they are the tokens of the asymmetric view.
    arrays = _empty(len(items), tokens, tokens, atoms)
    for row, item in enumerate(items):
        crystal = item.crystal
        num_tokens, num_atoms = view_sizes(crystal, view)
        if num_tokens > tokens or num_atoms > atoms:
            raise ValueError(
                f"{num_tokens} tokens and {num_atoms} atoms do not fit ({tokens}, {atoms})"
            )
        _fill_sites(arrays, row, crystal)
        _fill_geometry(arrays, row, crystal, view)
        for column, name in enumerate(PROPERTY_NAMES):
            value = item.properties.get(name)
            if value is not None:
                arrays["properties"][row, column] = value
                arrays["property_mask"][row, column] = True
        if item.precedent is not None:
            _fill_precedent(arrays, row, item.precedent)
    return Batch(**arrays)


def _empty(size: int, sites: int, tokens: int, atoms: int) -> dict[str, np.ndarray]:
    def zeros(*shape: int) -> Float:
        return np.zeros((size, *shape), dtype=np.float32)

    def integers(*shape: int) -> Int:
        return np.zeros((size, *shape), dtype=np.int64)

    def masks(*shape: int) -> Bool:
        return np.zeros((size, *shape), dtype=bool)

    return {
        "atomic_numbers": integers(sites),
        "site_mask": masks(sites),
        "multiplicity": integers(sites),
        "letter": integers(sites),
        "free_params": zeros(sites, 3),
        "free_mask": masks(sites, 3),
        "token_site": integers(tokens),
        "token_mask": masks(tokens),
        "token_rot": zeros(tokens, 3, 3),
        "token_trans": zeros(tokens, 3),
        "token_to_free": zeros(tokens, 3, 3),
        "atom_token": integers(atoms),
        "atom_site": integers(atoms),
        "atom_mask": masks(atoms),
        "orbit_rot": zeros(atoms, 3, 3),
        "orbit_trans": zeros(atoms, 3),
        "frame_inverse": zeros(atoms, 3, 3),
        "to_primitive": zeros(3, 3),
        "lattice_k": zeros(6),
        "k_mask": masks(6),
        "k_bias": zeros(6),
        "num_atoms": integers(),
        "space_group": integers(),
        "properties": zeros(len(PROPERTY_NAMES)),
        "property_mask": masks(len(PROPERTY_NAMES)),
        "precedent_mask": masks(),
        "precedent_params": zeros(sites, 3),
        "precedent_k": zeros(6),
        "precedent_difference": zeros(sites),
        "precedent_numbers": integers(sites),
    }


def _fill_sites(arrays: dict[str, np.ndarray], row: int, crystal: Crystal) -> None:
    count = len(crystal.sites)
    arrays["atomic_numbers"][row, :count] = [site.atomic_number for site in crystal.sites]
    arrays["site_mask"][row, :count] = True
    arrays["multiplicity"][row, :count] = [p.multiplicity for p in crystal.positions]
    arrays["letter"][row, :count] = [LETTERS.index(site.letter) for site in crystal.sites]
    arrays["free_params"][row, :count] = [site.free_params for site in crystal.sites]
    arrays["free_mask"][row, :count] = [p.free_mask for p in crystal.positions]
    mask, bias = k_constraints(crystal.space_group)
    arrays["lattice_k"][row] = lattice_to_k(crystal.lattice)
    arrays["k_mask"][row] = mask
    arrays["k_bias"][row] = bias
    arrays["num_atoms"][row] = crystal.num_atoms
    arrays["space_group"][row] = crystal.space_group


def _fill_precedent(arrays: dict[str, np.ndarray], row: int, precedent: Precedent) -> None:
    count = len(precedent.crystal.sites)
    arrays["precedent_mask"][row] = True
    arrays["precedent_params"][row, :count] = [s.free_params for s in precedent.crystal.sites]
    arrays["precedent_k"][row] = lattice_to_k(precedent.crystal.lattice)
    arrays["precedent_difference"][row, :count] = precedent.differences
    arrays["precedent_numbers"][row, :count] = precedent.numbers


def _fill_geometry(arrays: dict[str, np.ndarray], row: int, crystal: Crystal, view: View) -> None:
    """Tokens, atoms and the maps between them."""
    arrays["to_primitive"][row] = crystal.group.to_primitive
    token, atom = 0, 0
    for site, (s, position) in enumerate(zip(crystal.sites, crystal.positions, strict=True)):
        orbit = _orbit(position.space_group, s.letter, view)
        tokens = slice(token, token + len(orbit.token_rot))
        atoms = slice(atom, atom + len(orbit.orbit_rot))
        arrays["token_site"][row, tokens] = site
        arrays["token_mask"][row, tokens] = True
        arrays["token_rot"][row, tokens] = orbit.token_rot
        arrays["token_trans"][row, tokens] = orbit.token_trans
        arrays["token_to_free"][row, tokens] = orbit.token_to_free
        arrays["atom_token"][row, atoms] = token + orbit.atom_token
        arrays["atom_site"][row, atoms] = site
        arrays["atom_mask"][row, atoms] = True
        arrays["orbit_rot"][row, atoms] = orbit.orbit_rot
        arrays["orbit_trans"][row, atoms] = orbit.orbit_trans
        arrays["frame_inverse"][row, atoms] = orbit.frame_inverse
        token, atom = tokens.stop, atoms.stop


@dataclass(frozen=True)
class _Orbit:
    token_rot: np.ndarray
    token_trans: np.ndarray
    token_to_free: np.ndarray
    atom_token: np.ndarray
    orbit_rot: np.ndarray
    orbit_trans: np.ndarray
    frame_inverse: np.ndarray


@cache
def _orbit(number: int, letter: str, view: View) -> _Orbit:
    """Rows of one Wyckoff position in a batch."""
    position = space_group(number).wyckoff[letter]
    if view == "asymmetric":
        tokens = np.array([0])
        atoms = position.primitive
        frames = np.linalg.inv(position.frames[atoms])
        atom_token = np.zeros(len(atoms), dtype=int)
    else:
        tokens = atoms = np.arange(position.multiplicity)
        frames = np.broadcast_to(np.eye(3), (len(atoms), 3, 3))
        atom_token = np.arange(len(atoms))
    return _Orbit(
        token_rot=position.rotations[tokens],
        token_trans=position.translations[tokens],
        token_to_free=np.linalg.pinv(position.rotations[tokens]) / len(tokens),
        atom_token=atom_token,
        orbit_rot=position.rotations[atoms],
        orbit_trans=position.translations[atoms],
        frame_inverse=frames,
    )
