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
from tests.training import alike_records, tiny_run
from torch_impl.backend import load
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
