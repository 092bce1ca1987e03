"""What `uni-mdm bench` measures, whatever the framework."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from common.backend import SampleRequest, load_backend
from common.config import ModelConfig, RunConfig
from common.data.batch import FINE, View, bucket, view_sizes
from common.data.cif import parse_cif
from common.data.label import label_structure
from common.data.loader import BatchPlan
from common.data.store import Record
from common.diffusion.score import network_calls
from common.diffusion.training import BaseTrainer
from common.machine import apart
from common.sampling import BaseGenerator
from common.size_cost import SizeCost

#: Sizes inside the network: its time embedding, images and radial features of an edge.
TIME_WIDTH = 128
NUM_IMAGES = 27
DISTANCE_FEATURES = 32
#: Training steps per bucket that are timed, after one that is not.
TIMED_STEPS = 2
#: A training step in forward passes: gradients take two products of matrices for each.
PASSES_OF_STEP = 3
#: Width of the square matrices whose product tells the machine's peak, and products timed.
PEAK_WIDTH = 1536
PEAK_PRODUCTS = 5
#: DiffCSP++ as published (arXiv:2402.03992): network calls per sample, and the network, which is
#: that of ``configs/diffcsp_pp.yaml``.
DIFFCSP_PP_CALLS = 2000
DIFFCSP_PP = ModelConfig(
    cell="conventional",
    layers=6,
    width=512,
    edge_width=512,
    heads=8,
    feed_forward=0,
    modulation=False,
    frequencies=128,
    frames=False,
    distances=False,
    attention=False,
    aggregation="mean",
    properties=(),
)


@dataclass(frozen=True)
class NetworkSpeed:
    """Speed of one network on one set of crystals.

    Attributes:
        cell: the view, ``asymmetric`` or ``conventional``.
        parameters: of the network.
        edges: mean number of padded edges per structure.
        flops_per_call: floating-point operations of one network call per structure; products
            of matrices only, a multiplication and an addition counted as two.
        training: structures per second of training steps, data preparation included.
        sampling: structures per second of the whole sampler.
        calls: network calls per sample there.
        peak: float32 operations per second of large products of matrices, by the same framework.
        deployed_calls: network calls per sample that the run itself asks for.
        diffcsp_pp_flops: operations of DiffCSP++ as published for one of these structures, all its
            calls together, nothing padded.
    """

    cell: str
    parameters: int
    edges: float
    flops_per_call: float
    training: float
    sampling: float
    calls: int
    peak: float
    deployed_calls: int
    diffcsp_pp_flops: float

    @property
    def training_share(self) -> float:
        """Operations of the network per second of training, over the peak."""
        return self.training * PASSES_OF_STEP * self.flops_per_call / self.peak

    @property
    def sampling_share(self) -> float:
        """Operations of the network per second of sampling, over the peak."""
        return self.sampling * self.calls * self.flops_per_call / self.peak

    @property
    def flops_per_sample(self) -> float:
        """Operations of all calls that the run's own sampler makes for one structure."""
        return self.deployed_calls * self.flops_per_call

    @property
    def saving(self) -> float:
        """How many times as many operations DiffCSP++ spends on one structure."""
        return self.diffcsp_pp_flops / self.flops_per_sample

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        derived = ("training_share", "sampling_share", "flops_per_sample", "saving")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class StepCost:
    """What a training step costs, on average over an epoch.

    Attributes:
        seconds: per step, data preparation included.
        flops: floating-point operations per step; see ``network_flops``.
        epoch: steps in which every row comes once, on average.
    """

    seconds: float
    flops: float
    epoch: float


def network_speed(
    trainer: BaseTrainer,
    generator: BaseGenerator,
    records: list[Record],
    calls: int,
    parameters: int,
    peak: float,
) -> NetworkSpeed:
    """Measures training and sampling.

    Buckets are timed one by one at their full batch size, and weighted by their crystals. Weights
    may be untrained ones, which cost what trained ones cost.

    Args:
        trainer: of the records.
        generator: of the same network.
        records: the crystals.
        calls: network calls per sample.
        parameters: of the network.
        peak: of the machine, see ``product_speed``.
    """
    groups = trainer.data.buckets
    weights = [group.batch.size for group in groups]
    total = sum(weights)
    shapes = [group.batch.shape for group in groups]
    model, diffusion = trainer.config.model, trainer.config.diffusion
    flops = [network_flops(model, *shape) for shape in shapes]
    seconds = sum(w * _training_seconds(trainer, i) for i, w in enumerate(weights))
    return NetworkSpeed(
        cell=model.cell,
        parameters=parameters,
        edges=sum(w * t * a for w, (t, a) in zip(weights, shapes, strict=True)) / total,
        flops_per_call=sum(w * f for w, f in zip(weights, flops, strict=True)) / total,
        training=total / seconds,
        sampling=1 / _sampling_seconds(generator, records, calls),
        calls=network_calls(diffusion, calls),
        peak=peak,
        deployed_calls=network_calls(diffusion),
        diffcsp_pp_flops=diffcsp_pp_flops(records),
    )


