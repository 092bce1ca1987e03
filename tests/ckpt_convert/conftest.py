"""A run of a few training steps, and the shipped checkpoint; never change them."""

from pathlib import Path

import pytest

from common.checkpoint import shipped
from common.config import RunConfig
from common.data.label import label_structure
from common.data.store import Record, write_records
from tests.crystals import TEXTBOOK, textbook
from tests.networks import SMALL
from torch_impl.backend import train


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps; checkpoints after the second and the fourth."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "textbook.parquet"
    records = [
        Record(
            name,
            label_structure(textbook(name)),
            properties={"band_gap": 1.0 * index, "formation_energy": -0.5 * index},
        )
        for index, name in enumerate(tuple(TEXTBOOK)[:4])
    ]
    write_records(records, data)
    settings: dict[str, object] = {
        "data": str(data),
        "validation": str(data),
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
        "edge_budget": 256,
        "warmup": 0,
        "learning_rate": 1e-2,
    }
    config = RunConfig.model_validate({"name": "tiny", "model": SMALL, "train": settings})
    train(config, folder / "tiny", device="cpu")
    return folder / "tiny"


@pytest.fixture(scope="session")
def step_folder(run_folder: Path) -> Path:
    """The checkpoint after the second step, with the optimizer's state."""
    return run_folder / "step_00000002"


@pytest.fixture(scope="session")
def shipped_folder() -> Path:
    return shipped()["crystal_dit_small_fm"]
