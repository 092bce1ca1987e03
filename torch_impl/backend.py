"""The torch backend, as ``common.backend`` finds it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.language.config import LanguageRunConfig
from torch_impl.bench import (
    benchmark,
    benchmark_delivery,
    benchmark_sizes,
    benchmark_steps,
)
from torch_impl.devices import devices
from torch_impl.distributed import problems
from torch_impl.generator import Generator, load
from torch_impl.train_dit import train

if TYPE_CHECKING:
    from torch_impl.language_model import LanguageModel


def load_language_model(
    folder: Path, device: str = "cpu", base: Path | None = None
) -> "LanguageModel":
    """Reads a language model; see ``torch_impl.language_model.load_language_model``."""
    from torch_impl.language_model import load_language_model  # transformers is slow to import

    return load_language_model(folder, device, base)


def train_language(config: LanguageRunConfig, out: Path, **options: Any) -> None:
    """Trains a language model; see ``torch_impl.train_glm4.train``."""
    from torch_impl.train_glm4 import train  # transformers is slow to import

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
