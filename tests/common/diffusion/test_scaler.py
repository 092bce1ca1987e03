"""Standardised lattice numbers and properties: round trips, rare elements, absent columns."""

import warnings

import numpy as np
import pytest
from numpy.typing import NDArray

from common.crystal.lattice import crystal_system, k_constraints, k_to_lattice
from common.crystal.structure import Crystal, Site
from common.data.batch import Batch, BatchItem, collate
from common.diffusion.scaler import Standardizer, element_counts

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

#: One group per crystal system, and letters for three elements.
GROUPS = ((2, "iii"), (14, "eee"), (62, "ccc"), (139, "abe"), (166, "abc"), (225, "abc"))
SIZE = 1500
#: A^3 per atom, of the crystals made here.
VOLUMES = {3: 12.0, 8: 15.0, 11: 25.0, 22: 14.0, 56: 40.0}


def crystals(size: int, seed: int = 0, spread: float = 0.05) -> list[Crystal]:
    """Crystals whose volume is a sum over elements, up to a relative spread."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(size):
        group, letters = GROUPS[index % len(GROUPS)]
        elements = random.choice(list(VOLUMES), size=3, replace=False).tolist()
        sites = tuple(Site(z, letter) for z, letter in zip(elements, letters, strict=True))
        plain = Crystal(group, sites, np.eye(3))
        volume = sum(VOLUMES[z] * count for z, count in plain.formula_counts.items())
        mask, bias = k_constraints(group)
        k = np.where(mask, random.normal(0.1, 0.2, 6), bias)
        k[5] = (np.log(volume) + spread * random.normal()) / np.sqrt(3)
        made.append(Crystal(group, sites, k_to_lattice(k)))
    return made


def batch_of(
    found: list[Crystal], properties: list[dict[str, float | None]] | None = None
) -> Batch:
    given = properties or [{}] * len(found)
    return collate(
        [BatchItem(crystal, p) for crystal, p in zip(found, given, strict=True)], "asymmetric"
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    random = np.random.default_rng(1)
    properties: list[dict[str, float | None]] = [
        {"band_gap": gap, "formation_energy": energy if energy < -0.5 else None}
        for gap, energy in zip(
            random.exponential(1.5, SIZE).tolist(), random.normal(-2, 1, SIZE).tolist(), strict=True
        )
    ]
    return batch_of(crystals(SIZE), properties)


@pytest.fixture(scope="module")
def standardizer(batch: Batch) -> Standardizer:
    return Standardizer.fit(batch)


def back(standardizer: Standardizer, batch: Batch, z: NDArray[np.float32]) -> np.ndarray:
    return standardizer.lattice_center(batch) + standardizer.lattice_scales(batch) * z


def test_round_trip(batch: Batch, standardizer: Standardizer) -> None:
    again = back(standardizer, batch, standardizer.lattice(batch))
    np.testing.assert_allclose(again, batch.lattice_k, atol=2e-6)


def test_round_trip_of_unseen_crystals(standardizer: Standardizer) -> None:
    others = batch_of(crystals(30, seed=5, spread=0.5))
    again = back(standardizer, others, standardizer.lattice(others))
    np.testing.assert_allclose(again, others.lattice_k, atol=2e-6)


def test_fixed_numbers_are_exactly_the_bias(batch: Batch, standardizer: Standardizer) -> None:
    z = np.random.default_rng(0).normal(size=(batch.size, 6)).astype(np.float32)
    k = back(standardizer, batch, z)
    for row, number in enumerate(batch.space_group):
        mask, bias = k_constraints(int(number))
        np.testing.assert_array_equal(k[row, ~mask], bias[~mask].astype(np.float32))
        assert (k[row, mask] != bias[mask]).all()
    assert not standardizer.lattice(batch)[~batch.k_mask].any()


def test_standardised_numbers_have_mean_zero_and_unit_variance(
    batch: Batch, standardizer: Standardizer
) -> None:
    z = standardizer.lattice(batch)
    systems = np.array([crystal_system(int(n)) for n in batch.space_group])
    for system in range(6):
        rows = z[systems == system]
        free = batch.k_mask[systems == system][0]
        np.testing.assert_allclose(rows[:, free].mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(rows[:, free].std(axis=0), 1, atol=1e-4)


def test_volumes_of_elements_are_found(standardizer: Standardizer) -> None:
    for number, volume in VOLUMES.items():
        assert np.isclose(standardizer.element_volume[number], volume, rtol=0.07)


def test_composition_explains_the_volume(batch: Batch, standardizer: Standardizer) -> None:
    """k5 scatters by ln V / sqrt(3), of which the composition leaves the made spread of 5 %."""
    left = standardizer.lattice_std[:, 5]
    np.testing.assert_allclose(left, 0.05 / np.sqrt(3), rtol=0.35)
    assert batch.lattice_k[:, 5].std() > 5 * left.max()


def test_elements_never_or_rarely_seen(standardizer: Standardizer) -> None:
    unseen = standardizer.element_volume[92]
    assert np.isclose(unseen, 18.0)
    odd = crystals(40)
    rare = Crystal(225, (Site(92, "a"),), k_to_lattice(np.array([0, 0, 0, 0, 0, 6.0])))
    fitted = Standardizer.fit(batch_of([*odd, rare]))
    assert np.isfinite(fitted.element_volume).all()
    assert fitted.element_volume[92] <= 120
    assert fitted.element_volume.min() >= 2
    alone = batch_of([Crystal(225, (Site(94, "a"), Site(95, "b")), 6 * np.eye(3))])
    assert np.isfinite(back(standardizer, alone, standardizer.lattice(alone))).all()


def test_single_crystal_and_absent_systems() -> None:
    """One row has no spread, five systems have no row: scales stay above zero."""
    single = batch_of(crystals(1))
    fitted = Standardizer.fit(single)
    assert (fitted.lattice_std > 0).all()
    assert np.abs(fitted.lattice(single)).max() < 1e-3
    others = batch_of(crystals(6, seed=2))
    z = fitted.lattice(others)
    assert np.isfinite(z).all()
    np.testing.assert_allclose(back(fitted, others, z), others.lattice_k, atol=1e-5)


def test_properties(batch: Batch, standardizer: Standardizer) -> None:
    values, mask = standardizer.properties(batch, ("formation_energy",))
    assert values.shape == mask.shape == (SIZE, 1)
    np.testing.assert_array_equal(mask[:, 0], batch.property_mask[:, 1])
    assert 0 < mask.sum() < SIZE
    assert not values[~mask].any()
    assert np.isclose(values[mask].mean(), 0, atol=1e-4)
    assert np.isclose(values[mask].std(), 1, atol=1e-4)
    both, _ = standardizer.properties(batch, ("formation_energy", "band_gap"))
    np.testing.assert_array_equal(both[:, :1], values)
    given = batch.properties[:, 0]
    np.testing.assert_allclose(both[:, 1], (given - given.mean()) / given.std(), atol=1e-4)
    assert standardizer.properties(batch, ())[0].shape == (SIZE, 0)


@pytest.mark.parametrize(
    "given", [{}, {"band_gap": None, "formation_energy": None}, {"band_gap": 1.0}]
)
def test_absent_properties_are_no_nan(given: dict[str, float | None]) -> None:
    found = batch_of(crystals(12), [given] * 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = Standardizer.fit(found)
    for array in fitted.to_arrays().values():
        assert np.isfinite(array).all()
    assert (fitted.property_std > 0).all()
    values, mask = fitted.properties(found, ("band_gap", "formation_energy"))
    assert not values[~mask].any()
    assert np.isfinite(values).all()
    # Wanted at generation although no training row had it: finite still.
    asked = batch_of(crystals(2), [{"formation_energy": -1.0}] * 2)
    assert np.isfinite(fitted.properties(asked, ("formation_energy",))[0]).all()


def test_arrays_rebuild_it(batch: Batch, standardizer: Standardizer) -> None:
    again = Standardizer(**standardizer.to_arrays())
    np.testing.assert_array_equal(again.lattice(batch), standardizer.lattice(batch))


def test_counts_of_elements() -> None:
    spinel = Crystal(227, (Site(12, "a"), Site(13, "d"), Site(8, "e")), 8 * np.eye(3))
    rock_salt = Crystal(225, (Site(11, "a"), Site(17, "b")), 5 * np.eye(3))
    counts = element_counts(batch_of([spinel, rock_salt]))
    assert {int(z): counts[0, z] for z in np.flatnonzero(counts[0])} == {12: 8, 13: 16, 8: 32}
    assert {int(z): counts[1, z] for z in np.flatnonzero(counts[1])} == {11: 4, 17: 4}
