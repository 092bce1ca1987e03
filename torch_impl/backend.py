"""The torch backend, as ``common.backend`` finds it."""

from pathlib import Path
from typing import Any

from common.language.config import LanguageRunConfig
from torch_impl.bench import benchmark
from torch_impl.distributed import problems
from torch_impl.generator import Generator, devices, load
from torch_impl.train_dit import train


def train_language(config: LanguageRunConfig, out: Path, **options: Any) -> None:
    """Trains a language model; see ``torch_impl.train_glm4.train``."""
    from torch_impl.train_glm4 import train  # transformers is slow to import

    train(config, out, **options)


__all__ = ["Generator", "benchmark", "devices", "load", "problems", "train", "train_language"]
