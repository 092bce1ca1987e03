"""Training from precedents, and sampling from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.backend import SampleRequest
from common.checkpoint import PRECEDENTS, save_checkpoint
from common.crystal.lattice import lattice_to_k
from common.crystal.symmetry import nearest_zero
from common.data.store import Record
from common.diffusion.flow import DIFFERENCE_SCALES, VELOCITY_SCALE, starting_points
from tests.training import alike_records, tiny_run
from torch_impl.backend import load
from torch_impl.diffusion import NoisyTensors, bent
from torch_impl.tensors import TensorBatch
from torch_impl.train_dit import Trainer

RUN = tiny_run(model={"precedents": True}, steps=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNI_MDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def trainer() -> Trainer:
    records = alike_records()
    return Trainer(RUN, records, records)


def request(record: Record, sample: int = 0) -> SampleRequest:
    sites = tuple((site.atomic_number, site.letter) for site in record.crystal.sites)
    return SampleRequest(record.crystal.space_group, sites, key=record.material_id, sample=sample)


def test_an_untrained_network_gives_the_precedent_back(trainer: Trainer, tmp_path: Path) -> None:
    """Its velocities are zero: what is left is the noise around the precedent."""
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, **trainer.final())
    assert (folder / PRECEDENTS).exists()
    generator = load(folder, "cpu")
    records = alike_records()
    requests = [request(record, sample) for record in records for sample in range(8)]
    crystals = generator.sample(requests, seed=0, steps=1)
    spread, strain = [], []
    for wanted, crystal in zip(requests, crystals, strict=True):
        (found,) = generator.precedents.find(crystal)
        assert [(s.atomic_number, s.letter) for s in found.crystal.sites] == list(wanted.sites)
        for site, known, position in zip(
            crystal.sites, found.crystal.sites, crystal.positions, strict=True
        ):
            apart = nearest_zero(np.array(site.free_params) - np.array(known.free_params))
            spread += apart[position.free_mask].tolist()
        strain.append(np.abs(lattice_to_k(crystal.lattice) - lattice_to_k(found.crystal.lattice)))
    assert 0.018 < np.std(spread) < 0.022  # 0.05, times the temperature
    assert 0 < np.max(strain) < 1.5


DIFFERENCES = tiny_run(
    model={"precedents": True, "target": "difference", "former_elements": True},
    diffusion={"precedent_bend": 0.5},
    descriptions="random",
    precedents=4,
)


@pytest.mark.parametrize("steps", [1, 7])
def test_an_untrained_network_of_differences_ends_at_the_precedent(
    tmp_path: Path, steps: int
) -> None:
    """Its differences are zero: every path leads to the precedent, whatever the noise."""
    records = alike_records()
    save_checkpoint(tmp_path / "checkpoint", **Trainer(DIFFERENCES, records, records).final())
    generator = load(tmp_path / "checkpoint", "cpu")
    crystals = generator.sample([request(r, 1) for r in records], seed=0, steps=steps)
    for crystal in crystals:
        (found,) = generator.precedents.find(crystal)
        for site, known, position in zip(
            crystal.sites, found.crystal.sites, crystal.positions, strict=True
        ):
            apart = nearest_zero(np.array(site.free_params) - np.array(known.free_params))
            assert np.abs(apart[position.free_mask]).max(initial=0) < 1e-5
        strain = lattice_to_k(crystal.lattice) - lattice_to_k(found.crystal.lattice)
        assert np.abs(strain).max() < 1e-4


def test_samples_start_from_precedents_in_turn(tmp_path: Path) -> None:
    """From so many as there are, the most similar one first, then over again."""
    records = alike_records(12)
    diffusion = DIFFERENCES.diffusion.model_copy(update={"precedents_in_turn": 3})
    run = DIFFERENCES.model_copy(update={"diffusion": diffusion})
    save_checkpoint(tmp_path / "checkpoint", **Trainer(run, records, records).final())
    generator = load(tmp_path / "checkpoint", "cpu")
    found = generator.precedents.find(records[0].crystal, 3)
    assert len({one.material_id for one in found}) == 3
    crystals = generator.sample([request(records[0], sample) for sample in range(4)], 0, steps=1)
    for sample, crystal in enumerate(crystals):
        apart = [
            np.abs(lattice_to_k(crystal.lattice) - lattice_to_k(one.crystal.lattice)).max()
            for one in found
        ]
        assert np.argmin(apart) == sample % 3
        assert min(apart) < 1e-4


def test_differences_of_known_size_are_errors_of_the_same_size() -> None:
    """The untrained network's loss is that of the differences in their units, at every time."""
    records = alike_records()
    trainer = Trainer(DIFFERENCES, records, records)
    data = next(trainer.batches())
    batch, t = data.batch, data.noisy.t
    known = batch.precedent_mask
    assert known.any()
    with torch.no_grad():
        tensors = TensorBatch.from_batch(batch, trainer.standardizer, DIFFERENCES.model.properties)
        noisy = NoisyTensors.from_arrays(data.noisy, data.weights)
        velocity, _ = trainer.model(tensors, noisy.free_params, noisy.lattice, noisy.t)
    apart = VELOCITY_SCALE * nearest_zero(batch.precedent_params - batch.free_params)
    error = (velocity.numpy() - data.noisy.coordinate_target) * (1 - t)[:, None, None]
    free = batch.free_mask & known[:, None, None]
    np.testing.assert_allclose(error[free], apart[free], atol=1e-4)
    unit = DIFFERENCE_SCALES[0] / (1 - t)
    np.testing.assert_allclose(
        data.weights.coordinate_bend[known, 0, 0], 0.5 * unit[known], rtol=1e-5
    )
    first = data.weights.coordinate[free][0] * unit[np.nonzero(free)[0][0]] ** 2
    weights = data.weights.coordinate * unit[:, None, None] ** 2
    np.testing.assert_allclose(weights[free], first, rtol=1e-4)


