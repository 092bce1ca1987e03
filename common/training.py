"""Training as far as it needs no gradient: schedules, the loop, checkpoints and logs of any run.

``common.diffusion.training`` and ``common.language.training`` add what is learned from; a backend's
``Trainer`` the network, the optimiser and the moving of arrays.
"""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from common.checkpoint import (
    FINAL,
    Checkpoint,
    checkpoint_folder,
    latest,
    load_checkpoint,
    rows_seen_by,
    save_checkpoint,
    save_step,
    shipped_language,
)
from common.config import AnyRunConfig, RunConfig
from common.data.locations import dataset
from common.data.store import Record, fingerprint, is_fingerprint
from common.errors import Interrupted, UserError
from common.files import alone_in
from common.language.hub import weights_folder
from common.model_card import model_card
from common.stopping import StopRequest, stop_requests
from common.weights import Arrays

if TYPE_CHECKING:
    from common.training_log import TrainingLog

#: AdamW, in every framework.
ADAM_BETAS = (0.9, 0.99)
ADAM_EPS = 1e-8
#: Seconds in which a signal may reach one of several processes more than once.
ECHO = 10.0

#: Of the loss in float16: where it starts, and finite steps until it is doubled.
LOSS_SCALE, LOSS_SCALE_STEPS = 2.0**15, 2000

#: What a network gets in one step.
Data = TypeVar("Data")


