"""What `uni-mdm bench` reports, on two crystals and a tiny network."""

from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import common.speed
from common.backend import SampleRequest
from common.config import DiffusionConfig, ModelConfig, RunConfig, TrainConfig, load_config
from common.crystal.structure import Crystal, Site
from common.data.batch import BatchItem, Sizes, collate, symmetry_only
from common.data.loader import BatchPlan
from common.data.store import Record
from common.diffusion.score import network_calls
from common.diffusion.training import TrainingBatch
from common.size_cost import Law, requests_by_size
from common.speed import (
    DIFFCSP_PP,
    PEAK_PRODUCTS,
    PEAK_WIDTH,
    NetworkSpeed,
    diffcsp_pp_flops,
    network_flops,
    product_speed,
    step_costs,
    training_flops,
)
from tests.networks import fitted, noise_of, random_items
from torch_impl.bench import benchmark, benchmark_sizes, gemm_peak
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.generator import Generator
from torch_impl.tensors import TensorBatch
from torch_impl.train_dit import Trainer

RECORDS = [
    Record("salt", Crystal(225, (Site(11, "a"), Site(17, "b")), np.eye(3) * 5.64)),
    Record("rutile", Crystal(136, (Site(22, "a"), Site(8, "f", (0.305, 0.0, 0.0))), np.eye(3) * 4)),
]

Shape = tuple[int, ...]


def counting() -> FlopCounterMode:
    """Counts the products of matrices, with those of attention on CPUs, which torch leaves out."""

    def of_shapes(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        return int(sdpa_flop_count(query, key, value))

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: of_shapes})


def run(cell: str) -> RunConfig:
    model = ModelConfig(
        cell=cell, frames=cell == "asymmetric", layers=1, width=16, edge_width=16, heads=2
    )
    return RunConfig(name="tiny", model=model, train=TrainConfig(batch_size=4, edge_budget=256))


def test_edges_operations_and_speeds() -> None:
    threads = torch.get_num_threads()
    asymmetric, conventional = (
        benchmark(run(cell), RECORDS, calls=1, threads=1) for cell in ("asymmetric", "conventional")
    )
    torch.set_num_threads(threads)
    # Padded tokens x atoms: salt 2 x 4 and 8 x 8, rutile 2 x 8 and 8 x 8.
    assert asymmetric.edges == (2 * 4 + 2 * 8) / 2
    assert conventional.edges == 8 * 8
    assert asymmetric.parameters > conventional.parameters  # it reads a second frame
    assert conventional.flops_per_call > 2 * asymmetric.flops_per_call
    for speed in (asymmetric, conventional):
        assert speed.training > 0
        assert speed.sampling > 0
        assert speed.peak > 0
        assert (speed.calls, speed.deployed_calls) == (1, 50)
        assert speed.flops_per_sample == 50 * speed.flops_per_call
        assert speed.diffcsp_pp_flops == diffcsp_pp_flops(RECORDS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cell": "conventional", "frames": False},
        {"attention": False, "aggregation": "mean", "distances": False, "frames": False},
        {"feed_forward": 0, "modulation": False, "properties": ()},
        DIFFCSP_PP.model_dump() | {"layers": 2, "width": 64, "edge_width": 48},
    ],
)
def test_operations_are_those_that_torch_counts(settings: dict[str, object]) -> None:
    """In a batch so large that what is spent on weights alone does not show."""
    config = ModelConfig.model_validate({"layers": 2, "width": 64, "edge_width": 48} | settings)
    items: list[BatchItem] = random_items([(12, "aij"), (62, "cd")]) * 256
    batch = collate(items, config.cell)
    tensors = TensorBatch.from_batch(batch, fitted(items), config.properties)
    noise = [torch.from_numpy(x) for x in noise_of(batch)]
    with torch.inference_mode(), counting() as counter:
        CrystalDiT(config)(tensors, *noise)
    counted = counter.get_total_flops() / batch.size
    assert np.isclose(network_flops(config, *batch.shape), counted, rtol=0.01)


def test_published_setting_is_the_one_that_is_trained() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs"
    assert load_config(folder / "diffcsp_pp.yaml").model == DIFFCSP_PP


@pytest.mark.parametrize(
    ("stem", "millions"),
    [
        ("crystal_dit_small_fm", 2.1),
        ("diffcsp_pp_small", 2.0),
        ("crystal_dit_paper_fm", 11.9),
        ("crystal_dit_paper_bg", 11.9),
        ("diffcsp_pp", 13.0),
    ],
)
def test_parameters_are_as_many_as_the_files_say(stem: str, millions: float) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / f"{stem}.yaml"
    assert f"{millions} million" in path.read_text()
    with torch.device("meta"):
        model = CrystalDiT(load_config(path).model)
    assert round(sum(p.numel() for p in model.parameters()) * 1e-6, 1) == millions


