"""What `uni-mdm bench` measures, whatever the framework."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.data.cif import parse_cif
from common.data.label import label_structure


@dataclass(frozen=True)
class NetworkSpeed:
    """Speed of one network on one set of crystals.

    Attributes:
        cell: the view, ``asymmetric`` or ``conventional``.
        parameters: of the network.
        edges: mean number of padded edges per structure.
        flops_per_call: floating-point operations of one network call per structure; products
            of matrices only, a multiplication and an addition counted as two.
        training: structures per second of training steps, data preparation included.
        sampling: structures per second of the whole sampler.
        calls: network calls per sample there.
    """

    cell: str
    parameters: int
    edges: float
    flops_per_call: float
    training: float
    sampling: float
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def labelling_speed(cifs: Sequence[str]) -> float:
    """Rows per second parsed and labelled by one process."""
    label_structure(parse_cif(cifs[0]))  # imports and tables
    start = time.perf_counter()
    for cif in cifs:
        label_structure(parse_cif(cif))
    return len(cifs) / (time.perf_counter() - start)
