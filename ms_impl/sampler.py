"""Samplers: from noise to free coordinates and lattice numbers, one function each."""

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from common.config import DiffusionConfig
from common.diffusion.flow import VELOCITY_SCALE
from common.diffusion.score import ScoreProcess
from ms_impl.tensors import TensorBatch

#: Standardised lattice numbers have unit variance at every level. DDPM's first steps multiply by up
#: to 100, so that a poor network would otherwise leave the range of floating-point numbers.
LATTICE_LIMIT = 20.0

#: (batch, free_params, lattice, t) -> velocities, as ``CrystalDiT``.
Network = Callable[[TensorBatch, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def sample_flow(
    model: Network,
    batch: TensorBatch,
    free_noise: Tensor,
    lattice_noise: Tensor,
    steps: int,
    config: DiffusionConfig,
) -> tuple[Tensor, Tensor]:
    """Follows the velocities from noise at t = 0 to a crystal at t = 1, by Euler's rule.

    The same noise gives the same crystal: nothing else is random.

    Args:
        model: the network.
        batch: B crystals, of which only the symmetry and properties are read.
        free_noise: [B,S,3], uniform in [0,1).
        lattice_noise: [B,6], standard normal.
        steps: network calls.
        config: ``velocity_boost`` speeds the coordinates up as they settle (FlowMM's inference
            anti-annealing, arXiv:2406.04713, section 4).

    Returns:
        Free parameters [B,S,3] in [0,1) and standardised lattice numbers [B,6].
    """
    free, lattice = free_noise, lattice_noise
    for step in range(steps):
        t = step / steps
        free_velocity, lattice_velocity = model(batch, free, lattice, _times(free, t))
        boost = 1 + config.velocity_boost * t
        free = (free + boost * free_velocity / (VELOCITY_SCALE * steps)) % 1.0
        lattice = lattice + lattice_velocity / steps
    return free, lattice


def sample_predictor_corrector(
    model: Network,
    batch: TensorBatch,
    free_noise: Tensor,
    lattice_noise: Tensor,
    process: ScoreProcess,
    config: DiffusionConfig,
    draw: Callable[[str, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """DiffCSP++'s sampler: per level a Langevin step on the coordinates, then an ancestral step.

    Two network calls per level but one at the last, 2 T - 1 in all (arXiv:2402.03992, algorithm 2).

    Args:
        model, batch, free_noise, lattice_noise: as in ``sample_flow``.
        process: the noise levels.
        config: ``step_lr`` of the Langevin step.
        draw: standard normal noise by field and level: ``corrector`` and ``predictor`` [B,S,3],
            ``lattice`` [B,6].

    Returns:
        As ``sample_flow``.
    """
    free, lattice = free_noise, lattice_noise
    sigmas, ddpm = process.coordinates, process.lattice
    corrector = sigmas.corrector_step(config.step_lr, "diffcsp_pp")
    for level in range(process.timesteps, 0, -1):
        time = _times(free, level / process.timesteps)
        norm = float(sigmas.sigma_norm[level]) ** 0.5
        if level > 1:
            step = float(corrector[level])
            score, _ = model(batch, free, lattice, time)
            free = (free + step * norm * score + (2 * step) ** 0.5 * draw("corrector", level)) % 1.0
        score, noise = model(batch, free, lattice, time)
        free = free + float(sigmas.predictor_step[level]) * norm * score
        beta, alpha = float(ddpm.betas[level]), float(ddpm.alphas[level])
        lattice = (lattice - beta / float(ddpm.noise_scale[level]) * noise) / alpha**0.5
        if level > 1:
            free = free + float(sigmas.predictor_std[level]) * draw("predictor", level)
            lattice = lattice + float(ddpm.posterior_std[level]) * draw("lattice", level)
        free, lattice = free % 1.0, ops.clamp(lattice, -LATTICE_LIMIT, LATTICE_LIMIT)
    return free, lattice


def _times(free: Tensor, t: float) -> Tensor:
    return Tensor(np.full(free.shape[0], t), ms.float32)
