"""Ctrl-C, and what a cluster's scheduler sends before the time is over, while a run trains."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from common.checkpoint import load_checkpoint
from common.data.store import write_records
from common.errors import Interrupted
from common.training import TrainingRun, run_training
from tests.language import language_run
from tests.training import alike_records, textbook_records, tiny_run

#: So many steps are not over before a signal comes, however fast the machine is.
MANY = {"steps": 100000, "checkpoint_every": 100000, "validation_every": 100000}
TIMEOUT = 240


def logged(out: Path) -> list[dict[str, float]]:
    log = out / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


@pytest.mark.parametrize(
    ("name", "options", "status", "how"),
    [
        ("SIGINT", (), 130, "the same command goes on"),
        ("SIGTERM", ("--fresh",), 143, "the same command without --fresh goes on"),
    ],
)
def test_command(
    tmp_path: Path, name: str, options: tuple[str, ...], status: int, how: str
) -> None:
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    write_records(textbook_records(), tmp_path / "data.parquet")
    run = tiny_run(tmp_path / "data.parquet", **MANY)
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    command = [sys.executable, "-m", "common", "train", "--backend", "torch", "--out", out]
    # A shell may have started the tests with interruptions ignored, which a process inherits.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*command, *options, config], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + TIMEOUT
    while not logged(out):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, errors
    saved = load_checkpoint(out, optimizer=True)
    assert saved.state is not None
    step = saved.state["step"]
    assert step == logged(out)[-1]["step"]
    kept = f"stopped at step {step} of 100000, which {saved.path} keeps"
    assert errors.splitlines()[-1] == f"{kept}; {how}"
    assert "error" not in errors
    assert not (out / "final").exists()


def interrupted_in(trainer: TrainingRun[Any], step: int) -> TrainingRun[Any]:
    """The run, whose process gets SIGTERM while it makes a step."""
    update = trainer.update

    def updated(*arguments: Any) -> dict[str, float]:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return update(*arguments)

    trainer.update = updated  # type: ignore[method-assign]
    return trainer


def check(make: Callable[[], TrainingRun[Any]], folder: Path) -> Path:
    """A run that is interrupted in its second step of six, and the end of the same one."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"^stopped at step 2 of 6, which .*2 keeps") as end:
        run_training(interrupted_in(make(), 1), folder, resume=False)
    assert end.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    run_training(make(), folder, resume=True)
    return folder / "final"


def same_weights(one: Path, other: Path) -> bool:
    mine, others = load_checkpoint(one).model, load_checkpoint(other).model
    assert mine.keys() == others.keys()
    return all(np.array_equal(mine[name], others[name]) for name in mine)


def test_crystals_with_torch(tmp_path: Path) -> None:
    from torch_impl.train_dit import Trainer

    records = textbook_records()

    def make() -> Trainer:
        return Trainer(tiny_run(log_every=4), records, records)

    run_training(make(), tmp_path / "whole", resume=False)
    assert same_weights(check(make, tmp_path / "run"), tmp_path / "whole" / "final")
    # What was trained before the signal is in the log, too.
    steps = [row["step"] for row in logged(tmp_path / "run") if row["kind"] == "train"]
    assert steps == [2, 4, 6]


def test_language_with_torch(tmp_path: Path) -> None:
    from torch_impl.train_glm4 import Trainer

    records = textbook_records()

    def make() -> Trainer:
        return Trainer(language_run(), records, records)

    run_training(make(), tmp_path / "whole", resume=False)
    assert same_weights(check(make, tmp_path / "run"), tmp_path / "whole" / "final")


def test_crystals_with_mindspore(tmp_path: Path) -> None:
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    from ms_impl.train_dit import Trainer

    records = alike_records()
    model = {"layers": 1, "attention": False, "modulation": False}
    trainer = Trainer(tiny_run(model=model, batch_size=8, edge_budget=1024), records, records)
    assert check(lambda: trainer, tmp_path / "run").is_dir()


@pytest.mark.skipif(
    find_spec("mindformers") is None, reason="MindFormers is not installed: scripts/install.sh"
)
def test_language_with_mindspore(tmp_path: Path) -> None:
    """MindFormers' Trainer lets the end through."""
    from ms_impl.train_glm4 import Trainer

    records = textbook_records()

    def make() -> Trainer:
        return Trainer(language_run(token_budget=8192), records, records)

    assert check(make, tmp_path / "run").is_dir()


def test_end_of_the_run_is_no_interruption(tmp_path: Path) -> None:
    from torch_impl.train_dit import Trainer

    records = textbook_records()
    trainer = Trainer(tiny_run(), records, records)
    run_training(interrupted_in(trainer, 5), tmp_path, resume=False)
    assert (tmp_path / "final").is_dir()
