"""Other descriptions of one crystal: they are the same atoms, and the nearest one is found."""

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher

from common.crystal.descriptions import aligned, with_sites
from common.crystal.normalizer import changes_of_basis, letter_images, letter_permutations
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import space_group, wrap
from tests.crystals import random_crystal

#: All systems, centred cells, polar groups, sites that exchange letters, like sites.
SYSTEMS = (
    (1, "aaa"),
    (2, "abiii"),
    (4, "aaa"),
    (12, "aii"),
    (26, "aabc"),
    (36, "aaa"),
    (47, "abiqA"),
    (62, "acccd"),
    (99, "abc"),
    (139, "abeeh"),
    (148, "abf"),
    (160, "aab"),
    (186, "bbc"),
    (194, "acfk"),
    (198, "aab"),
    (221, "abg"),
    (227, "aeg"),
)


def named(crystal: Crystal) -> tuple[tuple[int, str], ...]:
    return tuple((site.atomic_number, site.letter) for site in crystal.sites)


def disguised(crystal: Crystal, random: np.random.Generator) -> Crystal:
    """The same crystal from another origin, with other axes, representatives and order of sites."""
    changes = changes_of_basis(crystal.space_group)
    near = np.flatnonzero(np.abs(changes.linear).max(axis=(1, 2)) < 1.5)[:24]
    axes = random.choice(near)
    shift = changes.origin[axes] + changes.shifts[random.integers(len(changes.shifts))]
    shift = shift + random.random(3) @ changes.polar
    sites = []
    for site, position in zip(crystal.sites, crystal.positions, strict=True):
        for other in space_group(crystal.space_group).wyckoff.values():
            linear, offset = position.maps_onto(other, changes.linear[axes], shift)
            if other.multiplicity == position.multiplicity and len(linear):
                pick = random.integers(len(linear))
                x, y, z = wrap(linear[pick] @ np.array(site.free_params) + offset[pick])
                sites.append(Site(site.atomic_number, other.letter, (x, y, z)))
                break
    assert len(sites) == len(crystal.sites)
    lattice = np.linalg.inv(changes.linear[axes]).T @ crystal.lattice
    return Crystal(
        crystal.space_group, tuple(sites[i] for i in random.permutation(len(sites))), lattice
    )


@pytest.mark.parametrize(("group", "letters"), SYSTEMS)
def test_a_disguised_crystal_is_found_again(group: int, letters: str) -> None:
    random = np.random.default_rng(group)
    matcher = StructureMatcher(stol=0.5, angle_tol=10, ltol=0.3)
    for _ in range(3):
        crystal = random_crystal(group, letters, random)
        other = disguised(crystal, random)
        found = with_sites(other, named(crystal))
        assert found is not None
        described, order = found
        assert named(described) == named(crystal)
        for site, index in zip(described.sites, order, strict=True):
            assert site.atomic_number == other.sites[index].atomic_number
        assert sorted(order) == list(range(len(crystal.sites)))
        again, distance = aligned(described, crystal)
        assert named(again) == named(crystal)
        assert distance < 1e-12
        apart = again.to_structure().frac_coords - crystal.to_structure().frac_coords
        assert np.abs(apart - np.round(apart)).max() < 1e-6
        assert matcher.get_rms_dist(described.to_structure(), crystal.to_structure())[0] < 1e-4


def test_distance_is_that_of_the_atoms() -> None:
    """One atom of rutile's two kinds moved by a known distance along its free variable."""
    lattice = np.diag([4.6, 4.6, 2.95])
    rutile, moved = (
        Crystal(136, (Site(22, "a"), Site(8, "f", (x, 0.0, 0.0))), lattice) for x in (0.305, 0.315)
    )
    _, distance = aligned(moved, rutile)
    displacement = 0.01 * 4.6 * np.sqrt(2)  # along x and y
    expected = 4 * displacement**2 / (6 * (4.6**2 * 2.95 / 6) ** (2 / 3))
    assert np.isclose(distance, expected, rtol=1e-6)
    # 1 - x is the same orbit: nothing is left of the difference.
    mirrored = Crystal(136, (Site(22, "a"), Site(8, "f", (0.695, 0.0, 0.0))), lattice)
    assert aligned(mirrored, rutile)[1] < 1e-12


