"""Training on textbook crystals: it learns, goes on where it stopped, and says what is wrong."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import (
    latest,
    load_checkpoint,
    rows_seen_by,
    save_checkpoint,
    save_step,
)
from common.config import RunConfig, load_config
from common.crystal.structure import Crystal, Site
from common.data.batch import PROPERTY_NAMES
from common.data.store import Record, fingerprint, read_records, write_records
from common.diffusion.training import MAX_ATOMS, LossValues, TrainingBatch, small_enough
from common.errors import UserError
from common.files import alone_in
from common.sampling import read_checkpoint
from common.training import LOSS_SCALE, LOSS_SCALE_STEPS, LossScale, Shard
from common.weights import MODEL_PREFIX
from tests.crystals import TEXTBOOK
from tests.networks import fill_value
from tests.training import textbook_records, tiny_run
from torch_impl.backend import load, train
from torch_impl.diffusion import Loss
from torch_impl.threads import threads_per_operation
from torch_impl.train_dit import Trainer

SCORE = {"kind": "score", "timesteps": 50}


@pytest.fixture(scope="session")
def records() -> list[Record]:
    return textbook_records()


@pytest.fixture(scope="session")
def parquet(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("textbook") / "textbook.parquet"
    write_records(records, path)
    return path


def trainer_of(records: list[Record], run: RunConfig) -> Trainer:
    return Trainer(run, records, records)


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    batches = trainer.batches()
    return [trainer.train_step(next(batches)) for _ in range(count)]


def rows(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# Learning


@pytest.mark.parametrize(
    ("model", "diffusion", "settings"),
    [
        ({}, {}, {}),
        ({}, {}, {"precision": "bfloat16"}),
        ({}, {}, {"precision": "float16"}),
        ({"cell": "conventional", "frames": False}, {}, {"edge_budget": 4096}),
        ({"properties": []}, SCORE, {}),
    ],
    ids=["flow", "bfloat16", "float16", "conventional", "score"],
)
def test_loss_falls(
    records: list[Record],
    model: dict[str, object],
    diffusion: dict[str, object],
    settings: dict[str, object],
) -> None:
    """Over 60 steps, for the same noise before and after."""
    settings = {"batch_size": 16, "edge_budget": 2048, "learning_rate": 1e-2} | settings
    run = tiny_run(model=model, diffusion=diffusion, steps=60, ema=0.5, **settings)
    trainer = trainer_of(records, run)
    before = trainer.validate()
    assert all(math.isfinite(row["loss"]) for row in steps(trainer, 60))
    after = trainer.validate()
    assert after["loss"] < 0.99 * before["loss"]
    assert after["lattice"] < 0.95 * before["lattice"]


def test_newborn_loss_is_the_size_of_the_targets(records: list[Record]) -> None:
    """The network says zero at first: the mean square of unit targets, up to sampling noise."""
    free = [record for record in records if record.crystal.num_free_coords]
    run = tiny_run(model={"properties": []}, diffusion=SCORE, batch_size=64, edge_budget=16384)
    losses = trainer_of(8 * free, run).validate()
    assert 0.7 < losses["coordinate"] < 1.3
    assert 0.7 < losses["lattice"] < 1.3
    assert np.isclose(losses["loss"], losses["coordinate"] + 0.5 * losses["lattice"])


def test_weights_of_the_losses(records: list[Record]) -> None:
    run = tiny_run(diffusion={"coordinate_weight": 3.0, "lattice_weight": 0.25})
    losses = trainer_of(records, run).validate()
    assert np.isclose(losses["loss"], 3 * losses["coordinate"] + 0.25 * losses["lattice"])


def test_validation_changes_nothing(records: list[Record]) -> None:
    trainer = trainer_of(records, tiny_run())
    steps(trainer, 2)
    before = [p.detach().clone() for p in trainer.parameters]
    assert trainer.validate() == trainer.validate()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def filled(trainer: Trainer) -> Trainer:
    """With averages that are not zero."""
    for name, average in zip(trainer.names, trainer.average, strict=True):
        average.copy_(torch.from_numpy(fill_value(name, average.shape)))
    return trainer


@pytest.mark.parametrize("diffusion", [{}, SCORE], ids=["flow", "score"])
def test_validation_does_not_depend_on_the_batches(
    records: list[Record], diffusion: dict[str, object]
) -> None:
    """Nor on how many processes share them: losses are means over the rows, each with its noise."""
    found = []
    for size, edges in ((4, 256), (3, 2048), (64, 65536)):
        run = tiny_run(diffusion=diffusion, batch_size=size, edge_budget=edges)
        found.append(filled(trainer_of(records, run)).validate())
        assert found[-1] == pytest.approx(found[0], rel=1e-5)
    trainers = [Trainer(run, records, records, shard=Shard(rank, 3)) for rank in range(3)]
    parts = [filled(trainer).validate() for trainer in trainers]
    for name in ("loss", "coordinate", "lattice"):
        assert sum(part[name] for part in parts) == pytest.approx(found[0][name], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"batch_size": 64, "edge_budget": 65536}], ids=str)
def test_every_validation_row_counts_alike(
    records: list[Record], settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, by as much as any other, whatever it has free and however often a batch repeats it."""
    trainer = trainer_of(records, tiny_run(**settings))
    seen: list[TrainingBatch] = []

    def noted(data: TrainingBatch) -> LossValues:
        seen.append(data)
        return LossValues(1.0, 2.0, 3.0, np.ones(data.batch.size, np.float32))

    monkeypatch.setattr(trainer, "losses", noted)
    validated = trainer.validate()
    assert validated["loss"] == len(seen), "the batches' losses add up"
    levels = {validated[f"coordinate_t{t / 5:.1f}"] for t in range(5)}
    assert 1 in levels <= {0, 1}, "no crystal at some, perhaps"
    total = sum(data.batch.size for data in seen)
    assert total > len(records), "there are repeats"
    free = sum(record.crystal.num_free_coords > 0 for record in records)
    assert 0 < free < len(records)
    for part, counting in (("coordinate", free), ("lattice", len(records))):
        weights = [getattr(data.weights, part).reshape(data.batch.size, -1) for data in seen]
        own = np.concatenate([rows.sum(axis=1) for rows in weights])
        assert np.count_nonzero(own) == counting
        np.testing.assert_allclose(own[own > 0], 1 / counting, rtol=1e-6)


