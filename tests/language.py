"""A language model of one block, trained for a few steps on textbook crystals."""

from pathlib import Path

from common.data.store import write_records
from common.language.config import LanguageRunConfig
from tests.training import textbook_records

BLOCK = {"layers": 1, "width": 32, "heads": 4, "groups": 2, "feed_forward": 48}


def language_run(parquet: Path | str = "unused", **settings: object) -> LanguageRunConfig:
    """Six steps of one block.

    Args:
        parquet: training and validation rows.
        settings: of training.
    """
    base: dict[str, object] = {
        "data": str(parquet),
        "validation": str(parquet),
        "steps": 6,
        "token_budget": 400,
        "warmup": 2,
        "validation_every": 3,
        "checkpoint_every": 3,
        "log_every": 1,
        "learning_rate": 1e-2,
    }
    data = {"name": "tiny", "kind": "language", "model": BLOCK, "train": base | settings}
    return LanguageRunConfig.model_validate(data)


def train_textbook_model(folder: Path, steps: int = 120) -> Path:
    """A checkpoint that knows textbook crystals by heart, more or less.

    Args:
        folder: a new one; the checkpoint is inside.
        steps: of training.
    """
    from torch_impl.backend import train_language

    parquet = folder / "textbook.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    write_records(textbook_records(), parquet)
    settings = {"steps": steps, "validation_every": steps, "checkpoint_every": steps}
    train_language(language_run(parquet, **settings), folder / "run", device="cpu")
    return folder / "run" / "final"
