"""Training of the Crystal DiT."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from numpy.typing import NDArray

from common.checkpoint import Checkpoint
from common.config import RunConfig
from common.data.store import Record
from common.diffusion.training import BaseTrainer, LossValues, TrainingBatch, checked_records
from common.training import ADAM_BETAS, ADAM_EPS, Shard, run_training
from common.weights import MODEL_PREFIX, MOMENTS, WEIGHT_PREFIX, Arrays, model_weights
from ms_impl.crystal_dit import CrystalDiT
from ms_impl.device import PerBucket, say_unheeded, set_precision, use_device
from ms_impl.diffusion import Loss, NoisyTensors, denoising_loss
from ms_impl.distributed import joined, sum_values
from ms_impl.optimizer import AdamW, Gradient, Norm
from ms_impl.pipeline import prefetched
from ms_impl.tensors import TensorBatch

#: As torch's ``clip_grad_norm_`` has it.
_CLIP_EPS = 1e-6


class Trainer(BaseTrainer):
    """One training run with MindSpore; see ``common.diffusion.training.BaseTrainer``."""

    def __init__(
        self,
        config: RunConfig,
        train_records: list[Record],
        validation_records: list[Record],
        device: str = "cpu",
        shard: Shard = Shard(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(config, train_records, validation_records, shard)
        if not shard.rank:
            say_unheeded(config.train)
        self.device = use_device(device)
        settings, diffusion = config.train, config.diffusion
        ms.set_seed(settings.seed)
        model = self.model = CrystalDiT(config.model)
        set_precision(model, settings.precision, self.device)
        self.names = [name for name, _ in model.parameters_and_names()]
        self.parameters = [parameter for _, parameter in model.parameters_and_names()]
        if self.start is not None:
            load_weights(model, self.start.model, str(self.start.path))
        # A network without properties has an empty parameter, which no kernel takes.
        trained = [parameter for parameter in self.parameters if parameter.size]
        self.optimizer = AdamW(trained, ADAM_BETAS, ADAM_EPS, settings.weight_decay)

        def scaled_loss(scale: Tensor, batch: TensorBatch, noisy: NoisyTensors) -> tuple:
            loss = denoising_loss(model, batch, noisy, diffusion)
            return scale * loss[0], loss

        self.gradient = PerBucket(Gradient(scaled_loss, trained))
        self.norm = Norm()

    def batches(self) -> Iterator[TrainingBatch]:
        """The training batches from the current step on, prepared ahead."""
        return prefetched(super().batches)

    def loss(self, data: TrainingBatch) -> Loss:
        """Loss of one batch."""
        return self._loss_and_gradient(data)[0]

    def _loss_and_gradient(self, data: TrainingBatch) -> tuple[Loss, Tensor]:
        """The gradient is that of the scaled loss.

        Both from one graph per bucket, for compiling takes longer than what a gradient costs.
        """
        properties = self.config.model.properties
        tensors = TensorBatch.from_batch(data.batch, self.standardizer, properties)
        noisy = NoisyTensors.from_arrays(data.noisy, data.weights)
        scale = Tensor(self.loss_scale.value, ms.float32)
        loss, gradient = self.gradient(data.batch, scale, tensors, noisy)
        return Loss(*loss), gradient

    def update(self, data: TrainingBatch, rate: float, decay: float) -> dict[str, float]:
        """One step of AdamW; see ``BaseTrainer``."""
        loss, gradient = self._loss_and_gradient(data)
        gradient = sum_values(gradient)
        norm = float(self.norm(gradient)) / self.loss_scale.value
        if math.isfinite(norm):
            scale = min(1.0, self.config.train.clip_norm / (norm + _CLIP_EPS))
            scale /= self.loss_scale.value
            self.optimizer.step(gradient, self.step + 1, rate, decay, scale)
        total, coordinate, lattice = self.summed([float(value) for value in loss[:3]])
        return {
            "loss": total,
            "coordinate": coordinate,
            "lattice": lattice,
            "gradient_norm": norm,
        }

    def summed(self, values: list[float]) -> list[float]:
        """Sums over the processes, in float32."""
        if self.shard.count == 1:
            return values
        return sum_values(Tensor(values, ms.float32)).asnumpy().tolist()

    def losses(self, data: TrainingBatch) -> LossValues:
        """Of the current weights."""
        loss = self.loss(data)
        return LossValues(
            float(loss.total),
            float(loss.coordinate),
            float(loss.lattice),
            loss.per_crystal.asnumpy(),
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has its averaged weights."""
        self.optimizer.put(self.optimizer.average)
        try:
            yield
        finally:
            self.optimizer.put(self.optimizer.weight)

    def average_arrays(self) -> Arrays:
        """Averaged weights by name."""
        return self._named("", self.optimizer.average)

    def optimizer_arrays(self) -> Arrays:
        """Current weights and AdamW's moments by prefixed name."""
        arrays = self._named(WEIGHT_PREFIX, self.optimizer.weight)
        for moment in MOMENTS:
            arrays |= self._named(f"{moment}.", getattr(self.optimizer, moment))
        return arrays

    def restore(self, saved: Checkpoint) -> None:
        """Takes weights, averages and moments from a checkpoint that has all of them."""
        assert saved.optimizer is not None
        optimizer = self.optimizer
        optimizer.weight.set_data(self._vector(saved.optimizer, WEIGHT_PREFIX))
        optimizer.average.set_data(self._vector(saved.model, MODEL_PREFIX))
        for moment in MOMENTS:
            getattr(optimizer, moment).set_data(self._vector(saved.optimizer, f"{moment}."))
        optimizer.put(optimizer.weight)

    def _named(self, prefix: str, vector: Parameter) -> Arrays:
        """The entries of a vector by the parameters that they belong to."""
        entries = vector.asnumpy()
        ends = np.cumsum([parameter.size for parameter in self.parameters])
        return {
            prefix + name: entries[end - parameter.size : end].reshape(parameter.shape).copy()
            for name, parameter, end in zip(self.names, self.parameters, ends, strict=True)
        }

    def _vector(self, arrays: Arrays, prefix: str) -> Tensor:
        rows: list[NDArray[np.float32]] = [arrays[prefix + name].ravel() for name in self.names]
        return Tensor(np.concatenate(rows))


def load_weights(model: CrystalDiT, arrays: Arrays, where: str) -> None:
    """Puts a checkpoint's weights into a network.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    parameters = dict(model.parameters_and_names())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, array in model_weights(arrays, shapes, where).items():
        parameters[name].set_data(Tensor(array))


def train(
    config: RunConfig, out: Path, *, resume: bool = False, threads: int = 1, device: str = "auto"
) -> None:
    """Trains as a configuration says; see ``common.training.run_training``.

    Args:
        config: the run.
        out: the run's folder.
        resume: whether to go on from the latest step in it.
        threads: CPU threads, which are left to MindSpore.
        device: ``auto``, ``cpu`` or ``ascend``.

    Raises:
        UserError: for data that cannot be read, a checkpoint that does not fit, or a device that
            is not here.
    """
    device = use_device(device)
    with joined(device) as shard:
        run_training(Trainer(config, *checked_records(config), device, shard), out, resume)
