"""Training of the Crystal DiT."""

from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from common.config import RunConfig
from common.data.store import Record
from common.diffusion.training import BaseTrainer, LossValues, TrainingBatch, checked_records
from common.training import Shard, run_training
from common.weights import MODEL_PREFIX, Arrays, model_weights
from torch_impl.adamw import AUTOCAST, AveragedAdamW, as_tensor
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.devices import available_device, compiles
from torch_impl.diffusion import Loss, NoisyTensors, denoising_loss
from torch_impl.distributed import joined, sum_gradients, sum_values
from torch_impl.tensors import TensorBatch
from torch_impl.threads import MAX_PARALLEL_CALLS, SideBySide


class Trainer(AveragedAdamW, BaseTrainer):
    """One training run with torch; see ``common.diffusion.training.BaseTrainer``."""

    prefix = MODEL_PREFIX
    #: Each takes a share of a step's crystals; without them torch splits single operations.
    threads: SideBySide | None = None

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
        compiled = compiles(settings.compile, self.device, tell=not shard.rank)
        if compiled:
            # Where most of the time goes; whole networks compile for minutes on a CPU.
            for block in self.model.blocks:
                block.fusion.compile(dynamic=True)
        if self.start is not None:
            load_weights(self.model, self.start.model, str(self.start.path))
        self.optimise(self.model, settings)
        self.network = sum_gradients(self.model)
        threads = min(torch.get_num_threads(), MAX_PARALLEL_CALLS)
        # Hooks, compiled code and the cache of autocast belong to one thread.
        plain = not compiled and settings.precision == "float32"
        if threads > 1 and self.device.type == "cpu" and plain and self.network is self.model:
            self.threads = SideBySide(threads)

    def loss(self, data: TrainingBatch) -> Loss:
        """Loss of one batch."""
        tensors = TensorBatch.from_batch(
            data.batch, self.standardizer, self.config.model.properties, self.device
        )
        noisy = NoisyTensors.from_arrays(data.noisy, data.weights, self.device)
        narrow = AUTOCAST.get(self.config.train.precision)
        with torch.autocast(self.device.type, narrow, enabled=narrow is not None):
            return denoising_loss(self.network, tensors, noisy, self.config.diffusion)

    def loss_with_gradient(self, data: TrainingBatch) -> Tensor:
        """Loss of one batch, its coordinate and its lattice part: [3].

        The gradient is left with the parameters.
        """
        if self.threads is None:
            loss = self.loss(data)
            self.backward(loss.total)
            return loss.values
        shares = data.shares(self.threads.count)

        def of_share(share: TrainingBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = self.loss(share)
            gradient = torch.autograd.grad(loss.total, self.parameters, materialize_grads=True)
            return loss.values, gradient

        values, gradients = zip(*self.threads.map(of_share, shares), strict=True)
        for parameter, gradient in zip(
            self.parameters, reduce(torch._foreach_add, gradients), strict=True
        ):
            parameter.grad = gradient
        return torch.stack(values).sum(0)

    def update(self, data: TrainingBatch, rate: float, decay: float) -> dict[str, float]:
        """One step of AdamW; see ``BaseTrainer``."""
        values = self.loss_with_gradient(data)
        norm = self.descend(rate, decay)
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
        run_training(Trainer(config, *checked_records(config), device, shard), out, resume)