def test_narrow_diffcsp_pp_differs_in_width_alone() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs"
    narrow, published = (load_config(folder / f"diffcsp_pp{x}.yaml") for x in ("_small", ""))
    assert narrow.diffusion == published.diffusion
    width = {"width": DIFFCSP_PP.width, "edge_width": DIFFCSP_PP.edge_width}
    assert narrow.model.model_copy(update=width) == DIFFCSP_PP


def test_operations_of_the_published_sampler() -> None:
    """On conventional cells of 8 and 6 atoms, without the padding that this repository adds."""
    calls = [network_flops(DIFFCSP_PP, atoms, atoms) for atoms in (8, 6)]
    assert diffcsp_pp_flops(RECORDS) == pytest.approx(1000 * sum(calls))
    assert diffcsp_pp_flops(RECORDS[:1]) == pytest.approx(2000 * calls[0])


def test_shares_of_the_peak() -> None:
    """Five structures a second, three forward passes of 2 FLOP each, are 30 of the peak's 120."""
    figures = NetworkSpeed(
        cell="asymmetric",
        parameters=1,
        edges=1.0,
        flops_per_call=2.0,
        training=5.0,
        sampling=3.0,
        calls=10,
        peak=120.0,
        deployed_calls=50,
        diffcsp_pp_flops=7000.0,
    )
    assert figures.training_share == 0.25
    assert figures.sampling_share == 0.5
    assert figures.flops_per_sample == 100.0
    assert figures.saving == 70.0
    written = figures.to_dict()
    assert (written["training_share"], written["sampling_share"]) == (0.25, 0.5)
    assert replace(figures, peak=240.0).sampling_share == 0.25


class Clock:
    """What ``time.perf_counter`` says; every step takes as long as its operations are many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *trainers: Trainer) -> None:
        self.now = 0.0
        self.turns: list[int] = []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        for index, trainer in enumerate(trainers):
            step = partial(self._step, index, trainer)
            monkeypatch.setattr(trainer, "train_step", step)
            monkeypatch.setattr(trainer, "prepare", lambda plan, _: plan)

    def _step(self, index: int, trainer: Trainer, plan: BatchPlan) -> None:
        first = index not in self.turns  # when shapes are compiled
        self.turns.append(index)
        self.now += 100 * first + (1 + index) * 1e-9 * training_flops(trainer, [plan])


def test_costs_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch's average, from a step that is not like the average; compilation is left out."""
    records = RECORDS * 4
    trainers = [Trainer(run(cell), records, records) for cell in ("asymmetric", "conventional")]
    clock = Clock(monkeypatch, *trainers)
    costs = step_costs(trainers, 1)
    assert clock.turns == [0, 1, 0, 1]
    for index, (trainer, cost) in enumerate(zip(trainers, costs, strict=True)):
        plans = list(islice(trainer.data.batches(0, 0), 600))
        mean = training_flops(trainer, plans) / len(plans)
        rows = sum(group.batch.size for group in trainer.data.buckets)
        assert cost.epoch == pytest.approx(rows * len(plans) / sum(len(p.rows) for p in plans), 0.1)
        assert cost.flops == pytest.approx(mean, rel=0.01)
        assert cost.seconds == pytest.approx((1 + index) * 1e-9 * cost.flops)
    (step,) = [plan for plan in trainers[0].data.once() if plan.bucket == 0][:1]
    # Three passes of a batch of four crystals of 2 x 4 edges.
    single = network_flops(trainers[0].config.model, 2, 4)
    assert training_flops(trainers[0], [step]) == 3 * 4 * single


