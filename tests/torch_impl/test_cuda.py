"""On a GPU everything comes out as on the CPU, but for rounding."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common.backend import SampleRequest
from common.checkpoint import latest, load_checkpoint, shipped, shipped_language
from common.crystal.structure import Crystal
from common.crystal.symmetry import nearest_zero
from common.data.store import Record, write_records
from common.prior import TemplatePrior
from common.ranking import Ranker
from tests.training import textbook_records, tiny_run
from torch_impl.backend import load, load_language_model, train
from torch_impl.train_dit import Trainer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a GPU; there: .venv/bin/python -m pytest tests/torch_impl/test_cuda.py",
)

MODELS = ["crystal_dit_small_bg", "crystal_dit_small_fm"]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return textbook_records()


def requests(count: int = 40) -> list[SampleRequest]:
    """Symmetries of known crystals, some with a precedent, and as many samples of a larger one."""
    symmetries = [
        (record.crystal.space_group, record.crystal.sites) for record in textbook_records()
    ]
    asked = [
        SampleRequest(number, tuple((s.atomic_number, s.letter) for s in sites), key=str(index))
        for index, (number, sites) in enumerate(symmetries)
    ]
    large = tuple((number, "a") for number in range(11, 31))
    return asked + [SampleRequest(1, large, key="large", sample=i) for i in range(count)]


def distance(first: list[Crystal], second: list[Crystal]) -> float:
    """The largest difference of a free coordinate (cells) or a lattice vector (A)."""
    found = [
        max(
            np.abs(nearest_zero(np.array(a.free_params) - np.array(b.free_params))).max()
            for a, b in zip(one.sites, other.sites, strict=True)
        )
        for one, other in zip(first, second, strict=True)
    ]
    lattices = [np.abs(a.lattice - b.lattice).max() for a, b in zip(first, second, strict=True)]
    return float(max(*found, *lattices))


# Training


@pytest.mark.parametrize(
    ("model", "diffusion"),
    [
        ({"precedents": True}, {}),
        ({"precedents": True, "target": "difference"}, {"precedent_bend": 0.5}),
        ({"cell": "conventional", "frames": False}, {}),
        ({"properties": []}, {"kind": "score", "timesteps": 50}),
    ],
    ids=["precedents", "differences", "conventional", "score"],
)
def test_training_as_on_the_cpu(
    records: list[Record], model: dict[str, object], diffusion: dict[str, object]
) -> None:
    """From the same weights: losses of steps, the first gradient, and the validation.

    Weights are not compared: where a gradient is nearly zero, AdamW's steps follow its rounding.
    """
    run = tiny_run(model=model, diffusion=diffusion, edge_budget=4096)
    trainers = [Trainer(run, records, records, device) for device in ("cpu", "cuda")]
    curves, gradients = [], []
    for trainer in trainers:
        trainer.loss(next(trainer.batches())).total.backward()
        parts = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        gradients.append(torch.cat([part.flatten().cpu() for part in parts]))
        batches = trainer.batches()
        curves.append([trainer.train_step(next(batches))["loss"] for _ in range(10)])
    apart = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert float(gradients[0].norm()) > 0
    assert float(apart) < 1e-3
    np.testing.assert_allclose(curves[1][:3], curves[0][:3], rtol=2e-4)
    np.testing.assert_allclose(curves[1], curves[0], rtol=3e-3)
    levels = [trainer.validate() for trainer in trainers]
    for name, value in levels[0].items():
        assert levels[1][name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_types_learn(records: list[Record], precision: str) -> None:
    run = tiny_run(precision=precision, edge_budget=4096)
    trainer = Trainer(run, records, records, "cuda")
    batches = trainer.batches()
    before = trainer.validate()["loss"]
    for _ in range(40):
        trainer.train_step(next(batches))
    assert trainer.validate()["loss"] < before


def test_run_goes_on_where_it_stopped(records: list[Record], tmp_path: Path) -> None:
    parquet = tmp_path / "textbook.parquet"
    write_records(records, parquet)
    run, whole, parts = tiny_run(parquet), tmp_path / "whole", tmp_path / "parts"
    train(run, whole, device="cuda")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "final")
    last = latest(parts)
    assert last is not None
    shutil.rmtree(last)  # half of the steps are left
    train(run, parts, resume=True, device="cuda")
    expected, found = (load_checkpoint(folder / "final").model for folder in (whole, parts))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-3, err_msg=name)


# Sampling


@pytest.mark.parametrize("name", MODELS)
def test_samples_as_on_the_cpu(name: str) -> None:
    asked = requests()
    cpu, gpu = (load(shipped()[name], device).sample(asked, 0) for device in ("cpu", "cuda"))
    assert distance(cpu, gpu) < 2e-3


def test_a_crystal_does_not_depend_on_what_is_sampled_beside_it() -> None:
    asked = requests()
    generator = load(shipped()[MODELS[0]], "cuda")
    assert torch.cuda.get_device_name() in generator.device_name
    together = [crystal.to_dict() for crystal in generator.sample(asked, 0)]
    assert [crystal.to_dict() for crystal in generator.sample(asked, 0)] == together
    for index in (0, 5, len(asked) - 1):
        (alone,) = generator.sample([asked[index]], 0)
        assert alone.to_dict() == together[index]


# Language model


def test_rankings_as_on_the_cpu() -> None:
    """The shipped model, asked with and without neighbours."""
    prior = TemplatePrior.load()
    rows = [
        ({38: 1, 22: 1, 8: 3}, {"formation_energy": -3.5}),
        ({11: 1, 17: 1}, {"formation_energy": -2.0}),
        ({12: 1, 13: 2, 8: 4}, {}),
    ]
    folder = shipped_language()["glm4_tiny_fm"]
    cpu, gpu = (
        Ranker(prior, load_language_model(folder, device)).rank(rows, 20)
        for device in ("cpu", "cuda")
    )
    for expected, found in zip(cpu, gpu, strict=True):
        assert [c.key for c in found[:5]] == [c.key for c in expected[:5]]
        np.testing.assert_allclose(
            [c.probability for c in found], [c.probability for c in expected], atol=1e-4
        )
