"""The MindSpore backend, as ``common.backend`` finds it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.language.config import LanguageRunConfig
from ms_impl.bench import (
    benchmark,
    benchmark_delivery,
    benchmark_sizes,
    benchmark_steps,
)
from ms_impl.distributed import problems
from ms_impl.generator import Generator, devices, load
from ms_impl.train_dit import train

if TYPE_CHECKING:
    from ms_impl.language_model import LanguageModel


def load_language_model(
    folder: Path, device: str = "cpu", base: Path | None = None
) -> "LanguageModel":
    """Reads a language model; see ``ms_impl.language_model.load_language_model``."""
    from ms_impl.language_model import load_language_model  # tokenizers may be missing

    return load_language_model(folder, device, base)


def train_language(config: LanguageRunConfig, out: Path, **options: Any) -> None:
    """Trains a language model; see ``ms_impl.train_glm4.train``."""
    from ms_impl.train_glm4 import train  # MindSpore's data sets are slow to import

    train(config, out, **options)


__all__ = [
    "Generator",
    "benchmark",
    "benchmark_delivery",
    "benchmark_sizes",
    "benchmark_steps",
    "devices",
    "load",
    "load_language_model",
    "problems",
    "train",
    "train_language",
]