def product_speed(multiply: Callable[[], object]) -> float:
    """Operations per second of the product of two square matrices: the median of several.

    Args:
        multiply: computes one such product of width ``PEAK_WIDTH``, and waits for it.
    """
    multiply()  # threads and buffers
    seconds = []
    for _ in range(PEAK_PRODUCTS):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2 * PEAK_WIDTH**3 / statistics.median(seconds)


def diffcsp_pp_flops(records: Sequence[Record]) -> float:
    """Operations that DiffCSP++ as published spends on one of the crystals, on average.

    Its implementation pads nothing: the crystals' own numbers of atoms count.
    """
    return sampling_flops(DIFFCSP_PP, DIFFCSP_PP_CALLS, records)


def sampling_flops(config: ModelConfig, calls: int, records: Sequence[Record]) -> float:
    """Operations of all network calls for one of the crystals, on average, nothing padded.

    Args:
        config: of the network.
        calls: per sample.
        records: the crystals, of which the sizes count.
    """
    sizes = [view_sizes(record.crystal, config.cell) for record in records]
    return calls * statistics.fmean(network_flops(config, *size) for size in sizes)


def most_common(records: list[Record], cell: View, count: int) -> list[Record]:
    """The crystals of the most common sizes.

    Args:
        records: the crystals.
        cell: view in which they are measured.
        count: of different sizes that are kept.
    """
    shapes = [bucket(record.crystal, cell, FINE) for record in records]
    kept = {shape for shape, _ in Counter(shapes).most_common(count)}
    return [record for record, shape in zip(records, shapes, strict=True) if shape in kept]


def measure_apart(
    backend: str, config: RunConfig, records: list[Record], calls: int, threads: int
) -> NetworkSpeed:
    """``network_speed`` in a process of its own: frameworks in one disturb each other's threads.

    Args:
        backend: as in ``common.backend.load_backend``.
        config: network and batch sizes.
        records: the crystals.
        calls: network calls per sample.
        threads: CPU threads.
    """
    speed: NetworkSpeed = apart(
        measured_with, backend, "benchmark", (config, records, calls, threads)
    )
    return speed


def measure_sizes_apart(
    backend: str, config: RunConfig, records: list[Record], calls: int, threads: int
) -> list[SizeCost]:
    """``common.size_cost.measure_sizes`` likewise; arguments as in ``measure_apart``."""
    costs: list[SizeCost] = apart(
        measured_with, backend, "benchmark_sizes", (config, records, calls, threads)
    )
    return costs


def measure_steps_apart(
    backend: str, configs: list[RunConfig], steps: int, threads: int, device: str
) -> list[StepCost]:
    """``step_costs`` of runs on the same rows, likewise.

    Args:
        backend: as in ``common.backend.load_backend``.
        configs: the runs.
        steps: of each that are timed.
        threads: CPU threads.
        device: as in ``common.backend.load_backend``.
    """
    costs: list[StepCost] = apart(
        measured_with, backend, "benchmark_steps", (configs, steps, threads, device)
    )
    return costs


def measured_with(backend: str, function: str, arguments: tuple[Any, ...]) -> Any:
    """What a function of a backend returns; sent to a process of its own."""
    return getattr(load_backend(backend), function)(*arguments)


def step_costs(trainers: Sequence[BaseTrainer], steps: int) -> list[StepCost]:
    """What a training step costs each of several runs, on average over an epoch.

    They take their steps in turn, so that whatever else the machine does slows all of them alike.
    The same batches come twice and are timed the second time, when every shape is compiled. A step
    is taken to last as long as its operations are many, which corrects for the batches' sizes.

    Args:
        trainers: of one framework.
        steps: of each that are timed.
    """
    plans = [list(islice(one.data.batches(one.config.train.seed, 0), steps)) for one in trainers]
    seconds = [0.0] * len(trainers)
    for timed in (False, True):
        for step in range(steps):
            for index, trainer in enumerate(trainers):
                seconds[index] += timed * _step_seconds(trainer, plans[index][step])
    costs = []
    for trainer, own, spent in zip(trainers, plans, seconds, strict=True):
        epoch = trainer.data.epoch
        flops = _epoch_flops(trainer) / epoch
        costs.append(StepCost(spent * flops / training_flops(trainer, own), flops, epoch))
    return costs


