"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from common.machine import ascend_count
from tests.language import train_textbook_model

# MindSpore needs the Python implementation of protobuf, which TensorBoard, if it comes first,
# would not choose.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs Ascend NPUs where they are not, with the command for where they are."""
    needed = next((mark.kwargs["npus"] for mark in item.iter_markers("ascend")), 0)
    if needed > ascend_count():
        command = f".venv/bin/python -m pytest {item.nodeid}"
        pytest.skip(f"needs {needed} Ascend NPUs; there: {command}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the MP-20 data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("UNI_MDM_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "mp_20" / "val.csv.gz").is_file():
        pytest.skip(f"MP-20 data not found in {folder}: set UNI_MDM_DATA")
    return folder


@pytest.fixture(scope="session")
def textbook_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small language model that was shown textbook crystals."""
    return train_textbook_model(tmp_path_factory.mktemp("language"))
