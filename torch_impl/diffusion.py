"""Training losses of the Crystal DiT."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from common.config import DiffusionConfig
from common.diffusion.flow import Path
from torch_impl.tensors import TensorBatch

#: A uniform difference on the unit torus has variance 1/12: velocities times this have unit size.
VELOCITY_SCALE = 12**0.5


@dataclass(frozen=True)
class PathTensors:
    """``common.diffusion.flow.Path`` as tensors, velocities in the network's units."""

    t: Tensor
    free_params: Tensor
    lattice: Tensor
    free_velocity: Tensor
    lattice_velocity: Tensor

    @classmethod
    def from_path(cls, path: Path, device: torch.device | str = "cpu") -> "PathTensors":
        """Copies a path to a device."""
        arrays = {f.name: np.ascontiguousarray(getattr(path, f.name)) for f in fields(cls)}
        arrays["free_velocity"] = arrays["free_velocity"] * np.float32(VELOCITY_SCALE)
        return cls(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


@dataclass(frozen=True)
class Loss:
    """Scalars to minimise and to watch.

    ``per_crystal`` [B] is the mean squared error of a crystal's coordinates, ``has_free`` [B]
    whether it has any; together they give the loss per noise level.
    """

    total: Tensor
    coordinate: Tensor
    lattice: Tensor
    per_crystal: Tensor
    has_free: Tensor


def flow_loss(
    model: nn.Module, batch: TensorBatch, path: PathTensors, config: DiffusionConfig
) -> Loss:
    """Squared error of the velocities, mean over all free numbers of the batch.

    Args:
        model: the network.
        batch: B crystals.
        path: where they stand at their times.
        config: weights.
    """
    coordinates, lattice = model(batch, path.free_params, path.lattice, path.t)
    free = batch.free_mask.float()
    coordinate_error = (coordinates.float() - path.free_velocity) ** 2 * free
    lattice_error = (lattice.float() - path.lattice_velocity) ** 2 * batch.k_mask
    coordinate = coordinate_error.sum() / free.sum().clamp(min=1)
    lattice_loss = lattice_error.sum() / batch.k_mask.float().sum()
    return Loss(
        total=config.coordinate_weight * coordinate + config.lattice_weight * lattice_loss,
        coordinate=coordinate,
        lattice=lattice_loss,
        per_crystal=coordinate_error.sum((1, 2)) / free.sum((1, 2)).clamp(min=1),
        has_free=batch.free_mask.any(2).any(1),
    )