def test_so_many_rows_are_shown_at_their_precedent() -> None:
    """The others' times are uniform, as all are without a precedent."""
    records = alike_records(40)
    run = tiny_run(
        model={"precedents": True}, at_precedent=0.6, batch_size=40, precedent_dropout=0.3
    )
    trainer = Trainer(run, records, records)
    data = next(trainer.batches())
    t, known = data.noisy.t, data.batch.precedent_mask
    assert 0 < known.sum() < len(known)
    assert 0.4 < (t[known] == 0).mean() < 0.8
    assert t[known].max() > 0.8
    assert (t[~known] > 0).all()
    at_start = known & (t == 0)
    start = starting_points(
        data.batch,
        trainer.standardizer,
        run.diffusion,
        *(np.zeros_like(data.batch.free_params),) * 2,
        np.zeros((len(t), 6), np.float32),
        0.0,
    )[0]
    near = nearest_zero(data.noisy.free_params - start)[at_start]
    assert np.abs(near[data.batch.free_mask[at_start]]).max() < 6 * run.diffusion.precedent_noise


def test_errors_bend() -> None:
    error = torch.tensor([0.0, 1e-3, -0.01, 3.0, -1e4])
    squared = bent(error, torch.tensor(float("inf")))
    torch.testing.assert_close(squared, error**2)
    found = bent(error, torch.tensor(0.5))
    torch.testing.assert_close(found[:3], error[:3] ** 2, rtol=2e-4, atol=0)
    torch.testing.assert_close(found[-1:], 2 * 0.5 * error[-1:].abs(), rtol=1e-3, atol=0)
    assert found[3] < squared[3] / 2


def test_descriptions_change_from_epoch_to_epoch() -> None:
    """Of crystals and precedents, both alike; validation keeps the records' own."""
    records = alike_records()
    trainer = Trainer(DIFFERENCES, records, records)
    plans = trainer.data.once()
    group = trainer.data.buckets[plans[0].bucket]
    own = group.batch.take(plans[0].rows)
    seen = [trainer.prepare(plans[0], step).batch for step in range(6)]
    assert any(np.abs(nearest_zero(b.free_params - own.free_params)).max() > 0.01 for b in seen)
    for batch in seen:
        known = batch.precedent_mask[:, None, None] & batch.free_mask
        before = np.where(known, nearest_zero(own.precedent_params - own.free_params), 0)
        after = np.where(known, nearest_zero(batch.precedent_params - batch.free_params), 0)
        # Axes that a first atom exchanges may differ; how far it is all in all, little.
        assert (np.abs(after).max(axis=2) <= 3 * np.abs(before).max(axis=2) + 1e-4).all()
    plan = trainer.validation.once()[0]
    own = trainer.validation.buckets[plan.bucket].batch.take(plan.rows)
    kept = trainer.prepare_validation(plan).batch
    np.testing.assert_array_equal(kept.free_params, own.free_params)
    np.testing.assert_array_equal(kept.precedent_params, own.precedent_params)


def test_steps_learn_from_short_paths(trainer: Trainer) -> None:
    batches = trainer.batches()
    first = next(batches)
    known = first.batch.precedent_mask
    assert known.any()
    target = first.noisy.coordinate_target[known]
    weights = first.weights.coordinate
    free = first.batch.free_mask
    if (~known).any():
        ratio = weights[known][free[known]].max() / weights[~known][free[~known]].max()
        assert np.isclose(ratio, 0.35**-2)
    assert np.isfinite(target).all()
    before = [parameter.detach().clone() for parameter in trainer.model.precedent.parameters()]
    for _ in range(3):
        assert np.isfinite(trainer.train_step(next(batches))["loss"])
    after = list(trainer.model.precedent.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_without_precedents_the_mask_is_empty() -> None:
    records = alike_records()
    plain = Trainer(tiny_run(), records, records)
    assert not next(plain.batches()).batch.precedent_mask.any()
    dropped = Trainer(tiny_run(model={"precedents": True}, precedent_dropout=1.0), records, records)
    assert not next(dropped.batches()).batch.precedent_mask.any()
