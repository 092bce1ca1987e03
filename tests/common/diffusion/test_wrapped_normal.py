"""The wrapped normal against autograd, 40-digit arithmetic, quadrature and Monte Carlo."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from common.diffusion.wrapped_normal import log_density, score, sigma_norm

CROSSOVER = 1.0 / math.sqrt(2.0 * math.pi)
SIGMAS = [0.002, 0.005, 0.03, 0.1, 0.25, 0.39, 0.398, 0.3999, 0.41, 0.5, 0.7, 1.0, 2.0]
POINTS = np.array([0.0, 1e-9, 0.003, 0.1, 0.25, 0.4, 0.499, 0.5 - 1e-7, 0.51, 0.77, 0.999999])

positions = st.floats(-3.0, 3.0)
widths = st.floats(0.002, 2.0)


def mixture_log_density(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """log of the explicit mixture of 81 images, float64."""
    images = torch.arange(-40, 41, dtype=torch.float64)
    exponent = -0.5 * ((x[:, None] + images) / sigma) ** 2
    return torch.logsumexp(exponent, dim=1) - math.log(sigma * math.sqrt(2.0 * math.pi))


def exact(x: float, sigma: float) -> tuple[float, float]:
    """(log p, d/dx log p) by the image sum in 120-digit arithmetic."""
    with mpmath.workdps(120):
        x, variance = mpmath.mpf(x), mpmath.mpf(sigma) ** 2
        images = [x + n for n in range(-45, 46)]
        terms = [mpmath.exp(-(d**2) / (2 * variance)) for d in images]
        total = mpmath.fsum(terms)
        slope = -mpmath.fsum(t * d for t, d in zip(terms, images, strict=True)) / variance
        log_p = mpmath.log(total / mpmath.sqrt(2 * mpmath.pi * variance))
        return float(log_p), float(slope / total)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_score_is_the_autograd_gradient_of_the_mixture(sigma: float) -> None:
    x = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    log_p = mixture_log_density(x, sigma)
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    # Autograd itself loses about (reach of the images / sigma^2) x 1e-16 to cancellation.
    absolute = 1e-13 * max(1.0, 1.0 / sigma**2)
    np.testing.assert_allclose(score(POINTS, sigma), gradient.numpy(), rtol=1e-11, atol=absolute)
    np.testing.assert_allclose(
        log_density(POINTS, sigma), log_p.detach().numpy(), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("sigma", SIGMAS)
def test_exact_in_many_digits(sigma: float) -> None:
    """Relative accuracy even of the score at sigma = 2, which is of size e^-79."""
    for x in (0.003, 0.1, 0.25, 0.4, 0.499, 0.7):
        log_p, slope = exact(x, sigma)
        # log p is a sum of terms of size max(|log p|, log sigma); where it is tiny (Fourier) it
        # is computed from small terms only.
        np.testing.assert_allclose(log_density(x, sigma), log_p, rtol=1e-13, atol=2e-15)
        np.testing.assert_allclose(score(x, sigma), slope, rtol=2e-12)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_density_integrates_to_one(sigma: float) -> None:
    breaks = [n * sigma for n in (-12, -6, -3, -1, 1, 3, 6, 12) if abs(n * sigma) < 0.5]
    total, _ = integrate.quad(
        lambda x: float(np.exp(log_density(x, sigma))), -0.5, 0.5, points=breaks or None, limit=200
    )
    assert total == pytest.approx(1.0, abs=1e-11)


@given(positions, widths, st.integers(-5, 5))
@settings(deadline=None)
def test_period_one_and_parity(x: float, sigma: float, shift: int) -> None:
    # Adding an integer rounds x by up to 5e-16, which the local slope amplifies.
    slack = 2e-15 / sigma**2
    curvature = 2e-15 * (0.25 / sigma**4 + 1.0 / sigma**2)
    assert log_density(x + shift, sigma) == pytest.approx(log_density(x, sigma), abs=slack)
    assert score(x + shift, sigma) == pytest.approx(score(x, sigma), abs=curvature, rel=1e-12)
    assert log_density(-x, sigma) == pytest.approx(log_density(x, sigma), rel=1e-14, abs=1e-15)
    assert score(-x, sigma) == pytest.approx(-score(x, sigma), rel=1e-12, abs=1e-12 / sigma**2)


@given(st.floats(1e-4, 0.5 - 1e-4), widths)
@settings(deadline=None)
def test_density_falls_and_score_points_home(x: float, sigma: float) -> None:
    """Between 0 and 1/2 the score is negative, and weaker than the unwrapped -x / sigma^2."""
    value = float(score(x, sigma))
    assert -x / sigma**2 * (1.0 + 1e-12) <= value < 0.0


@given(positions, st.floats(0.05, 2.0))
@settings(deadline=None)
def test_score_is_the_slope_of_log_density(x: float, sigma: float) -> None:
    step = 1e-4 * sigma
    slope = (log_density(x + step, sigma) - log_density(x - step, sigma)) / (2.0 * step)
    assert score(x, sigma) == pytest.approx(float(slope), rel=1e-4, abs=1e-5 / sigma**2)


@given(st.floats(-0.5, 0.5))
@settings(deadline=None)
def test_both_forms_meet_at_the_crossover(x: float) -> None:
    below, above = np.nextafter(CROSSOVER, 0.0), np.nextafter(CROSSOVER, 1.0)
    assert log_density(x, below) == pytest.approx(log_density(x, above), abs=2e-15)
    assert score(x, below) == pytest.approx(score(x, above), rel=1e-13, abs=5e-15)


def test_broadcasting_mixes_both_regimes() -> None:
    sigmas = np.array(SIGMAS)
    table = score(POINTS[:, None], sigmas)
    assert table.shape == (POINTS.size, sigmas.size)
    assert table.dtype == np.float64
    for j, sigma in enumerate(SIGMAS):
        np.testing.assert_array_equal(table[:, j], score(POINTS, sigma))
    assert log_density(0.3, 0.1).shape == ()
    assert score(np.empty((0, 3)), 0.1).shape == (0, 3)


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
def test_sigma_must_be_positive_and_finite(bad: float) -> None:
    for function in (lambda: log_density(0.1, bad), lambda: score(0.1, [0.1, bad])):
        with pytest.raises(ValueError, match="sigma > 0"):
            function()
    with pytest.raises(ValueError, match="sigma > 0"):
        sigma_norm(bad)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.8])
def test_sigma_norm_is_the_monte_carlo_mean(sigma: float) -> None:
    """Samples are wrapped normals by construction: sigma z."""
    z = np.random.default_rng(20240).standard_normal(200_000)
    squares = score(sigma * z, sigma) ** 2
    error = squares.std() / math.sqrt(squares.size)
    assert abs(squares.mean() - sigma_norm(sigma)) < 4.0 * error


@pytest.mark.parametrize("sigma", [0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7])
def test_sigma_norm_is_the_adaptive_integral(sigma: float) -> None:
    def integrand(x: float) -> float:
        return float(np.exp(log_density(x, sigma)) * score(x, sigma) ** 2)

    expected = 2.0 * integrate.quad(integrand, 0.0, 0.5, limit=400, epsabs=0, epsrel=1e-12)[0]
    assert sigma_norm(sigma) == pytest.approx(expected, rel=1e-11)


def test_sigma_norm_limits() -> None:
    small = np.array([1e-6, 0.002, 0.01, 0.05])
    np.testing.assert_allclose(sigma_norm(small) * small**2, 1.0, rtol=1e-13)
    large = np.array([0.7, 1.0, 1.5, 2.0])
    leading = 8.0 * math.pi**2 * np.exp(-4.0 * (math.pi * large) ** 2)
    # The next term is smaller by q^2 = exp(-4 pi^2 sigma^2).
    np.testing.assert_allclose(
        sigma_norm(large), leading, rtol=3.0 * np.exp(-4 * (math.pi * 0.7) ** 2)
    )


@given(widths)
@settings(deadline=None)
def test_sigma_norm_never_exceeds_the_unwrapped_value(sigma: float) -> None:
    """Fisher information: wrapping and more noise can only lower it."""
    value = float(sigma_norm(sigma))
    assert 0.0 < value <= (1.0 + 1e-13) / sigma**2
    assert sigma_norm(1.01 * sigma) < value


def test_sigma_norm_is_deterministic_and_keeps_the_shape() -> None:
    sigmas = np.array([[0.01, 0.1], [0.5, 1.0]])
    first = sigma_norm(sigmas)
    assert first.shape == (2, 2)
    assert first.tobytes() == sigma_norm(sigmas).tobytes()
    assert sigma_norm(0.1).shape == ()
