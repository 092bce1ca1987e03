"""Which of several samples of one symmetry to keep.

The rule, in this order:

1. Samples with two atoms closer than 0.5 A are left out, unless all are like that.
2. Consensus: the sample nearest on average to all others. The distance of two samples is the root
   mean square displacement that pymatgen's StructureMatcher finds after scaling to equal volume, in
   units of (volume per atom)^(1/3), and 0.5 (its tolerance) where they do not match or a cell is
   broken; added to that is the difference of their lengths, |ln(V1/V2)|/3.
3. Among equals the larger smallest distance between atoms, then the first sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.crystal.structure import Crystal

#: At most so many samples are compared pairwise, in cells of at most so many atoms (primitive); in
#: larger ones only their volumes are.
MAX_COMPARED = 16
MAX_COMPARED_ATOMS = 40
_TOO_CLOSE = 0.5


@dataclass(frozen=True)
class Choice:
    """The sample chosen.

    Attributes:
        sample: its index.
        samples: how many there were.
        consensus: its mean distance to the others, see the module; 0 if it is the only one.
    """

    sample: int
    samples: int
    consensus: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "sample": self.sample,
            "samples": self.samples,
            "consensus": round(self.consensus, 6),
        }


def choose_sample(samples: Sequence[Crystal]) -> Choice:
    """The sample to keep; see the module."""
    from common.evaluate.validity import min_distance

    if len(samples) == 1:
        return Choice(0, 1, 0.0)
    nearest = np.array([min_distance(crystal.to_structure(primitive=True)) for crystal in samples])
    kept = np.flatnonzero(nearest >= _TOO_CLOSE)
    if len(kept) == 0:
        kept = np.arange(len(samples))
    kept = kept[:MAX_COMPARED]
    consensus = _distances([samples[i] for i in kept]).sum(axis=1) / max(len(kept) - 1, 1)
    # Rounded, so that the choice does not hang on the last bits of equal samples.
    best = min(
        range(len(kept)), key=lambda i: (round(consensus[i], 6), -round(nearest[kept[i]], 6), i)
    )
    return Choice(int(kept[best]), len(samples), float(consensus[best]))


def _distances(crystals: Sequence[Crystal]) -> NDArray[np.float64]:
    """[N,N], see the module."""
    from common.evaluate.match import STANDARD, cell_distance, reduced_cell
    from common.evaluate.validity import cell_problem

    lengths = np.array([np.log(abs(np.linalg.det(c.lattice))) / 3 for c in crystals])
    distances: NDArray[np.float64] = np.abs(lengths[:, None] - lengths)
    if crystals[0].num_primitive_atoms > MAX_COMPARED_ATOMS:
        return distances
    if crystals[0].num_free_coords == 0 and crystals[0].space_group >= 195:
        return distances  # equal but for the volume
    structures = [crystal.to_structure(primitive=True) for crystal in crystals]
    cells = [None if cell_problem(one) else reduced_cell(one, False) for one in structures]
    for i, first in enumerate(cells):
        for j, second in enumerate(cells[:i]):
            found = None
            if first is not None and second is not None:
                found = cell_distance(first, second, STANDARD)
            rms = STANDARD.stol if found is None else found
            distances[i, j] += rms
            distances[j, i] += rms
    return distances
