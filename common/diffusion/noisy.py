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
