"""What a run writes while it trains: one JSON object per line, and the same for TensorBoard."""

import json
import os
import socket
import time
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from common.files import append_whole, refused


class TrainingLog:
    """``log.jsonl`` and ``tensorboard/`` in a run's folder; both are whole after every call.

    TensorBoard's own writer is a thread, whose errors come late and as a traceback.

    Args:
        folder: the run's.
        step: where the run goes on; what TensorBoard was told of later steps no longer counts.

    Raises:
        UserError: here and in ``write``, when the system refuses.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._lines = folder / "log.jsonl"
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{rest:09d}"
        self._events = folder / "tensorboard" / name
        try:
            self._events.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise refused(self._events.parent, error) from error
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
        append_whole(self._lines, json.dumps(row).encode() + b"\n")
        scalars = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in values.items()
        ]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append_whole(self._events, record.getvalue())