def training_flops(trainer: BaseTrainer, plans: Sequence[BatchPlan]) -> float:
    """Operations of training steps on some batches, padding included."""
    flops = _bucket_flops(trainer)
    return PASSES_OF_STEP * sum(len(plan.rows) * flops[plan.bucket] for plan in plans)


def _epoch_flops(trainer: BaseTrainer) -> float:
    """The same where every row comes once."""
    buckets = zip(trainer.data.buckets, _bucket_flops(trainer), strict=True)
    return PASSES_OF_STEP * sum(group.batch.size * flops for group, flops in buckets)


def _bucket_flops(trainer: BaseTrainer) -> list[float]:
    """Of the network for a crystal of each bucket."""
    shapes = [group.batch.shape for group in trainer.data.buckets]
    return [network_flops(trainer.config.model, *shape) for shape in shapes]


def _training_seconds(trainer: BaseTrainer, index: int) -> float:
    """Seconds per structure of a bucket."""
    group = trainer.data.buckets[index]
    row = np.arange(group.batch_size)
    plan = BatchPlan(index, row % group.batch.size, row < group.batch.size)
    _step_seconds(trainer, plan)
    seconds = sum(_step_seconds(trainer, plan) for _ in range(TIMED_STEPS))
    return seconds / (TIMED_STEPS * group.batch_size)


def _step_seconds(trainer: BaseTrainer, plan: BatchPlan) -> float:
    """Seconds of a training step on a batch, its preparation included."""
    start = time.perf_counter()
    trainer.train_step(trainer.prepare(plan, trainer.step))
    return time.perf_counter() - start


def _sampling_seconds(generator: BaseGenerator, records: list[Record], calls: int) -> float:
    """Seconds per structure when every call of the network is full, as in a long run."""
    groups: dict[tuple[int, int], list[SampleRequest]] = {}
    for record in records:
        request = SampleRequest.of(record.crystal, record.material_id, {})
        shape = bucket(record.crystal, generator.config.model.cell, generator.sizes)
        groups.setdefault(shape, []).append(request)
    seconds = 0.0
    for shape, requests in groups.items():
        size = generator.rows_per_call(shape) * generator.parallel_calls
        full = [requests[i % len(requests)] for i in range(size)]
        generator.sample(full, 0, 1)
        start = time.perf_counter()
        generator.sample(full, 0, calls)
        seconds += len(requests) / size * (time.perf_counter() - start)
    return seconds / len(records)


def network_flops(config: ModelConfig, tokens: int, atoms: int) -> float:
    """Operations of one network call for one structure of a bucket (T, A), products only.

    What is spent on weights alone, once per call, is left out.
    """
    width, edge_width, edges = config.width, config.edge_width, tokens * atoms
    square = width * width
    attention = config.attention
    parts = 1 + int(attention) + int(config.feed_forward > 0)
    weighted = config.heads if config.aggregation == "softmax" else 1
    # Multiplications of one block, per edge, per token and per structure.
    of_edge = width * (edge_width + weighted)
    of_token = square * (6 + 4 * attention + 2 * config.feed_forward)
    of_token += 2 * width * tokens * attention
    of_structure = square * (3 * attention + 3 * parts * config.modulation)
    frames = 2 if config.frames else 1
    geometry = 9 * frames + (9 + 3 * NUM_IMAGES if config.distances else 0)
    features = frames * 6 * config.frequencies
    features += DISTANCE_FEATURES if config.distances else 0
    of_edge = config.layers * of_edge + geometry + edge_width * (features + edge_width) + 2 * width
    of_token = config.layers * of_token + square + 17 * width
    of_structure = config.layers * of_structure
    of_structure += width * (TIME_WIDTH + 12 + 6) + 6 * edge_width
    of_structure += square * (3 + len(config.properties))
    return 2.0 * (edges * of_edge + tokens * of_token + of_structure)


def labelling_speed(cifs: Sequence[str]) -> float:
    """Rows per second parsed and labelled by one process."""
    label_structure(parse_cif(cifs[0]))  # imports and tables
    start = time.perf_counter()
    for cif in cifs:
        label_structure(parse_cif(cif))
    return len(cifs) / (time.perf_counter() - start)
