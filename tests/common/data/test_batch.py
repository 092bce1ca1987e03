"""Batches: positions, frames and maps against crystals that pymatgen holds; padding."""

from dataclasses import fields

import numpy as np
import pytest
from numpy.typing import NDArray

from common.crystal.lattice import k_constraints, k_to_lattice, lattice_to_k
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import nearest_zero, space_group
from common.data.batch import (
    Batch,
    BatchItem,
    View,
    batch_shape,
    bucket,
    collate,
    symmetry_only,
    view_sizes,
)
from tests.crystals import random_crystal

#: Every crystal system and centring; oblique special positions (x,2x,z), (x,x,x), (x,-x,1/4).
SYSTEMS = [
    (1, "aa"),
    (2, "aii"),
    (5, "abc"),
    (14, "be"),
    (38, "abd"),
    (62, "acd"),
    (70, "ae"),
    (122, "acd"),
    (139, "aeh"),
    (152, "ac"),
    (160, "ab"),
    (166, "abch"),
    (186, "bc"),
    (194, "bfh"),
    (205, "ac"),
    (216, "ae"),
    (227, "ae"),
]
views = pytest.mark.parametrize("view", ["asymmetric", "conventional"])
systems = pytest.mark.parametrize(("group", "letters"), SYSTEMS)

Array = NDArray[np.float64]


def crystal_of(group: int, letters: str) -> Crystal:
    return random_crystal(group, letters, np.random.default_rng(group))


def single(crystal: Crystal, view: View) -> Batch:
    return collate([BatchItem(crystal, {})], view)


def atoms_of(batch: Batch) -> tuple[Array, NDArray[np.int64]]:
    """Fractional coordinates and elements of the only crystal's atoms, conventional basis."""
    mask = batch.atom_mask[0]
    site = batch.atom_site[0, mask]
    free = batch.free_params[0, site].astype(float)
    coords = np.einsum("aij,aj->ai", batch.orbit_rot[0, mask], free) + batch.orbit_trans[0, mask]
    return coords, batch.atomic_numbers[0, site]


def tokens_of(batch: Batch) -> Array:
    mask = batch.token_mask[0]
    free = batch.free_params[0, batch.token_site[0, mask]].astype(float)
    return np.einsum("tij,tj->ti", batch.token_rot[0, mask], free) + batch.token_trans[0, mask]


def surroundings(centre: Array, batch: Batch, turn: Array) -> list[tuple[int, ...]]:
    """Every atom as seen from a point: element and turned difference modulo the lattice, sorted."""
    coords, numbers = atoms_of(batch)
    differences = (coords - centre) @ turn.T @ batch.to_primitive[0].T
    grid = 1000
    cells = np.mod(np.rint(differences * grid).astype(int), grid)
    return sorted((int(z), *cell) for z, cell in zip(numbers, cells.tolist(), strict=True))


@views
@systems
def test_positions_are_those_of_the_structure(group: int, letters: str, view: View) -> None:
    crystal = crystal_of(group, letters)
    batch = single(crystal, view)
    coords, numbers = atoms_of(batch)
    structure = crystal.to_structure(primitive=view == "asymmetric")
    if view == "asymmetric":
        coords = coords @ batch.to_primitive[0].T.astype(float)
    assert numbers.tolist() == list(structure.atomic_numbers)
    np.testing.assert_allclose(nearest_zero(coords - structure.frac_coords), 0, atol=1e-5)


@views
@systems
def test_every_token_is_one_of_the_atoms_that_carry_it(
    group: int, letters: str, view: View
) -> None:
    batch = single(crystal_of(group, letters), view)
    tokens, (atoms, _) = tokens_of(batch), atoms_of(batch)
    carried = batch.atom_token[0, batch.atom_mask[0]]
    to_primitive = batch.to_primitive[0].astype(float)
    for token, position in enumerate(tokens):
        difference = nearest_zero((atoms[carried == token] - position) @ to_primitive.T)
        assert np.abs(difference).max(axis=1).min() < 1e-5
    np.testing.assert_array_equal(
        batch.token_site[0, carried], batch.atom_site[0, batch.atom_mask[0]]
    )


