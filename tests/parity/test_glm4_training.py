"""LoRA through MindFormers' Trainer and through transformers and peft, from the same beginning."""

import json
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from common.checkpoint import load_checkpoint
from common.data.store import read_records, write_records
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.language.examples import TokenBatch
from tests.training import textbook_records
from torch_impl import backend as torch_backend
from torch_impl.language_model import load_language_model
from torch_impl.train_glm4 import Trainer

if find_spec("mindformers") is None:
    pytest.skip("MindFormers is not installed: scripts/install.sh", allow_module_level=True)
from ms_impl import backend as ms_backend
from ms_impl import train_glm4

#: Of loss curves.
LIMIT = 1e-4
STEPS = 4


def settings(parquet: Path, base: Path | None, **changes: object) -> LanguageRunConfig:
    """A run of four steps of one block, of LoRA if there is a base."""
    train: dict[str, object] = {
        "data": str(parquet),
        "validation": str(parquet),
        "questions": ["band_gap"],
        "steps": STEPS,
        "token_budget": 192,
        "warmup": 2,
        "validation_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "learning_rate": 1e-2,
        "ema": 0.5,
        "init_from": None if base is None else str(base / "final"),
    }
    return LanguageRunConfig.model_validate(
        {
            "name": "tiny",
            "kind": "language",
            "model": {"layers": 1, "width": 32, "heads": 4, "groups": 2, "feed_forward": 48},
            "lora": None if base is None else {"rank": 4},
            "train": train | changes,
        }
    )


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("textbook") / "textbook.parquet"
    write_records(textbook_records(), path)
    return path


@pytest.fixture(scope="module")
def base(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the additions belong to."""
    out = tmp_path_factory.mktemp("base")
    torch_backend.train_language(settings(parquet, None), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def torch_run(parquet: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch")
    torch_backend.train_language(settings(parquet, base), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def ms_run(parquet: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mindspore")
    ms_backend.train_language(settings(parquet, base), out, device="cpu")
    return out


def curve(run: Path, kind: str = "train") -> np.ndarray:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return np.array([row["loss"] for row in rows if row["kind"] == kind])


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest relative difference."""
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found / wanted - 1).max())


