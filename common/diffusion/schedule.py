"""Noise schedules: cosine betas for the lattice (DDPM), log-spaced sigmas for the coordinates.

All arrays are float64 of length T + 1 and read-only. Index t = 0 means no noise, t = 1..T are the
noise levels, so that a timestep indexes them directly. The values are those of the DiffCSP++
protocol (Jiao et al., ICLR 2024), which the paper follows.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.diffusion.wrapped_normal import sigma_norm
from common.errors import UserError

CorrectorRule = Literal["diffcsp", "diffcsp_pp"]


def cosine_betas(
    num_steps: int, s: float = 0.008, clip: tuple[float, float] = (1e-4, 0.9999)
) -> NDArray[np.float64]:
    """beta_t of the cosine schedule, [T+1], beta_0 = 0 (Nichol & Dhariwal 2021, eq. 17).

        beta_t = clip(1 - f(t) / f(t-1)),  f(t) = cos^2(pi/2 (t/T + s) / (1 + s))

    Args:
        num_steps: T, at least 1.
        s: Offset that keeps the first betas from vanishing, >= 0.
        clip: Least and greatest beta of the levels 1..T, both inside (0, 1).

    Raises:
        UserError: for values outside these ranges.
    """
    _check_num_steps(num_steps)
    low, high = clip
    if not (math.isfinite(s) and s >= 0.0):
        raise UserError(f"cosine schedule: s = {s} is not a number >= 0; the usual value is 0.008")
    if not 0.0 < low <= high < 1.0:
        raise UserError(f"cosine schedule: clip = {clip} must be 0 < low <= high < 1")
    time = np.arange(num_steps + 1) / num_steps
    f = np.cos(0.5 * math.pi * (time + s) / (1.0 + s)) ** 2
    return np.concatenate([[0.0], np.clip(1.0 - f[1:] / f[:-1], low, high)])


def log_sigmas(
    num_steps: int, sigma_min: float = 0.005, sigma_max: float = 0.5
) -> NDArray[np.float64]:
    """Noise levels sigma_t in fractional units, [T+1]: sigma_0 = 0, then a geometric sequence.

        sigma_t = sigma_min (sigma_max / sigma_min)^((t-1) / (T-1)),  t = 1..T

    The levels sigma_i of the paper's eqs. 4 and 5 (Song & Ermon 2020), in rising order.

    Raises:
        UserError: unless T >= 2 and 0 < sigma_min < sigma_max.
    """
    _check_num_steps(num_steps, least=2)
    if not (0.0 < sigma_min < sigma_max < math.inf):
        raise UserError(
            f"coordinate noise: sigma_min = {sigma_min}, sigma_max = {sigma_max} "
            "must be 0 < sigma_min < sigma_max"
        )
    return np.concatenate([[0.0], np.geomspace(sigma_min, sigma_max, num_steps)])


@dataclass(frozen=True)
class CosineSchedule:
    """DDPM with cosine betas, for the six lattice numbers k (paper eqs. 1-3; Ho et al. 2020).

    Forward step (eq. 1):  k_t = sqrt(alpha_t) k_{t-1} + sqrt(beta_t) eps
    From clean data (inside eq. 3):  k_t = signal_scale_t k_0 + noise_scale_t eps
    Reverse step (eq. 2, mean in terms of the predicted noise; posterior_std for its spread):
        k_{t-1} = (k_t - beta_t / noise_scale_t eps_theta) / sqrt(alpha_t) + posterior_std_t z
    """

    num_steps: int = 1000
    s: float = 0.008
    clip: tuple[float, float] = (1e-4, 0.9999)

    def __post_init__(self) -> None:
        self.betas  # noqa: B018 - a bad setting must fail here, not at first use

    @cached_property
    def betas(self) -> NDArray[np.float64]:
        """beta_t, variance of one forward step."""
        return _read_only(cosine_betas(self.num_steps, self.s, self.clip))

    @cached_property
    def alphas(self) -> NDArray[np.float64]:
        """alpha_t = 1 - beta_t."""
        return _read_only(1.0 - self.betas)

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """alpha-bar_t = alpha_1 ... alpha_t, share of the variance that is still signal."""
        return _read_only(np.cumprod(self.alphas))

    @cached_property
    def signal_scale(self) -> NDArray[np.float64]:
        """sqrt(alpha-bar_t)."""
        return _read_only(np.sqrt(self.alphas_cumprod))

    @cached_property
    def noise_scale(self) -> NDArray[np.float64]:
        """sqrt(1 - alpha-bar_t), in units of standardised k; not the sigma of the coordinates."""
        return _read_only(np.sqrt(1.0 - self.alphas_cumprod))

    @cached_property
    def posterior_std(self) -> NDArray[np.float64]:
        """Standard deviation of q(k_{t-1} | k_t, k_0) (Ho et al. 2020, eq. 7), 0 at t = 0 and 1."""
        bar = self.alphas_cumprod
        variance = self.betas[1:] * (1.0 - bar[:-1]) / (1.0 - bar[1:])
        return _read_only(np.concatenate([[0.0], np.sqrt(variance)]))


@dataclass(frozen=True)
class SigmaSchedule:
    """Variance-exploding noise on the torus, for fractional coordinates (paper eqs. 4 and 5).

    x_t = (x_0 + sigma_t eps) mod 1. The network learns score / sqrt(sigma_norm_t), whose mean
    square is one at every level.
    """

    num_steps: int = 1000
    sigma_min: float = 0.005
    sigma_max: float = 0.5

    def __post_init__(self) -> None:
        self.sigmas  # noqa: B018 - a bad setting must fail here, not at first use

    @cached_property
    def sigmas(self) -> NDArray[np.float64]:
        """sigma_t in fractional units, 0 at t = 0."""
        return _read_only(log_sigmas(self.num_steps, self.sigma_min, self.sigma_max))

    @cached_property
    def sigma_norm(self) -> NDArray[np.float64]:
        """E[score^2] at each level; 1 at t = 0, where there is no score (DiffCSP's convention)."""
        return _read_only(np.concatenate([[1.0], sigma_norm(self.sigmas[1:])]))

    @cached_property
    def predictor_step(self) -> NDArray[np.float64]:
        """sigma_t^2 - sigma_{t-1}^2, factor of the score in the ancestral step t -> t-1; 0 at 0."""
        return _read_only(np.diff(self.sigmas**2, prepend=0.0))

    @cached_property
    def predictor_std(self) -> NDArray[np.float64]:
        """Noise of the ancestral step t -> t-1 (Song et al. 2021, eq. 47), 0 at t = 0 and 1:

        sqrt(sigma_{t-1}^2 (sigma_t^2 - sigma_{t-1}^2) / sigma_t^2)
        """
        ratio = self.sigmas[:-1] / self.sigmas[1:]
        return _read_only(np.concatenate([[0.0], ratio * np.sqrt(self.predictor_step[1:])]))

    def corrector_step(self, step_lr: float, rule: CorrectorRule) -> NDArray[np.float64]:
        """Langevin step size c_t of x <- x + c_t score + sqrt(2 c_t) z, [T+1], 0 at t = 0.

        "diffcsp":     step_lr (sigma_t / sigma_1)^2
        "diffcsp_pp":  step_lr / (sigma_norm_t sigma_1^2)

        The two agree at t = 1 up to rounding and differ a thousandfold at sigma = 0.5, so a
        step_lr tuned for one (1e-5 on MP-20 for DiffCSP++) is useless for the other.
        """
        if not (0.0 <= step_lr < math.inf):
            raise UserError(f"corrector: step_lr = {step_lr} is not a number >= 0")
        if rule == "diffcsp":
            relative = (self.sigmas[1:] / self.sigma_min) ** 2
        elif rule == "diffcsp_pp":
            relative = 1.0 / (self.sigma_norm[1:] * self.sigma_min**2)
        else:
            raise UserError(f"corrector: rule {rule!r} is neither 'diffcsp' nor 'diffcsp_pp'")
        return _read_only(np.concatenate([[0.0], step_lr * relative]))


def _check_num_steps(num_steps: int, least: int = 1) -> None:
    if not isinstance(num_steps, int) or num_steps < least:
        raise UserError(f"noise schedule: {num_steps} steps; give a whole number >= {least}")


def _read_only(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values.setflags(write=False)
    return values
