"""The MindSpore backend, as ``common.backend`` finds it."""

from pathlib import Path
from typing import Any

from common.language.config import LanguageRunConfig
from ms_impl.bench import benchmark, benchmark_sizes, benchmark_steps
from ms_impl.distributed import problems
from ms_impl.generator import Generator, devices, load
from ms_impl.train_dit import train


def train_language(config: LanguageRunConfig, out: Path, **options: Any) -> None:
    """Trains a language model; see ``ms_impl.train_glm4.train``."""
    from ms_impl.train_glm4 import train  # MindSpore's data sets are slow to import

    train(config, out, **options)


__all__ = [
    "Generator",
    "benchmark",
    "benchmark_sizes",
    "benchmark_steps",
    "devices",
    "load",
    "problems",
    "train",
    "train_language",
]
