"""Speed of training and sampling with MindSpore on this machine."""

from pathlib import Path

import mindspore as ms
from mindspore import ops

from common.config import RunConfig
from common.data.batch import FINE
from common.data.locations import dataset
from common.data.store import Record
from common.delivery import Delivery, deliver
from common.size_cost import SizeCost, measure_sizes
from common.speed import (
    PEAK_WIDTH,
    NetworkSpeed,
    StepCost,
    network_speed,
    product_speed,
    step_costs,
)
from ms_impl.crystal_dit import CrystalDiT
from ms_impl.device import use_device
from ms_impl.generator import Generator, load
from ms_impl.train_dit import Trainer


def benchmark(config: RunConfig, records: list[Record], calls: int, threads: int) -> NetworkSpeed:
    """Speed of a network of untrained weights; see ``common.speed.network_speed``.

    Args:
        config: network and batch sizes; compilation is left out.
        records: the crystals.
        calls: network calls per sample.
        threads: CPU threads, which are left to MindSpore.
    """
    trainer, generator = _untrained(config, records)
    parameters = sum(parameter.size for parameter in trainer.parameters)
    return network_speed(trainer, generator, records, calls, parameters, gemm_peak())


def benchmark_sizes(
    config: RunConfig, records: list[Record], calls: int, threads: int
) -> list[SizeCost]:
    """Cost of sampling against size; see ``common.size_cost``. Arguments as in ``benchmark``."""
    _, generator = _untrained(config, records)
    return measure_sizes(generator, calls)


def benchmark_steps(
    configs: list[RunConfig], steps: int, threads: int, device: str = "auto"
) -> list[StepCost]:
    """Cost of training steps of several runs on the same rows; see ``common.speed.step_costs``.

    Args:
        configs: the runs; the first one names the rows.
        steps: of each that are timed.
        threads: CPU threads, which are left to MindSpore.
        device: ``auto``, ``cpu`` or ``ascend``.
    """
    records = dataset(configs[0].train.data)
    return step_costs([Trainer(one, records, records[:1], device) for one in configs], steps)


def benchmark_delivery(
    checkpoint: Path,
    records: list[Record],
    threads: int,
    device: str = "auto",
    calls: int | None = None,
) -> Delivery:
    """How long a trained checkpoint takes for crystals, compilation included.

    See ``common.delivery.deliver``.

    Args:
        checkpoint: its folder.
        records: what to sample.
        threads: CPU threads, which are left to MindSpore.
        device: ``auto``, ``cpu`` or ``ascend``.
        calls: network calls per crystal; the checkpoint's own number without it.
    """
    device = use_device(device)  # which later kernels would not let one choose
    times, _ = deliver(lambda: load(checkpoint, device), records, gemm_peak(), calls)
    return times


def _untrained(config: RunConfig, records: list[Record]) -> tuple[Trainer, Generator]:
    settings = config.train.model_copy(update={"init_from": None})
    trainer = Trainer(config.model_copy(update={"train": settings}), records, records)
    generator = Generator(config, CrystalDiT(config.model), trainer.standardizer, "cpu")
    generator.sizes = FINE  # the shapes of training, and of torch
    return trainer, generator


def gemm_peak() -> float:
    """Operations per second of large float32 products of matrices, with the threads as set."""
    matrix = ops.ones((PEAK_WIDTH, PEAK_WIDTH), ms.float32)
    # Only a result that is read has been waited for.
    return product_speed(lambda: ops.matmul(matrix, matrix).asnumpy())
