"""Training losses of the Crystal DiT."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.config import DiffusionConfig
from common.diffusion.noisy import LossWeights, NoisyCrystals
from torch_impl.tensors import TensorBatch


@dataclass(frozen=True)
class NoisyTensors:
    """``NoisyCrystals`` and ``LossWeights`` of ``common.diffusion.noisy`` as tensors."""

    t: Tensor
    free_params: Tensor
    lattice: Tensor
    coordinate_target: Tensor
    lattice_target: Tensor
    coordinate_weight: Tensor
    lattice_weight: Tensor
    coordinate_bend: Tensor
    lattice_bend: Tensor

    @classmethod
    def from_arrays(
        cls, noisy: NoisyCrystals, weights: LossWeights, device: torch.device | str = "cpu"
    ) -> "NoisyTensors":
        """Copies noisy crystals to a device."""
        arrays = {
            **vars(noisy),
            "coordinate_weight": weights.coordinate,
            "lattice_weight": weights.lattice,
            "coordinate_bend": weights.coordinate_bend,
            "lattice_bend": weights.lattice_bend,
        }
        return cls(
            **{n: torch.from_numpy(np.ascontiguousarray(a)).to(device) for n, a in arrays.items()}
        )


@dataclass(frozen=True)
class Loss:
    """Scalars to minimise and to watch.

    ``per_crystal`` [B] is the mean squared error of a crystal's free coordinates.
    """

    total: Tensor
    coordinate: Tensor
    lattice: Tensor
    per_crystal: Tensor

    @property
    def values(self) -> Tensor:
        """Total, coordinate and lattice without their gradients: [3]."""
        return torch.stack([self.total, self.coordinate, self.lattice]).detach()


def bent(error: Tensor, bend: Tensor) -> Tensor:
    """Squares of errors, but linear far beyond a bend; see ``LossWeights``."""
    return 2 * error**2 / (1 + (1 + (error / bend) ** 2).sqrt())


def denoising_loss(
    model: nn.Module, batch: TensorBatch, noisy: NoisyTensors, config: DiffusionConfig
) -> Loss:
    """Weighted error of the targets, squared or bent.

    Args:
        model: a CrystalDiT, or what stands for it when several processes train it.
        batch: B crystals.
        noisy: the crystals with noise.
        config: weights of coordinates and lattice.
    """
    coordinates, lattice = model(batch, noisy.free_params, noisy.lattice, noisy.t)
    free = batch.free_mask.float()
    error = coordinates.float() - noisy.coordinate_target  # [B,S,3]
    coordinate = (noisy.coordinate_weight * bent(error, noisy.coordinate_bend)).sum()
    lattice_error = lattice.float() - noisy.lattice_target
    lattice_loss = (noisy.lattice_weight * bent(lattice_error, noisy.lattice_bend)).sum()
    return Loss(
        total=config.coordinate_weight * coordinate + config.lattice_weight * lattice_loss,
        coordinate=coordinate,
        lattice=lattice_loss,
        per_crystal=(error**2 * free).sum((1, 2)) / free.sum((1, 2)).clamp(min=1),
    )
