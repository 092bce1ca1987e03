"""Other descriptions of the same crystal: another origin, other axes, other representatives.

A description is the letters and variables of the sites, and the lattice. The group's normaliser
and the choice of a first atom in every orbit lead from one to the other.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from common.crystal.lattice import lattice_to_k, standard_orientation
from common.crystal.normalizer import changes_of_basis, letter_images
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import nearest_zero, space_group, wrap

Array = NDArray[np.float64]

#: Changes of axes that are tried, of those that bring the lattices nearest to each other.
_MAX_AXES = 12
#: They may leave the lattice numbers so much farther apart than the best of them.
_AXES_MARGIN = 0.3
#: Weight of the squared difference of lattice numbers beside the squared displacement per atom in
#: units of (volume per atom)^(2/3).
_LATTICE_WEIGHT = 0.5
#: Shifts along polar directions that are tried for one change of basis.
_MAX_POLAR_SHIFTS = 32
#: Changes of basis that are searched for given letters.
_MAX_CHANGES = 4096


@dataclass(frozen=True)
class _Images:
    """Maps of a letter's variables to those of its image: [E,3,3] and [E,3]."""

    letter: str
    linear: Array
    offset: Array


@lru_cache(maxsize=200_000)
def _images(number: int, letter: str, axes: int, shift: int) -> _Images:
    """Where a change of basis takes a position."""
    changes = changes_of_basis(number)
    positions = space_group(number).wyckoff
    own = positions[letter]
    linear, moved = changes.linear[axes], changes.origin[axes] + changes.shifts[shift]
    kind = own.multiplicity, own.dof
    alike = (p for p in positions.values() if (p.multiplicity, p.dof) == kind)
    for other in alike:
        maps = own.maps_onto(other, linear, moved)
        if len(maps[0]):
            return _Images(other.letter, *maps)
    raise AssertionError(f"position {letter} of group {number} is lost")


def _image_letter(number: int, letter: str, axes: int, shift: int) -> str:
    """The letter of ``_images``, without its maps."""
    letters = list(space_group(number).wyckoff)
    image = letters[letter_images(number, letter)[0][axes]]
    return letters[letter_images(number, image)[1][shift]]


def _new_lattice(lattice: Array, linear: Array) -> Array:
    """Rows of the lattice after a change of axes x -> linear @ x."""
    return np.asarray(np.linalg.inv(linear).swapaxes(-1, -2) @ lattice)


def with_sites(
    crystal: Crystal, wanted: tuple[tuple[int, str], ...]
) -> tuple[Crystal, tuple[int, ...]] | None:
    """A crystal in the description that has given elements on given letters, sites in that order.

    Args:
        crystal: of any description.
        wanted: atomic number and letter of every site.

    Returns:
        the description, and which of the crystal's sites each of its sites was; None if there is
        no such description among those tried.
    """
    number = crystal.space_group
    changes = changes_of_basis(number)
    fits = _letters_fit(crystal, wanted)
    if not fits.any():
        return None
    axes, shift = divmod(int(fits.argmax()), len(changes.shifts))
    images = [_images(number, site.letter, axes, shift) for site in crystal.sites]
    found = [(s.atomic_number, i.letter) for s, i in zip(crystal.sites, images, strict=True)]
    params = [
        wrap(image.linear[0] @ np.array(site.free_params) + image.offset[0])
        for site, image in zip(crystal.sites, images, strict=True)
    ]
    lattice = _new_lattice(crystal.lattice, changes.linear[axes])
    order = _in_order(wanted, found)
    sites = tuple(_site(*found[index], params[index]) for index in order)
    return Crystal(number, sites, lattice), order


