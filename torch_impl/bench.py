"""Speed of training and sampling with torch on this machine."""

import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.backend import SampleRequest
from common.config import RunConfig
from common.data.batch import bucket
from common.data.loader import BatchPlan, Bucket
from common.data.store import Record
from common.speed import NetworkSpeed
from torch_impl.generator import TorchGenerator, rows_per_call
from torch_impl.tensors import TensorBatch
from torch_impl.train_dit import Trainer

#: Training steps per bucket that are timed, after one that is not.
TIMED_STEPS = 2


def benchmark(config: RunConfig, records: list[Record], calls: int, threads: int) -> NetworkSpeed:
    """Speed of a network of untrained weights, which cost what trained ones cost.

    Buckets are timed one by one at their full batch size, and weighted by their crystals.

    Args:
        config: network and batch sizes; compilation is left off.
        records: the crystals.
        calls: network calls per sample.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    settings = config.train.model_copy(update={"compile": False, "init_from": None})
    trainer = Trainer(config.model_copy(update={"train": settings}), records, records)
    weights = [group.batch.size for group in trainer.data.buckets]
    total = sum(weights)
    seconds = flops = edges = 0.0
    for index, group in enumerate(trainer.data.buckets):
        seconds += weights[index] * _training_seconds(trainer, index, group)
        flops += weights[index] * _flops(trainer, group)
        edges += weights[index] * group.batch.shape[0] * group.batch.shape[1]
    generator = TorchGenerator(config, trainer.model, trainer.standardizer, "cpu")
    return NetworkSpeed(
        cell=config.model.cell,
        parameters=sum(parameter.numel() for parameter in trainer.parameters),
        edges=edges / total,
        flops_per_call=flops / total,
        training=total / seconds,
        sampling=1 / _sampling_seconds(generator, records, calls),
        calls=calls,
    )


def _training_seconds(trainer: Trainer, index: int, group: Bucket) -> float:
    """Seconds per structure of a bucket."""
    rows = np.arange(group.batch_size) % group.batch.size
    plan = BatchPlan(index, rows)
    trainer.train_step(plan)
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        trainer.train_step(plan)
    return (time.perf_counter() - start) / (TIMED_STEPS * group.batch_size)


def _flops(trainer: Trainer, group: Bucket) -> float:
    """Operations per structure of one full call for a bucket."""
    size = rows_per_call(group.batch.shape)
    batch = group.batch.take(np.arange(size) % group.batch.size)
    names = trainer.config.model.properties
    tensors = TensorBatch.from_batch(batch, trainer.standardizer, names)
    free = torch.from_numpy(batch.free_params)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        trainer.model(tensors, free, torch.zeros(size, 6), torch.zeros(size))
    return float(counter.get_total_flops()) / size


def _sampling_seconds(generator: TorchGenerator, records: list[Record], calls: int) -> float:
    """Seconds per structure when every call of the network is full, as in a long run."""
    groups: dict[tuple[int, int], list[SampleRequest]] = {}
    for record in records:
        request = SampleRequest(
            record.crystal.space_group,
            tuple((site.atomic_number, site.letter) for site in record.crystal.sites),
            key=record.material_id,
        )
        groups.setdefault(bucket(record.crystal, generator.config.model.cell), []).append(request)
    seconds = 0.0
    for shape, requests in groups.items():
        size = rows_per_call(shape)
        full = [requests[i % len(requests)] for i in range(size)]
        generator.sample(full, 0, 1)
        start = time.perf_counter()
        generator.sample(full, 0, calls)
        seconds += len(requests) / size * (time.perf_counter() - start)
    return seconds / len(records)
