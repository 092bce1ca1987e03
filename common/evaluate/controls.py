"""What a model must beat: crystals made without one, from the same symmetry.

The random draw, told the true space group and sites as the model is, guesses the volume from the
composition with the training set's element volumes. The other control is the precedent itself
(``common.precedents``).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.crystal.lattice import k_to_lattice
from common.crystal.structure import Crystal, Site
from common.data.batch import Batch, BatchItem, collate
from common.diffusion.noise import noise
from common.diffusion.scaler import Standardizer


def random_draw(
    crystals: Sequence[Crystal],
    keys: Sequence[str],
    standardizer: Standardizer,
    seed: int,
    sample: int = 0,
) -> list[Crystal]:
    """Free coordinates uniform, lattice shape as in the crystal system, volume guessed.

    Args:
        crystals: of which only the symmetry is used.
        keys: name each of them in the noise.
        standardizer: fitted on the training set.
        seed, sample: of the noise.
    """
    batch = collate([BatchItem(crystal, {}) for crystal in crystals], "asymmetric")
    z = np.stack([noise(seed, key, sample, "control lattice", 0, (6,)) for key in keys])
    z[:, 5] = 0.0  # the volume is the guess itself
    k = standardizer.lattice_center(batch) + standardizer.lattice_scales(batch) * z
    return [
        Crystal(
            crystal.space_group,
            _with_params(
                crystal,
                noise(seed, key, sample, "control free", 0, (len(crystal.sites), 3), "uniform"),
            ),
            lattice,
        )
        for crystal, key, lattice in zip(crystals, keys, k_to_lattice(k), strict=True)
    ]


def _with_params(crystal: Crystal, params: NDArray[np.float32]) -> tuple[Site, ...]:
    masked = [
        np.where(position.free_mask, row.astype(float), 0.0)
        for position, row in zip(crystal.positions, params, strict=True)
    ]
    return tuple(
        Site(site.atomic_number, site.letter, (float(x), float(y), float(z)))
        for site, (x, y, z) in zip(crystal.sites, masked, strict=True)
    )


def fit_standardizer(crystals: Sequence[Crystal]) -> Standardizer:
    """The statistics of training crystals without properties."""
    batch: Batch = collate([BatchItem(crystal, {}) for crystal in crystals], "asymmetric")
    return Standardizer.fit(batch)
