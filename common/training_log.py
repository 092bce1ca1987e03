"""What a run writes while it trains: one JSON object per line, and the same for TensorBoard."""

import json
import time
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TrainingLog:
    """``log.jsonl`` and ``tensorboard/`` in a run's folder.

    Args:
        folder: the run's.
        step: where the run goes on; what TensorBoard was told of later steps no longer counts.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._lines = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._events = EventFileWriter(str(folder / "tensorboard"))
        self._add(Event(step=step, file_version="brain.Event:2"))
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, kind: str, step: int, seconds: float, values: dict[str, float]) -> None:
        """Adds figures of a step.

        Args:
            kind: ``train`` or ``validation``.
            step: of the run.
            seconds: of training so far.
            values: by name.
        """
        row = {"kind": kind, "step": step, "seconds": round(seconds, 1), **values}
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        scalars = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in values.items()
        ]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.add_event(event)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._events.close()
        self._lines.close()
