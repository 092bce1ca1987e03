"""Samplers: from noise to free coordinates and lattice numbers, one function each."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.config import DiffusionConfig
from torch_impl.diffusion import VELOCITY_SCALE
from torch_impl.tensors import TensorBatch

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
        time = torch.full((free.shape[0],), t, device=free.device)
        free_velocity, lattice_velocity = model(batch, free, lattice, time)
        boost = 1 + config.velocity_boost * t
        free = (free + boost * free_velocity / (VELOCITY_SCALE * steps)) % 1.0
        lattice = lattice + lattice_velocity / steps
    return free, lattice