def test_preparation_counts_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(run("asymmetric"), RECORDS, RECORDS)
    clock = [0.0]
    true = trainer.prepare

    def slow(*arguments: Any) -> TrainingBatch:
        clock[0] += 5.0
        return true(*arguments)

    monkeypatch.setattr(trainer, "prepare", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    batches = trainer.timed_batches()
    for _ in range(2):
        trainer.train_step(next(batches))
    assert trainer.seconds == 10.0


@pytest.mark.parametrize("kind", ["flow", "score"])
@pytest.mark.parametrize("asked", [None, 1, 5, 6, 7, 20])
def test_calls_are_those_that_the_sampler_makes(kind: str, asked: int | None) -> None:
    config = run("asymmetric")
    diffusion = DiffusionConfig.model_validate({"kind": kind, "steps": 5, "timesteps": 4})
    config = config.model_copy(update={"diffusion": diffusion})
    model = CrystalDiT(config.model)
    generator = Generator(config, model, fitted(random_items()), "cpu")
    made: list[int] = []
    model.register_forward_hook(lambda *_: made.append(1))
    generator.sample([SampleRequest(225, ((11, "a"), (17, "b")))], 0, asked)
    assert network_calls(diffusion, asked) == len(made)
    of_score = {None: 7, 1: 3, 20: 7, 6: 5}
    assert len(made) == (of_score.get(asked, asked) if kind == "score" else asked or 5)
    assert network_calls(diffusion, len(made)) == len(made), "what was made can be asked for"


def test_peak_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product, which starts the threads, does not count, nor does a slow one decide."""
    durations = iter([50.0, 2.0, 9.0, 2.0, 1.0, 100.0])
    clock = [0.0]

    def multiply() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(common.speed.time, "perf_counter", lambda: clock[0])
    assert product_speed(multiply) == 2 * PEAK_WIDTH**3 / 2.0


def test_products_are_those_that_are_counted() -> None:
    with counting() as counter:
        assert gemm_peak() > 0
    assert counter.get_total_flops() == (1 + PEAK_PRODUCTS) * 2 * PEAK_WIDTH**3


def test_cost_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call keeps to its budget of edges, or has one crystal: that of 52 sites, and large ones."""
    monkeypatch.setattr("common.size_cost.ATOMS", (4, 52))
    threads = torch.get_num_threads()
    costs = benchmark_sizes(run("asymmetric"), RECORDS, calls=1, threads=2)
    torch.set_num_threads(threads)
    budget = Generator.edges_per_call
    sizes = [(cost.space_group, cost.tokens, cost.atoms) for cost in costs]
    assert sizes == [
        *[(10, 1, 4), (2, 2, 4), (1, 4, 4), (10, 13, 52), (2, 26, 52), (1, 52, 52)],
        *[(10, 50, 200), (2, 100, 200), (1, 200, 200)],
    ]
    assert [cost.is_large for cost in costs] == [False] * 6 + [True] * 3
    for cost in costs:
        assert cost.seconds > 0
        assert cost.size <= cost.padded_edges * 2 / cost.in_flight  # two calls at once
        if not cost.is_large:
            most = 64 * 64 if cost.tokens == 52 else budget
            assert budget / 4 < cost.padded_edges <= most
    assert [cost.in_flight for cost in costs[:6:5]] == [2 * budget // (2 * 4), 2 * 1]
    assert [cost.in_flight for cost in costs[6:]] == [2, 2, 2]


def counted(generator: Generator, request: SampleRequest) -> float:
    """Operations that torch counts while one crystal is sampled with one call."""
    with counting() as counter:
        (crystal,) = generator.sample([request], 0, 1)
    assert (
        crystal.num_primitive_atoms == len(request.sites) * {1: 1, 2: 2, 10: 4}[crystal.space_group]
    )
    return float(counter.get_total_flops())


def departures(cell: str, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Of operations against sites x atoms, from 8 atoms to 200.

    Returns:
        the exponent, and how many times as much as the line says the worst crystal takes.
    """
    config = run(cell)
    generator = Generator(config, CrystalDiT(config.model), fitted(random_items()), "cpu")
    monkeypatch.setattr(generator, "parallel_calls", 1)  # what other threads do is not counted
    monkeypatch.setattr(generator, "edges_per_call", 1)
    monkeypatch.setattr(generator, "sizes", Sizes((), (), 1))  # nothing is padded
    requests = requests_by_size("asymmetric", (8, 12, 20, 36, 52, 100, 200))
    made = [symmetry_only(request.space_group, request.sites) for request in requests]
    sizes = [len(crystal.sites) * crystal.num_primitive_atoms for crystal in made]
    operations = [counted(generator, request) for request in requests]
    law = Law.fit(sizes, operations)
    ratios = np.array(operations) / law.at(np.array(sizes, float))
    return law.exponent, float(np.exp(np.abs(np.log(np.abs(ratios))).max()))


def test_operations_grow_as_sites_times_atoms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed, in whole samples; with one token per atom they do not."""
    exponent, worst = departures("asymmetric", monkeypatch)
    assert 0.9 < exponent < 1.02
    assert worst < 1.15
    _, worst_per_atom = departures("conventional", monkeypatch)
    assert worst_per_atom > 2
