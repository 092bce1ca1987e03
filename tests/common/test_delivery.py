"""What `uni-mdm bench --checkpoint` measures, with a sampler that needs no network."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from common.backend import SampleRequest
from common.config import RunConfig, parse_config
from common.crystal.structure import Crystal
from common.data.batch import Precedent, bucket
from common.data.store import Record
from common.delivery import Delivery, Stopwatch, deliver
from common.diffusion.score import ScoreProcess
from common.evaluate.controls import fit_standardizer
from common.evaluate.run import Evaluation, Told
from common.sampling import BaseGenerator, Call, Solution
from common.speed import diffcsp_pp_flops, network_flops
from tests.training import textbook_records

RECORDS = textbook_records()[:6]


class Clock:
    """What ``time.perf_counter`` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


class Slow(BaseGenerator):
    """Takes 1 s to be loaded, 2 s for each symmetry's precedents, 8 s per call, 64 s to begin."""

    device_name = "a clock"
    edges_per_call = 64

    def __init__(self, config: RunConfig, clock: Clock) -> None:
        super().__init__(config, fit_standardizer([record.crystal for record in RECORDS]))
        self.clock = clock
        self.asked: list[SampleRequest] = []
        self.solved: list[tuple[int, tuple[int, int]]] = []
        self.seeds: set[int] = set()
        clock.now += 1

    def sample(
        self,
        requests: Sequence[SampleRequest],
        seed: int,
        steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Crystal]:
        self.clock.now += 64
        self.asked += requests
        return super().sample(requests, seed, steps, progress)

    def precedents_of(self, crystal: Crystal) -> list[Precedent]:
        self.clock.now += 2
        return []

    def solve(self, call: Call, seed: int, steps: int, process: ScoreProcess | None) -> Solution:
        self.clock.now += 8
        self.solved.append((call.batch.size, call.batch.shape))
        self.seeds.add(seed)
        return self.start(call, seed)


def made(
    monkeypatch: pytest.MonkeyPatch, records: list[Record], calls: int | None = None
) -> tuple[Delivery, list[Crystal], Slow]:
    config = parse_config({"name": "slow", "train": {}}, "here")
    clock = Clock(monkeypatch)
    generators: list[Slow] = []

    def load() -> Slow:
        generators.append(Slow(config, clock))
        return generators[0]

    times, crystals = deliver(load, records, 1e9, calls)
    return times, crystals, generators[0]


def test_where_the_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    times, crystals, generator = made(monkeypatch, RECORDS)
    count = len(generator.solved)
    shapes = {bucket(record.crystal, "asymmetric") for record in RECORDS}
    assert count >= len(shapes) > 1
    assert times.loading == 1
    assert times.precedents == 2 * len({(r.space_group, r.sites) for r in generator.asked})
    assert times.network == 8 * count
    assert times.other == 64
    assert times.seconds == 1 + times.precedents + 8 * count + 64
    assert [crystal.space_group for crystal in crystals] == [
        record.crystal.space_group for record in RECORDS
    ]


def test_operations_are_those_of_whole_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that only fill a call are computed, too; DiffCSP++'s own are not padded."""
    times, _, generator = made(monkeypatch, RECORDS)
    model = generator.config.model
    rows = sum(size for size, _ in generator.solved)
    assert rows > len(RECORDS)
    computed = sum(size * network_flops(model, *shape) for size, shape in generator.solved)
    steps = generator.config.diffusion.steps
    assert times.calls == steps
    assert times.flops == pytest.approx(steps * computed / len(RECORDS))
    assert times.diffcsp_pp_flops == diffcsp_pp_flops(RECORDS)
    assert times.saving == times.diffcsp_pp_flops / times.flops
    # All operations, in the seconds of the calls alone, of 1e9 in each.
    assert times.share == pytest.approx(steps * computed / times.network / 1e9)
    few, _, _ = made(monkeypatch, RECORDS, 3)
    assert few.calls == 3
    assert few.flops == pytest.approx(times.flops * 3 / steps)
    assert few.to_dict()["saving"] == few.saving


def test_what_is_asked_is_what_an_evaluation_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetries, properties where there are any, names and seed; so are the crystals."""
    energies = (-1.0, None, 0.0, -2.5, -0.5, None)
    records = [
        Record(record.material_id, record.crystal, properties={"formation_energy": energy})
        for record, energy in zip(RECORDS, energies, strict=True)
    ]
    _, crystals, generator = made(monkeypatch, records)
    other = Slow(generator.config, generator.clock)
    evaluation = Evaluation(records, "x", records, "x", workers=1)
    told = Told.of(records, other.properties, "true", 0)
    evaluation.model(other, name="x", checkpoint="x", k=1, seed=0, steps=10, device="x", told=told)
    assert generator.asked == other.asked
    assert {"formation_energy": 0.0}.items() <= generator.asked[2].properties.items()
    assert "formation_energy" not in generator.asked[1].properties
    assert generator.seeds == other.seeds == {0}
    expected = Slow(generator.config, generator.clock).sample(generator.asked, 0)
    for crystal, same in zip(crystals, expected, strict=True):
        np.testing.assert_array_equal(crystal.lattice, same.lattice)


def test_a_stopwatch_of_several_threads_counts_every_second_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    first: Any = watch
    with first:
        clock.now = 3.0
        with watch:  # another thread's
            clock.now = 5.0
    clock.now = 100.0  # nobody is there
    with watch:
        clock.now = 101.0
    assert watch.seconds == 6.0
