"""A tiny run on textbook crystals, for the tests of training."""

from pathlib import Path

from common.config import RunConfig
from common.data.batch import bucket
from common.data.label import label_structure
from common.data.store import Record
from tests.crystals import TEXTBOOK, textbook
from tests.networks import SMALL, random_items

#: Space groups and sites of three or four sites and at most eight atoms.
ALIKE = ((2, "aii"), (12, "aij"), (139, "aeh"))


def textbook_records() -> list[Record]:
    """Every textbook crystal; the properties are made up, one is missing."""
    return [
        Record(
            name,
            label_structure(textbook(name)),
            properties={"band_gap": 0.5 * index, "formation_energy": -0.2 * index or None},
        )
        for index, name in enumerate(TEXTBOOK)
    ]


def alike_records(count: int = 12) -> list[Record]:
    """Random crystals of one padded shape, for a framework that compiles a network for each."""
    systems = (ALIKE * count)[:count]
    items = random_items(systems)
    assert len({bucket(item.crystal, "asymmetric") for item in items}) == 1
    return [
        Record(f"random-{index}", item.crystal, properties=item.properties)
        for index, item in enumerate(items)
    ]


def tiny_run(
    parquet: Path | str = "unused",
    model: dict[str, object] | None = None,
    diffusion: dict[str, object] | None = None,
    **settings: object,
) -> RunConfig:
    """A run of six steps that logs every one, and validates and saves at every third.

    Args:
        parquet: training and validation rows.
        model: replaces some of its settings, as ``diffusion`` and ``settings`` (of training) do.
    """
    base: dict[str, object] = {
        "data": str(parquet),
        "validation": str(parquet),
        "steps": 6,
        "batch_size": 4,
        "edge_budget": 256,
        "warmup": 2,
        "validation_every": 3,
        "checkpoint_every": 3,
        "log_every": 1,
        "learning_rate": 3e-3,
    }
    data = {
        "name": "tiny",
        "model": SMALL | (model or {}),
        "diffusion": diffusion or {},
        "train": base | settings,
    }
    return RunConfig.model_validate(data)
