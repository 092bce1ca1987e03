"""Samplers with networks that know the answer, and the backend that users call."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from common.backend import SampleRequest
from common.checkpoint import save_checkpoint, shipped
from common.config import DiffusionConfig, RunConfig
from common.crystal.lattice import k_constraints, lattice_to_k
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import nearest_zero, space_group
from common.data.batch import COARSE, FINE, Sizes
from common.diffusion.flow import VELOCITY_SCALE
from common.diffusion.score import ScoreProcess, score_process
from common.diffusion.wrapped_normal import score
from common.errors import UserError
from common.precedents import PrecedentIndex
from common.prior import load_prior
from common.sampling import Call, Solution
from common.weights import MODEL_PREFIX, STANDARDIZER_PREFIX
from tests.common.crystal.test_structure import holds
from tests.networks import SYSTEMS, fill_value, fitted, random_items, small
from torch_impl.backend import Generator, devices, load
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.generator import ROW_STEP, rows_are_alike
from torch_impl.sampler import sample_flow, sample_predictor_corrector
from torch_impl.tensors import TensorBatch

#: The networks here know the answer, and read no batch.
NO_BATCH = cast(TensorBatch, None)


def wrapped_distance(a: Tensor, b: Tensor) -> float:
    return float(np.abs(nearest_zero((a - b).double().numpy())).max())


# Flow


class KnownTarget:
    """The exact velocity field of a data set of one crystal."""

    def __init__(self, free: Tensor, lattice: Tensor) -> None:
        self.free, self.lattice, self.times = free, lattice, list[float]()

    def __call__(
        self, batch: TensorBatch, free: Tensor, lattice: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.times.append(float(t[0]))
        left = 1 - t[:, None]
        difference = self.free - free
        velocity = VELOCITY_SCALE * (difference - difference.round()) / left[..., None]
        return velocity, (self.lattice - lattice) / left


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_flow_lands_on_the_target(steps: int) -> None:
    torch.manual_seed(0)
    target = KnownTarget(torch.rand(4, 3, 3), torch.randn(4, 6))
    found = sample_flow(
        target, NO_BATCH, torch.rand(4, 3, 3), torch.randn(4, 6), steps, DiffusionConfig()
    )
    assert wrapped_distance(found[0], target.free) < 1e-5
    torch.testing.assert_close(found[1], target.lattice, atol=1e-5, rtol=1e-5)
    assert (found[0] >= 0).all()
    assert (found[0] < 1).all()
    np.testing.assert_allclose(target.times, np.arange(steps) / steps, atol=1e-6)


def test_velocity_boost() -> None:
    """A constant velocity carries 1 + boost * mean(t) times as far; the lattice as before."""

    def constant(
        batch: TensorBatch, free: Tensor, lattice: Tensor, t: Tensor
    ) -> tuple[Tensor, ...]:
        return VELOCITY_SCALE * torch.full_like(free, 0.1), torch.ones_like(lattice)

    config = DiffusionConfig(velocity_boost=2.0)
    free, lattice = sample_flow(
        constant,  # type: ignore[arg-type]
        NO_BATCH,
        torch.zeros(1, 2, 3),
        torch.zeros(1, 6),
        4,
        config,
    )
    torch.testing.assert_close(free, torch.full((1, 2, 3), 0.1 * (1 + 2.0 * 0.375)))
    torch.testing.assert_close(lattice, torch.ones(1, 6))


# Predictor and corrector


class KnownDistribution:
    """Exact scores where coordinates are wrapped normal around `centre`, the lattice normal."""

    def __init__(self, process: ScoreProcess, centre: float, spread: float) -> None:
        self.process, self.centre, self.spread = process, centre, spread
        self.mean, self.std = 0.7, 0.4
        self.calls = 0

    def __call__(
        self, batch: TensorBatch, free: Tensor, lattice: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        level = round(float(t[0]) * self.process.timesteps)
        sigma = float(np.hypot(self.spread, self.process.coordinates.sigmas[level]))
        gradient = score(free.double().numpy() - self.centre, sigma)
        gradient /= np.sqrt(self.process.coordinates.sigma_norm[level])
        signal = float(self.process.lattice.signal_scale[level])
        noise = float(self.process.lattice.noise_scale[level])
        variance = (signal * self.std) ** 2 + noise**2
        expected = noise * (lattice - signal * self.mean) / variance
        return torch.from_numpy(gradient.astype(np.float32)), expected


def sampled(step_lr: float, levels: int = 120) -> tuple[np.ndarray, np.ndarray, KnownDistribution]:
    process = ScoreProcess.of(levels, 0.005, 0.5)
    known = KnownDistribution(process, centre=0.9, spread=0.1)
    generator = torch.Generator().manual_seed(0)

    def draw(field: str, level: int) -> Tensor:
        assert field in ("corrector", "predictor", "lattice")
        return torch.randn((1000, 6) if field == "lattice" else (1000, 2, 3), generator=generator)

    free, lattice = sample_predictor_corrector(
        known,
        NO_BATCH,
        torch.rand(1000, 2, 3, generator=generator),
        torch.randn(1000, 6, generator=generator),
        process,
        DiffusionConfig(kind="score", step_lr=step_lr),
        draw,
    )
    assert (free >= 0).all()
    assert (free < 1).all()
    return free.double().numpy(), lattice.double().numpy(), known


@pytest.mark.parametrize("step_lr", [1e-6, 1e-5])
def test_predictor_corrector_draws_from_the_distribution(step_lr: float) -> None:
    free, lattice, known = sampled(step_lr)
    assert known.calls == 2 * 120 - 1  # no corrector at the last level
    moved = nearest_zero(free - known.centre)
    assert abs(moved.mean()) < 4 * 0.1 / np.sqrt(moved.size) + 0.002
    assert np.isclose(moved.std(), known.spread, rtol=0.06)
    # A normal law, not only its width.
    assert np.isclose((np.abs(moved) < 0.1).mean(), 0.683, atol=0.04)
    assert np.isclose(lattice.mean(), known.mean, atol=0.04)
    assert np.isclose(lattice.std(), known.std, rtol=0.06)


def test_score_of_another_distribution_is_noticed() -> None:
    """The test above would fail for a network that is wrong by a tenth of a cell."""
    process = ScoreProcess.of(60, 0.005, 0.5)
    shifted = KnownDistribution(process, centre=0.0, spread=0.1)
    generator = torch.Generator().manual_seed(0)
    free, _ = sample_predictor_corrector(
        shifted,
        NO_BATCH,
        torch.rand(300, 2, 3, generator=generator),
        torch.randn(300, 6, generator=generator),
        process,
        DiffusionConfig(kind="score"),
        lambda field, level: torch.randn(
            (300, 6) if field == "lattice" else (300, 2, 3), generator=generator
        ),
    )
    assert abs(nearest_zero(free.double().numpy() - 0.9).mean() - 0.1) < 0.02


@pytest.mark.parametrize("calls", [4, 10, 40, 2000, 9000])
def test_fewer_levels_are_those_of_training(calls: int) -> None:
    """A network is told t: the noise there must be that which it was trained with."""
    config = DiffusionConfig(kind="score")
    trained, fewer = score_process(config), score_process(config, calls)
    assert trained is not None
    assert fewer is not None
    assert fewer.timesteps == min(calls // 2, 1000)
    t = np.arange(1, fewer.timesteps + 1) / fewer.timesteps
    known = np.arange(1, 1001) / 1000
    expected = np.exp(np.interp(t, known, np.log(trained.coordinates.sigmas[1:])))
    np.testing.assert_allclose(fewer.coordinates.sigmas[1:], expected, rtol=1e-6)
    signal = np.interp(t, known, trained.lattice.signal_scale[1:])
    np.testing.assert_allclose(fewer.lattice.signal_scale[1:], signal, atol=0.012)


# The backend


def generator(
    kind: str = "flow",
    cell: str = "asymmetric",
    precedents: PrecedentIndex | None = None,
    temperature: float = 0.4,
) -> Generator:
    """An untrained network with no zero in it."""
    config = RunConfig(
        name="x",
        model=small(cell=cell, precedents=precedents is not None),
        diffusion=DiffusionConfig(
            kind=kind,  # type: ignore[arg-type]
            steps=4,
            timesteps=4,
            precedent_temperature=temperature,
        ),
    )
    model = CrystalDiT(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(fill_value(name, parameter.shape)))
    return Generator(config, model, fitted(random_items()), "cpu", precedents)


@pytest.fixture(scope="module", params=["flow", "score", "conventional"])
def sampler(request: pytest.FixtureRequest) -> Generator:
    if request.param == "conventional":
        return generator(cell="conventional")
    return generator(request.param)


def requests(count: int = 20) -> list[SampleRequest]:
    """Several symmetries, two samples of each and more, with and without properties."""
    made = []
    for index in range(count):
        group, letters = SYSTEMS[index % len(SYSTEMS)]
        sites = tuple((11 + i, letter) for i, letter in enumerate(letters))
        given = {"formation_energy": -1.0} if index % 2 else {}
        made.append(
            SampleRequest(group, sites, given, key=f"r{index % len(SYSTEMS)}", sample=index)
        )
    return made


def as_bytes(crystal: Crystal) -> bytes:
    return repr((crystal.space_group, crystal.sites)).encode() + crystal.lattice.tobytes()


def test_a_sample_depends_on_its_request_alone(sampler: Generator) -> None:
    asked = requests()
    together = [as_bytes(crystal) for crystal in sampler.sample(asked, seed=3)]
    order = np.random.default_rng(0).permutation(len(asked))
    shuffled = sampler.sample([asked[i] for i in order], seed=3)
    assert [as_bytes(crystal) for crystal in shuffled] == [together[i] for i in order]
    for index in (0, 5, 11, 19):
        (alone,) = sampler.sample([asked[index]], seed=3)
        assert as_bytes(alone) == together[index], index
    assert [as_bytes(crystal) for crystal in sampler.sample(asked, seed=3)] == together


@pytest.mark.parametrize("name", ["crystal_dit_small_fm", "crystal_dit_paper_bg"])
def test_shipped_networks_sample_the_same_beside_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 1 to 120 crystals at once, hence in calls of other sizes, and in full ones alone."""
    known = load_prior().reference
    asked = [
        SampleRequest.of(known.crystal(row), known.material_id(row), {})
        for row in np.random.default_rng(0).integers(len(known), size=120).tolist()
    ]
    sampler = load(shipped()[name], "cpu")
    together = [as_bytes(crystal) for crystal in sampler.sample(asked, seed=0)]
    for start, stop in ((0, 1), (1, 4), (4, 20), (20, 80)):
        part = sampler.sample(asked[start:stop], seed=0)
        assert [as_bytes(crystal) for crystal in part] == together[start:stop]

    def only_full(count: int, shape: tuple[int, int]) -> list[int]:
        rows = sampler.rows_per_call(shape)
        return [rows] * -(-count // rows)

    monkeypatch.setattr(sampler, "call_sizes", only_full)
    full = sampler.sample(asked[:30], seed=0)
    assert [as_bytes(crystal) for crystal in full] == together[:30]


def test_calls_are_full_where_few_rows_give_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.functional.linear

    def other(few: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        def shifted(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            result = linear(rows, weight, bias)
            return torch.nextafter(result, result + 1) if len(rows) == few else result

        return shifted

    if not rows_are_alike(generator(cell="asymmetric").model, ROW_STEP):
        pytest.skip("few rows do give other bits here")
    for few, wanted in ((2 * ROW_STEP, None), (2 * ROW_STEP + 1, ROW_STEP)):
        with monkeypatch.context() as patch:
            patch.setattr("torch.nn.functional.linear", other(few))
            assert generator(cell="asymmetric").row_step == wanted


def test_widths_whose_activations_hang_on_their_place() -> None:
    """SiLU computes the rest of a vector register otherwise: rows of 12 numbers are no multiple."""
    with torch.no_grad():
        rows = torch.randn(220, 12, generator=torch.Generator().manual_seed(0))
        whole = torch.nn.functional.silu(rows)
        alike = all(
            torch.equal(torch.nn.functional.silu(rows[-count:]), whole[-count:])
            for count in range(ROW_STEP, 220, ROW_STEP)
        )
    model = CrystalDiT(small(width=12, heads=2))
    assert alike or not rows_are_alike(model, ROW_STEP)


@pytest.mark.parametrize(
    ("step", "count", "edges", "wanted"),
    [
        (None, 0, 10, []),
        (None, 1, 10, [10]),
        (None, 21, 10, [10, 10, 10]),
        (None, 2, 2000, [1, 1]),
        (4, 1, 10, [4]),
        (4, 8, 10, [8]),
        (4, 10, 10, [8, 4]),
        (4, 23, 10, [8, 8, 8]),
        (4, 2, 30, [1, 1]),  # fewer than four, which would give other bits, never
        (4, 0, 10, []),
    ],
)
def test_sizes_of_calls(
    sampler: Generator, step: int | None, count: int, edges: int, wanted: list[int]
) -> None:
    sampler.edges_per_call, sampler.row_step = 100, step
    assert sampler.call_sizes(count, (1, edges)) == wanted


def test_samples_differ(sampler: Generator) -> None:
    base = requests(1)[0]
    others = [
        (base, 0),
        (base, 1),
        (replace(base, sample=1), 0),
        (replace(base, key="other"), 0),
        (replace(base, properties={"formation_energy": -3.0}), 0),
        (replace(base, properties={"band_gap": 2.0}), 0),
    ]
    found = {as_bytes(sampler.sample([request], seed)[0]) for request, seed in others}
    assert len(found) == len(others)


def test_symmetry_and_composition_are_kept(sampler: Generator) -> None:
    for request, crystal in zip(requests(7), sampler.sample(requests(7), seed=0), strict=True):
        assert crystal.space_group == request.space_group
        assert tuple((s.atomic_number, s.letter) for s in crystal.sites) == request.sites
        wyckoff = space_group(request.space_group).wyckoff
        wanted = {z: wyckoff[letter].multiplicity for z, letter in request.sites}
        assert crystal.formula_counts == wanted
        structure = crystal.to_structure()
        assert {int(z): list(structure.atomic_numbers).count(z) for z in wanted} == wanted
        assert holds(structure, request.space_group)


def test_free_numbers_are_in_range_and_fixed_ones_exact(sampler: Generator) -> None:
    for crystal in sampler.sample(requests(7), seed=1):
        mask, bias = k_constraints(crystal.space_group)
        np.testing.assert_allclose(lattice_to_k(crystal.lattice)[~mask], bias[~mask], atol=1e-7)
        for site, position in zip(crystal.sites, crystal.positions, strict=True):
            values = np.array(site.free_params)
            assert not values[~position.free_mask].any()
            assert ((values >= 0) & (values < 1)).all()
            assert (values[position.free_mask] != 0).all()
            np.testing.assert_array_equal(values, np.round(values, 6))


def test_progress_counts_every_crystal(sampler: Generator) -> None:
    counted: list[int] = []
    sampler.sample(requests(), seed=0, progress=counted.append)
    assert sum(counted) == 20
    assert min(counted) >= 1


@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_samples_that_start_right_at_a_precedent_are_alike_and_made_once(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rutile = Crystal(136, (Site(22, "a"), Site(8, "f", (0.3, 0.0, 0.0))), np.diag([4.6, 4.6, 3.0]))
    index = PrecedentIndex.of_crystals([rutile], ["TiO2"], np.full(119, 20.0))
    sampler = generator(precedents=index, temperature=temperature)
    solve, made = sampler.solve, []

    def counting(call: Call, *args: Any, **kwargs: Any) -> Solution:
        made.extend(call.rows)
        return solve(call, *args, **kwargs)

    monkeypatch.setattr(sampler, "solve", counting)
    told = SampleRequest(136, ((50, "a"), (8, "f")), {"formation_energy": -1.0}, "SnO2")
    groups = [
        [replace(told, sample=sample) for sample in range(4)],
        [replace(told, sample=sample, properties={}) for sample in range(3)],
        [SampleRequest(136, ((50, "b"), (8, "j")), {}, "new", sample) for sample in range(3)],
    ]
    counted: list[int] = []
    crystals = iter(sampler.sample(list(chain(*groups)), 0, None, counted.append))
    found = [{as_bytes(next(crystals)) for _ in group} for group in groups]
    different = [1, 1, 3] if temperature == 0 else [4, 3, 3]
    assert [len(each) for each in found] == different
    assert len(made) == sum(different)
    assert sorted(chain(*made)) == list(range(10))
    assert sum(counted) == 10
    (alone,) = sampler.sample([groups[0][2]], 0)
    assert as_bytes(alone) in found[0]


def test_no_request(sampler: Generator) -> None:
    assert sampler.sample([], seed=0) == []


@pytest.mark.parametrize("kind", ["flow", "score"])
def test_number_of_network_calls(kind: str) -> None:
    sampler = generator(kind)
    calls = []
    sampler.model.register_forward_hook(lambda *_: calls.append(1))
    for steps, expected in ((None, 4 if kind == "flow" else 7), (6, 6 if kind == "flow" else 5)):
        calls.clear()
        sampler.sample(requests(1), seed=0, steps=steps)
        assert len(calls) == expected


def arrays(sampler: Generator) -> dict[str, np.ndarray]:
    weights = {MODEL_PREFIX + n: p.numpy() for n, p in sampler.model.named_parameters()}
    statistics = sampler.standardizer.to_arrays().items()
    return weights | {STANDARDIZER_PREFIX + n: a.astype(np.float32) for n, a in statistics}


def test_checkpoint_samples_the_same(tmp_path: Path) -> None:
    sampler = generator()
    save_checkpoint(
        tmp_path / "c", config=sampler.config.model_dump(mode="json"), model=arrays(sampler)
    )
    loaded = load(tmp_path / "c", "cpu")
    assert loaded.properties == ("band_gap", "formation_energy")
    found, expected = (g.sample(requests(7), seed=0) for g in (loaded, sampler))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.lattice, other.lattice, atol=1e-4)
        for a, b in zip(one.sites, other.sites, strict=True):
            np.testing.assert_allclose(
                nearest_zero(np.subtract(a.free_params, b.free_params)), 0, atol=1e-4
            )
    assert [as_bytes(c) for c in found] == [
        as_bytes(c) for c in load(tmp_path / "c", "cpu").sample(requests(7), seed=0)
    ]


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    sampler = generator()
    config, model = sampler.config.model_dump(mode="json"), arrays(sampler)
    name = MODEL_PREFIX + "norm.weight"
    wrong = {
        "weights do not belong": {k: v for k, v in model.items() if k != name},
        "has shape": model | {name: np.ones(3, np.float32)},
        "norm.extra": model | {MODEL_PREFIX + "norm.extra": np.ones(3, np.float32)},
        "statistics are missing": {
            k: v for k, v in model.items() if k != STANDARDIZER_PREFIX + "lattice_std"
        },
    }
    for index, (says, given) in enumerate(wrong.items()):
        save_checkpoint(tmp_path / str(index), config=config, model=given)
        with pytest.raises(UserError, match=says):
            load(tmp_path / str(index), "cpu")
    save_checkpoint(tmp_path / "config", config=config | {"model": {"depth": 3}}, model=model)
    with pytest.raises(UserError, match=r"model\.depth"):
        load(tmp_path / "config", "cpu")


def test_number_of_threads_changes_nothing() -> None:
    """Sums over 400 edges are parted among threads, which shows in their last bits."""
    sites = tuple((number, "a") for number in range(11, 31))
    requests = [SampleRequest(1, sites, key="x", sample=sample) for sample in range(11)]
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            generator = load(shipped()["crystal_dit_small_fm"])
            assert generator.parallel_calls == number
            found.append([c.to_dict() for c in generator.sample(requests, 0, steps=2)])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_a_generator_has_multiplied_its_weights_once() -> None:
    """What it multiplied is all it samples with: the weights behind no longer matter."""
    sampler = generator(cell="asymmetric")
    request = SampleRequest(1, ((8, "a"), (22, "a")), key="folded")
    (before,) = sampler.sample([request], 0, steps=2)
    with torch.no_grad():
        for block in sampler.model.blocks:
            block.attention.query.weight.zero_()
            block.attention.fuse_value.weight.zero_()
    (after,) = sampler.sample([request], 0, steps=2)
    assert after.to_dict() == before.to_dict()


# Sizes


def in_group(group: int, letter: str, count: int, key: str = "large") -> SampleRequest:
    """A crystal with so many sites of one letter, of three elements in turn."""
    return SampleRequest(group, tuple(((8, 14, 22)[i % 3], letter) for i in range(count)), key=key)


@pytest.mark.parametrize("cell", ["asymmetric", "conventional"])
@pytest.mark.parametrize(
    ("sizes", "budget"), [(FINE, 2048), (FINE, 4096), (COARSE, 8192), (FINE, 300)]
)
@pytest.mark.parametrize("step", [None, 4])
def test_edges_of_a_call_stay_within_its_budget(
    cell: str, sizes: Sizes, budget: int, step: int | None
) -> None:
    """Whatever is asked for together; a crystal that alone has more is sampled alone."""
    sampler = generator(cell=cell)
    sampler.sizes, sampler.edges_per_call, sampler.row_step = sizes, budget, step
    calls: list[tuple[int, int]] = []

    def note(_: torch.nn.Module, inputs: tuple[TensorBatch, ...]) -> None:
        crystals, tokens = inputs[0].token_mask.shape
        calls.append((crystals, tokens * inputs[0].atom_mask.shape[1]))

    sampler.model.register_forward_pre_hook(note)
    random = np.random.default_rng(0)
    counts = [*random.integers(1, 24, size=30).tolist(), 100]
    asked = [in_group(*((1, "a"), (2, "i"))[i % 2], n, key=str(i)) for i, n in enumerate(counts)]
    assert len(sampler.sample(asked, seed=0, steps=1)) == len(asked)
    for crystals, edges in calls:
        assert crystals == 1 or crystals * edges <= budget
        assert step or (crystals + 1) * edges > budget  # nor is the budget left unused
        assert step is None or crystals == 1 or crystals % step == 0
    assert max(crystals for crystals, _ in calls) > 1
    assert max(edges for _, edges in calls) > budget  # the large one was served


@pytest.mark.parametrize(("group", "letter", "count"), [(1, "a", 200), (2, "i", 100)])
def test_two_hundred_atoms_in_the_primitive_cell(
    sampler: Generator, group: int, letter: str, count: int
) -> None:
    request = in_group(group, letter, count)
    (crystal,) = sampler.sample([request], seed=0, steps=2)
    assert crystal.num_primitive_atoms == 200
    assert tuple((s.atomic_number, s.letter) for s in crystal.sites) == request.sites
    structure = crystal.to_structure()
    wanted = {z: 200 // count * [n for n, _ in request.sites].count(z) for z in (8, 14, 22)}
    assert {z: list(structure.atomic_numbers).count(z) for z in wanted} == wanted
    assert np.isfinite(structure.cart_coords).all()
    assert structure.volume > 0
    places = np.array([site.free_params for site in crystal.sites])
    assert len(np.unique(places, axis=0)) == count  # every site has been sampled by itself


def test_devices() -> None:
    assert "cpu" in devices()
