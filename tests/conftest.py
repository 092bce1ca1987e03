"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the MP-20 data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("UNI_MDM_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "mp_20" / "val.csv.gz").is_file():
        pytest.skip(f"MP-20 data not found in {folder}: set UNI_MDM_DATA")
    return folder
