"""Crystals as a space group, its occupied sites and a lattice; to and from pymatgen and CIF."""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure

from common.crystal.lattice import standard_orientation
from common.crystal.symmetry import SpaceGroup, WyckoffPosition, space_group
from common.crystal.wyckoff import SymmetryKey, symmetry_key
from common.elements import formula_text

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """One orbit: an element on a Wyckoff position, and the position's variables x, y, z.

    ``free_params`` are fractional, in [0,1), of the orbit's first position; zero where the
    position has no such variable.
    """

    atomic_number: int
    letter: str
    free_params: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Crystal:
    """A crystal that holds its symmetry by construction.

    Attributes:
        space_group: number 1-230, standard setting.
        sites: the occupied orbits.
        lattice: [3,3], rows are the vectors of the conventional cell in angstrom.
    """

    space_group: int
    sites: tuple[Site, ...]
    lattice: Array = field(repr=False)

    @property
    def group(self) -> SpaceGroup:
        """Tables of the space group."""
        return space_group(self.space_group)

    @cached_property
    def positions(self) -> tuple[WyckoffPosition, ...]:
        """The Wyckoff position of every site."""
        wyckoff = self.group.wyckoff
        return tuple(wyckoff[site.letter] for site in self.sites)

    @cached_property
    def num_atoms(self) -> int:
        """Atoms in the conventional cell."""
        return sum(position.multiplicity for position in self.positions)

    @property
    def num_primitive_atoms(self) -> int:
        """Atoms in the primitive cell."""
        return self.num_atoms // len(self.group.centering)

    @property
    def volume_per_atom(self) -> float:
        """In A^3."""
        return float(abs(np.linalg.det(self.lattice))) / self.num_atoms

    @property
    def num_free_coords(self) -> int:
        """Free coordinates of all sites together."""
        return sum(position.dof for position in self.positions)

    @property
    def formula_counts(self) -> dict[int, int]:
        """Atoms of each atomic number in the conventional cell."""
        counts: Counter[int] = Counter()
        for site, position in zip(self.sites, self.positions, strict=True):
            counts[site.atomic_number] += position.multiplicity
        return dict(counts)

    @cached_property
    def symmetry_key(self) -> SymmetryKey:
        """Group and sites, the same for all descriptions of them."""
        return symmetry_key(self.space_group, ((s.atomic_number, s.letter) for s in self.sites))

    @property
    def sites_string(self) -> str:
        """Sites as ``Sr:1a Ti:1b O:3c``."""
        return " ".join(
            f"{Element.from_Z(site.atomic_number).symbol}:{position.multiplicity}{site.letter}"
            for site, position in zip(self.sites, self.positions, strict=True)
        )

    def to_structure(self, primitive: bool = False) -> Structure:
        """The atoms, in the conventional cell or in the primitive cell of the same setting.

        Raises:
            ValueError: if a coordinate or the lattice is not finite.
        """
        elements: list[Element] = []
        coords: list[Array] = []
        for site, position in zip(self.sites, self.positions, strict=True):
            atoms = position.positions(np.array(site.free_params))
            if primitive:
                atoms = atoms[position.primitive]
            elements += [Element.from_Z(site.atomic_number)] * len(atoms)
            coords.append(atoms)
        frac_coords = np.concatenate(coords)
        if not (np.isfinite(frac_coords).all() and np.isfinite(self.lattice).all()):
            raise ValueError("a crystal must have finite coordinates and lattice")
        lattice = self.lattice
        if primitive:
            frac_coords = frac_coords @ self.group.to_primitive.T
            lattice = np.linalg.inv(self.group.to_primitive).T @ lattice
        return Structure(Lattice(lattice), elements, frac_coords, to_unit_cell=True)

    def to_cif(self, name: str | None = None) -> str:
        """A CIF with the group's operations and one row per site.

        Args:
            name: name of the data block; the reduced formula without it.
        """
        structure = self.to_structure()
        lattice = Lattice(standard_orientation(self.lattice))
        formula = formula_text(self.formula_counts)
        lines = [f"data_{name or formula}"]
        lines += [f"_symmetry_space_group_name_H-M   '{self.group.symbol}'"]
        for key, value in zip("abc", lattice.abc, strict=True):
            lines.append(f"_cell_length_{key}   {value:.8f}")
        for key, value in zip(("alpha", "beta", "gamma"), lattice.angles, strict=True):
            lines.append(f"_cell_angle_{key}   {value:.8f}")
        lines += [
            f"_symmetry_Int_Tables_number   {self.space_group}",
            f"_chemical_formula_structural   {formula}",
            f"_chemical_formula_sum   '{structure.composition.formula}'",
            f"_cell_volume   {lattice.volume:.8f}",
            f"_cell_formula_units_Z   {math.gcd(*self.formula_counts.values())}",
            "loop_",
            " _symmetry_equiv_pos_site_id",
            " _symmetry_equiv_pos_as_xyz",
        ]
        lines += [f"  {i}  '{xyz}'" for i, xyz in enumerate(self.group.operations_xyz, start=1)]
        lines.append("loop_")
        lines += [
            f" _atom_site_{key}"
            for key in ("type_symbol", "label", "symmetry_multiplicity", "Wyckoff_symbol")
        ]
        lines += [f" _atom_site_{key}" for key in ("fract_x", "fract_y", "fract_z", "occupancy")]
        for index, (site, position) in enumerate(zip(self.sites, self.positions, strict=True)):
            symbol = Element.from_Z(site.atomic_number).symbol
            x, y, z = position.positions(np.array(site.free_params))[0]
            lines.append(
                f"  {symbol}  {symbol}{index}  {position.multiplicity}  {site.letter}"
                f"  {x:.10f}  {y:.10f}  {z:.10f}  1"
            )
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The crystal as JSON types; floats keep every bit."""
        return {
            "space_group": self.space_group,
            "sites": [
                {
                    "element": Element.from_Z(site.atomic_number).symbol,
                    "letter": site.letter,
                    "free_params": list(site.free_params),
                }
                for site in self.sites
            ],
            "lattice": np.asarray(self.lattice).tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Crystal":
        """The crystal that ``to_dict`` wrote."""
        sites = tuple(
            Site(Element(site["element"]).Z, site["letter"], tuple(site["free_params"]))
            for site in data["sites"]
        )
        return cls(int(data["space_group"]), sites, np.array(data["lattice"], dtype=float))
