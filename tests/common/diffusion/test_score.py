"""Score matching on the torus and DDPM of the lattice, against autograd and closed forms."""

import numpy as np
import pytest
import torch

from common.crystal.symmetry import nearest_zero
from common.diffusion.score import ScoreProcess

PROCESS = ScoreProcess.of(50, 0.005, 0.5)


def draws(size: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Crystals [B,4,3] and [B,6], and their noise."""
    random = np.random.default_rng(seed)
    free = random.random((size, 4, 3), dtype=np.float32)
    lattice = random.normal(size=(size, 6)).astype(np.float32)
    noise = random.normal(size=(size, 4, 3)).astype(np.float32)
    lattice_noise = random.normal(size=(size, 6)).astype(np.float32)
    return free, lattice, noise, lattice_noise


def mixture_score(x: np.ndarray, centre: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Gradient by autograd of the log density of a sum over periodic images."""
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    images = torch.arange(-12, 13, dtype=torch.float64)
    distance = point[..., None] - torch.tensor(centre, dtype=torch.float64)[..., None] - images
    exponent = -0.5 * (distance / torch.tensor(sigma, dtype=torch.float64)[..., None]) ** 2
    (gradient,) = torch.autograd.grad(exponent.logsumexp(-1).sum(), point)
    return gradient.numpy()


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_target_is_the_gradient_of_the_mixture(t: float) -> None:
    free, lattice, noise, lattice_noise = draws(20)
    noisy = PROCESS.make_noisy(free, lattice, noise, lattice_noise, np.full(20, t, np.float32))
    level = int(t * 50) + 1
    sigma = PROCESS.coordinates.sigmas[level]
    moved = free.astype(float) + sigma * noise
    expected = mixture_score(moved, free, np.full(moved.shape, sigma))
    scale = np.sqrt(PROCESS.coordinates.sigma_norm[level])
    np.testing.assert_allclose(noisy.coordinate_target, expected / scale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(nearest_zero(noisy.free_params - moved), 0, atol=1e-6)
    np.testing.assert_allclose(noisy.t, level / 50)


@pytest.mark.parametrize("level", [1, 15, 30, 40, 50])
def test_targets_have_unit_mean_square(level: int) -> None:
    free, lattice, noise, lattice_noise = draws(20_000)
    t = np.full(len(free), (level - 0.5) / 50, np.float32)
    noisy = PROCESS.make_noisy(free, lattice, noise, lattice_noise, t)
    assert np.isclose((noisy.coordinate_target**2).mean(), 1, atol=0.02)
    assert np.isclose((noisy.lattice_target**2).mean(), 1, atol=0.02)


def test_lattice_keeps_its_variance_and_its_share_of_signal() -> None:
    free, lattice, noise, lattice_noise = draws(20_000)
    for level in (1, 25, 50):
        t = np.full(len(free), (level - 0.5) / 50, np.float32)
        noisy = PROCESS.make_noisy(free, lattice, noise, lattice_noise, t)
        assert np.isclose(noisy.lattice.var(), 1, atol=0.02)
        # Nichol & Dhariwal 2021, eq. 17; clipping moves only the last levels.
        f = [np.cos(np.pi / 2 * (x + 0.008) / 1.008) ** 2 for x in (level / 50, 0)]
        share = np.corrcoef(noisy.lattice.ravel(), lattice.ravel())[0, 1]
        assert np.isclose(share, np.sqrt(f[0] / f[1]), atol=0.01)


def test_levels_are_even_and_never_out_of_range() -> None:
    t = (np.arange(5000, dtype=np.float32) + np.float32(0.5)) / 5000
    counts = np.bincount(PROCESS.level(t), minlength=51)
    assert counts[0] == 0
    assert set(counts[1:]) <= {99, 100, 101}
    edges = np.array([0.0, 1 - 2**-24], np.float32)
    assert PROCESS.level(edges).tolist() == [1, 50]
    assert ScoreProcess.of(1000, 0.005, 0.5).level(edges).tolist() == [1, 1000]


def test_every_row_has_its_own_level() -> None:
    free, lattice, noise, lattice_noise = draws(3)
    t = np.array([0.1, 0.5, 0.95], np.float32)
    together = PROCESS.make_noisy(free, lattice, noise, lattice_noise, t)
    for row in range(3):
        one = slice(row, row + 1)
        alone = PROCESS.make_noisy(free[one], lattice[one], noise[one], lattice_noise[one], t[one])
        np.testing.assert_array_equal(alone.free_params[0], together.free_params[row])
        np.testing.assert_array_equal(alone.lattice[0], together.lattice[row])
        np.testing.assert_array_equal(alone.coordinate_target[0], together.coordinate_target[row])


def test_types_are_those_of_a_network() -> None:
    noisy = PROCESS.make_noisy(*draws(4), np.full(4, 0.5, np.float32))
    assert {array.dtype for array in vars(noisy).values()} == {np.dtype(np.float32)}
    assert (noisy.free_params >= 0).all()
    assert (noisy.free_params < 1).all()
