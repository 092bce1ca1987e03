"""Training with MindSpore: it learns, goes on where it stopped, and says what it cannot do.

What needs no framework is tested with torch, which compiles nothing.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from numpy.typing import NDArray

from common.checkpoint import load_checkpoint, save_step
from common.config import RunConfig
from common.data.store import Record, write_records
from common.diffusion.training import BaseTrainer, TrainingBatch
from common.errors import UserError
from common.training import LOSS_SCALE, Shard
from common.weights import MODEL_PREFIX
from ms_impl.backend import load, train
from ms_impl.layers import Linear
from ms_impl.train_dit import Trainer
from tests.training import alike_records, textbook_records, tiny_run

SCORE = {"kind": "score", "timesteps": 50}
VECTORS = ("weight", "average", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Of one bucket, for which one graph is compiled."""
    return alike_records()


@pytest.fixture(scope="module")
def parquet(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alike") / "alike.parquet"
    write_records(records, path)
    return path


def run_of(parquet: Path | str = "unused", **settings: object) -> RunConfig:
    settings = {"batch_size": 12, "edge_budget": 1024} | settings
    return tiny_run(parquet, model={"layers": 1}, **settings)


@pytest.fixture(scope="module")
def compiled(
    records: list[Record], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, Path]:
    """A trainer whose graph all tests share, and a checkpoint of its first step's weights."""
    trainer = Trainer(run_of(steps=60, learning_rate=1e-2, ema=0.5), records, records)
    folder = tmp_path_factory.mktemp("newborn")
    save_step(folder, 0, **trainer.checkpoint())
    return trainer, folder


@pytest.fixture
def trainer(compiled: tuple[Trainer, Path]) -> Iterator[Trainer]:
    """At its first step."""
    trainer, folder = compiled
    config = trainer.config
    trainer.resume(folder)
    yield trainer
    trainer.config = config


def change(trainer: Trainer, **settings: object) -> None:
    """Other settings of training, until the end of the test."""
    train = trainer.config.train.model_copy(update=settings)
    trainer.config = trainer.config.model_copy(update={"train": train})


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    batches = trainer.batches()
    return [trainer.train_step(next(batches)) for _ in range(count)]


def vectors(trainer: Trainer) -> dict[str, NDArray[np.float32]]:
    return {name: getattr(trainer.optimizer, name).asnumpy().copy() for name in VECTORS}


def shown(trainer: Trainer) -> NDArray[np.float32]:
    """What the network computes with."""
    return np.concatenate([p.asnumpy().ravel() for p in trainer.parameters])


# Learning


def test_loss_falls(trainer: Trainer) -> None:
    """Over 60 steps, for the same noise before and after."""
    before = trainer.validate()
    assert all(math.isfinite(row["loss"]) for row in steps(trainer, 60))
    after = trainer.validate()
    assert after["loss"] < 0.98 * before["loss"]
    assert after["lattice"] < 0.95 * before["lattice"]


def test_score_matching_without_properties(records: list[Record]) -> None:
    """A network with an empty parameter, which has no gradient."""
    run = tiny_run(
        model={"layers": 1, "properties": [], "attention": False},
        diffusion=SCORE,
        batch_size=12,
        edge_budget=1024,
        learning_rate=1e-2,
        steps=40,
        ema=0.5,
    )
    trainer = Trainer(run, records, records)
    before = trainer.validate()
    steps(trainer, 40)
    assert trainer.validate()["loss"] < 0.98 * before["loss"]
    assert trainer.average_arrays()["property.null"].shape == (0, run.model.width)


def test_validation_changes_nothing(trainer: Trainer) -> None:
    steps(trainer, 2)
    before = vectors(trainer)
    assert trainer.validate() == trainer.validate()
    for name, values in vectors(trainer).items():
        np.testing.assert_array_equal(values, before[name])
    np.testing.assert_array_equal(shown(trainer), before["weight"])


def test_validation_is_that_of_the_average(trainer: Trainer) -> None:
    steps(trainer, 3)
    found = trainer.validate()["loss"]
    optimizer = trainer.optimizer
    optimizer.weight.set_data(Tensor(optimizer.average.asnumpy()))
    optimizer.put(optimizer.weight)
    assert trainer.validate()["loss"] == found
    data = trainer.prepare_validation(trainer.validation.once()[0])
    assert np.isclose(trainer.losses(data).total, found, rtol=1e-6)  # there is one batch


# Optimisation


def test_average_of_the_weights(trainer: Trainer) -> None:
    """Against the same recursion in float64."""
    change(trainer, ema=0.15)
    expected = vectors(trainer)["average"].astype(float)
    for step in range(5):
        steps(trainer, 1)
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * shown(trainer)
    np.testing.assert_allclose(vectors(trainer)["average"], expected, rtol=1e-5, atol=1e-7)
    saved = trainer.model_arrays()
    for name, array in trainer.average_arrays().items():
        np.testing.assert_array_equal(saved[MODEL_PREFIX + name], array)


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradient_is_clipped(trainer: Trainer, limit: float) -> None:
    """What AdamW sees has at most the given norm; the log keeps the norm before."""
    change(trainer, clip_norm=limit)
    row = steps(trainer, 1)[0]
    seen = np.linalg.norm(vectors(trainer)["exp_avg"].astype(float)) / (1 - 0.9)
    assert 1e-2 < row["gradient_norm"] < 1e2
    assert np.isclose(seen, min(limit, row["gradient_norm"]), rtol=1e-4)


def test_gradient_that_is_not_finite(trainer: Trainer) -> None:
    steps(trainer, 1)
    weight = trainer.optimizer.weight.asnumpy().copy()
    name = "lattice_head.output.bias"
    end = np.cumsum([p.size for p in trainer.parameters])[trainer.names.index(name)]
    weight[end - 1] = np.inf
    trainer.optimizer.weight.set_data(Tensor(weight))
    trainer.optimizer.put(trainer.optimizer.weight)
    before = vectors(trainer)
    with pytest.raises(UserError, match="training step 1: the gradient is not finite"):
        steps(trainer, 1)
    assert trainer.step == 1
    for name, values in vectors(trainer).items():
        np.testing.assert_array_equal(values, before[name])


def test_seed_decides_the_first_weights(records: list[Record]) -> None:
    first, other, again = (
        shown(Trainer(run_of(seed=seed), records, records)) for seed in (0, 1, 0)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


# Runs


def test_resumed_run_ends_with_the_same_bytes(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says once per bucket that it compiles, and how long it took; the result can be loaded."""
    run = run_of(parquet)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(run, whole, device="cpu")
    said = capsys.readouterr().err
    shape = "4 tokens, 8 atoms, 12 crystals"
    assert said.count(f"compiling for {shape}\ncompiled for {shape} in ") == 1
    assert said.count("compiling") == said.count("compiled")
    # What a kill after the third step leaves.
    shutil.copytree(whole / "step_00000003", parts / "step_00000003")
    train(run, parts, resume=True, device="cpu")
    for name in ("final/model.safetensors", "step_00000006/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    third, sixth = (load_checkpoint(whole / f"step_0000000{step}").hash for step in (3, 6))
    assert third != sixth  # it went on at all
    assert load(whole / "final", "cpu").properties == run.model.properties


def test_starts_from_a_checkpoint(records: list[Record], compiled: tuple[Trainer, Path]) -> None:
    _, folder = compiled
    trainer = Trainer(run_of(init_from=str(folder), seed=5), records, records)
    weights = load_checkpoint(folder).model
    assert trainer.step == 0
    for arrays, prefix in ((trainer.average_arrays(), ""), (trainer.optimizer_arrays(), "weight.")):
        for name in trainer.names:
            np.testing.assert_array_equal(arrays[prefix + name], weights[MODEL_PREFIX + name])
    run = run_of(init_from=str(folder))
    wider = run.model_copy(update={"model": run.model.model_copy(update={"width": 32})})
    with pytest.raises(UserError, match="has shape"):
        Trainer(wider, records, records)


def test_what_is_torchs_alone_is_said(
    records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first process alone."""
    for rank in (1, 0):
        assert "train.compile" not in capsys.readouterr().err
        Trainer(run_of(compile=True), records, records, shard=Shard(rank, 2))
    assert "train.compile: torch's alone" in capsys.readouterr().err


# Data


def same_bytes(a: TrainingBatch, b: TrainingBatch) -> bool:
    pairs = [
        (getattr(first, f.name), getattr(second, f.name))
        for first, second in ((a.batch, b.batch), (a.noisy, b.noisy), (a.weights, b.weights))
        for f in fields(first)
    ]
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs
    )


def test_prefetched_batches_are_the_same(records: list[Record]) -> None:
    """Over several epochs of all shapes, from the middle of one on."""
    everything = [*textbook_records(), *records]
    trainer = Trainer(tiny_run(), everything, records)
    trainer.step = 3
    ahead = list(islice(trainer.batches(), 24))
    plain = list(islice(BaseTrainer.batches(trainer), 24))
    assert len({data.batch.shape for data in plain}) > 3
    assert all(same_bytes(a, b) for a, b in zip(ahead, plain, strict=True))
    assert not any(same_bytes(a, b) for a, b in zip(ahead[1:], plain, strict=False))


def test_unread_batches_do_no_harm(trainer: Trainer) -> None:
    """Batches that were prepared and not asked for leave no trace, and neither does stopping."""
    batches = trainer.batches()
    first = next(batches)
    batches.close()
    assert same_bytes(next(trainer.batches()), first)


# Devices


def test_bfloat16_on_a_cpu(records: list[Record], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(run_of(precision="bfloat16"), records, records)
    line = "bfloat16 cannot be compiled for a CPU: float32 takes its place\n"
    assert capsys.readouterr().err == line
    cells = [cell for _, cell in trainer.model.cells_and_names() if isinstance(cell, Linear)]
    assert {cell.precision for cell in cells} == {ms.float32}


def test_float16_on_a_cpu(records: list[Record]) -> None:
    """The scaled loss leaves loss and update where float32 has them, to float16's rounding."""
    wide, narrow = (Trainer(run_of(precision=p), records, records) for p in ("float32", "float16"))
    assert (wide.loss_scale.value, narrow.loss_scale.value) == (1.0, LOSS_SCALE)
    batch = next(wide.batches())
    for _ in range(3):  # residual branches are zero at first
        expected, found = (trainer.train_step(batch) for trainer in (wide, narrow))
    for name in ("loss", "gradient_norm"):
        assert found[name] != expected[name]
        assert math.isclose(found[name], expected[name], rel_tol=1e-2)
    assert narrow.loss_scale.finite_steps == 3


def test_devices_that_are_not_here(records: list[Record]) -> None:
    with pytest.raises(UserError, match=r"^device 'cuda' is unknown to MindSpore: give cpu or asc"):
        Trainer(run_of(), records, records, device="cuda")
    with pytest.raises(UserError, match=r"^device 'ascend': .*finds no CANN \(libge_runner.so\)"):
        Trainer(run_of(), records, records, device="ascend")
