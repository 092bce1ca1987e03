"""Every random number of training and sampling, from the one noise source."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from common.diffusion.noise import Kind, noise

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TrainingDraws:
    """The randomness of one training step.

    Attributes:
        t: [B] in [0,1), one in each of B equal intervals.
        free: [B,S,3], uniform in [0,1).
        free_normal: [B,S,3], standard normal.
        lattice: [B,6], standard normal.
        origins: [B,O,4], uniform, see ``Descriptions.nearest``.
        first_atoms: [B,S], uniform, see ``Descriptions.anew``.
        keep_property: [B], uniform; a property is dropped where it is below the dropout rate.
        keep_precedent: [B], likewise for precedents.
    """

    t: Array
    free: Array
    free_normal: Array
    lattice: Array
    origins: Array
    first_atoms: Array
    keep_property: Array
    keep_precedent: Array

    @classmethod
    def of_step(
        cls, seed: int, stream: str, step: int, shape: tuple[int, int], origins: int
    ) -> "TrainingDraws":
        """Draws of a step.

        Args:
            seed: of the run.
            stream: names who draws, ``train`` or ``validation``.
            step: of the run.
            shape: crystals and padded sites (B, S).
            origins: O.
        """
        size, sites = shape

        def draw(field: str, shape: tuple[int, ...], uniform: bool = True) -> Array:
            kind: Kind = "uniform" if uniform else "normal"
            return noise(seed, stream, 0, field, step, shape, kind)

        strata = (np.arange(size, dtype=np.float32) + draw("t", (size,))) / size
        return cls(
            t=np.minimum(strata, np.float32(1 - 2**-24)),
            free=draw("free", (size, sites, 3)),
            free_normal=draw("free", (size, sites, 3), uniform=False),
            lattice=draw("lattice", (size, 6), uniform=False),
            origins=draw("origins", (size, origins, 4)),
            first_atoms=draw("first_atoms", (size, sites)),
            keep_property=draw("property", (size,)),
            keep_precedent=draw("precedent", (size,)),
        )

    def take(self, rows: NDArray[np.int64]) -> "TrainingDraws":
        """Those of some crystals."""
        return TrainingDraws(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})
