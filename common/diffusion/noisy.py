"""What a network is trained on: crystals with noise, and what it should say of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class NoisyCrystals:
    """B crystals with noise.

    Attributes:
        t: [B] in [0,1], the time the network is told; what it means is the process's business.
        free_params: [B,S,3] in [0,1), with noise.
        lattice: [B,6], standardised, with noise.
        coordinate_target: [B,S,3], of unit size.
        lattice_target: [B,6], of unit size.
    """

    t: Array
    free_params: Array
    lattice: Array
    coordinate_target: Array
    lattice_target: Array


@dataclass(frozen=True)
class LossWeights:
    """Weight of every squared error in the loss; those of a whole batch sum to one.

    Attributes:
        coordinate: [B,S,3], alike for all free coordinates, else zero.
        lattice: [B,6], alike for all free lattice numbers, else zero.
    """

    coordinate: Array
    lattice: Array

    @classmethod
    def of(cls, free_mask: NDArray[np.bool_], k_mask: NDArray[np.bool_]) -> "LossWeights":
        """Weights of a batch with these masks, [B,S,3] and [B,6]."""
        return cls(_shares(free_mask), _shares(k_mask))

    def take(self, rows: NDArray[np.int64], real: NDArray[np.bool_]) -> "LossWeights":
        """Those of some rows, zero for the rows that are not real."""
        return LossWeights(
            self.coordinate[rows] * real[:, None, None], self.lattice[rows] * real[:, None]
        )

    def in_units(self, unit: Array) -> "LossWeights":
        """Those of errors that are counted in units of their own, [B]."""
        scale = unit.astype(np.float32) ** -2
        return LossWeights(self.coordinate * scale[:, None, None], self.lattice * scale[:, None])


def _shares(mask: NDArray[np.bool_]) -> Array:
    return mask.astype(np.float32) / np.float32(max(1, mask.sum()))
