"""The plan of a language model's run: what it counts is what the trainers pad."""

import importlib.util
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from common.data.store import write_records
from common.language.config import LanguageRunConfig
from common.language.examples import fixed_shape
from common.language.tokenizer import compact_tokenizer
from common.training import Shard
from tests.conftest import REPOSITORY
from tests.language import language_run
from tests.training import textbook_records
from torch_impl.train_glm4 import Trainer

DEVICES = 3


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = REPOSITORY / "scripts" / "plan_language.py"
    spec = importlib.util.spec_from_file_location("plan_language", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_padding_is_that_of_the_trainers(script: ModuleType) -> None:
    """Of the first epoch, on the device that has most; graphs hold more than the budget's share."""
    rows, run = textbook_records(), language_run()
    counted = script.padding(run, compact_tokenizer(), rows, DEVICES)
    trainer = Trainer(run, rows, rows, shard=Shard(0, DEVICES))
    epoch = trainer.data.epoch(run.train.seed, 0)
    sizes = [data.tokens.shape for data in islice(trainer.batches(), len(epoch))]
    assert counted.widest == max(np.prod(size) for size in sizes)
    budget, limit = run.train.token_budget, run.model.positions
    graphs = [fixed_shape(length, budget, limit, DEVICES) for _, length in sizes]
    assert counted.shapes.total() == len(epoch) > 1
    assert counted.most == max(rows * length for rows, length in graphs) > budget / DEVICES
    assert counted.mean == pytest.approx(np.mean([rows * length for rows, length in graphs]))


def test_memory_is_that_of_the_largest_graph(script: ModuleType) -> None:
    data = language_run(init_from="base").model_dump() | {"lora": {"rank": 2}}
    run = LanguageRunConfig.model_validate(data)
    small, large = (
        script.plan(run, np.ones(3), script.Padding(shapes, 0), DEVICES)
        for shapes in (script.Counter({(2, 32): 2}), script.Counter({(2, 32): 1, (4, 48): 1}))
    )
    for name in ("inputs", "block", "logits"):
        assert getattr(large, name) == pytest.approx(3 * getattr(small, name))
    assert large.operations == pytest.approx(2 * small.operations)
    assert (large.weights, large.additions) == (small.weights, small.additions)


def test_base_that_is_shipped_goes_by_its_name(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As for a training, which is what is planned."""
    rows, config = tmp_path / "rows.parquet", tmp_path / "run.yaml"
    write_records(textbook_records(), rows)
    data = language_run(rows, init_from="glm4_tiny").model_dump(mode="json")
    config.write_text(yaml.safe_dump(data | {"lora": {"rank": 2}}))
    monkeypatch.chdir(tmp_path)
    script.main(config)
    assert "mean of a step" in capsys.readouterr().out
