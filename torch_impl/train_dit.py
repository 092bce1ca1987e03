"""Training of the Crystal DiT."""

from pathlib import Path

import torch

from common.checkpoint import load_checkpoint
from common.config import RunConfig
from common.data.store import Record
from common.training import (
    BaseTrainer,
    LossValues,
    Shard,
    TrainingBatch,
    records_of,
    run_training,
)
from common.weights import MODEL_PREFIX, Arrays, model_weights
from torch_impl.adamw import AUTOCAST, AveragedAdamW, as_tensor
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.devices import available_device
from torch_impl.diffusion import Loss, NoisyTensors, denoising_loss
from torch_impl.distributed import joined, sum_gradients, sum_values
from torch_impl.tensors import TensorBatch


class Trainer(AveragedAdamW, BaseTrainer):
    """One training run with torch; see ``common.training.BaseTrainer``."""

    prefix = MODEL_PREFIX

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
        if settings.init_from:
            saved = load_checkpoint(Path(settings.init_from))
            load_weights(self.model, saved.model, settings.init_from)
        self.optimise(self.model, settings)
        self.network = sum_gradients(self.model)

    def loss(self, data: TrainingBatch) -> Loss:
        """Loss of one batch."""
        tensors = TensorBatch.from_batch(
            data.batch, self.standardizer, self.config.model.properties, self.device
        )
        noisy = NoisyTensors.from_arrays(data.noisy, data.weights, self.device)
        narrow = AUTOCAST.get(self.config.train.precision)
        with torch.autocast(self.device.type, narrow, enabled=narrow is not None):
            return denoising_loss(self.network, tensors, noisy, self.config.diffusion)

    def update(self, data: TrainingBatch, rate: float, decay: float) -> dict[str, float]:
        """One step of AdamW; see ``BaseTrainer``."""
        loss = self.loss(data)
        norm = self.descend(loss.total, rate, decay)
        values = torch.stack([loss.total, loss.coordinate, loss.lattice]).detach()
        total, coordinate, lattice = sum_values(values).tolist()
        return {
            "loss": total,
            "coordinate": coordinate,
            "lattice": lattice,
            "gradient_norm": norm,
        }

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


def load_weights(model: CrystalDiT, arrays: Arrays, where: str) -> None:
    """Puts a checkpoint's weights into a network.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, array in model_weights(arrays, shapes, where).items():
        parameters[name].data.copy_(as_tensor(array))


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
    device = available_device(device)
    torch.set_num_threads(threads)
    with joined(device) as shard:
        run_training(Trainer(config, *records_of(config), device, shard), out, resume)
