"""Speed of training and sampling with MindSpore on this machine."""

from common.config import RunConfig
from common.data.batch import FINE
from common.data.store import Record
from common.speed import NetworkSpeed, network_speed
from ms_impl.crystal_dit import CrystalDiT
from ms_impl.generator import Generator
from ms_impl.train_dit import Trainer


def benchmark(config: RunConfig, records: list[Record], calls: int, threads: int) -> NetworkSpeed:
    """Speed of a network of untrained weights; see ``common.speed.network_speed``.

    Args:
        config: network and batch sizes; compilation is left out.
        records: the crystals.
        calls: network calls per sample.
        threads: CPU threads.
    """
    settings = config.train.model_copy(update={"init_from": None})
    trainer = Trainer(config.model_copy(update={"train": settings}), records, records)
    generator = Generator(config, CrystalDiT(config.model), trainer.standardizer, "cpu")
    generator.sizes = FINE  # the shapes of training, and of torch
    parameters = sum(parameter.size for parameter in trainer.parameters)
    return network_speed(trainer, generator, records, calls, parameters)
