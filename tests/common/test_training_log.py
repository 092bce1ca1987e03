"""What a run writes while it trains, read by TensorBoard itself."""

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from common.training_log import TrainingLog


def test_files_of_one_second_are_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard sorts their names as text; the first is from the second's first tenth."""
    for value, nanoseconds in ((1.0, 5), (2.0, 98_765_432), (3.0, 112_486_000)):
        monkeypatch.setattr(time, "time_ns", lambda now=10**18 + nanoseconds: now)
        TrainingLog(tmp_path, 3).write("train", 3, 0.1, {"loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 3.0)]


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    """A run that goes on from step 2 replaces what was told of step 3."""
    first = TrainingLog(tmp_path, 0)
    for step in (1, 2, 3):
        first.write("train", step, 0.1, {"loss": step / 4, "rate": 1.0})
    second = TrainingLog(tmp_path, 3)
    second.write("train", 3, 0.2, {"loss": 5.0, "rate": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/rate"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 5.0),
    ]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [0.25, 0.5, 0.75, 5.0]


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("notes")
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: File exists"):
        TrainingLog(tmp_path, 0)
