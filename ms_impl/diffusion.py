"""Training losses of the Crystal DiT."""

from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops

from common.config import DiffusionConfig
from common.diffusion.noisy import LossWeights, NoisyCrystals
from ms_impl.tensors import TensorBatch, Tensors


class NoisyTensors(Tensors):
    """``NoisyCrystals`` and ``LossWeights`` of ``common.diffusion.noisy`` as tensors."""

    t: Tensor
    free_params: Tensor
    lattice: Tensor
    coordinate_target: Tensor
    lattice_target: Tensor
    coordinate_weight: Tensor
    lattice_weight: Tensor

    @classmethod
    def from_arrays(cls, noisy: NoisyCrystals, weights: LossWeights) -> "NoisyTensors":
        """Copies noisy crystals to the device."""
        arrays = {**vars(noisy)}
        arrays["coordinate_weight"], arrays["lattice_weight"] = weights.coordinate, weights.lattice
        return cls({name: Tensor(np.ascontiguousarray(array)) for name, array in arrays.items()})


class Loss(NamedTuple):
    """Scalars to minimise and to watch.

    ``per_crystal`` [B] is the mean squared error of a crystal's free coordinates.
    """

    total: Tensor
    coordinate: Tensor
    lattice: Tensor
    per_crystal: Tensor


def denoising_loss(
    model: nn.Cell, batch: TensorBatch, noisy: NoisyTensors, config: DiffusionConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted squared error of the targets.

    Args:
        model: a CrystalDiT, or what stands for it when several processes train it.
        batch: B crystals.
        noisy: the crystals with noise.
        config: weights of coordinates and lattice.

    Returns:
        The fields of ``Loss`` in their order: a named tuple made inside a graph stops gradients.
    """
    coordinates, lattice = model(batch, noisy["free_params"], noisy["lattice"], noisy["t"])
    free = batch["free_mask"].astype(coordinates.dtype)
    squared = ops.square(coordinates - noisy["coordinate_target"]) * free  # [B,S,3]
    coordinate = (noisy["coordinate_weight"] * squared).sum()
    lattice_loss = (noisy["lattice_weight"] * ops.square(lattice - noisy["lattice_target"])).sum()
    total = config.coordinate_weight * coordinate + config.lattice_weight * lattice_loss
    per_crystal = squared.sum((1, 2)) / ops.maximum(free.sum((1, 2)), 1)
    return total, coordinate, lattice_loss, per_crystal
