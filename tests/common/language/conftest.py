"""Tokenizers and crystals of the training set for the tests of this folder."""

import warnings
from pathlib import Path

import pandas as pd
import pytest
from pymatgen.core import Structure

from common.crystal.structure import Crystal
from common.data.label import label_structure
from common.language.tokenizer import SymmetryTokenizer, compact_tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def compact() -> SymmetryTokenizer:
    return compact_tokenizer()


@pytest.fixture(scope="session")
def glm4_folder(data_dir: Path) -> Path:
    folder = data_dir / "glm4_tokenizer"
    if not folder.is_dir():
        pytest.skip(f"GLM-4's tokenizer not found in {folder}: set UNI_MDM_DATA")
    return folder


@pytest.fixture(scope="session")
def glm4(glm4_folder: Path) -> SymmetryTokenizer:
    return load_tokenizer(glm4_folder)


@pytest.fixture(scope="session")
def training_rows(data_dir: Path) -> list[tuple[Crystal, dict[str, float]]]:
    """Every 170th crystal of the training set, with its properties."""
    table = pd.read_csv(data_dir / "mp_20" / "train.csv.gz")
    rows = []
    for row in table.iloc[::170].itertuples():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about rounded coordinates
            crystal = label_structure(Structure.from_str(row.cif, fmt="cif"))
        energy = float(row.formation_energy_per_atom)
        rows.append((crystal, {"band_gap": float(row.band_gap), "formation_energy": energy}))
    return rows
