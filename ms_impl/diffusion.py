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
    coordinate_bend: Tensor
    lattice_bend: Tensor

    @classmethod
    def from_arrays(cls, noisy: NoisyCrystals, weights: LossWeights) -> "NoisyTensors":
        """Copies noisy crystals to the device."""
        arrays = {
            **vars(noisy),
            "coordinate_weight": weights.coordinate,
            "lattice_weight": weights.lattice,
            "coordinate_bend": weights.coordinate_bend,
            "lattice_bend": weights.lattice_bend,
        }
        return cls({name: Tensor(np.ascontiguousarray(array)) for name, array in arrays.items()})


class Loss(NamedTuple):
    """Scalars to minimise and to watch.

    ``per_crystal`` [B] is the mean squared error of a crystal's free coordinates.
    """

    total: Tensor
    coordinate: Tensor
    lattice: Tensor
    per_crystal: Tensor


def bent(error: Tensor, bend: Tensor) -> Tensor:
    """Squares of errors, but linear far beyond a bend; see ``LossWeights``."""
    return 2 * ops.square(error) / (1 + ops.sqrt(1 + ops.square(error / bend)))


def denoising_loss(
    model: nn.Cell, batch: TensorBatch, noisy: NoisyTensors, config: DiffusionConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted error of the targets, squared or bent.

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
    error = coordinates - noisy["coordinate_target"]  # [B,S,3]
    coordinate = (noisy["coordinate_weight"] * bent(error, noisy["coordinate_bend"])).sum()
    lattice_error = lattice - noisy["lattice_target"]
    lattice_loss = (noisy["lattice_weight"] * bent(lattice_error, noisy["lattice_bend"])).sum()
    total = config.coordinate_weight * coordinate + config.lattice_weight * lattice_loss
    per_crystal = (ops.square(error) * free).sum((1, 2)) / ops.maximum(free.sum((1, 2)), 1)
    return total, coordinate, lattice_loss, per_crystal