def test_other_letters_are_no_description() -> None:
    salt = Crystal(225, (Site(11, "a"), Site(17, "b")), np.eye(3) * 5.6)
    exchanged = with_sites(salt, ((11, "b"), (17, "a")))
    assert exchanged is not None
    assert named(exchanged[0]) == ((11, "b"), (17, "a"))
    assert exchanged[1] == (0, 1)
    assert with_sites(salt, ((11, "a"), (17, "c"))) is None
    with pytest.raises(ValueError, match="no description"):
        aligned(salt, Crystal(225, (Site(11, "a"), Site(17, "c")), np.eye(3) * 5.6))


def test_letters_must_have_as_many_sites() -> None:
    """Both letters have oxygen either way; the origin must move to have two on h."""
    oxygen = [
        Site(8, letter, (0.0, 0.0, z)) for letter, z in zip("ggh", (0.1, 0.3, 0.2), strict=True)
    ]
    crystal = Crystal(123, tuple(oxygen), np.diag([4.0, 4.0, 7.0]))
    wanted = ((8, "g"), (8, "h"), (8, "h"))
    found = with_sites(crystal, wanted)
    assert found is not None
    assert named(found[0]) == wanted


@pytest.mark.parametrize("group", [198, 199, 206, 210])
def test_changes_of_axes_whose_origin_is_far(group: int) -> None:
    """All of the cube's 48 operations but for those of the point group keep these groups."""
    changes = changes_of_basis(group)
    point_group = np.unique(space_group(group).rotations, axis=0)
    assert len(changes.linear) == 48 // len(point_group)
    assert changes.origin[:, 0].any()


@pytest.mark.parametrize("group", [14, 47, 123, 166, 221, 227])
def test_changes_of_basis_exchange_letters_as_the_permutations_say(group: int) -> None:
    changes = changes_of_basis(group)
    positions = space_group(group).wyckoff
    found = set()
    for axes in range(len(changes.linear)):
        for shift in changes.shifts:
            images = []
            for position in positions.values():
                (image,) = (
                    other.letter
                    for other in positions.values()
                    if (other.multiplicity, other.dof) == (position.multiplicity, position.dof)
                    and len(
                        position.maps_onto(
                            other, changes.linear[axes], changes.origin[axes] + shift
                        )[0]
                    )
                )
                images.append(image)
            found.add("".join(images))
    assert found == set(letter_permutations(group))


@pytest.mark.parametrize("group", [2, 5, 10, 12, 24, 47, 74, 123, 166, 187, 194, 216, 227])
def test_images_of_letters_are_where_the_maps_lead(group: int) -> None:
    """For changes of axes with a shift behind them, one of some dozens drawn by chance."""
    random = np.random.default_rng(group)
    changes = changes_of_basis(group)
    positions = space_group(group).wyckoff
    letters = list(positions)
    exchanged = 0
    for _ in range(12):
        axes = random.integers(len(changes.linear))
        shift = random.integers(len(changes.shifts))
        moved = changes.linear[axes], changes.origin[axes] + changes.shifts[shift]
        for letter, position in positions.items():
            between = letters[letter_images(group, letter)[0][axes]]
            image = letters[letter_images(group, between)[1][shift]]
            assert len(position.maps_onto(positions[image], *moved)[0])
            exchanged += image != letter
    assert exchanged


def test_the_first_change_that_fits_is_taken() -> None:
    """Where none is needed, the crystal stays as it is, to the last bit."""
    random = np.random.default_rng(0)
    for group, letters in SYSTEMS:
        crystal = random_crystal(group, letters, random)
        found = with_sites(crystal, named(crystal))
        assert found is not None
        described, order = found
        assert order == tuple(range(len(crystal.sites)))
        np.testing.assert_array_equal(described.lattice, crystal.lattice)
        if len(set(named(crystal))) == len(crystal.sites):
            for site, other in zip(described.sites, crystal.sites, strict=True):
                np.testing.assert_allclose(site.free_params, other.free_params, atol=1e-12)


def test_as_many_sites_of_an_element_as_wanted() -> None:
    """Each site fits somewhere, but not all of them at once."""
    crystal = Crystal(
        2, (Site(11, "a"), Site(11, "b"), Site(17, "c"), Site(17, "d")), np.diag([4.0, 5.0, 6.0])
    )
    assert with_sites(crystal, ((11, "a"), (17, "b"), (17, "c"), (17, "d"))) is None
    assert with_sites(crystal, ((11, "a"), (11, "b"), (17, "c"))) is None
