"""The MindSpore backend, as ``common.backend`` finds it."""

from ms_impl.bench import benchmark, benchmark_sizes, benchmark_steps
from ms_impl.distributed import problems
from ms_impl.generator import Generator, devices, load
from ms_impl.train_dit import train

__all__ = [
    "Generator",
    "benchmark",
    "benchmark_sizes",
    "benchmark_steps",
    "devices",
    "load",
    "problems",
    "train",
]
