"""Training of the Crystal DiT."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import Checkpoint, load_checkpoint
from common.config import RunConfig
from common.data.store import Record
from common.training import (
    ADAM_BETAS,
    ADAM_EPS,
    BaseTrainer,
    LossValues,
    Shard,
    TrainingBatch,
    records_of,
    run_training,
)
from common.weights import MODEL_PREFIX, MOMENTS, WEIGHT_PREFIX, Arrays, model_weights
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.diffusion import Loss, NoisyTensors, denoising_loss
from torch_impl.distributed import joined, sum_gradients, sum_values
from torch_impl.tensors import TensorBatch


class Trainer(BaseTrainer):
    """One training run with torch; see ``common.training.BaseTrainer``."""

    def __init__(
        self,
        config: RunConfig,
        train_records: list[Record],
        validation_records: list[Record],
        device: str = "cpu",
        shard: Shard = Shard(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(config, train_records, validation_records, shard)
        self.device = torch.device(device)
        settings = config.train
        torch.manual_seed(settings.seed)
        self.model = CrystalDiT(config.model).to(self.device)
        if settings.compile:
            # Where most of the time goes; whole networks compile for minutes on a CPU.
            for block in self.model.blocks:
                block.fusion.compile(dynamic=True)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = [parameter for _, parameter in self.model.named_parameters()]
        if settings.init_from:
            saved = load_checkpoint(Path(settings.init_from))
            load_weights(self.model, saved.model, settings.init_from)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.network = sum_gradients(self.model)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def loss(self, data: TrainingBatch) -> Loss:
        """Loss of one batch."""
        tensors = TensorBatch.from_batch(
            data.batch, self.standardizer, self.config.model.properties, self.device
        )
        noisy = NoisyTensors.from_arrays(data.noisy, data.weights, self.device)
        bfloat16 = self.config.train.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            return denoising_loss(self.network, tensors, noisy, self.config.diffusion)

    def update(self, data: TrainingBatch, rate: float, decay: float) -> dict[str, float]:
        """One step of AdamW; see ``BaseTrainer``."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(data)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        values = torch.stack([loss.total, loss.coordinate, loss.lattice]).detach()
        total, coordinate, lattice = sum_values(values).tolist()
        return {
            "loss": total,
            "coordinate": coordinate,
            "lattice": lattice,
            "gradient_norm": norm.item(),
        }

    def summed(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        return sum_values(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    @torch.no_grad()
    def losses(self, data: TrainingBatch) -> LossValues:
        """Of the current weights."""
        loss = self.loss(data)
        return LossValues(
            loss.total.item(),
            loss.coordinate.item(),
            loss.lattice.item(),
            loss.per_crystal.numpy(force=True),
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has its averaged weights."""
        with torch.no_grad():
            current = [parameter.detach().clone() for parameter in self.parameters]
            torch._foreach_copy_(self.parameters, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, current)

    def average_arrays(self) -> Arrays:
        """Averaged weights by name."""
        return self._named("", self.average)

    def optimizer_arrays(self) -> Arrays:
        """Current weights and AdamW's moments by prefixed name."""
        arrays = self._named(WEIGHT_PREFIX, self.parameters)
        for moment in MOMENTS:
            # A network without properties has an empty parameter, of which AdamW keeps nothing.
            tensors = [
                self.optimizer.state[p].get(moment, torch.zeros_like(p)) for p in self.parameters
            ]
            arrays |= self._named(f"{moment}.", tensors)
        return arrays

    def restore(self, saved: Checkpoint) -> None:
        """Takes weights, averages and moments from a checkpoint that has all of them."""
        assert saved.optimizer is not None
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            parameter.data.copy_(_tensor(saved.optimizer[WEIGHT_PREFIX + name]))
            self.average[index].copy_(_tensor(saved.model[MODEL_PREFIX + name]))
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=self.device)
            } | {
                moment: _tensor(saved.optimizer[f"{moment}.{name}"]).to(self.device)
                for moment in MOMENTS
            }

    def _named(self, prefix: str, tensors: list[Tensor]) -> Arrays:
        return {
            prefix + name: tensor.detach().float().numpy(force=True).copy()
            for name, tensor in zip(self.names, tensors, strict=True)
        }


def load_weights(model: CrystalDiT, arrays: Arrays, where: str) -> None:
    """Puts a checkpoint's weights into a network.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, array in model_weights(arrays, shapes, where).items():
        parameters[name].data.copy_(_tensor(array))


def train(
    config: RunConfig, out: Path, *, resume: bool = False, threads: int = 1, device: str = "auto"
) -> None:
    """Trains as a configuration says; see ``common.training.run_training``.

    Args:
        config: the run.
        out: the run's folder.
        resume: whether to go on from the latest step in it.
        threads: CPU threads.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: for data that cannot be read, a checkpoint that does not fit, or an environment
            that is not torchrun's although there are other processes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    with joined(device) as shard:
        run_training(Trainer(config, *records_of(config), device, shard), out, resume)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))