@systems
def test_frames_turn_surroundings_back(group: int, letters: str) -> None:
    """An atom's surroundings, turned back, are those of the token that stands for it."""
    batch = single(crystal_of(group, letters), "asymmetric")
    tokens, (atoms, _) = tokens_of(batch), atoms_of(batch)
    turned = False
    for atom, position in enumerate(atoms):
        frame_inverse = batch.frame_inverse[0, atom].astype(float)
        reference = surroundings(tokens[batch.atom_token[0, atom]], batch, np.eye(3))
        seen = surroundings(position, batch, frame_inverse)
        distance = [
            np.abs(np.subtract(a[1:], b[1:]) - 1000 * np.rint(np.subtract(a[1:], b[1:]) / 1000))
            for a, b in zip(seen, reference, strict=True)
        ]
        if np.max(distance) > 1:  # sorting may tear apart what rounding moved across an edge
            assert not set(seen) ^ set(reference)
        turned |= seen != surroundings(position, batch, np.eye(3))
    assert turned or group == 1  # else the test would pass with any frames


def test_frames_of_the_conventional_cell_do_nothing() -> None:
    batch = single(crystal_of(62, "acd"), "conventional")
    atoms = batch.atom_mask[0]
    np.testing.assert_array_equal(batch.frame_inverse[0, atoms], np.eye(3)[None].repeat(16, 0))


@views
@systems
def test_tokens_share_their_sites_variables(group: int, letters: str, view: View) -> None:
    """Moving a site's variables moves its tokens; token_to_free, summed, gives the move back."""
    batch = single(crystal_of(group, letters), view)
    for site in np.flatnonzero(batch.site_mask[0]):
        mine = batch.token_mask[0] & (batch.token_site[0] == site)
        back = np.einsum("tij,tjk->ik", batch.token_to_free[0, mine], batch.token_rot[0, mine])
        np.testing.assert_allclose(back, np.diag(batch.free_mask[0, site].astype(float)), atol=1e-6)


@views
def test_fields_of_a_site(view: View) -> None:
    crystal = Crystal(
        227,
        (Site(12, "a"), Site(13, "d"), Site(8, "e", (0.26, 0, 0))),
        k_to_lattice(np.array([0, 0, 0, 0, 0, np.log(528.0) / np.sqrt(3)])),
    )
    batch = single(crystal, view)
    assert batch.atomic_numbers[0, :3].tolist() == [12, 13, 8]
    assert batch.multiplicity[0, :3].tolist() == [8, 16, 32]
    assert batch.letter[0, :3].tolist() == [0, 3, 4]
    assert batch.free_mask[0, :3].tolist() == [[False] * 3, [False] * 3, [True, False, False]]
    assert batch.num_atoms.tolist() == [56]
    assert batch.space_group.tolist() == [227]
    assert batch.atom_mask.sum() == (14 if view == "asymmetric" else 56)
    assert batch.token_mask.sum() == (3 if view == "asymmetric" else 56)


@systems
def test_lattice_numbers(group: int, letters: str) -> None:
    crystal = crystal_of(group, letters)
    batch = single(crystal, "asymmetric")
    mask, bias = k_constraints(group)
    np.testing.assert_array_equal(batch.k_mask[0], mask)
    np.testing.assert_array_equal(batch.k_bias[0], bias.astype(np.float32))
    np.testing.assert_allclose(batch.lattice_k[0], lattice_to_k(crystal.lattice), rtol=1e-6)
    np.testing.assert_allclose(batch.lattice_k[0, ~mask], bias[~mask], atol=1e-6)
    volume = np.exp(np.sqrt(3) * batch.lattice_k[0, 5])
    assert np.isclose(volume, crystal.to_structure().volume, rtol=1e-5)


def test_largest_letter() -> None:
    """Group 47 has 27 positions, the last one named A."""
    batch = single(symmetry_only(47, [(8, "A")]), "asymmetric")
    assert batch.letter[0, 0] == 26
    assert batch.multiplicity[0, 0] == 8