def same_arrays(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same weights and moments."""
    a, b = (load_checkpoint(path, optimizer=True) for path in (first, second))
    assert a.state is not None
    assert b.state is not None
    assert a.state["step"] == b.state["step"]
    close = []
    for ours, theirs in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert ours is not None
        assert theirs is not None
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.shape == theirs[name].shape, name
            scale = np.abs(array).max()
            close.append(scale > 0 and np.abs(array - theirs[name]).max() < 1e-4 * scale)
    return all(close)


def test_curves(torch_run: Path, ms_run: Path) -> None:
    assert len(curve(ms_run)) == STEPS
    assert apart(curve(ms_run), curve(torch_run)) < LIMIT
    assert apart(curve(ms_run, "validation"), curve(torch_run, "validation")) < LIMIT


def test_checkpoints(torch_run: Path, ms_run: Path) -> None:
    last = f"step_{STEPS:08d}"
    assert same_arrays(torch_run / last, ms_run / last)
    names = [sorted(p.name for p in (run / "final").iterdir()) for run in (torch_run, ms_run)]
    assert names[0] == names[1]
    assert load_checkpoint(ms_run / "final").config == load_checkpoint(torch_run / "final").config


def test_torch_reads_the_adapter(torch_run: Path, ms_run: Path) -> None:
    ids = [[2, 3, 4, 100, 200]]
    found, wanted = (
        load_language_model(run / "final")(ids, [None])[0][0] for run in (ms_run, torch_run)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_mindspore_goes_on_with_torchs_run(
    parquet: Path, base: Path, torch_run: Path, tmp_path: Path
) -> None:
    copytree(torch_run / "step_00000002", tmp_path / "step_00000002")
    ms_backend.train_language(settings(parquet, base), tmp_path, resume=True, device="cpu")
    assert apart(curve(tmp_path), curve(torch_run)[2:]) < LIMIT
    assert same_arrays(torch_run / f"step_{STEPS:08d}", tmp_path / f"step_{STEPS:08d}")


# Regularisation


def test_analogues_left_out_are_the_same(parquet: Path, base: Path, tmp_path: Path) -> None:
    """In both frameworks, from their settings."""
    changes = {"analogues": 3, "token_budget": 600}
    whole, *found = tmp_path / "whole", tmp_path / "torch", tmp_path / "mindspore"
    torch_backend.train_language(settings(parquet, base, **changes), whole, device="cpu")
    for backend, out in zip((torch_backend, ms_backend), found, strict=True):
        run = settings(parquet, base, **changes, analogue_dropout=0.5)
        backend.train_language(run, out, device="cpu")
    assert apart(curve(found[1]), curve(found[0])) < LIMIT
    assert apart(curve(found[1], "validation"), curve(found[0], "validation")) < LIMIT
    assert apart(curve(found[1]), curve(whole)) > LIMIT


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "lora"])
def test_dropout_in_steps_but_not_in_validation(parquet: Path, base: Path, adapted: bool) -> None:
    """With weights that stay as they are: validation is torch's, and steps differ from it."""
    config = settings(parquet, base if adapted else None, dropout=0.5, learning_rate=1e-12)
    rows = read_records(parquet)
    trainer = train_glm4.Trainer(config, rows, rows)
    plain = config.train.model_copy(update={"dropout": 0.0})
    other = Trainer(config.model_copy(update={"train": plain}), rows, rows)
    wanted = other.validate()["loss"]
    before = trainer.validate()["loss"]  # whose graphs come first
    found: list[float] = []
    trainer.run(lambda values: found.append(values["loss"]))
    expected = [other.train_step(data)["loss"] for data in islice(other.batches(), STEPS)]
    assert before == pytest.approx(wanted, rel=LIMIT)
    assert trainer.validate()["loss"] == pytest.approx(wanted, rel=LIMIT)
    assert all(abs(a / b - 1) > LIMIT for a, b in zip(found, expected, strict=True))
    later = train_glm4.Trainer(config, rows, rows)
    later.run(lambda values: None)
    assert later.validate()["loss"] == pytest.approx(wanted, rel=LIMIT)  # whose come last


# What must be noticed


@pytest.mark.parametrize("change", [{"learning_rate": 1.1e-2}, {"seed": 1}])
def test_another_run_is_noticed(
    parquet: Path, base: Path, ms_run: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    torch_backend.train_language(settings(parquet, base, **change), tmp_path, device="cpu")
    assert apart(curve(ms_run), curve(tmp_path)) > LIMIT
    assert not same_arrays(tmp_path / f"step_{STEPS:08d}", ms_run / f"step_{STEPS:08d}")


def test_permuted_batch_is_noticed(
    parquet: Path,
    base: Path,
    torch_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers of other questions."""
    fixed = train_glm4.Trainer.fixed

    def permuted(self: train_glm4.Trainer, data: TokenBatch) -> TokenBatch:
        other = TokenBatch(
            data.tokens, np.roll(data.targets, 1, axis=0), data.answers, data.answer_tokens
        )
        return fixed(self, other)

    monkeypatch.setattr(train_glm4.Trainer, "fixed", permuted)
    ms_backend.train_language(settings(parquet, base), tmp_path, device="cpu")
    assert apart(curve(tmp_path), curve(torch_run)) > LIMIT


def test_weights_of_another_network(parquet: Path, base: Path) -> None:
    config = settings(parquet, base)
    other = config.model.model_copy(update={"layers": 2})
    rows = read_records(parquet)
    with pytest.raises(UserError, match="weights do not belong to this network"):
        train_glm4.Trainer(config.model_copy(update={"model": other}), rows, rows)
