"""Training losses of the Crystal DiT."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from common.config import DiffusionConfig
from common.diffusion.noisy import NoisyCrystals
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.tensors import TensorBatch


@dataclass(frozen=True)
class NoisyTensors:
    """``common.diffusion.noisy.NoisyCrystals`` as tensors."""

    t: Tensor
    free_params: Tensor
    lattice: Tensor
    coordinate_target: Tensor
    lattice_target: Tensor

    @classmethod
    def from_arrays(
        cls, noisy: NoisyCrystals, device: torch.device | str = "cpu"
    ) -> "NoisyTensors":
        """Copies noisy crystals to a device."""
        arrays = {f.name: np.ascontiguousarray(getattr(noisy, f.name)) for f in fields(cls)}
        return cls(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


@dataclass(frozen=True)
class Loss:
    """Scalars to minimise and to watch.

    ``per_crystal`` [B] is the mean squared error of a crystal's coordinates, ``has_free`` [B]
    whether it has any, ``t`` [B] its time; together they give the loss per noise level.
    """

    total: Tensor
    coordinate: Tensor
    lattice: Tensor
    per_crystal: Tensor
    has_free: Tensor
    t: Tensor


def denoising_loss(
    model: CrystalDiT, batch: TensorBatch, noisy: NoisyTensors, config: DiffusionConfig
) -> Loss:
    """Squared error of the targets, mean over all free numbers of the batch.

    Args:
        model: the network.
        batch: B crystals.
        noisy: the crystals with noise.
        config: weights.
    """
    coordinates, lattice = model(batch, noisy.free_params, noisy.lattice, noisy.t)
    free = batch.free_mask.float()
    coordinate_error = (coordinates.float() - noisy.coordinate_target) ** 2 * free
    lattice_error = (lattice.float() - noisy.lattice_target) ** 2 * batch.k_mask
    coordinate = coordinate_error.sum() / free.sum().clamp(min=1)
    lattice_loss = lattice_error.sum() / batch.k_mask.float().sum()
    return Loss(
        total=config.coordinate_weight * coordinate + config.lattice_weight * lattice_loss,
        coordinate=coordinate,
        lattice=lattice_loss,
        per_crystal=coordinate_error.sum((1, 2)) / free.sum((1, 2)).clamp(min=1),
        has_free=batch.free_mask.any(2).any(1),
        t=noisy.t,
    )
