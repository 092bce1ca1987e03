"""Schedules against their closed forms."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.diffusion.schedule import CosineSchedule, SigmaSchedule, cosine_betas, log_sigmas
from common.diffusion.wrapped_normal import score
from common.errors import UserError

steps = st.integers(2, 1500)


def test_unclipped_betas_telescope_to_the_cosine() -> None:
    schedule = CosineSchedule()
    t = np.arange(1, 1001)
    unclipped = (schedule.betas[1:] > 1e-4) & (schedule.betas[1:] < 0.9999)
    assert unclipped.sum() > 950
    f = [math.cos(0.5 * math.pi * (i / 1000 + 0.008) / 1.008) ** 2 for i in range(1001)]
    for i in t[unclipped]:
        assert schedule.alphas[i] == pytest.approx(f[i] / f[i - 1], rel=1e-12)
    first = int(t[unclipped][0])
    for i in t[unclipped]:
        ratio = schedule.alphas_cumprod[i] / schedule.alphas_cumprod[first - 1]
        assert ratio == pytest.approx(f[i] / f[first - 1], rel=1e-10)


def test_default_values_of_the_protocol() -> None:
    betas = cosine_betas(1000)
    assert betas.shape == (1001,)
    assert betas[0] == 0.0
    assert betas[1] == 1e-4  # 4.1e-5 before the clip
    assert betas[1000] == 0.9999  # 1 before the clip
    # One minus the squared ratio of cosines at t = 500, evaluated with 30 digits.
    assert betas[500] == pytest.approx(0.003145886230478196, rel=1e-12)
    sigmas = log_sigmas(1000)
    assert sigmas[[0, 1, 1000]].tolist() == [0.0, 0.005, 0.5]
    assert log_sigmas(3)[2] == pytest.approx(0.05, rel=1e-15)


@given(steps, st.floats(0.0, 0.1))
@settings(deadline=None)
def test_cosine_schedule_properties(num_steps: int, s: float) -> None:
    schedule = CosineSchedule(num_steps, s)
    bar = schedule.alphas_cumprod
    assert schedule.betas.shape == bar.shape == (num_steps + 1,)
    assert bar[0] == 1.0
    assert (np.diff(bar) < 0.0).all()
    assert (bar > 0.0).all()
    assert ((schedule.betas[1:] >= 1e-4) & (schedule.betas[1:] <= 0.9999)).all()
    np.testing.assert_allclose(schedule.signal_scale**2 + schedule.noise_scale**2, 1.0, rtol=1e-14)


@given(steps, st.data())
@settings(deadline=None)
def test_many_small_steps_make_the_closed_form(num_steps: int, data: st.DataObject) -> None:
    """Eq. 1 step by step: the signal shrinks and the variance accumulates to 1 - alpha-bar."""
    schedule = CosineSchedule(num_steps)
    t = data.draw(st.integers(1, num_steps))
    signal, variance = 1.0, 0.0
    for beta in schedule.betas[1 : t + 1]:
        signal *= math.sqrt(1.0 - beta)
        variance = (1.0 - beta) * variance + beta
    assert schedule.signal_scale[t] == pytest.approx(signal, rel=1e-10)
    assert schedule.noise_scale[t] ** 2 == pytest.approx(variance, rel=1e-10)


@given(steps)
@settings(deadline=None)
def test_posterior_is_bayes_rule(num_steps: int) -> None:
    """Product of two Gaussians in k_{t-1}: precisions add, and the means weigh by precision."""
    schedule = CosineSchedule(num_steps)
    a, b = schedule.alphas[2:], schedule.betas[2:]
    prior = 1.0 - schedule.alphas_cumprod[1:-1]
    variance = 1.0 / (a / b + 1.0 / prior)
    np.testing.assert_allclose(schedule.posterior_std[2:] ** 2, variance, rtol=1e-9)
    assert schedule.posterior_std[:2].tolist() == [0.0, 0.0]
    # The documented reverse mean equals Bayes' mean when eps_theta is the true noise.
    k0, eps = 0.7, -1.3
    kt = schedule.signal_scale[2:] * k0 + schedule.noise_scale[2:] * eps
    bayes = variance * (np.sqrt(a) / b * kt + schedule.signal_scale[1:-1] / prior * k0)
    documented = (kt - b / schedule.noise_scale[2:] * eps) / np.sqrt(a)
    np.testing.assert_allclose(documented, bayes, rtol=1e-6, atol=1e-6)


@given(steps, st.floats(1e-4, 0.4), st.floats(1.01, 100.0))
@settings(deadline=None)
def test_sigmas_are_a_geometric_sequence(num_steps: int, low: float, factor: float) -> None:
    sigmas = log_sigmas(num_steps, low, low * factor)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 0.0
    assert sigmas[1] == pytest.approx(low, rel=1e-14)
    assert sigmas[-1] == pytest.approx(low * factor, rel=1e-14)
    ratio = factor ** (1.0 / (num_steps - 1))
    np.testing.assert_allclose(sigmas[2:] / sigmas[1:-1], ratio, rtol=1e-11)


def test_normalised_score_has_unit_mean_square_at_every_level() -> None:
    schedule = SigmaSchedule(20)
    z = np.random.default_rng(5).standard_normal(100_000)
    assert schedule.sigma_norm[0] == 1.0
    for sigma, norm in zip(schedule.sigmas[1:], schedule.sigma_norm[1:], strict=True):
        squares = score(sigma * z, sigma) ** 2 / norm
        assert abs(squares.mean() - 1.0) < 4.5 * squares.std() / math.sqrt(z.size)


@given(steps)
@settings(deadline=None)
def test_ancestral_step_is_bayes_rule_of_the_unwrapped_walk(num_steps: int) -> None:
    schedule = SigmaSchedule(num_steps)
    s = schedule.sigmas
    np.testing.assert_allclose(np.cumsum(schedule.predictor_step), s**2, rtol=1e-10)
    variance = 1.0 / (1.0 / s[1:-1] ** 2 + 1.0 / schedule.predictor_step[2:])
    np.testing.assert_allclose(schedule.predictor_std[2:] ** 2, variance, rtol=1e-10)
    assert schedule.predictor_std[:2].tolist() == [0.0, 0.0]
    # x_t + step * score is the posterior mean of x_{t-1} for the exact score -(x_t - x_0)/sigma^2.
    x0, xt = 0.1, 0.4
    mean = variance * (x0 / s[1:-1] ** 2 + xt / schedule.predictor_step[2:])
    step = xt - schedule.predictor_step[2:] * (xt - x0) / s[2:] ** 2
    np.testing.assert_allclose(step, mean, rtol=1e-9)


def test_corrector_rules_agree_at_first_and_part_at_last() -> None:
    schedule = SigmaSchedule()
    plain = schedule.corrector_step(1e-5, "diffcsp")
    plus = schedule.corrector_step(1e-5, "diffcsp_pp")
    assert plain[0] == plus[0] == 0.0
    assert plain[1] == pytest.approx(1e-5, rel=1e-12)
    assert plus[1] == pytest.approx(1e-5, rel=1e-12)
    assert plain[-1] == pytest.approx(0.1, rel=1e-12)
    # Leading Fourier term of sigma_norm at 0.5, good to q^2 = 5e-5.
    norm = 8.0 * math.pi**2 * math.exp(-(math.pi**2))
    assert plus[-1] == pytest.approx(1e-5 / (norm * 2.5e-5), rel=1e-4)
    assert 900.0 < plus[-1] / plain[-1] < 1100.0


def test_schedules_are_values() -> None:
    schedule = SigmaSchedule(50)
    assert schedule == SigmaSchedule(50)
    assert hash(CosineSchedule(50)) == hash(CosineSchedule(50))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.num_steps = 3  # type: ignore[misc]
    for array in (schedule.sigmas, schedule.sigma_norm, CosineSchedule(50).alphas_cumprod):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: CosineSchedule(0),
        lambda: CosineSchedule(2.5),  # type: ignore[arg-type]
        lambda: CosineSchedule(10, s=-0.1),
        lambda: CosineSchedule(10, s=math.nan),
        lambda: CosineSchedule(10, clip=(0.0, 0.9)),
        lambda: CosineSchedule(10, clip=(0.1, 1.0)),
        lambda: CosineSchedule(10, clip=(0.5, 0.1)),
        lambda: SigmaSchedule(1),
        lambda: SigmaSchedule(10, sigma_min=0.0),
        lambda: SigmaSchedule(10, sigma_min=0.5, sigma_max=0.5),
        lambda: SigmaSchedule(10, sigma_max=math.inf),
        lambda: SigmaSchedule(10, sigma_min=math.nan),
        lambda: SigmaSchedule(10).corrector_step(-1.0, "diffcsp"),
        lambda: SigmaSchedule(10).corrector_step(math.nan, "diffcsp"),
        lambda: SigmaSchedule(10).corrector_step(1e-5, "other"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_one_clear_line(make) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value)