def _letters_fit(crystal: Crystal, wanted: tuple[tuple[int, str], ...]) -> NDArray[np.bool_]:
    """Which changes of basis, shifts running fastest, put the elements on the wanted letters."""
    number = crystal.space_group
    letters = list(space_group(number).wyckoff)
    shifts = len(changes_of_basis(number).shifts)
    used = -(-_MAX_CHANGES // shifts)
    by_shift = np.stack([letter_images(number, letter)[1] for letter in letters])  # [L,M]
    target = Counter(wanted)
    sites = Counter((site.atomic_number, site.letter) for site in crystal.sites)
    fits = []
    for (z, letter), count in sites.items():  # two letters never have the same image
        images = by_shift[letter_images(number, letter)[0][:used]].ravel()[:_MAX_CHANGES]
        fits.append(np.array([target[z, image] == count for image in letters])[images])
    return np.logical_and.reduce(fits) & (len(sites) == len(target))


def _in_order(wanted: tuple[tuple[int, str], ...], found: list[tuple[int, str]]) -> tuple[int, ...]:
    """Which of the sites found is each of the wanted ones."""
    rest: dict[tuple[int, str], list[int]] = {}
    for index, site in enumerate(found):
        rest.setdefault(site, []).append(index)
    return tuple(rest[site].pop(0) for site in wanted)


def _site(atomic_number: int, letter: str, params: Array) -> Site:
    x, y, z = (float(value) for value in params)
    return Site(atomic_number, letter, (x, y, z))


def aligned(crystal: Crystal, other: Crystal) -> tuple[Crystal, float]:
    """The description of a crystal that is nearest to another one.

    Args:
        crystal: is described anew.
        other: with the same elements on the same letters, up to the order of sites.

    Returns:
        the crystal, its sites in the order of the other's, and their distance: mean squared
        displacement in units of (volume per atom)^(2/3), and that of the lattice numbers.
    """
    best: tuple[float, Crystal] | None = None
    frame = _Frame(other)
    lattices = _new_lattice(crystal.lattice, frame.changes.linear)
    strain = ((lattice_to_k(lattices) - lattice_to_k(other.lattice)) ** 2).sum(axis=1)
    order = np.argsort(strain, kind="stable").tolist()
    for tried, axes in enumerate(order):
        far = np.sqrt(strain[axes]) > np.sqrt(strain[order[0]]) + _AXES_MARGIN
        if best is not None and (far or tried >= _MAX_AXES):
            break
        for shift in range(len(frame.changes.shifts)):
            found = frame.fit(crystal, axes, shift)
            if found is None:
                continue
            cost = found[0] + _LATTICE_WEIGHT * float(strain[axes])
            if best is None or cost < best[0]:
                best = cost, Crystal(crystal.space_group, found[1], lattices[axes])
    if best is None:
        raise ValueError(f"no description of {crystal.sites_string} fits {other.sites_string}")
    return best[1], best[0]


class _Frame:
    """The crystal to which others are fitted."""

    def __init__(self, other: Crystal) -> None:
        self.other = other
        self.changes = changes_of_basis(other.space_group)
        self.cartesian = standard_orientation(other.lattice)
        volume = abs(np.linalg.det(other.lattice))
        self.unit = (volume / other.num_atoms) ** (2 / 3) * other.num_atoms
        self.params = np.array([site.free_params for site in other.sites], dtype=float)
        self.slots: dict[tuple[int, str], list[int]] = {}
        for index, site in enumerate(other.sites):
            self.slots.setdefault((site.atomic_number, site.letter), []).append(index)
        self.is_polar = bool(np.abs(self.changes.polar).max() > 1e-9)

    def fit(self, crystal: Crystal, axes: int, shift: int) -> tuple[float, tuple[Site, ...]] | None:
        """Mean squared displacement, and the sites; None if the letters become others."""
        number = crystal.space_group
        found = Counter(
            (site.atomic_number, _image_letter(number, site.letter, axes, shift))
            for site in crystal.sites
        )
        if found != {key: len(slots) for key, slots in self.slots.items()}:
            return None
        members: dict[tuple[int, str], list[Array]] = {}
        for site in crystal.sites:
            image = _images(number, site.letter, axes, shift)
            params = image.linear @ np.array(site.free_params) + image.offset  # [E,3]
            members.setdefault((site.atomic_number, image.letter), []).append(params)
        if not self.is_polar:
            cost, chosen, _ = self._assign(members, np.zeros(3))
        else:
            tries = [self._assign(members, s) for s in self._polar_shifts(members)]
            cost, chosen, rest = min(tries, key=lambda found: found[0])
            refined = self._assign(members, rest)
            if refined[0] < cost:
                cost, chosen, _ = refined
        sites = tuple(
            _site(site.atomic_number, site.letter, wrap(chosen[i]))
            for i, site in enumerate(self.other.sites)
        )
        return cost / self.unit, sites

    def _polar_shifts(self, members: dict[tuple[int, str], list[Array]]) -> Iterator[Array]:
        """Shifts that put an orbit of the smallest kind onto each of its counterparts."""
        key = min(members, key=lambda k: (len(members[k]), len(members[k][0])))
        first = self.other.group.wyckoff[key[1]].rotations[0]
        count = 0
        for slot in self.slots[key]:
            for params in members[key][0]:
                apart = first @ nearest_zero(params - self.params[slot])
                yield -apart @ self.changes.polar
                count += 1
                if count == _MAX_POLAR_SHIFTS:
                    return

    def _assign(
        self, members: dict[tuple[int, str], list[Array]], polar: Array
    ) -> tuple[float, dict[int, Array], Array]:
        """Cost, variables by slot, and the polar shift with what would still improve it."""
        total, weight = 0.0, 0
        chosen: dict[int, Array] = {}
        drift = np.zeros(3)
        for key, own in members.items():
            position = self.other.group.wyckoff[key[1]]
            slots = self.slots[key]
            inverse = np.linalg.pinv(position.rotations[0])
            params = np.stack(own) + inverse @ polar  # [I,E,3]
            apart = nearest_zero(params[:, None] - self.params[slots][:, None])  # [I,J,E,3]
            apart = np.where(position.free_mask, apart, 0.0) @ position.rotations[0].T
            squared = ((apart @ self.cartesian) ** 2).sum(axis=-1)  # [I,J,E]
            representative = squared.argmin(axis=2)
            cost = np.take_along_axis(squared, representative[..., None], 2)[..., 0]
            rows, columns = (
                (np.array([0]), np.array([0])) if len(own) == 1 else linear_sum_assignment(cost)
            )
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
                e = representative[i, j]
                chosen[slots[j]] = np.where(position.free_mask, params[i, e], 0.0)
                total += position.multiplicity * cost[i, j]
                drift += position.multiplicity * apart[i, j, e]
                weight += position.multiplicity
        return float(total), chosen, polar - (drift / weight) @ self.changes.polar