def test_properties_and_their_mask() -> None:
    crystal = symmetry_only(221, [(55, "a"), (17, "b")])
    given: list[dict[str, float | None]] = [
        {"band_gap": 0.0, "formation_energy": -2.5, "e_above_hull": 0.1},
        {"band_gap": None, "formation_energy": 0.0},
        {},
    ]
    batch = collate([BatchItem(crystal, properties) for properties in given], "asymmetric")
    np.testing.assert_array_equal(batch.properties, np.array([[0, -2.5], [0, 0], [0, 0]], "f4"))
    assert batch.property_mask.tolist() == [[True, True], [False, True], [False, False]]


@views
@systems
def test_bucket_holds_the_crystal_and_little_more(group: int, letters: str, view: View) -> None:
    crystal = symmetry_only(group, [(8, letter) for letter in letters])
    (tokens, atoms), (token_size, atom_size) = view_sizes(crystal, view), bucket(crystal, view)
    assert tokens <= token_size <= atom_size
    assert atoms <= atom_size < atoms + 16
    batch = single(crystal, view)
    assert batch.shape == (token_size, atom_size)
    assert batch.site_mask.shape == batch.token_mask.shape
    if view == "conventional":
        assert token_size == atom_size


def test_buckets_are_few() -> None:
    """One shape per step of four atoms up to 20, of sixteen above."""
    crystals = [symmetry_only(1, [(8, "a")] * count) for count in range(1, 100)]
    shapes = sorted({bucket(crystal, "conventional") for crystal in crystals})
    assert [atoms for _, atoms in shapes] == [4, 8, 12, 16, 20, 32, 48, 64, 80, 96, 112]
    assert len({bucket(crystal, "asymmetric") for crystal in crystals}) < 20


@views
def test_padding_is_empty_and_changes_nothing_else(view: View) -> None:
    items = [BatchItem(crystal_of(62, "acd"), {"band_gap": 1.0})]
    tight = collate(items, view)
    tokens, atoms = tight.shape
    wide = collate(items, view, (tokens + 3, atoms + 5))
    for field in fields(Batch):
        small, large = getattr(tight, field.name), getattr(wide, field.name)
        inside = tuple(slice(0, n) for n in small.shape)
        np.testing.assert_array_equal(large[inside], small, err_msg=field.name)
        large = large.copy()
        large[inside] = 0
        assert not large.any(), field.name


@views
def test_rows_do_not_depend_on_their_neighbours(view: View) -> None:
    items = [BatchItem(crystal_of(*system), {"band_gap": 1.0}) for system in SYSTEMS]
    together = collate(items, view)
    assert together.size == len(items)
    assert together.shape == batch_shape(items, view)
    rows = np.array([3, 0, 5])
    chosen = collate([items[row] for row in rows], view, together.shape)
    for field in fields(Batch):
        np.testing.assert_array_equal(
            getattr(together.take(rows), field.name), getattr(chosen, field.name)
        )


def test_no_field_is_edited_by_replace() -> None:
    batch = single(crystal_of(62, "acd"), "asymmetric")
    before = batch.free_params.copy()
    other = batch.replace(free_params=np.zeros_like(before))
    assert not other.free_params.any()
    np.testing.assert_array_equal(batch.free_params, before)
    assert other.token_rot is batch.token_rot


def test_crystal_that_does_not_fit() -> None:
    item = BatchItem(symmetry_only(62, [(8, "d"), (14, "c")]), {})
    with pytest.raises(ValueError, match=r"2 tokens and 12 atoms do not fit \(1, 12\)"):
        collate([item], "asymmetric", (1, 12))
    with pytest.raises(ValueError, match=r"12 tokens and 12 atoms do not fit \(8, 8\)"):
        collate([item], "conventional", (8, 8))


def test_unknown_letter() -> None:
    with pytest.raises(KeyError):
        collate([BatchItem(symmetry_only(221, [(8, "z")]), {})], "asymmetric")


def test_no_crystal() -> None:
    with pytest.raises(ValueError, match="empty"):
        collate([], "asymmetric")


def test_symmetry_only_has_every_operation() -> None:
    crystal = symmetry_only(194, [(12, "c")])
    assert crystal.positions[0] is space_group(194).wyckoff["c"]
    assert crystal.sites[0].free_params == (0, 0, 0)
