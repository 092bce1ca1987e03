"""Networks with no zero in them, and batches of random crystals, for the tests of a framework."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from common.config import ModelConfig
from common.data.batch import Batch, BatchItem, Precedent, View, collate
from common.diffusion.scaler import Standardizer
from tests.crystals import random_crystal

#: Space groups and the sites in them: primitive and centred cells, oblique sites, all systems.
SYSTEMS = (
    (2, "aii"),
    (12, "aij"),
    (62, "bcd"),
    (139, "aeh"),
    (160, "ab"),
    (186, "bc"),
    (227, "ae"),
)
SMALL = {
    "layers": 2,
    "width": 16,
    "edge_width": 12,
    "heads": 4,
    "frequencies": 3,
    "properties": ("band_gap", "formation_energy"),
}


def small(**settings: object) -> ModelConfig:
    """A network of few parameters with every part switched on."""
    data = SMALL | settings
    if data.get("cell") == "conventional":
        data.setdefault("frames", False)
    return ModelConfig.model_validate(data)


def fill_value(name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Non-trivial values of a parameter, the same for the same name and shape.

    At birth a network's residual branches and outputs are zero, which hides them from a test.
    """
    seed = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    values = np.random.default_rng(seed).normal(size=tuple(shape))
    fan_in = shape[-1] if len(shape) > 1 else 4
    return (values / np.sqrt(max(1, fan_in))).astype(np.float32)


def random_items(
    systems: Sequence[tuple[int, str]] = SYSTEMS,
    seed: int = 0,
    properties: bool = True,
    precedents: bool = False,
) -> list[BatchItem]:
    """One random crystal per (space group, letters), with both properties or none.

    With ``precedents`` all but every third one has another random crystal to start from.
    """
    random = np.random.default_rng(seed)
    items = []
    for row, (group, letters) in enumerate(systems):
        crystal = random_crystal(group, letters, random)
        gap, energy = random.random(2).tolist()
        given: dict[str, float | None] = {"band_gap": 3 * gap, "formation_energy": -2 * energy}
        precedent = None
        if precedents and row % 3 < 2:
            differences = tuple(random.random(len(crystal.sites)).tolist())
            known = random_crystal(group, letters, random)
            numbers = tuple((site.atomic_number + 1 + row) % 90 + 1 for site in crystal.sites)
            precedent = Precedent(known, differences, numbers, f"known-{row}")
        items.append(BatchItem(crystal, given if properties else {}, precedent))
    return items


def fitted(items: Sequence[BatchItem]) -> Standardizer:
    """Statistics of crystals."""
    return Standardizer.fit(collate(items, "asymmetric"))


def noise_of(batch: Batch, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Free coordinates [B,S,3], lattice numbers [B,6] and times [B] to show to a network."""
    random = np.random.default_rng(seed)
    size, sites = batch.site_mask.shape
    free = random.random((size, 128, 3), dtype=np.float32)[:, :sites]
    lattice = random.normal(size=(size, 6)).astype(np.float32)
    return np.where(batch.free_mask, free, 0), lattice, random.random(size, dtype=np.float32)


__all__ = ["SYSTEMS", "View", "fill_value", "fitted", "noise_of", "random_items", "small"]
