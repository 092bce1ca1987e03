"""Fixtures of this folder."""

from pathlib import Path

import pytest

from tests.language import train_textbook_model


@pytest.fixture(scope="session")
def textbook_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small language model that was shown textbook crystals."""
    return train_textbook_model(tmp_path_factory.mktemp("language"))