@dataclass(frozen=True)
class Shard:
    """Which share of every batch a process works on, when several train together."""

    rank: int = 0
    count: int = 1

    def rows(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions in a batch of some size, and which of them are real.

        Every process gets equally many; those beyond the batch repeat its last row.
        """
        share = -(-size // self.count)
        positions = np.arange(self.rank * share, (self.rank + 1) * share)
        return positions.clip(max=size - 1), positions < size


class LossScale:
    """What the loss is multiplied by before its gradient is taken: one, but in float16.

    Small gradients are zero in float16, and large ones infinite: the scale is halved, and the step
    left out, where one is not finite, and doubled after many steps (arXiv:1710.03740, section 3.2).
    """

    def __init__(self, precision: str) -> None:
        self.moves = precision == "float16"
        self.value = LOSS_SCALE if self.moves else 1.0
        self.finite_steps = 0

    def follow(self, finite: bool) -> bool:
        """Takes note of a step; returns whether training can go on."""
        if not self.moves:
            return finite
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.finite_steps == LOSS_SCALE_STEPS:
            self.value, self.finite_steps = 2 * self.value, 0
        return self.value >= 1.0


class TrainingRun(ABC, Generic[Data]):
    """One training run; every step is a function of the configuration and the step's number.

    Args:
        config: of the run.
        train_records: what to learn from.
        num_rows: of these, so many as are used.
        shard: this process's share of every batch.

    Attributes:
        remarks: lines for the user before training begins: on the warm-up, and on what becomes of
            the rows.
    """

    def __init__(
        self, config: AnyRunConfig, train_records: list[Record], num_rows: int, shard: Shard
    ) -> None:
        self.config = config
        self.shard = shard
        self.step = 0
        self.seconds = 0.0
        self.loss_scale = LossScale(config.train.precision)
        self.remarks = self._hurried()
        self.fingerprint = fingerprint(train_records)
        self.num_rows = num_rows
        start = self.start_folder
        self._seen_before = rows_seen_by(start) if start else ()

    @cached_property
    def start_folder(self) -> Path | None:
        """What the weights start from, if they do not start at random."""
        return start_folder(self.config)

    @abstractmethod
    def batches(self) -> Iterator[Data]:
        """The training batches from the current step on."""

    @abstractmethod
    def update(self, data: Data, rate: float, decay: float) -> dict[str, float]:
        """One step of the optimiser at a learning rate, then of the weights' average.

        Returns:
            ``loss``, its parts, and ``gradient_norm`` (before clipping) of the whole batch; where
            the norm is not finite, nothing was changed.
        """

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Losses of the averaged weights on the validation rows."""

    @abstractmethod
    def average_arrays(self) -> Arrays:
        """Averaged weights by name."""

    @abstractmethod
    def optimizer_arrays(self) -> Arrays:
        """Current weights and AdamW's moments by prefixed name."""

    @abstractmethod
    def restore(self, saved: Checkpoint) -> None:
        """Takes weights, averages and moments from a checkpoint that has all of them."""

    def summed(self, values: list[float]) -> list[float]:
        """Sums over the processes that train together; without others the values themselves."""
        return values

    # Schedules

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to ``final_rate`` of the peak."""
        settings = self.config.train
        if step < settings.warmup:
            return settings.learning_rate * (step + 1) / settings.warmup
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)

    def _hurried(self) -> list[str]:
        """A line where the run ends before its learning rate has reached its peak."""
        settings = self.config.train
        if settings.warmup <= settings.steps:
            return []
        return [
            f"train.warmup: {settings.warmup} steps are more than the {settings.steps} of the run, "
            f"whose learning rate gets to {settings.steps / settings.warmup:.1%} of "
            f"{settings.learning_rate:g}; set fewer"
        ]

    def average_decay(self, step: int) -> float:
        """Of the weights' average: short at first."""
        return min(self.config.train.ema, (1 + step) / (10 + step))

    # Steps

    def timed_batches(self) -> Iterator[Data]:
        """``batches``, whose preparation counts as training time."""
        batches = self.batches()
        while True:
            start = time.perf_counter()
            data = next(batches)
            self.seconds += time.perf_counter() - start
            yield data

    def train_step(self, data: Data) -> dict[str, float]:
        """One optimiser step; returns what to log."""
        start = time.perf_counter()
        rate = self.learning_rate(self.step)
        values = self.update(data, rate, self.average_decay(self.step))
        if not self.loss_scale.follow(math.isfinite(values["gradient_norm"])):
            raise UserError(
                f"training step {self.step}: the gradient is not finite; lower learning_rate"
            )
        self.step += 1
        self.seconds += time.perf_counter() - start
        return values | {"learning_rate": rate}

    def run(self, follow: Callable[[dict[str, float]], None]) -> None:
        """Trains to the end.

        Args:
            follow: called after every step with what it gave.
        """
        batches = self.timed_batches()
        while self.step < self.config.train.steps:
            follow(self.train_step(next(batches)))

    # Checkpoints

    def model_arrays(self) -> Arrays:
        """What a checkpoint keeps as the model: the averaged weights."""
        return self.average_arrays()

    def companions(self) -> dict[str, bytes]:
        """Files beside a checkpoint's own; see ``common.checkpoint``."""
        return {}

    def final(self) -> dict[str, Any]:
        """Arguments of ``common.checkpoint.save_checkpoint`` that every checkpoint has."""
        return {
            "config": self.config.model_dump(mode="json"),
            "model": self.model_arrays(),
            "fingerprint": self.fingerprint,
            "companions": self.companions(),
        }

    @property
    def account(self) -> dict[str, Any]:
        """What a manifest says of the rows that the weights have seen."""
        own = (self.config.train.data, self.num_rows)
        return {"training_rows": self.num_rows, "data": [*self._seen_before, own]}

    def checkpoint(self) -> dict[str, Any]:
        """Arguments of ``common.checkpoint.save_step``."""
        own = self.loss_scale
        scale = {"loss_scale": [own.value, own.finite_steps]} if own.moves else {}
        return self.final() | {
            "optimizer": self.optimizer_arrays(),
            "state": {"step": self.step, "seconds": self.seconds} | scale,
            "extra": self.account,
        }

    @property
    @abstractmethod
    def description(self) -> str:
        """What is trained and what it does, in a sentence."""

    @property
    def origin(self) -> str:
        """Names the weights that it starts from, by their content; empty for random ones."""
        return ""

    def _check(self, saved: Checkpoint, folder: Path) -> None:
        """Raises UserError if a checkpoint of the same rows is of another run."""

    @property
    def advice(self) -> str:
        """To who wants to start anew; several processes cannot put a run aside."""
        return "give --fresh to start anew" if self.shard.count == 1 else "give another --out"

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            UserError: if it was trained on other rows or cannot be read.
        """
        saved = load_checkpoint(folder, optimizer=True)
        if saved.fingerprint != self.fingerprint:
            if is_fingerprint(saved.fingerprint):
                raise UserError(f"{folder}: trained on other rows; {self.advice}")
            raise UserError(
                f"{folder}: made by an earlier version, whose names of training rows cannot be "
                f"compared; go on with that version, or {self.advice}"
            )
        self._check(saved, folder)
        assert saved.state is not None
        self.step, self.seconds = int(saved.state["step"]), float(saved.state["seconds"])
        if self.loss_scale.moves:
            self.loss_scale.value, self.loss_scale.finite_steps = saved.state["loss_scale"]
        self.restore(saved)


def check_agreement(trainer: TrainingRun[Any]) -> None:
    """Makes sure that the processes train the same run, from the same step on.

    Raises:
        UserError: in those processes that differ from the average, which stops all of them.
    """
    settings = trainer.config.model_dump_json()
    state = f"{settings} {trainer.fingerprint} {trainer.origin} {trainer.step}"
    # Small enough that every framework's sum is exact.
    mine = float(int(hashlib.sha256(state.encode()).hexdigest()[:4], 16))
    if trainer.summed([mine])[0] != trainer.shard.count * mine:
        raise UserError(
            "the processes differ in settings, training rows or checkpoint: give all machines "
            "the same CONFIG, data and train.init_from, and an --out that they share"
        )


def start_folder(config: AnyRunConfig) -> Path | None:
    """The folder that ``train.init_from`` names, if it names one.

    That is a path, a shipped checkpoint's name, or a language model's repository, which is fetched.

    Raises:
        UserError: if a name is not known, or a repository cannot be fetched.
    """
    start = config.train.init_from
    if not start:
        return None
    if isinstance(config, RunConfig):
        return checkpoint_folder(start)
    return weights_folder(checkpoint_folder(start, shipped_language()))


def records_of(config: AnyRunConfig) -> tuple[list[Record], list[Record]]:
    """Training and validation rows that a run names; UserError if they cannot be read."""
    return dataset(config.train.data), dataset(config.train.validation)


def run_training(trainer: TrainingRun[Any], out: Path, resume: bool) -> None:
    """Trains to the end; only the first process writes.

    Args:
        trainer: the run.
        out: the run's folder: steps, logs, and the finished checkpoint in ``final``.
        resume: whether to go on from the latest step in it.

    Raises:
        UserError: for a checkpoint that does not fit, or if another run trains in the folder.
        Interrupted: after the step in which Ctrl-C or SIGTERM came, in any of the processes; the
            first of them has then written a checkpoint.
    """
    with ExitStack() as stack:
        if not trainer.shard.rank:
            out.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(alone_in(out)):
                raise UserError(f"{out}: another process trains there; give another --out")
        _run_training(trainer, out, resume)


def _run_training(trainer: TrainingRun[Any], out: Path, resume: bool) -> None:
    folder = latest(out) if resume else None
    if resume:
        assert folder is not None
        trainer.resume(folder)
    check_agreement(trainer)
    with stop_requests(ECHO if trainer.shard.count > 1 else 0.0) as request:
        if trainer.shard.rank:
            _follow(trainer, request)
            return
        for line in (*_beginning(trainer, folder), *trainer.remarks):
            print(line, flush=True)
        from common.training_log import TrainingLog  # slow to import, and only needed here

        log = TrainingLog(out, trainer.step)
        with _progress() as progress:
            validation = _lead(trainer, out, log, progress, request)
        save_checkpoint(
            out / FINAL,
            **trainer.final(),
            extra=trainer.account | {"training_seconds": round(trainer.seconds)},
            card=model_card(trainer, validation),
        )
    print(f"{out / FINAL}: trained for {trainer.step} steps", flush=True)


def _beginning(trainer: TrainingRun[Any], folder: Path | None) -> Iterator[str]:
    """Lines for the user: what is trained, and the checkpoint that it goes on from, if any."""
    processes = "1 process" if trainer.shard.count == 1 else f"{trainer.shard.count} processes"
    yield f"{trainer.config.name}: training on {trainer.num_rows:,} rows, {processes}"
    if folder:
        yield f"going on from {folder}, after step {trainer.step} of {trainer.config.train.steps}"


def _follow(trainer: TrainingRun[Any], request: StopRequest) -> None:
    if _is_over(trainer):
        trainer.validate()

    def follow(_: dict[str, float]) -> None:
        if _due(trainer, trainer.config.train.validation_every):
            trainer.validate()
        if number := _stops(trainer, request):
            trainer.summed([0.0])  # until the first process has written
            raise Interrupted(f"stopped at step {trainer.step}", number)

    trainer.run(follow)


def _lead(
    trainer: TrainingRun[Any],
    out: Path,
    log: "TrainingLog",
    progress: Progress,
    request: StopRequest,
) -> dict[str, float]:
    """Trains, writes logs and checkpoints, and returns the losses of the last validation."""
    settings = trainer.config.train
    last = trainer.validate() if _is_over(trainer) else {}
    task = progress.add_task("training", total=settings.steps, completed=trainer.step, loss="")
    window: list[dict[str, float]] = []

    def follow(values: dict[str, float]) -> None:
        window.append(values)
        progress.update(task, completed=trainer.step, loss=f"loss {values['loss']:.3f}")
        if _due(trainer, settings.log_every):
            mean = _mean(window)
            log.write("train", trainer.step, trainer.seconds, mean)
            if not progress.console.is_terminal:  # which shows the bar only when it is full
                loss = mean.get("loss", math.nan)
                print(f"step {trainer.step} of {settings.steps}: loss {loss:.4f}", flush=True)
            window.clear()
        if _due(trainer, settings.validation_every):
            last.update(trainer.validate())
            log.write("validation", trainer.step, trainer.seconds, last)
        if _due(trainer, settings.checkpoint_every):
            save_step(out, trainer.step, **trainer.checkpoint())
        if number := _stops(trainer, request):
            if window:
                log.write("train", trainer.step, trainer.seconds, _mean(window))
            kept = save_step(out, trainer.step, **trainer.checkpoint())
            trainer.summed([0.0])
            where = f"stopped at step {trainer.step} of {settings.steps}, which {kept} keeps"
            raise Interrupted(where, number)

    trainer.run(follow)
    return last


def _stops(trainer: TrainingRun[Any], request: StopRequest) -> int:
    """The signal that ends the run after this step, the same step in all processes, or 0.

    One of them that was asked is enough. After the last step there is nothing to stop.
    """
    if _is_over(trainer):
        return 0
    own = request.signal or 0
    (asked,) = trainer.summed([float(own)])
    return own or (SIGTERM if asked else 0)


def _is_over(trainer: TrainingRun[Any]) -> bool:
    """Whether no step is left, as where a run goes on that had ended."""
    return trainer.step == trainer.config.train.steps


def _due(trainer: TrainingRun[Any], every: int) -> bool:
    """Whether what happens every so many steps, and after the last one, happens now."""
    return trainer.step % every == 0 or _is_over(trainer)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means of figures over the steps where they are finite; those that never are stay away.

    A step that ``LossScale`` leaves out has no gradient.
    """
    finite = {name: [row[name] for row in rows if math.isfinite(row[name])] for name in rows[0]}
    return {name: float(np.mean(values)) for name, values in finite.items() if values}


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
