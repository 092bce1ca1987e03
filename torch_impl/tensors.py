"""A batch as torch tensors, with the lattice's centre and scale beside it."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from common.data.batch import Batch
from common.diffusion.scaler import Standardizer


@dataclass(frozen=True)
class TensorBatch:
    """The fields of ``common.data.batch.Batch`` that a network reads, as tensors.

    ``lattice_center`` and ``lattice_scale``, both [B,6], take standardised lattice numbers to k:
    k = center + scale * lattice. ``precedent_lattice`` [B,6] and ``properties`` are standardised.
    """

    atomic_numbers: Tensor
    site_mask: Tensor
    multiplicity: Tensor
    letter: Tensor
    free_mask: Tensor
    token_site: Tensor
    token_mask: Tensor
    token_rot: Tensor
    token_trans: Tensor
    token_to_free: Tensor
    atom_token: Tensor
    atom_site: Tensor
    atom_mask: Tensor
    orbit_rot: Tensor
    orbit_trans: Tensor
    frame_inverse: Tensor
    to_primitive: Tensor
    k_mask: Tensor
    num_atoms: Tensor
    space_group: Tensor
    properties: Tensor
    property_mask: Tensor
    precedent_mask: Tensor
    precedent_params: Tensor
    precedent_difference: Tensor
    precedent_numbers: Tensor
    precedent_lattice: Tensor
    lattice_center: Tensor
    lattice_scale: Tensor

    @classmethod
    def from_batch(
        cls,
        batch: Batch,
        standardizer: Standardizer,
        properties: tuple[str, ...],
        device: torch.device | str = "cpu",
    ) -> "TensorBatch":
        """Copies a batch to a device.

        Args:
            batch: the crystals.
            standardizer: of the lattice and the properties.
            properties: names of those that the network takes, in its order.
            device: where to.
        """
        arrays = {f.name: getattr(batch, f.name) for f in fields(cls) if hasattr(batch, f.name)}
        values, mask = standardizer.properties(batch, properties)
        arrays["properties"], arrays["property_mask"] = values, mask
        arrays["precedent_lattice"] = standardizer.precedent_lattice(batch)
        arrays["lattice_center"] = standardizer.lattice_center(batch)
        arrays["lattice_scale"] = standardizer.lattice_scales(batch)
        return cls(**{name: _tensor(array, device) for name, array in arrays.items()})


def _tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
