"""What `uni-mdm bench` measures, whatever the framework."""

import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.backend import SampleRequest, load_backend
from common.config import DiffusionConfig, ModelConfig, RunConfig
from common.data.batch import FINE, View, bucket, view_sizes
from common.data.cif import parse_cif
from common.data.label import label_structure
from common.data.loader import BatchPlan
from common.data.store import Record
from common.diffusion.score import score_process
from common.sampling import BaseGenerator
from common.size_cost import SizeCost
from common.training import BaseTrainer

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


def network_calls(config: DiffusionConfig, calls: int | None = None) -> int:
    """Network calls that the sampler makes per structure.

    Args:
        config: of the run.
        calls: so many are asked for; the run's own number without it.
    """
    process = score_process(config, calls)
    # The last level has no corrector.
    return calls or config.steps if process is None else 2 * process.timesteps - 1


def diffcsp_pp_flops(records: Sequence[Record]) -> float:
    """Operations that DiffCSP++ as published spends on one of the crystals, on average.

    Its implementation pads nothing: the crystals' own numbers of atoms count.
    """
    sizes = [view_sizes(record.crystal, DIFFCSP_PP.cell) for record in records]
    return DIFFCSP_PP_CALLS * statistics.fmean(network_flops(DIFFCSP_PP, *size) for size in sizes)


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
    speed: NetworkSpeed = _apart(backend, "benchmark", config, records, calls, threads)
    return speed


def measure_sizes_apart(
    backend: str, config: RunConfig, records: list[Record], calls: int, threads: int
) -> list[SizeCost]:
    """``common.size_cost.measure_sizes`` likewise; arguments as in ``measure_apart``."""
    costs: list[SizeCost] = _apart(backend, "benchmark_sizes", config, records, calls, threads)
    return costs


def _apart(backend: str, function: str, *arguments: Any) -> Any:
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(_measure, backend, function, arguments).result()


def _measure(backend: str, function: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(load_backend(backend), function)(*arguments)


def _training_seconds(trainer: BaseTrainer, index: int) -> float:
    """Seconds per structure of a bucket."""
    group = trainer.data.buckets[index]
    plan = BatchPlan(index, np.arange(group.batch_size) % group.batch.size)

    def step() -> None:
        trainer.train_step(trainer.prepare(trainer.data, plan, "train", trainer.step))

    step()
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    return (time.perf_counter() - start) / (TIMED_STEPS * group.batch_size)


def _sampling_seconds(generator: BaseGenerator, records: list[Record], calls: int) -> float:
    """Seconds per structure when every call of the network is full, as in a long run."""
    groups: dict[tuple[int, int], list[SampleRequest]] = {}
    for record in records:
        request = SampleRequest(
            record.crystal.space_group,
            tuple((site.atomic_number, site.letter) for site in record.crystal.sites),
            key=record.material_id,
        )
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
