"""Textbook crystals with published lattice constants, and random crystals of any space group.

`textbook(name)` gives the conventional cell; names and literature stand in `TEXTBOOK`.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Lattice, Structure

from common.crystal.lattice import k_constraints, k_to_lattice
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import WyckoffPosition, space_group

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Textbook:
    """One published crystal.

    Attributes:
        group: number of the space group, standard setting.
        symbol: the same as pymatgen names it (:2 and :H are the origin and the axes).
        lattice: lengths in angstrom, angles in degrees.
        atoms: species and position of one atom per orbit.
        sites: the orbits, up to an exchange of letters by another origin.
        bond: shortest distance between two atoms in angstrom.
    """

    group: int
    symbol: str
    lattice: Lattice
    atoms: tuple[tuple[str, tuple[float, float, float]], ...]
    sites: str
    bond: float


TEXTBOOK: dict[str, Textbook] = {
    # Swanson & Fuyat, NBS Circular 539, vol. 2 (1953).
    "rock salt NaCl": Textbook(
        225,
        "Fm-3m",
        Lattice.cubic(5.6402),
        (("Na", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5))),
        "Na:4a Cl:4b",
        2.8201,
    ),
    # Swanson & Fuyat, NBS Circular 539, vol. 2 (1953).
    "CsCl": Textbook(
        221,
        "Pm-3m",
        Lattice.cubic(4.123),
        (("Cs", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5))),
        "Cs:1a Cl:1b",
        3.5706,
    ),
    # Swanson & Fuyat, NBS Circular 539, vol. 2 (1953).
    "zinc blende ZnS": Textbook(
        216,
        "F-43m",
        Lattice.cubic(5.4060),
        (("Zn", (0, 0, 0)), ("S", (0.25, 0.25, 0.25))),
        "Zn:4a S:4c",
        2.3409,
    ),
    # Kisi & Elcombe, Acta Cryst. C45, 1867 (1989).
    "wurtzite ZnS": Textbook(
        186,
        "P6_3mc",
        Lattice.hexagonal(3.8227, 6.2607),
        (("Zn", (1 / 3, 2 / 3, 0)), ("S", (1 / 3, 2 / 3, 0.3748))),
        "Zn:2b S:2b",
        2.342,
    ),
    # Swanson & Tatge, NBS Circular 539, vol. 1 (1953).
    "fluorite CaF2": Textbook(
        225,
        "Fm-3m",
        Lattice.cubic(5.4626),
        (("Ca", (0, 0, 0)), ("F", (0.25, 0.25, 0.25))),
        "Ca:4a F:8c",
        2.3654,
    ),
    # Howard, Sabine & Dickson, Acta Cryst. B47, 462 (1991).
    "rutile TiO2": Textbook(
        136,
        "P4_2/mnm",
        Lattice.tetragonal(4.5937, 2.9587),
        (("Ti", (0, 0, 0)), ("O", (0.30478, 0.30478, 0))),
        "Ti:2a O:4f",
        1.948,
    ),
    # Swanson & Fuyat, NBS Circular 539, vol. 3 (1954).
    "perovskite SrTiO3": Textbook(
        221,
        "Pm-3m",
        Lattice.cubic(3.9050),
        (("Sr", (0.5, 0.5, 0.5)), ("Ti", (0, 0, 0)), ("O", (0.5, 0, 0))),
        "Sr:1b Ti:1a O:3d",
        1.9525,
    ),
    # Sasaki, Prewitt, Bass & Schulze, Acta Cryst. C43, 1668 (1987), axes b, c, a of Pbnm.
    "orthorhombic perovskite CaTiO3": Textbook(
        62,
        "Pnma",
        Lattice.orthorhombic(5.4423, 7.6401, 5.3796),
        (
            ("Ca", (0.0360, 0.25, 0.9932)),
            ("Ti", (0, 0, 0.5)),
            ("O", (0.4838, 0.25, 0.0714)),
            ("O", (0.2888, 0.0371, 0.7108)),
        ),
        "Ca:4c Ti:4b O:4c O:8d",
        1.95,
    ),
    # Hill, Craig & Gibbs, Phys. Chem. Minerals 4, 317 (1979).
    "spinel MgAl2O4": Textbook(
        227,
        "Fd-3m:2",
        Lattice.cubic(8.0832),
        (("Mg", (1 / 8, 1 / 8, 1 / 8)), ("Al", (0.5, 0.5, 0.5)), ("O", (0.2624, 0.2624, 0.2624))),
        "Mg:8a Al:16d O:32e",
        1.924,
    ),
    # Finger & Hazen, J. Appl. Phys. 49, 5823 (1978).
    "corundum Al2O3": Textbook(
        167,
        "R-3c:H",
        Lattice.hexagonal(4.7606, 12.994),
        (("Al", (0, 0, 0.3522)), ("O", (0.3063, 0, 0.25))),
        "Al:12c O:18e",
        1.855,
    ),
    # Levien, Prewitt & Weidner, Am. Mineral. 65, 920 (1980), origin moved by (0, 0, 2/3).
    "alpha quartz SiO2": Textbook(
        154,
        "P3_221",
        Lattice.hexagonal(4.9160, 5.4054),
        (("Si", (0.4697, 0, 2 / 3)), ("O", (0.4135, 0.2669, 0.1191 + 2 / 3))),
        "Si:3a O:6c",
        1.605,
    ),
    # Swanson & Fuyat, NBS Circular 539, vol. 2 (1953).
    "diamond C": Textbook(
        227, "Fd-3m:2", Lattice.cubic(3.5667), (("C", (1 / 8, 1 / 8, 1 / 8)),), "C:8a", 1.5444
    ),
    # Wyckoff, Crystal Structures, vol. 1 (1963).
    "hcp Mg": Textbook(
        194,
        "P6_3/mmc",
        Lattice.hexagonal(3.2095, 5.2107),
        (("Mg", (1 / 3, 2 / 3, 0.25)),),
        "Mg:2c",
        3.197,
    ),
    # Howard, Hill & Reichert, Acta Cryst. B44, 116 (1988).
    "baddeleyite ZrO2": Textbook(
        14,
        "P2_1/c",
        Lattice.monoclinic(5.1505, 5.2116, 5.3173, 99.230),
        (
            ("Zr", (0.2754, 0.0395, 0.2083)),
            ("O", (0.0700, 0.3317, 0.3447)),
            ("O", (0.4496, 0.7569, 0.4792)),
        ),
        "Zr:4e O:4e O:4e",
        2.05,
    ),
}


def textbook(name: str) -> Structure:
    """The conventional cell of one of TEXTBOOK, built by pymatgen from its own tables."""
    return _built(name).copy()


@cache
def _built(name: str) -> Structure:
    """Cached: pymatgen takes most of a second for a cubic group."""
    crystal = TEXTBOOK[name]
    species = [symbol for symbol, _ in crystal.atoms]
    coords = [position for _, position in crystal.atoms]
    return Structure.from_spacegroup(crystal.symbol, crystal.lattice, species, coords)


def random_lattice(group: int, volume: float, rng: np.random.Generator) -> Array:
    """A lattice [3,3] (rows, A) of some volume (A^3) that a space group allows."""
    mask, bias = k_constraints(group)
    k = bias + mask * rng.normal(scale=0.2, size=6)
    k[5] = np.log(volume) / np.sqrt(3)
    return k_to_lattice(k)


def random_crystal(group: int, letters: str, rng: np.random.Generator) -> Crystal:
    """A crystal with these Wyckoff letters, each another element, no two atoms within 1 A.

    Free parameters and lattice are random, the latter within the group's constraints.
    """
    positions = [space_group(group).wyckoff[letter] for letter in letters]
    num_atoms = sum(position.multiplicity for position in positions)
    for attempt in range(100):
        volume = num_atoms * (20 + 2 * attempt)
        crystal = Crystal(
            group,
            tuple(
                Site(atomic_number, position.letter, random_params(position, rng))
                for atomic_number, position in enumerate(positions, start=11)
            ),
            random_lattice(group, volume, rng),
        )
        if shortest_distance(crystal.to_structure(primitive=True)) > 1.0:
            return crystal
    raise AssertionError(f"no room for {letters} in group {group}")


def random_params(
    position: WyckoffPosition, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Variables of a Wyckoff position, zero where it has none."""
    x, y, z = np.where(position.free_mask, rng.random(3), 0.0).tolist()
    return x, y, z


def shortest_distance(structure: Structure) -> float:
    """Between two atoms, or an atom and its image along a cell vector, in angstrom."""
    distances = structure.distance_matrix
    pairs = distances[np.triu_indices(len(structure), k=1)]
    return float(pairs.min(initial=min(structure.lattice.abc)))


def as_points(frac_coords: Array) -> NDArray[np.int64]:
    """A number for each point [...,3] of the unit cell: equal for equal points."""
    grid = 10_000
    cells = np.mod(np.rint(frac_coords * grid).astype(np.int64), grid)
    keys: NDArray[np.int64] = cells @ np.array([grid**2, grid, 1])
    return keys
