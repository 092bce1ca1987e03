"""Standardised lattice numbers and properties: what is diffused, and what conditions it.

k5 holds the volume, which the composition nearly decides: its centre is the sum of one volume per
element, fitted on the training set. What is left of k5, and the shape numbers k0..k4, are
standardised per crystal system.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.crystal.lattice import crystal_system
from common.data.batch import PROPERTY_NAMES, Batch
from common.elements import NUM_ELEMENTS

Array = NDArray[np.float64]

_NUM_SYSTEMS = 6
# Pulls the volume of an element that is rarely seen towards the mean of all (A^3 per atom).
_PRIOR_VOLUME = 18.0
_PRIOR_WEIGHT = 0.1
_VOLUME_RANGE = (2.0, 120.0)
_MIN_SCALE = 0.02
#: Crystal system of every space group; none has number zero.
_SYSTEMS = np.array([-1, *(crystal_system(number) for number in range(1, 231))])


@dataclass(frozen=True)
class Standardizer:
    """Centres and scales, fitted on the training set.

    Attributes:
        element_volume: [119], A^3 per atom, by atomic number.
        lattice_mean: [6,6], per crystal system, of k with k5's composition part taken off.
        lattice_std: [6,6], per crystal system; above zero where a number is free.
        property_mean, property_std: [P], in the order of ``PROPERTY_NAMES``.
    """

    element_volume: Array
    lattice_mean: Array
    lattice_std: Array
    property_mean: Array
    property_std: Array

    @classmethod
    def fit(cls, batch: Batch) -> "Standardizer":
        """Statistics of training crystals."""
        element_volume = _fit_volumes(batch)
        rest = batch.lattice_k - _composition_center(batch, element_volume)
        system = _systems(batch)
        mean, std = np.zeros((_NUM_SYSTEMS, 6)), np.ones((_NUM_SYSTEMS, 6))
        for index in range(_NUM_SYSTEMS):
            rows = rest[system == index]
            if len(rows):
                mean[index], std[index] = rows.mean(axis=0), rows.std(axis=0).clip(_MIN_SCALE)
        given = np.where(batch.property_mask, batch.properties, np.nan).astype(float)
        known = batch.property_mask.any(axis=0)
        given[:, ~known] = 0.0
        return cls(
            element_volume,
            mean,
            std,
            np.nanmean(given, axis=0),
            np.nanstd(given, axis=0).clip(1e-3),
        )

    def of_former(self, former: "Standardizer", learned: tuple[str, ...]) -> "Standardizer":
        """What weights that start from a checkpoint's go on with: its statistics.

        Args:
            former: the checkpoint's.
            learned: properties that it was trained with; the others keep the statistics of self.
        """
        known = np.array([name in learned for name in PROPERTY_NAMES])
        return replace(
            former,
            property_mean=np.where(known, former.property_mean, self.property_mean),
            property_std=np.where(known, former.property_std, self.property_std),
        )

    def agrees(self, other: "Standardizer") -> bool:
        """Whether the two are the same but for roundings, as those of another processor are."""
        pairs = zip(self.to_arrays().values(), other.to_arrays().values(), strict=True)
        return all(np.allclose(one, two, rtol=1e-4, atol=1e-6) for one, two in pairs)

    def lattice_center(self, batch: Batch) -> Array:
        """Where standardised zero lies: [B,6]; the fixed value where k is fixed."""
        center = self.lattice_mean[_systems(batch)]
        center = center + _composition_center(batch, self.element_volume)
        return np.where(batch.k_mask, center, batch.k_bias)

    def lattice_scales(self, batch: Batch) -> Array:
        """[B,6], zero where k is fixed."""
        return np.where(batch.k_mask, self.lattice_std[_systems(batch)], 0.0)

    def lattice(self, batch: Batch) -> NDArray[np.float32]:
        """Standardised lattice numbers [B,6], zero where fixed."""
        return self._standardized(batch.lattice_k, batch)

    def precedent_lattice(self, batch: Batch) -> NDArray[np.float32]:
        """Standardised lattice numbers [B,6] of the precedents, zero where there is none."""
        return self._standardized(batch.precedent_k, batch) * batch.precedent_mask[:, None]

    def _standardized(self, k: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
        scale = self.lattice_scales(batch)
        rest = k - self.lattice_center(batch)
        return np.divide(rest, scale, out=np.zeros_like(rest), where=scale > 0).astype(np.float32)

    def properties(
        self, batch: Batch, names: tuple[str, ...]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Standardised properties [B,len(names)], zero where not given, and their mask."""
        columns = [PROPERTY_NAMES.index(name) for name in names]
        mask = batch.property_mask[:, columns]
        values = (batch.properties - self.property_mean) / self.property_std
        return np.where(mask, values[:, columns], 0.0).astype(np.float32), mask

    def to_arrays(self) -> dict[str, Array]:
        """The statistics by name, for a checkpoint."""
        return dict(vars(self))


def _fit_volumes(batch: Batch) -> Array:
    """Least squares, relative to each volume, of the sum of element volumes."""
    counts = element_counts(batch)
    volume = np.exp(batch.lattice_k[:, 5].astype(float) * np.sqrt(3))
    design = np.vstack([counts / volume[:, None], _PRIOR_WEIGHT * np.eye(NUM_ELEMENTS)])
    prior = np.full(NUM_ELEMENTS, _PRIOR_WEIGHT * _PRIOR_VOLUME)
    target = np.concatenate([np.ones(len(volume)), prior])
    solution: Array = np.linalg.lstsq(design, target, rcond=None)[0]
    return solution.clip(*_VOLUME_RANGE)


def _composition_center(batch: Batch, element_volume: Array) -> Array:
    """k of a cubic cell with the volume of the composition: [B,6]."""
    center = np.zeros((batch.size, 6))
    center[:, 5] = np.log(element_counts(batch) @ element_volume) / np.sqrt(3)
    return center


def element_counts(batch: Batch) -> Array:
    """Atoms of every element in the conventional cell: [B,119]."""
    counts = np.zeros((batch.size, NUM_ELEMENTS))
    rows = np.broadcast_to(np.arange(batch.size)[:, None], batch.atomic_numbers.shape)
    np.add.at(counts, (rows, batch.atomic_numbers), batch.multiplicity * batch.site_mask)
    return counts


def _systems(batch: Batch) -> NDArray[np.int64]:
    return _SYSTEMS[batch.space_group]