def test_dropped_property_is_not_learned_from(records: list[Record]) -> None:
    """With every property dropped only the null embedding learns; without, the layers do."""
    for dropout, null_moves, values_move in ((1.0, True, False), (0.0, False, True)):
        run = tiny_run(model={"properties": ["band_gap"]}, property_dropout=dropout, weight_decay=0)
        trainer = trainer_of(records, run)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        steps(trainer, 4)
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert ("property.null" in moved) == null_moves
        assert ("property.mlp.0.output.weight" in moved) == values_move


# Optimisation


def test_rows_without_a_property_are_learned(
    records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scales come from the rows that have it, and how many lack it is said before training."""
    bare = [
        Record(r.material_id, r.crystal, properties={"band_gap": r.properties["band_gap"]})
        for r in records[:5]
    ]
    rows = [*bare, *records[5:]]
    path = tmp_path / "gaps.parquet"
    write_records(rows, path)
    train(tiny_run(path, steps=3), tmp_path / "run")
    said = f"{path}: 5 of {len(rows)} rows have no formation_energy and are learned without it"
    assert said in capsys.readouterr().out.splitlines()[1]
    trainer = trainer_of(rows, tiny_run(path))
    assert trainer.num_rows == len(rows)
    known = [r.properties["formation_energy"] for r in records[5:]]
    assert trainer.standardizer.property_mean[1] == pytest.approx(np.mean(known), rel=1e-5)
    assert trainer.standardizer.property_std[1] == pytest.approx(np.std(known), rel=1e-5)


def test_learning_rate(records: list[Record]) -> None:
    run = tiny_run(steps=110, warmup=10, learning_rate=1.0, final_rate=0.1)
    rate = trainer_of(records, run).learning_rate
    np.testing.assert_allclose([rate(step) for step in range(10)], np.arange(1, 11) / 10)
    for step, expected in ((10, 1.0), (35, 0.1 + 0.9 * (2 + 2**0.5) / 4), (60, 0.55), (110, 0.1)):
        assert np.isclose(rate(step), expected)
    assert np.isclose(rate(500), 0.1)
    assert all(rate(step) >= rate(step + 1) for step in range(10, 110))


def test_learning_rate_is_the_one_used(records: list[Record]) -> None:
    trainer = trainer_of(records, tiny_run(warmup=3))
    logged = [row["learning_rate"] for row in steps(trainer, 3)]
    np.testing.assert_allclose(logged, [1e-3, 2e-3, 3e-3])
    assert trainer.optimizer.param_groups[0]["lr"] == logged[-1]


def test_average_is_the_exponential_one(records: list[Record]) -> None:
    """average <- d average + (1 - d) weights, with d = min(ema, (1 + s) / (10 + s))."""
    trainer = trainer_of(records, tiny_run(ema=0.15))
    expected = [p.detach().double().clone() for p in trainer.parameters]
    for step in range(5):
        steps(trainer, 1)
        decay = min(0.15, (1 + step) / (10 + step))
        for mean, parameter in zip(expected, trainer.parameters, strict=True):
            mean.mul_(decay).add_((1 - decay) * parameter.detach().double())
    for mean, average in zip(expected, trainer.average, strict=True):
        torch.testing.assert_close(average.double(), mean, rtol=1e-5, atol=1e-7)
    saved = trainer.model_arrays()
    for name, mean in zip(trainer.names, trainer.average, strict=True):
        np.testing.assert_array_equal(saved[MODEL_PREFIX + name], mean.numpy())


def test_gradient_is_clipped(records: list[Record]) -> None:
    """What AdamW sees has at most the given norm; the log keeps the norm before."""
    trainer = trainer_of(records, tiny_run(clip_norm=1e-3))
    for row in steps(trainer, 3):
        norms = [p.grad.norm() for p in trainer.parameters if p.grad is not None]
        assert float(torch.stack(norms).norm()) <= 1.001e-3 < row["gradient_norm"]


def test_gradient_that_is_not_finite(records: list[Record]) -> None:
    trainer = trainer_of(records, tiny_run())
    steps(trainer, 1)
    with torch.no_grad():
        trainer.model.lattice_head.output.bias[5] = math.inf
    before = [p.detach().clone() for p in trainer.parameters]
    with pytest.raises(UserError, match="training step 1: the gradient is not finite"):
        steps(trainer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_seed_decides_everything(records: list[Record]) -> None:
    first, again, other = (trainer_of(records, tiny_run(seed=seed)) for seed in (0, 0, 1))
    torch.rand(7)  # another consumer of torch's generator has no influence
    losses = [[row["loss"] for row in steps(trainer, 3)] for trainer in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]


# Runs


class Stop(Exception):
    """Stands for a kill."""


def run_until(run: RunConfig, out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains and is interrupted before a step."""
    train_step = Trainer.train_step

    def stopping(self: Trainer, data: TrainingBatch) -> dict[str, float]:
        if self.step == step:
            raise Stop
        return train_step(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        with pytest.raises(Stop):
            train(run, out, device="cpu")


@pytest.mark.parametrize("diffusion", [{}, SCORE], ids=["flow", "score"])
def test_resumed_run_ends_with_the_same_bytes(
    parquet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    diffusion: dict[str, object],
) -> None:
    """What is trained is said, and where it goes on."""
    model: dict[str, object] = {"properties": []} if diffusion else {}
    run = tiny_run(parquet, model=model, diffusion=diffusion)
    train(run, tmp_path / "whole", device="cpu")
    what = f"{run.name}: training on {len(TEXTBOOK)} rows, 1 process"
    assert capsys.readouterr().out.startswith(f"{what}\n")
    run_until(run, tmp_path / "parts", 5, monkeypatch)
    assert latest(tmp_path / "parts") == tmp_path / "parts" / "step_00000003"
    assert not (tmp_path / "parts" / "final").exists()
    capsys.readouterr()
    train(run, tmp_path / "parts", resume=True, device="cpu")
    where = f"going on from {tmp_path}/parts/step_00000003, after step 3 of 6"
    assert capsys.readouterr().out.startswith(f"{what}\n{where}\n")
    for name in ("final/model.safetensors", "step_00000006/optimizer.safetensors"):
        whole, parts = (tmp_path / folder / name for folder in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    third, sixth = (
        load_checkpoint(tmp_path / "whole" / f"step_0000000{step}").hash for step in (3, 6)
    )
    assert third != sixth  # it went on at all


def test_log_and_finished_checkpoint(parquet: Path, records: list[Record], tmp_path: Path) -> None:
    run = tiny_run(parquet, log_every=2)
    train(run, tmp_path, device="cpu")
    logged = rows(tmp_path, "train")
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert {"loss", "coordinate", "lattice", "gradient_norm", "learning_rate"} <= set(logged[0])
    validated = rows(tmp_path, "validation")
    assert [row["step"] for row in validated] == [3, 6]
    levels = [f"coordinate_t{t}" for t in ("0.0", "0.2", "0.4", "0.6", "0.8")]
    assert all(row[name] >= 0 for row in validated for name in levels)
    assert all(sum(row[name] for name in levels) > 0 for row in validated)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    final = load_checkpoint(tmp_path / "final")
    assert RunConfig.model_validate(final.config) == run
    assert final.manifest["extra"]["training_rows"] == len(records)
    assert rows_seen_by(tmp_path / "final") == ((str(parquet), len(records)),)
    assert final.optimizer is None
    assert final.hash == load_checkpoint(tmp_path).hash
    assert load(tmp_path / "final", "cpu").properties == run.model.properties
    card = (tmp_path / "final/README.md").read_text()
    size = sum(
        parameter.numel() for parameter in load(tmp_path / "final", "cpu").model.parameters()
    )
    for part in (
        f"# {run.name}\n\nCrystal DiT: ",
        ", told space group, Wyckoff sites, band_gap (eV), formation_energy (eV/atom). ",
        f" {size:,} parameters.\n",
        f"learned from {parquet}, {len(records)} rows, fingerprint `{final.fingerprint}`.",
        "**Budget:** 6 steps, ",
        "; from random weights.",
        f": loss {validated[-1]['loss']:.4f}.",
    ):
        assert part in card
    train(run, tmp_path, device="cpu", resume=True)  # has no step left, and says as much
    assert f": loss {validated[-1]['loss']:.4f}." in (tmp_path / "final/README.md").read_text()


def test_settings_of_a_finished_run_make_the_same_run(parquet: Path, tmp_path: Path) -> None:
    train(tiny_run(parquet), tmp_path / "first", device="cpu")
    again = load_config(tmp_path / "first/final/config.yaml")
    train(again, tmp_path / "second", device="cpu")
    first, second = (load_checkpoint(tmp_path / name / "final") for name in ("first", "second"))
    assert first.hash == second.hash


def test_a_warm_up_longer_than_the_run_is_told(records: list[Record]) -> None:
    model = {"properties": ["band_gap"]}
    assert trainer_of(records, tiny_run(model=model, steps=6, warmup=6)).remarks == []
    run = tiny_run(model=model, steps=6, warmup=12, learning_rate=1e-3)
    (line,) = trainer_of(records, run).remarks
    assert line.startswith("train.warmup: 12 steps are more than the 6 of the run, ")
    assert "gets to 50.0% of 0.001;" in line


def test_noise_levels_are_told_apart(records: list[Record]) -> None:
    """The losses per level, weighted by the crystals in them, are the loss per crystal."""
    trainer = trainer_of(records, tiny_run())
    steps(trainer, 3)
    found = trainer.validate()
    per_level: dict[int, list[float]] = {}
    current = [p.detach().clone() for p in trainer.parameters]
    torch._foreach_copy_([p.data for p in trainer.parameters], trainer.average)
    for plan in trainer.validation.once():
        data = trainer.prepare_validation(plan)
        with torch.no_grad():
            loss = trainer.loss(data)
        for row, t in enumerate(data.noisy.t.tolist()):
            if plan.first[row] and data.batch.free_mask[row].any():
                per_level.setdefault(int(5 * t), []).append(float(loss.per_crystal[row]))
    torch._foreach_copy_([p.data for p in trainer.parameters], current)
    assert len(per_level) > 2
    for level, values in per_level.items():
        assert np.isclose(found[f"coordinate_t{level / 5:.1f}"], np.mean(values), rtol=1e-5)


def test_resume_with_other_rows(records: list[Record], tmp_path: Path) -> None:
    trainer = trainer_of(records, tiny_run())
    steps(trainer, 1)
    save_step(tmp_path, trainer.step, **trainer.checkpoint())
    other = trainer_of(records[:-1], tiny_run())
    with pytest.raises(UserError, match="other rows"):
        other.resume(tmp_path)
    former = tmp_path / "former"
    save_step(former, trainer.step, **trainer.checkpoint() | {"fingerprint": "9" * 64})
    with pytest.raises(UserError, match="made by an earlier version"):
        trainer.resume(former)
    other = trainer_of(records, tiny_run())
    other.resume(tmp_path)
    assert other.step == 1
    assert steps(other, 1)[0]["loss"] == steps(trainer, 1)[0]["loss"]


def test_starts_from_a_checkpoint(records: list[Record], parquet: Path, tmp_path: Path) -> None:
    train(tiny_run(parquet), tmp_path, device="cpu")
    final = tmp_path / "final"
    trainer = trainer_of(records, tiny_run(init_from=str(final), seed=5))
    weights = load_checkpoint(final).model
    assert trainer.step == 0
    seen = [(str(parquet), len(records)), (trainer.config.train.data, len(records))]
    assert trainer.account == {"training_rows": len(records), "data": seen}
    for name, parameter, average in zip(
        trainer.names, trainer.parameters, trainer.average, strict=True
    ):
        np.testing.assert_array_equal(parameter.detach().numpy(), weights[MODEL_PREFIX + name])
        np.testing.assert_array_equal(average.numpy(), weights[MODEL_PREFIX + name])
    with pytest.raises(UserError, match="has shape"):
        trainer_of(records, tiny_run(model={"width": 32}, init_from=str(final)))
    with pytest.raises(UserError):
        trainer_of(records, tiny_run(init_from=str(tmp_path / "absent")))


@pytest.mark.parametrize("learned", [(), ("formation_energy",)])
def test_weights_go_on_with_the_statistics_they_were_learned_with(
    learned: tuple[str, ...], records: list[Record], tmp_path: Path
) -> None:
    """On other rows; a property that they never saw is scaled by these."""
    folder, run = tmp_path / "start", tiny_run(model={"properties": learned})
    former = trainer_of(records, run)
    save_checkpoint(folder, **former.final())
    again = trainer_of(records, tiny_run(model=dict(run.model), init_from=str(folder)))
    fitted = trainer_of(records[:5], run).standardizer
    other = trainer_of(records[:5], tiny_run(model=dict(run.model), init_from=str(folder)))
    for name, value in other.standardizer.to_arrays().items():
        wanted = former.standardizer.to_arrays()[name]
        np.testing.assert_array_equal(again.standardizer.to_arrays()[name], wanted)
        assert not np.allclose(wanted, fitted.to_arrays()[name])
        if name.startswith("property"):
            known = [key in learned for key in PROPERTY_NAMES]
            wanted = np.where(known, wanted, fitted.to_arrays()[name])
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
    saved = load_checkpoint(folder).model
    for name, array in other.model_arrays().items():
        if not name.startswith("standardizer.property"):
            np.testing.assert_array_equal(array, saved[name])
    save_checkpoint(tmp_path / "second", **other.final())
    third = trainer_of(
        records[:5], tiny_run(model=dict(run.model), init_from=str(tmp_path / "second"))
    )
    for name, value in third.standardizer.to_arrays().items():
        np.testing.assert_allclose(value, other.standardizer.to_arrays()[name], rtol=1e-6)


def test_a_fine_tuned_network_keeps_what_it_starts_its_samples_from(
    records: list[Record], tmp_path: Path
) -> None:
    """New rows get precedents from it and stand beside it; and so on along a chain."""
    salt, *former = records
    lattice = salt.crystal.lattice
    fluoride, bromide = (
        Record(name, Crystal(225, (Site(metal, "a"), Site(halogen, "b")), lattice))
        for name, metal, halogen in (("LiF", 3, 9), ("KBr", 19, 35))
    )
    run = {"precedents": True, "properties": ()}
    folders = [str(tmp_path / name) for name in ("first", "second", "third")]
    for folder, rows, start in zip(
        folders, ([salt, *former], [fluoride], [bromide]), ("", *folders), strict=False
    ):
        trainer = trainer_of(rows, tiny_run(model=run, init_from=start))
        save_checkpoint(Path(folder), **trainer.final())
    _, _, index, _ = read_checkpoint(Path(folders[-1]))
    assert index is not None
    names = [one.material_id for one in index.find(fluoride.crystal, 3)]
    assert names == ["LiF", salt.material_id, "KBr"]
    assert index.find(former[-1].crystal)
    (bucket,) = trainer.data.buckets
    assert bucket.batch.precedent_mask.all()
    assert trainer.fingerprint == fingerprint([bromide])
    # The salt again, under another name: it is not what the network is shown of itself.
    again = Record("again", salt.crystal)
    run = tiny_run(model=run, init_from=folders[-1])
    (watched,) = Trainer(run, [bromide], [again]).validation.buckets
    (found,) = watched.batch.precedent_numbers
    assert set(found.ravel().tolist()) - {0} in ({3, 9}, {19, 35})


def test_a_run_does_not_go_on_with_other_statistics(records: list[Record], tmp_path: Path) -> None:
    """As when what it starts from has been trained anew in between."""
    start = tmp_path / "start"
    save_checkpoint(start, **trainer_of(records, tiny_run()).final())
    trainer = trainer_of(records[:5], tiny_run(init_from=str(start)))
    steps(trainer, 1)
    save_step(tmp_path / "run", trainer.step, **trainer.checkpoint())
    trainer_of(records[:5], tiny_run(init_from=str(start))).resume(tmp_path / "run")
    shutil.rmtree(start)
    save_checkpoint(start, **trainer_of(records[:9], tiny_run()).final())
    with pytest.raises(UserError, match="made with other scales of lattices and properties than"):
        trainer_of(records[:5], tiny_run(init_from=str(start))).resume(tmp_path / "run")


# Data


def test_no_rows(tmp_path: Path, parquet: Path, records: list[Record]) -> None:
    empty = tmp_path / "empty.parquet"
    write_records([], empty)
    with pytest.raises(UserError, match="no crystal"):
        train(tiny_run(parquet, data=str(empty)), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="to watch"):
        train(tiny_run(parquet, validation=str(empty)), tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="no data set"):
        train(tiny_run(tmp_path / "absent.parquet"), tmp_path / "run", device="cpu")


@pytest.mark.parametrize("energy", [None, -1.0])
def test_a_property_that_no_row_tells(
    tmp_path: Path, records: list[Record], energy: float | None
) -> None:
    told = [
        Record(r.material_id, r.crystal, properties=r.properties | {"formation_energy": energy})
        for r in records
    ]
    write_records(told, tmp_path / "told.parquet")
    run = tiny_run(tmp_path / "told.parquet")
    with pytest.raises(UserError, match=r"no row has a formation_energy.* model\.properties"):
        train(run, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    train(tiny_run(tmp_path / "told.parquet", {"properties": ["band_gap"]}), tmp_path / "run")


def test_a_folder_where_another_run_trains(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with alone_in(tmp_path / "run"), pytest.raises(UserError, match="another process trains"):
        train(tiny_run(parquet), tmp_path / "run", device="cpu")


@pytest.mark.parametrize("device", ["cuda", "gpu", "ascend"])
def test_a_device_that_is_not_here(parquet: Path, tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is here")
    with pytest.raises(UserError, match=f"no device '{device}'"):
        train(tiny_run(parquet), tmp_path / "run", device=device)


def test_loss_scale_is_halved_where_a_gradient_overflows(records: list[Record]) -> None:
    """The step is left out; the next one finds its way, and a resumed run knows the scale."""
    trainer = trainer_of(records, tiny_run(precision="float16"))
    (good,) = steps(trainer, 1)
    assert math.isfinite(good["gradient_norm"])
    before = trainer.optimizer_arrays()
    trainer.loss_scale.value = 2.0**127
    (overflown,) = steps(trainer, 1)
    assert not math.isfinite(overflown["gradient_norm"])
    assert (trainer.loss_scale.value, trainer.loss_scale.finite_steps) == (2.0**126, 0)
    after = trainer.optimizer_arrays()
    assert all((before[name] == after[name]).all() for name in before)
    assert trainer.checkpoint()["state"]["loss_scale"] == [2.0**126, 0]
    trainer.loss_scale.value = 1.0
    steps(trainer, 1)
    counted = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert counted <= {0.0, 3.0}  # zero where there is no gradient
    assert 3.0 in counted
    trainer.loss_scale.value = 1.0
    assert not trainer.loss_scale.follow(finite=False)  # nothing left to halve: an error


def test_log_of_steps_that_are_left_out_is_json(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.LOSS_SCALE", 2.0**127)
    train(tiny_run(parquet, precision="float16"), tmp_path / "run", device="cpu")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    steps_told = [row for row in rows if row["kind"] == "train"]
    assert len(steps_told) == 6
    assert "gradient_norm" not in steps_told[0]
    assert all(row["loss"] > 0 for row in steps_told)


def test_loss_scale_grows_after_many_steps() -> None:
    scale = LossScale("float16")
    for _ in range(LOSS_SCALE_STEPS):
        assert scale.follow(finite=True)
    assert (scale.value, scale.finite_steps) == (2 * LOSS_SCALE, 0)
    fixed = LossScale("bfloat16")
    assert fixed.value == 1.0
    assert not fixed.follow(finite=False)


def test_large_crystals_are_left_out(records: list[Record]) -> None:
    largest = max(records, key=lambda record: record.crystal.num_primitive_atoms)
    assert largest.crystal.num_primitive_atoms <= MAX_ATOMS
    sites = largest.crystal.sites * 6
    grown = type(largest.crystal)(largest.crystal.space_group, sites, largest.crystal.lattice)
    assert grown.num_primitive_atoms > MAX_ATOMS
    assert small_enough([*records, Record("grown", grown)]) == records


def test_rows_come_back_from_parquet(records: list[Record], parquet: Path) -> None:
    assert len(read_records(parquet)) == len(records) == len(TEXTBOOK)


# Sharing a batch


def test_shares_of_a_batch_add_up(records: list[Record]) -> None:
    """Gradients of three processes, whose rows do not divide evenly, sum to that of one."""
    settings: dict[str, object] = {"batch_size": 7, "edge_budget": 2048}
    whole = trainer_of(records, tiny_run(**settings))
    weights = [torch.from_numpy(fill_value(n, p.shape)) for n, p in whole.model.named_parameters()]
    gradients, sizes = [], []
    for count in (1, 3):
        total: list[torch.Tensor] = []
        for rank in range(count):
            trainer = Trainer(whole.config, records, records, shard=Shard(rank, count))
            torch._foreach_copy_([p.data for p in trainer.parameters], weights)
            data = next(trainer.batches())
            sizes.append(data.batch.size)
            loss = trainer.loss(data).total
            found = torch.autograd.grad(loss, trainer.parameters, materialize_grads=True)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        gradients.append(total)
    assert sizes == [7, 3, 3, 3]
    largest = max(float(one.abs().max()) for one in gradients[0] if one.numel())
    for name, one, three in zip(whole.names, *gradients, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-3, atol=1e-6 * largest, msg=name)


def sizes_of_shares(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the crystals of every call of the loss, in which an operation has one thread."""
    sizes = []
    loss = trainer.loss

    def counted(data: TrainingBatch) -> Loss:
        assert trainer.threads is None or torch.get_num_threads() == 1
        sizes.append(data.batch.size)
        return loss(data)

    monkeypatch.setattr(trainer, "loss", counted)
    return sizes


@pytest.mark.parametrize(
    "model",
    [{}, {"precedents": True}, {"cell": "conventional", "frames": False}],
    ids=["asymmetric", "precedents", "conventional"],
)
def test_threads_take_shares_of_a_step(
    records: list[Record], model: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients, of shares of unlike size, add up to that of one thread; so do the losses."""
    run = tiny_run(model=model, batch_size=7, edge_budget=65536)
    found = []
    for count, shares in ((1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (5, [1, 1, 1, 2, 2])):
        with threads_per_operation(count):
            trainer = trainer_of(records, run)
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    parameter.copy_(torch.from_numpy(fill_value(name, parameter.shape)))
            sizes = sizes_of_shares(trainer, monkeypatch)
            free = (one for one in trainer.batches() if one.weights.coordinate.any())
            values = trainer.loss_with_gradient(next(free))
            assert torch.get_num_threads() == count
        assert sorted(sizes) == shares
        found.append((values, [parameter.grad for parameter in trainer.parameters]))
    (value, gradient), *others = found
    assert all(float(part) > 0 for part in value)
    largest = max(float(one.abs().max()) for one in gradient if one is not None and one.numel())
    for values, gradients in others:
        torch.testing.assert_close(values, value, rtol=1e-5, atol=0)
        for name, one, shared in zip(trainer.names, gradient, gradients, strict=True):
            one = torch.zeros_like(shared) if one is None else one
            torch.testing.assert_close(shared, one, rtol=1e-3, atol=1e-6 * largest, msg=name)


def test_fewer_crystals_than_threads(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    with threads_per_operation(4):
        trainer = trainer_of(records, tiny_run(batch_size=2, edge_budget=2048))
        sizes = sizes_of_shares(trainer, monkeypatch)
        steps(trainer, 1)
    assert sizes == [1, 1]


def test_threads_repeat_a_run_bit_by_bit(records: list[Record]) -> None:
    """Which share is done first makes no difference."""
    with threads_per_operation(3):
        first, second = (trainer_of(records, tiny_run(batch_size=16)) for _ in range(2))
        assert first.threads is not None
        assert steps(first, 4) == steps(second, 4)
        for one, other in zip(first.parameters, second.parameters, strict=True):
            assert torch.equal(one, other)


def test_an_error_in_a_share_is_raised(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    with threads_per_operation(2):
        trainer = trainer_of(records, tiny_run())
        data = next(trainer.batches())

        def failing(share: TrainingBatch) -> Loss:
            raise ValueError(f"{share.batch.size} crystals")

        monkeypatch.setattr(trainer, "loss", failing)
        with pytest.raises(ValueError, match="crystals"):
            trainer.loss_with_gradient(data)
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"compile": True}], ids=str)
def test_one_thread_where_state_is_its_own(
    records: list[Record], settings: dict[str, object]
) -> None:
    """Compiled code and autocast's cache are not shared between threads."""
    with threads_per_operation(2):
        assert trainer_of(records, tiny_run(**settings)).threads is None
        assert trainer_of(records, tiny_run()).threads is not None


def test_without_a_compiler_threads_are_used(
    records: list[Record], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with threads_per_operation(2):
        assert trainer_of(records, tiny_run(compile=True)).threads is not None
    assert capsys.readouterr().err.startswith("train.compile: without effect, for g++ is not found")
