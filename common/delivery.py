"""How long a user waits for crystals of a trained checkpoint, and what the time goes into."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from common.backend import SampleRequest
from common.crystal.structure import Crystal
from common.data.batch import Precedent
from common.data.store import Record
from common.diffusion.score import network_calls
from common.machine import apart
from common.sampling import BaseGenerator, Call, Solution
from common.speed import diffcsp_pp_flops, measured_with, network_flops

#: Of the noise: that of `uni-mdm evaluate` where none is given.
SEED = 0


@dataclass(frozen=True)
class Delivery:
    """What the crystals of a trained checkpoint took.

    Attributes:
        crystals: so many, one of each symmetry that was asked for.
        loading: seconds until the checkpoint could be asked, the framework's own start left out.
        precedents: seconds in which known crystals to start from were found; zero where none are.
        network: seconds in which at least one call of the sampler ran.
        other: seconds of all else, from the first symmetry to the last crystal.
        calls: network calls per crystal.
        flops: floating-point operations of all calls for one crystal as they were computed, with
            all padding; see ``common.speed.network_flops``.
        diffcsp_pp_flops: those of DiffCSP++ as published, nothing padded.
        peak: operations per second of large products of matrices, by the same framework.
        device: in words.
    """

    crystals: int
    loading: float
    precedents: float
    network: float
    other: float
    calls: int
    flops: float
    diffcsp_pp_flops: float
    peak: float
    device: str

    @property
    def seconds(self) -> float:
        """Of everything."""
        return self.loading + self.precedents + self.network + self.other

    @property
    def share(self) -> float:
        """Operations per second while the network worked, over the peak."""
        return self.crystals * self.flops / self.network / self.peak

    @property
    def saving(self) -> float:
        """How many times as many operations DiffCSP++ spends on one crystal."""
        return self.diffcsp_pp_flops / self.flops

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        derived = ("seconds", "share", "saving")
        return asdict(self) | {name: getattr(self, name) for name in derived}


class Stopwatch:
    """Seconds during which at least one thread was in its block.

    Attributes:
        seconds: so far, once no thread is in it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self.seconds += time.perf_counter() - self._since


def deliver(
    load: Callable[[], BaseGenerator],
    records: Sequence[Record],
    peak: float,
    calls: int | None = None,
) -> tuple[Delivery, list[Crystal]]:
    """Samples one crystal for the symmetry and properties of every record, and times it.

    They are the crystals that `uni-mdm evaluate --given symmetry` matches with the records. Nothing
    is warmed up: what the first calls take longer is in the network's time.

    Args:
        load: the checkpoint.
        records: what to sample.
        peak: see ``Delivery``.
        calls: network calls per crystal that are asked for; the checkpoint's own number without.

    Returns:
        the times, and the crystals in their order.
    """
    loading, precedents, network, whole = (Stopwatch() for _ in range(4))
    computed: list[float] = []
    with Progress() as progress:
        task = progress.add_task("Loading", total=None)
        with loading:
            generator = load()
        find, solve, model = generator.precedents_of, generator.solve, generator.config.model

        def timed_find(crystal: Crystal) -> list[Precedent]:
            with precedents:
                found = find(crystal)
            progress.advance(task)
            return found

        def timed_solve(call: Call, **settings: Any) -> Solution:
            computed.append(call.batch.size * network_flops(model, *call.batch.shape))
            with network:
                return solve(call, **settings)

        def sampled(count: int) -> None:
            progress.advance(sampling, count)

        generator.precedents_of = timed_find  # type: ignore[method-assign]
        generator.solve = timed_solve  # type: ignore[method-assign,assignment]
        requests = [
            SampleRequest.of(
                record.crystal,
                record.material_id,
                {n: v for n in generator.properties if (v := record.properties[n]) is not None},
            )
            for record in records
        ]
        symmetries = {(request.space_group, request.sites) for request in requests}
        progress.update(task, description="Finding precedents", total=len(symmetries))
        sampling = progress.add_task("Sampling", total=len(requests))
        with whole:
            crystals = generator.sample(requests, SEED, calls, sampled)
    made = network_calls(generator.config.diffusion, calls)
    times = Delivery(
        crystals=len(crystals),
        loading=loading.seconds,
        precedents=precedents.seconds,
        network=network.seconds,
        other=whole.seconds - precedents.seconds - network.seconds,
        calls=made,
        flops=made * sum(computed) / len(crystals),
        diffcsp_pp_flops=diffcsp_pp_flops(records),
        peak=peak,
        device=generator.device_name,
    )
    return times, crystals


def deliver_apart(
    backend: str,
    checkpoint: Path,
    records: list[Record],
    threads: int,
    device: str,
    calls: int | None = None,
) -> Delivery:
    """``deliver`` in a process of its own; see ``common.speed.measure_apart``."""
    arguments = (checkpoint, records, threads, device, calls)
    times: Delivery = apart(measured_with, backend, "benchmark_delivery", arguments)
    return times
