"""What a network is trained on: crystals with noise, and what it should say of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import starmap

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
    """How errors count in the loss.

    An error e counts as 2 e^2 / (1 + sqrt(1 + (e / d)^2)) times its weight: as e^2 where it is
    small beside d, as 2 d |e| where it is large (pseudo-Huber; Charbonnier et al., ICIP 1994).

    Attributes:
        coordinate: weights [B,S,3], zero where not free; their sum over a batch, or over several
            that are weighed together, is one, but for their units.
        lattice: likewise [B,6].
        coordinate_bend: d of the coordinates, [B,1,1]; infinity where errors are squared always.
        lattice_bend: likewise [B,1].
    """

    coordinate: Array
    lattice: Array
    coordinate_bend: Array
    lattice_bend: Array

    @classmethod
    def of(cls, free_mask: NDArray[np.bool_], k_mask: NDArray[np.bool_]) -> "LossWeights":
        """Weights of squared errors of a batch with these masks, [B,S,3] and [B,6].

        All free coordinates count alike, and all free lattice numbers.
        """
        return cls._squared(_shares(free_mask), _shares(k_mask))

    @classmethod
    def of_crystals(
        cls, masks: Iterable[tuple[NDArray[np.bool_], NDArray[np.bool_]]]
    ) -> list["LossWeights"]:
        """Weights of squared errors with which all crystals of several batches count alike.

        Sums over the batches are means over the crystals that have a free coordinate, or a free
        lattice number, of each one's own mean.

        Args:
            masks: of each batch, as ``of`` takes them.
        """
        shares = map(_shares_of_crystals, zip(*masks, strict=True))
        return list(starmap(cls._squared, zip(*shares, strict=True)))

    @classmethod
    def _squared(cls, coordinate: Array, lattice: Array) -> "LossWeights":
        never = np.full(len(lattice), np.inf, np.float32)
        return cls(coordinate, lattice, never[:, None, None], never[:, None])

    def take(self, rows: NDArray[np.int64], real: NDArray[np.bool_]) -> "LossWeights":
        """Those of some rows, zero for the rows that are not real."""
        return LossWeights(
            self.coordinate[rows] * real[:, None, None],
            self.lattice[rows] * real[:, None],
            self.coordinate_bend[rows],
            self.lattice_bend[rows],
        )

    def in_units(self, coordinate: Array, lattice: Array, bend: Array) -> "LossWeights":
        """Those of errors that are counted in units of their own.

        Args:
            coordinate, lattice: the units, [B].
            bend: d in these units, [B].
        """
        first, second = coordinate[:, None, None], lattice[:, None]
        return LossWeights(
            self.coordinate * first**-2,
            self.lattice * second**-2,
            bend[:, None, None] * first,
            bend[:, None] * second,
        )


def _shares(mask: NDArray[np.bool_]) -> Array:
    return mask.astype(np.float32) / np.float32(max(1, mask.sum()))


def _shares_of_crystals(masks: tuple[NDArray[np.bool_], ...]) -> list[Array]:
    counts = [mask.sum(axis=tuple(range(1, mask.ndim)), keepdims=True) for mask in masks]
    crystals = sum(int(np.count_nonzero(count)) for count in counts)
    return [
        mask.astype(np.float32) / (max(1, crystals) * count.clip(1)).astype(np.float32)
        for mask, count in zip(masks, counts, strict=True)
    ]
