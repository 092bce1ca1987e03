"""Density and score of the wrapped normal on the unit torus [0, 1), in float64.

This is the transition kernel of the fractional coordinates, x_t ~ N_w(x_0, sigma^2) (paper eq. 4),
per coordinate and centred at zero: pass x = x_t - x_0. Both forms of the density are exact,

    p(x) = sum_n exp(-(x + n)^2 / (2 sigma^2)) / (sigma sqrt(2 pi))            images
         = 1 + 2 sum_{m>=1} q^(m^2) cos(2 pi m x),  q = exp(-2 pi^2 sigma^2)   Fourier series

(Poisson summation). The images converge fast for small sigma, the Fourier series for large sigma
and without the cancellation that ruins the image sum of a score of size q; they are equally fast
at sigma = 1/sqrt(2 pi), where this module changes over.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Formula = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]

_CROSSOVER = 1.0 / math.sqrt(2.0 * math.pi)
# At the crossover the first image left out is below e^-37, the first harmonic below e^-78, of the
# leading term; both are smaller elsewhere.
_IMAGES = np.arange(-3.0, 4.0)
_HARMONICS = np.arange(1.0, 5.0)
# Quadrature of sigma_norm. 1/p has poles a height pi sigma^2 above x = 1/2, where the integrand has
# fallen to e^(-1/(8 sigma^2)); so the error is about e^(-1/(8 sigma^2) - 2 pi^2 sigma^2 nodes), at
# worst e^(-pi sqrt(nodes)) = e^-43. Beyond _REACH / 2 sigmas the integrand is below e^-190.
_NODES = 192
_REACH = 40.0


def log_density(x: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
    """log p(x) of the wrapped normal.

    Args:
        x: Displacement in fractional units, any real number (the density has period 1).
        sigma: Standard deviation before wrapping, fractional units, > 0; broadcasts against x.

    Raises:
        ValueError: for a sigma that is not positive and finite.
    """
    return _by_regime(x, sigma, _log_density_images, _log_density_fourier)


def score(x: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
    """d/dx log p(x), in inverse fractional units; arguments and errors as in `log_density`.

    Odd in x with period 1. With x = x_t - x_0 it is the gradient with respect to x_t, the target
    of denoising score matching: eq. 5 with -(x_t - x_0) / sigma^2 replaced by its wrapped form.
    """
    return _by_regime(x, sigma, _score_images, _score_fourier)


def sigma_norm(sigma: ArrayLike) -> NDArray[np.float64]:
    """E[score(x, sigma)^2] under x ~ N_w(0, sigma^2): what the score target is normalised by.

    Trapezoidal rule on one period, which converges exponentially for a periodic analytic
    function; for small sigma on +-20 sigma, outside which nothing is left. Limits: 1/sigma^2 for
    small sigma, 8 pi^2 exp(-4 pi^2 sigma^2) for large sigma. DiffCSP and DiffCSP++ draw 10,000
    random numbers for the same quantity.

    Args:
        sigma: Any shape, fractional units, > 0.

    Returns:
        Same shape, inverse fractional units squared.
    """
    column = np.asarray(sigma, dtype=np.float64)[..., None]
    width = np.minimum(1.0, _REACH * column)
    x = (np.arange(_NODES) / _NODES - 0.5) * width
    integrand = np.exp(log_density(x, column)) * score(x, column) ** 2
    return np.asarray(integrand.mean(axis=-1) * width[..., 0])


def _by_regime(
    x: ArrayLike, sigma: ArrayLike, images: _Formula, fourier: _Formula
) -> NDArray[np.float64]:
    """Broadcast, wrap x to [-1/2, 1/2] and apply the formula that converges fast for each sigma."""
    x, sigma = np.broadcast_arrays(
        np.asarray(x, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    )
    if not (np.isfinite(sigma) & (sigma > 0.0)).all():
        raise ValueError("the wrapped normal needs sigma > 0 and finite")
    nearest = x - np.round(x)
    result = np.empty(x.shape)
    small = sigma < _CROSSOVER
    result[small] = images(nearest[small], sigma[small])
    result[~small] = fourier(nearest[~small], sigma[~small])
    return result


def _log_density_images(x: NDArray[np.float64], sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """log sum over images; |x| <= 1/2, x and sigma [n]."""
    exponent = -0.5 * ((x[:, None] + _IMAGES) / sigma[:, None]) ** 2
    top = exponent.max(axis=1)
    total = np.exp(exponent - top[:, None]).sum(axis=1)
    return top + np.log(total) - np.log(sigma * math.sqrt(2.0 * math.pi))


def _score_images(x: NDArray[np.float64], sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """-sum_n w_n (x + n) / sigma^2 with w the images' shares of the density; |x| <= 1/2."""
    distance = x[:, None] + _IMAGES
    exponent = -0.5 * (distance / sigma[:, None]) ** 2
    weight = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(weight * distance).sum(axis=1) / weight.sum(axis=1) / sigma**2


def _log_density_fourier(x: NDArray[np.float64], sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(1 + 2 sum_m q^(m^2) cos(2 pi m x)); x and sigma [n]."""
    phase = 2.0 * math.pi * _HARMONICS * x[:, None]
    return np.log1p(2.0 * (_amplitudes(sigma) * np.cos(phase)).sum(axis=1))


def _score_fourier(x: NDArray[np.float64], sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """p'(x) / p(x) from the Fourier series; x and sigma [n]."""
    phase = 2.0 * math.pi * _HARMONICS * x[:, None]
    amplitude = _amplitudes(sigma)
    slope = -4.0 * math.pi * (_HARMONICS * amplitude * np.sin(phase)).sum(axis=1)
    return slope / (1.0 + 2.0 * (amplitude * np.cos(phase)).sum(axis=1))


def _amplitudes(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """q^(m^2) for each harmonic m, [n, harmonics]."""
    return np.exp(-2.0 * (math.pi * sigma[:, None] * _HARMONICS) ** 2)
