"""Paths on the torus, and the equivalent descriptions that they end in."""

import numpy as np
import pytest
from pymatgen.core import Structure

from common.crystal.lattice import k_constraints, k_to_lattice
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import nearest_zero, space_group
from common.data.batch import BatchItem, Precedent, collate
from common.diffusion.flow import (
    VELOCITY_SCALE,
    Descriptions,
    make_path,
    normalizer_translations,
)

GROUPS = [1, 2, 4, 8, 12, 14, 33, 38, 62, 70, 99, 122, 139, 146, 155, 160, 166, 186, 194]
GROUPS += [198, 205, 216, 221, 225, 227, 230]


def random_crystal(number: int, random: np.random.Generator) -> Crystal:
    """Up to three sites, the lattice with exactly the group's freedom."""
    letters = list(space_group(number).wyckoff)
    chosen = random.choice(letters, size=min(3, len(letters)), replace=False)
    mask, bias = k_constraints(number)
    k = np.where(mask, random.normal(0, 0.1, 6), bias)
    k[5] = np.log(200.0) / np.sqrt(3)
    sites = tuple(Site(11 + i, letter, tuple(random.random(3))) for i, letter in enumerate(chosen))
    return Crystal(number, sites, k_to_lattice(k))


def sorted_distances(structure: Structure) -> np.ndarray:
    """Distances between all atoms, each with its pair of elements: a fingerprint of the crystal."""
    numbers = np.array(structure.atomic_numbers)
    pairs = numbers[:, None] * 100 + numbers
    order = np.lexsort((structure.distance_matrix.ravel().round(5), pairs.ravel()))
    return np.stack([pairs.ravel(), structure.distance_matrix.ravel()])[:, order]


def with_params(crystal: Crystal, params: np.ndarray) -> Crystal:
    """The crystal with other free parameters [S,3]."""
    sites = (
        Site(site.atomic_number, site.letter, tuple(row.astype(float)))
        for site, row in zip(crystal.sites, params, strict=False)
    )
    return Crystal(crystal.space_group, tuple(sites), crystal.lattice)


@pytest.mark.parametrize("number", GROUPS)
def test_new_description_is_of_the_same_crystal_and_of_the_same_precedent(number: int) -> None:
    random = np.random.default_rng(number)
    crystal = random_crystal(number, random)
    given = np.array([site.free_params for site in crystal.sites])
    near = with_params(crystal, given + random.normal(0, 0.02, given.shape))
    item = BatchItem(crystal, {}, Precedent(near, (0.0,) * len(given), (8,) * len(given), "near"))
    batch = collate([item], "asymmetric")
    descriptions, row = Descriptions(batch), np.array([0])
    mask = batch.free_mask[0, : len(given)]
    apart = nearest_zero(batch.precedent_params - batch.free_params)[0, : len(given)]
    apart = np.where(mask, apart, 0)
    seen = []
    for _ in range(12):
        draws = random.random((1, 4), dtype=np.float32)
        first = random.random((1, batch.free_params.shape[1]), dtype=np.float32)
        free, precedent = (found[0, : len(given)] for found in descriptions.anew(row, draws, first))
        for params, whole in ((free, crystal), (precedent, near)):
            expected = sorted_distances(whole.to_structure())
            found = sorted_distances(with_params(crystal, params).to_structure())
            np.testing.assert_allclose(found, expected, atol=2e-4)
        moved = nearest_zero(precedent - free)
        np.testing.assert_allclose(
            np.linalg.norm(np.where(mask, moved, 0), axis=1) > 1e-4,
            np.linalg.norm(apart, axis=1) > 1e-4,
        )
        assert np.abs(moved).max() < 4 * np.abs(apart).max() + 1e-4
        seen.append(free)
    if mask.any():
        assert max(np.abs(nearest_zero(other - seen[0])).max() for other in seen) > 0.01


@pytest.mark.parametrize("number", GROUPS)
def test_nearest_description_is_the_same_crystal_and_nearer(number: int) -> None:
    random = np.random.default_rng(number)
    crystal = random_crystal(number, random)
    batch = collate([BatchItem(crystal, {})], "asymmetric")
    noise = random.random((1, batch.free_params.shape[1], 3), dtype=np.float32)
    draws = random.random((1, 8, 4), dtype=np.float32)
    draws[0, 0] = 0.0  # the origin as given
    free = Descriptions(batch).nearest(np.array([0]), noise, draws)
    moved = Crystal(
        number,
        tuple(
            Site(site.atomic_number, site.letter, tuple(free[0, i].astype(float)))
            for i, site in enumerate(crystal.sites)
        ),
        crystal.lattice,
    )
    expected = sorted_distances(crystal.to_structure())
    np.testing.assert_allclose(sorted_distances(moved.to_structure()), expected, atol=2e-4)
    before = np.where(batch.free_mask, nearest_zero(batch.free_params - noise), 0)
    after = np.where(batch.free_mask, nearest_zero(free - noise), 0)
    assert (after**2).sum() <= (before**2).sum() + 1e-6


def test_nearest_description_finds_a_hidden_equivalent() -> None:
    """Noise that sits on an equivalent description is at distance zero from it."""
    position = space_group(62).wyckoff["d"]
    linear, offset = position.equivalents
    free = np.array([0.13, 0.07, 0.41])
    crystal = Crystal(62, (Site(14, "d", tuple(free)),), np.diag([5.0, 6.0, 7.0]))
    batch = collate([BatchItem(crystal, {})], "asymmetric")
    noise = batch.free_params.copy()
    noise[0, 0] = np.mod(linear[-1] @ free + offset[-1], 1.0)
    draws = np.zeros((1, 1, 4), dtype=np.float32)
    nearest = Descriptions(batch).nearest(np.array([0]), noise, draws)
    np.testing.assert_allclose(nearest_zero(nearest[0, 0] - noise[0, 0]), 0, atol=1e-6)
    assert np.abs(nearest_zero(noise[0, 0] - free)).max() > 0.1


@pytest.mark.parametrize(
    ("number", "discrete", "polar"),
    [(1, 1, 3), (2, 8, 0), (8, 2, 2), (33, 4, 1), (62, 8, 0), (216, 4, 0), (225, 2, 0)],
)
def test_normalizer_translations(number: int, discrete: int, polar: int) -> None:
    """Orders from International Tables A, section 3.5 (Euclidean normalizers, modulo the group)."""
    shifts, projector = normalizer_translations(number)
    assert len(shifts) == discrete
    assert np.linalg.matrix_rank(projector) == polar
    np.testing.assert_allclose(projector @ projector, projector, atol=1e-12)


def test_path_is_straight_and_takes_the_short_way() -> None:
    random = np.random.default_rng(0)
    free, noise = random.random((2, 4, 3, 3), dtype=np.float32)
    lattice, lattice_noise = random.normal(size=(2, 4, 6)).astype(np.float32)
    ends = [
        make_path(free, lattice, noise, lattice_noise, np.full(4, t, np.float32))
        for t in (0.0, 0.5, 1.0)
    ]
    np.testing.assert_allclose(nearest_zero(ends[0].free_params - noise), 0, atol=1e-6)
    np.testing.assert_allclose(nearest_zero(ends[2].free_params - free), 0, atol=1e-6)
    np.testing.assert_allclose(ends[2].lattice, lattice, atol=1e-6)
    half = nearest_zero(ends[1].free_params - ends[0].free_params)
    np.testing.assert_allclose(half, ends[1].coordinate_target / (2 * VELOCITY_SCALE), atol=1e-6)
    assert np.abs(ends[1].coordinate_target).max() <= 0.5 * VELOCITY_SCALE + 1e-6
