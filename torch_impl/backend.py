"""The torch backend, as ``common.backend`` finds it."""

from torch_impl.bench import benchmark
from torch_impl.generator import TorchGenerator, devices, load
from torch_impl.train_dit import train

__all__ = ["TorchGenerator", "benchmark", "devices", "load", "train"]
