"""Training of the Crystal DiT on one device."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from common.checkpoint import latest, load_checkpoint, save_checkpoint, save_step
from common.config import DiffusionConfig, RunConfig
from common.data.batch import Batch, BatchItem, collate
from common.data.loader import BatchPlan, Bucket, BucketedData
from common.data.locations import dataset
from common.data.store import Record, fingerprint
from common.diffusion.draws import TrainingDraws
from common.diffusion.flow import make_path
from common.diffusion.noisy import NoisyCrystals
from common.diffusion.scaler import Standardizer
from common.diffusion.score import ScoreProcess
from common.errors import UserError
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.diffusion import Loss, NoisyTensors, denoising_loss
from torch_impl.tensors import TensorBatch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MODEL_PREFIX = "model."
STANDARDIZER_PREFIX = "standardizer."
#: Atoms in the primitive cell, at most; larger crystals are left out of training.
MAX_ATOMS = 52
NOISE_BINS = 5


class Trainer:
    """One training run; every step is a function of the configuration and the step's number.

    Args:
        config: of the run.
        train_records: what to learn from.
        validation_records: whose loss is watched.
        device: where.
    """

    def __init__(
        self,
        config: RunConfig,
        train_records: list[Record],
        validation_records: list[Record],
        device: str = "cpu",
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.step = 0
        self.seconds = 0.0
        settings = config.train
        items = batch_items(train_records)
        if not items:
            raise UserError(f"{settings.data}: no crystal of at most {MAX_ATOMS} atoms to train on")
        self.fingerprint = fingerprint(train_records)
        self.num_rows = len(items)
        self.standardizer = Standardizer.fit(collate(items, "asymmetric"))
        view = config.model.cell
        self.data = BucketedData(items, view, settings.batch_size, settings.edge_budget)
        self.validation = BucketedData(
            batch_items(validation_records[: settings.validation_rows]),
            view,
            settings.batch_size,
            settings.edge_budget,
        )
        self.score_process = score_process(config.diffusion)
        torch.manual_seed(settings.seed)
        self.model = CrystalDiT(config.model).to(self.device)
        if settings.compile:
            # Where most of the time goes; whole networks compile for minutes on a CPU.
            for block in self.model.blocks:
                block.fusion.compile(dynamic=True)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = [parameter for _, parameter in self.model.named_parameters()]
        if settings.init_from:
            self._start_from(Path(settings.init_from))
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to ``final_rate`` of the peak."""
        settings = self.config.train
        if step < settings.warmup:
            return settings.learning_rate * (step + 1) / settings.warmup
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)

    def loss(self, data: BucketedData, plan: BatchPlan, stream: str, step: int) -> Loss:
        """Loss of one batch with the noise of a step."""
        settings, diffusion = self.config.train, self.config.diffusion
        group = data.buckets[plan.bucket]
        batch = group.batch.take(plan.rows)
        shape = batch.free_params.shape[:2]
        draws = TrainingDraws.of_step(
            settings.seed, stream, step, (shape[0], shape[1]), diffusion.origin_tries
        )
        if stream == "train":
            keep = draws.keep_property >= settings.property_dropout
            batch = batch.replace(property_mask=batch.property_mask & keep[:, None])
        noisy = self._add_noise(group, batch, plan, draws)
        tensors = TensorBatch.from_batch(
            batch, self.standardizer, self.config.model.properties, self.device
        )
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"
        ):
            return denoising_loss(
                self.model, tensors, NoisyTensors.from_arrays(noisy, self.device), diffusion
            )

    def _add_noise(
        self, group: Bucket, batch: Batch, plan: BatchPlan, draws: TrainingDraws
    ) -> NoisyCrystals:
        lattice = self.standardizer.lattice(batch)
        if self.score_process is not None:
            return self.score_process.make_noisy(
                batch.free_params, lattice, draws.free_normal, draws.lattice, draws.t
            )
        free = group.descriptions.nearest(plan.rows, draws.free, draws.origins)
        return make_path(free, lattice, draws.free, draws.lattice, draws.t)

    def train_step(self, plan: BatchPlan) -> dict[str, float]:
        """One optimiser step; returns what to log."""
        start = time.perf_counter()
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.data, plan, "train", self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"training step {self.step}: the gradient is not finite; lower learning_rate"
            )
        self.optimizer.step()
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self.step += 1
        self.seconds += time.perf_counter() - start
        return {
            "loss": loss.total.item(),
            "coordinate": loss.coordinate.item(),
            "lattice": loss.lattice.item(),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses of the averaged weights, the coordinate's also per noise level."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        sums: dict[str, float] = {"loss": 0.0, "coordinate": 0.0, "lattice": 0.0}
        levels = np.zeros((NOISE_BINS, 2))
        plans = self.validation.epoch(0, 0)
        for index, plan in enumerate(plans):
            loss = self.loss(self.validation, plan, "validation", index)
            for name, value in (
                ("loss", loss.total),
                ("coordinate", loss.coordinate),
                ("lattice", loss.lattice),
            ):
                sums[name] += value.item() / len(plans)
            bins = (loss.t.numpy(force=True) * NOISE_BINS).astype(int).clip(max=NOISE_BINS - 1)
            np.add.at(levels, (bins, 0), loss.per_crystal.numpy(force=True))
            np.add.at(levels, (bins, 1), loss.has_free.numpy(force=True))
        torch._foreach_copy_(self.parameters, current)
        for index, (total, count) in enumerate(levels):
            sums[f"coordinate_t{index / NOISE_BINS:.1f}"] = float(total / max(count, 1))
        return sums

    def model_arrays(self) -> dict[str, np.ndarray]:
        """Averaged weights and statistics, as a checkpoint keeps them."""
        arrays = _named(MODEL_PREFIX, self.names, self.average)
        for name, array in self.standardizer.to_arrays().items():
            arrays[STANDARDIZER_PREFIX + name] = array.astype(np.float32)
        return arrays

    def optimizer_arrays(self) -> dict[str, np.ndarray]:
        """Current weights and AdamW's moments."""
        arrays = _named("weight.", self.names, self.parameters)
        for moment in ("exp_avg", "exp_avg_sq"):
            # A network without properties has an empty parameter, of which AdamW keeps nothing.
            tensors = [
                self.optimizer.state[p].get(moment, torch.zeros_like(p)) for p in self.parameters
            ]
            arrays |= _named(f"{moment}.", self.names, tensors)
        return arrays

    def checkpoint(self) -> dict[str, Any]:
        """Arguments of ``common.checkpoint.save_step``."""
        return {
            "config": self.config.model_dump(mode="json"),
            "model": self.model_arrays(),
            "optimizer": self.optimizer_arrays(),
            "state": {"step": self.step, "seconds": self.seconds},
            "fingerprint": self.fingerprint,
            "extra": {"training_rows": self.num_rows},
        }

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            UserError: if it was trained on other rows or cannot be read.
        """
        saved = load_checkpoint(folder, optimizer=True)
        if saved.fingerprint != self.fingerprint:
            raise UserError(f"{folder}: trained on other rows; give --fresh to start anew")
        assert saved.optimizer is not None
        assert saved.state is not None
        self.step, self.seconds = int(saved.state["step"]), float(saved.state["seconds"])
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            parameter.data.copy_(_tensor(saved.optimizer[f"weight.{name}"]))
            self.average[index].copy_(_tensor(saved.model[MODEL_PREFIX + name]))
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=self.device),
                "exp_avg": _tensor(saved.optimizer[f"exp_avg.{name}"]).to(self.device),
                "exp_avg_sq": _tensor(saved.optimizer[f"exp_avg_sq.{name}"]).to(self.device),
            }

    def _start_from(self, folder: Path) -> None:
        load_weights(self.model, load_checkpoint(folder).model, str(folder))


def score_process(config: DiffusionConfig, calls: int | None = None) -> ScoreProcess | None:
    """The noise levels of score matching, or None for flow matching.

    Args:
        config: of the run.
        calls: network calls of the sampler, two per level, for fewer levels than were trained.
    """
    if config.kind == "flow":
        return None
    trained = config.timesteps
    levels = trained if calls is None else min(max(2, calls // 2), trained)
    # The sigma that training had at t = 1 / levels: a network knows a sigma by its t.
    share = (trained / levels - 1) / (trained - 1)
    lowest = config.sigma_min * (config.sigma_max / config.sigma_min) ** share
    return ScoreProcess.of(levels, lowest, config.sigma_max)


def batch_items(records: list[Record]) -> list[BatchItem]:
    """Records as a network sees them, without those too large to train on."""
    return [
        BatchItem(record.crystal, record.properties)
        for record in records
        if record.crystal.num_primitive_atoms <= MAX_ATOMS
    ]


def load_weights(model: CrystalDiT, arrays: dict[str, np.ndarray], where: str) -> None:
    """Puts a checkpoint's weights into a network.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    given = {k.removeprefix(MODEL_PREFIX) for k in arrays if k.startswith(MODEL_PREFIX)}
    wanted = dict(model.named_parameters())
    if given != set(wanted):
        names = sorted(given ^ set(wanted))
        raise UserError(f"{where}: weights do not belong to this network: {', '.join(names[:5])}")
    for name, parameter in wanted.items():
        array = arrays[MODEL_PREFIX + name]
        if tuple(array.shape) != tuple(parameter.shape):
            raise UserError(
                f"{where}: weight {name} has shape {array.shape}, not {tuple(parameter.shape)}"
            )
        parameter.data.copy_(_tensor(array))


def train(
    config: RunConfig, out: Path, *, resume: bool = False, threads: int = 1, device: str = "auto"
) -> None:
    """Trains as a configuration says, into a run folder, and leaves a checkpoint there.

    Args:
        config: the run.
        out: the run's folder: steps, logs, and the finished checkpoint in ``final``.
        resume: whether to go on from the latest step in it.
        threads: CPU threads.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: for data that cannot be read or a checkpoint that does not fit.
    """
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = config.train
    trainer = Trainer(config, dataset(settings.data), dataset(settings.validation), device)
    if resume:
        folder = latest(out)
        assert folder is not None
        trainer.resume(folder)
    out.mkdir(parents=True, exist_ok=True)
    with (
        (out / "log.jsonl").open("a") as log,
        SummaryWriter(str(out / "tensorboard"), purge_step=trainer.step) as board,
        _progress() as progress,
    ):
        _loop(trainer, out, log, board, progress)
    save_checkpoint(
        out / "final",
        config=config.model_dump(mode="json"),
        model=trainer.model_arrays(),
        fingerprint=trainer.fingerprint,
        extra={"training_rows": trainer.num_rows, "training_seconds": round(trainer.seconds)},
        card=f"# {config.name}\n",
    )


def _loop(
    trainer: Trainer, out: Path, log: TextIO, board: "SummaryWriter", progress: Progress
) -> None:
    settings = trainer.config.train
    task = progress.add_task("training", total=settings.steps, completed=trainer.step, loss="")
    plans: Iterator[BatchPlan] = trainer.data.batches(settings.seed, trainer.step)
    window: list[dict[str, float]] = []
    while trainer.step < settings.steps:
        window.append(trainer.train_step(next(plans)))
        done = trainer.step == settings.steps
        progress.update(task, completed=trainer.step, loss=f"loss {window[-1]['loss']:.3f}")
        if trainer.step % settings.log_every == 0 or done:
            _write_log(log, board, "train", trainer, _mean(window))
            window = []
        if trainer.step % settings.validation_every == 0 or done:
            _write_log(log, board, "validation", trainer, trainer.validate())
        if trainer.step % settings.checkpoint_every == 0 or done:
            save_step(out, trainer.step, **trainer.checkpoint())


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _write_log(
    log: TextIO, board: "SummaryWriter", kind: str, trainer: Trainer, values: dict[str, float]
) -> None:
    row = {"kind": kind, "step": trainer.step, "seconds": round(trainer.seconds, 1), **values}
    log.write(json.dumps(row) + "\n")
    log.flush()
    for name, value in values.items():
        board.add_scalar(f"{kind}/{name}", value, trainer.step)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )


def _named(prefix: str, names: list[str], tensors: list[Tensor]) -> dict[str, np.ndarray]:
    return {
        prefix + name: tensor.detach().float().numpy(force=True).copy()
        for name, tensor in zip(names, tensors, strict=True)
    }


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))
