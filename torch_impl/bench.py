"""Speed of training and sampling with torch on this machine."""

import torch

from common.config import RunConfig
from common.data.store import Record
from common.speed import NetworkSpeed, network_speed
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.generator import Generator
from torch_impl.train_dit import Trainer


def benchmark(config: RunConfig, records: list[Record], calls: int, threads: int) -> NetworkSpeed:
    """Speed of a network of untrained weights; see ``common.speed.network_speed``.

    Args:
        config: network and batch sizes; compilation is left off.
        records: the crystals.
        calls: network calls per sample.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    settings = config.train.model_copy(update={"compile": False, "init_from": None})
    trainer = Trainer(config.model_copy(update={"train": settings}), records, records)
    generator = Generator(config, CrystalDiT(config.model), trainer.standardizer, "cpu")
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    return network_speed(trainer, generator, records, calls, parameters)
