"""LoRA in MindFormers' words by two processes, started by the scripts that a user starts."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from common.checkpoint import save_checkpoint
from common.data.store import write_records
from common.language.config import LanguageRunConfig
from common.language.initial import initial_weights
from common.language.mindformers import sections
from common.language.parameters import parameters
from common.language.tokenizer import compact_tokenizer
from tests.end_to_end.test_distributed import (
    ASCEND,
    CPU,
    GPU,
    assert_same,
    free_port,
    result,
    rows,
)
from tests.training import textbook_records
from torch_impl.backend import train_language


@dataclass(frozen=True)
class Run:
    """A run on a disk: MindFormers' YAML, and the folder of one process with torch."""

    config: Path
    alone: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("language")
    write_records(textbook_records(), folder / "data.parquet")
    train: dict[str, object] = {
        "data": str(folder / "data.parquet"),
        "validation": str(folder / "data.parquet"),
        "questions": ["band_gap"],
        "steps": 3,
        "token_budget": 192,
        "warmup": 1,
        "validation_every": 3,
        "checkpoint_every": 3,
        "log_every": 1,
        "learning_rate": 1e-2,
        "init_from": str(folder / "base"),
    }
    model = {"layers": 1, "width": 32, "heads": 4, "groups": 2, "feed_forward": 48}
    data = {"name": "tiny", "kind": "language", "model": model, "lora": {"rank": 4}}
    settings = LanguageRunConfig.model_validate(data | {"train": train})
    network = settings.model.to_huggingface(compact_tokenizer())
    # Larger than at birth, so that the additions matter.
    weights = {n: 3 * a for n, a in initial_weights(parameters(network), 0).items()}
    of_base = {"name": "base", "kind": "language", "model": model}
    save_checkpoint(folder / "base", config=of_base, model=weights)
    config = folder / "mindformers.yaml"
    config.write_text(yaml.safe_dump(sections(settings, network)))
    train_language(settings, folder / "alone", device="cpu")
    return Run(config, folder / "alone")


def test_run_gpu(run: Run, tmp_path: Path) -> None:
    code, _, errors = result(GPU, *CPU, "--nproc", 2, "--out", tmp_path / "run", run.config)
    assert code == 0, errors
    assert_same(rows(tmp_path / "run"), rows(run.alone))


@pytest.mark.skipif(
    importlib.util.find_spec("mindformers") is None,
    reason="MindFormers is not installed: scripts/install.sh",
)
def test_run_ascend_distributed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of different numbers of answers, whose gradients are averaged."""
    monkeypatch.chdir(tmp_path)
    options = ("--worker_num", 2, "--master_port", free_port(), "--out", tmp_path / "run")
    code, _, errors = result(ASCEND, *CPU, *options, run.config)
    assert code == 0, errors
    assert_same(rows(tmp_path / "run"), rows(run.alone))
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing beside it"


def test_wrong_word_is_told_before_anything_starts(run: Run, tmp_path: Path) -> None:
    arguments = ("--nproc", 2, "--out", tmp_path / "run", run.config, "runner_config.epochs=2")
    code, _, errors = result(GPU, *CPU, *arguments)
    assert code == 2
    assert "runner_config.epochs is 2, but only 1 is heeded" in errors
    assert not (tmp_path / "run").exists()
