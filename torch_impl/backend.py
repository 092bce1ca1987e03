"""The torch backend, as ``common.backend`` finds it."""

from torch_impl.bench import benchmark
from torch_impl.distributed import problems
from torch_impl.generator import Generator, devices, load
from torch_impl.train_dit import train

__all__ = ["Generator", "benchmark", "devices", "load", "problems", "train"]
