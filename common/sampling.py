"""Sampling crystals from a checkpoint, as far as it needs no network: calls, noise, crystals.

A backend's generator adds the network and the sampler.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.backend import SampleRequest
from common.checkpoint import Checkpoint, load_checkpoint
from common.config import RunConfig, parse_config
from common.crystal.lattice import k_to_lattice
from common.crystal.structure import Crystal, Site
from common.crystal.wyckoff import Sites
from common.data.batch import (
    FINE,
    Batch,
    BatchItem,
    Precedent,
    Sizes,
    View,
    bucket,
    collate,
    symmetry_only,
)
from common.diffusion.flow import starting_points
from common.diffusion.noise import noise
from common.diffusion.scaler import Standardizer
from common.diffusion.score import ScoreProcess, score_process
from common.precedents import PrecedentIndex, load_precedents
from common.weights import statistics

#: Digits kept of a free coordinate.
COORDINATE_DIGITS = 6

Array = NDArray[np.float32]
#: Free parameters [B,S,3] in [0,1) and standardised lattice numbers [B,6].
Solution = tuple[Array, Array]


@dataclass(frozen=True)
class Call:
    """Crystals that are sampled together.

    Attributes:
        rows: of the requests, without the padding; several where these get the same crystal.
        requests: [B], the first of each, the last ones repeated to fill the call.
        batch: their symmetry and properties.
    """

    rows: list[list[int]]
    requests: list[SampleRequest]
    batch: Batch

    def draw(self, seed: int, field: str, level: int = 0, uniform: bool = False) -> Array:
        """Noise of all crystals: [B,6] for the field ``lattice``, else [B,S,3]."""
        sites = self.batch.free_params.shape[1]
        shape = (6,) if field == "lattice" else (sites, 3)
        rows = [
            noise(seed, r.key, r.sample, field, level, shape, "uniform" if uniform else "normal")
            for r in self.requests
        ]
        return np.stack(rows)


def calls(
    requests: Sequence[SampleRequest],
    view: View,
    sizes: Sizes,
    call_sizes: Callable[[int, tuple[int, int]], list[int]],
    precedents: Callable[[Crystal], list[Precedent]],
    noiseless: bool = False,
) -> Iterator[Call]:
    """The calls that sample all requests, bucket by bucket.

    Args:
        requests: what to sample.
        view: of the network.
        sizes: to which crystals are padded.
        call_sizes: see ``BaseGenerator``.
        precedents: what the samples of a symmetry start from in turn, if anything.
        noiseless: whether those that start from a precedent start right there. What is asked
            twice of one precedent is then sampled once.
    """
    known: dict[tuple[int, Sites], list[Precedent]] = {}
    items: list[BatchItem] = []
    rows_of: dict[Hashable, list[int]] = {}
    for row, request in enumerate(requests):
        crystal = symmetry_only(request.space_group, request.sites)
        symmetry = request.space_group, request.sites
        if symmetry not in known:
            known[symmetry] = precedents(crystal)
        found = known[symmetry]
        turn = request.sample % len(found) if found else None
        items.append(
            BatchItem(crystal, dict(request.properties), None if turn is None else found[turn])
        )
        told = tuple(sorted(request.properties.items()))
        start = (symmetry, told, turn) if noiseless and found else row
        rows_of.setdefault(start, []).append(row)
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for rows in rows_of.values():
        groups.setdefault(bucket(items[rows[0]].crystal, view, sizes), []).append(rows)
    # Those of most sites first, whose calls can be the longest: no thread waits for one at the end.
    for shape, group in sorted(groups.items(), reverse=True):
        rest = iter(group)
        for size in call_sizes(len(group), shape):
            chunk = list(islice(rest, size))
            padded = [chunk[i % len(chunk)][0] for i in range(size)]
            batch = collate([items[i] for i in padded], view, shape)
            yield Call(chunk, [requests[i] for i in padded], batch)


class BaseGenerator(ABC):
    """A checkpoint that samples crystals; see ``common.backend.Generator``.

    Args:
        config: of the run that trained it.
        standardizer: of the same.
        precedents: what it starts from, if it does.
    """

    #: Calls that ``solve`` is given at once, in threads of their own.
    parallel_calls = 1
    #: To which crystals are padded; always the same, for padding changes the last bits.
    sizes = FINE
    #: Padded edges in one call of the network at most, or one crystal.
    edges_per_call = 4096
    #: Crystals in a call are a multiple of this, or one: the last call of a bucket is filled up to
    #: the next. None: all calls of a bucket have one size, for a crystal's bytes, which are not to
    #: depend on what is sampled beside it, may hang on how many are in its call.
    row_step: int | None = None
    #: Where it samples, as the framework calls it.
    device: str

    def __init__(
        self,
        config: RunConfig,
        standardizer: Standardizer,
        precedents: PrecedentIndex | None = None,
    ) -> None:
        self.config = config
        self.standardizer = standardizer
        self.precedents = precedents

    @property
    def properties(self) -> tuple[str, ...]:
        """Names of the properties that the checkpoint was trained with."""
        return self.config.model.properties

    @property
    @abstractmethod
    def device_name(self) -> str:
        """What samples, in words, for reports."""

    @abstractmethod
    def solve(self, call: Call, seed: int, steps: int, process: ScoreProcess | None) -> Solution:
        """Runs the sampler.

        Args:
            call: the crystals.
            seed: of the noise.
            steps: network calls (flow).
            process: the noise levels (score), or None (flow).

        Returns:
            Free parameters [B,S,3] in [0,1) and standardised lattice numbers [B,6].
        """

    def sample(
        self,
        requests: Sequence[SampleRequest],
        seed: int,
        steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Crystal]:
        """One crystal per request; see ``common.backend.Generator.sample``."""
        settings = self.config.diffusion
        process = score_process(settings, steps)
        crystals: dict[int, Crystal] = {}
        solve = partial(self.solve, seed=seed, steps=steps or settings.steps, process=process)
        waiting = calls(
            requests,
            self.config.model.cell,
            self.sizes,
            self.call_sizes,
            self.precedents_of,
            noiseless=process is None and settings.precedent_temperature == 0,
        )
        for call, (free, lattice) in self._solved(waiting, solve):
            found = zip(call.rows, self._crystals(call, free, lattice), strict=False)
            for rows, crystal in found:
                crystals.update(dict.fromkeys(rows, crystal))
            if progress is not None:
                progress(sum(map(len, call.rows)))
        return [crystals[index] for index in range(len(requests))]

    def precedents_of(self, crystal: Crystal) -> list[Precedent]:
        """What the samples of a symmetry start from in turn; empty for noise."""
        if self.precedents is None:
            return []
        return self.precedents.find(crystal, self.config.diffusion.precedents_in_turn)

    def rows_per_call(self, shape: tuple[int, int]) -> int:
        """Crystals in a full call of the network for a bucket (T, A); one, if less than a step."""
        rows = max(1, self.edges_per_call // (shape[0] * shape[1]))
        step = self.row_step or 1
        return max(1, rows - rows % step)

    def call_sizes(self, count: int, shape: tuple[int, int]) -> list[int]:
        """Crystals in each call for so many of a bucket (T, A), with those that only fill."""
        full = self.rows_per_call(shape)
        sizes = [full] * -(-count // full)
        if self.row_step is not None and (rest := count % full):
            sizes[-1] = min(full, -(-rest // self.row_step) * self.row_step)
        return sizes

    def start(self, call: Call, seed: int) -> Solution:
        """Where the sampler begins; see ``Solution``."""
        return starting_points(
            call.batch,
            self.standardizer,
            self.config.diffusion,
            call.draw(seed, "free", uniform=True),
            call.draw(seed, "free"),
            call.draw(seed, "lattice"),
            self.config.diffusion.precedent_temperature,
        )

    def _solved(
        self, waiting: Iterator[Call], solve: Callable[[Call], Solution]
    ) -> Iterator[tuple[Call, Solution]]:
        """Calls with what came out of them, in their order."""
        if self.parallel_calls == 1:
            yield from ((call, solve(call)) for call in waiting)
            return
        pool = ThreadPoolExecutor(self.parallel_calls)
        try:
            at_once = list(waiting)
            yield from zip(at_once, pool.map(solve, at_once), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after an interruption nothing more is begun

    def _crystals(self, call: Call, free: Array, lattice: Array) -> list[Crystal]:
        batch = call.batch
        scale = self.standardizer.lattice_scales(batch)
        lattices = k_to_lattice(self.standardizer.lattice_center(batch) + scale * lattice)
        params = np.where(batch.free_mask, free.astype(float), 0.0)
        params = np.mod(np.round(params, COORDINATE_DIGITS), 1.0)
        return [
            Crystal(
                request.space_group,
                tuple(
                    Site(number, letter, tuple(params[row, site].tolist()))
                    for site, (number, letter) in enumerate(request.sites)
                ),
                lattices[row],
            )
            for row, request in enumerate(call.requests)
        ]


def read_checkpoint(
    folder: Path,
) -> tuple[RunConfig, Standardizer, PrecedentIndex | None, Checkpoint]:
    """Settings, statistics, precedents and everything else of a checkpoint folder.

    Raises:
        UserError: if it is unreadable or damaged.
    """
    saved = load_checkpoint(folder)
    config = parse_config(saved.config, f"{folder}/config.yaml")
    standardizer = statistics(saved.model, folder)
    precedents = None
    if config.model.precedents:
        precedents = load_precedents(saved.path, saved.fingerprint, standardizer.element_volume)
    return config, standardizer, precedents, saved
