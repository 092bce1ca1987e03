"""AdamW with averaged weights, and what a checkpoint keeps of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoint
from common.config import Optimisation
from common.training import ADAM_BETAS, ADAM_EPS, LossScale
from common.weights import MOMENTS, WEIGHT_PREFIX, Arrays
from torch_impl.distributed import sum_values

#: Types of autocast by the names that ``train.precision`` gives them.
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class AveragedAdamW:
    """The part of a trainer that changes weights, whatever the network.

    Attributes:
        device: of the weights.
        step: steps of the run that are done, those that were left out too.
        names, parameters: what is trained.
        loss_scale: of the run.
        average: its averages.
        optimizer: torch's AdamW.
        prefix: of the names in ``model.safetensors``.
    """

    device: torch.device
    step: int
    loss_scale: LossScale
    prefix = ""

    def optimise(self, network: nn.Module, settings: Optimisation) -> None:
        """Begins with the network's weights; those that need no gradient are left out."""
        trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.parameters = [parameter for _, parameter in trained]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.clip_norm = settings.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for parameter in self.parameters:
            state = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            self.optimizer.state[parameter] = state | {"step": torch.zeros((), device=self.device)}

    def backward(self, loss: Tensor) -> None:
        """Puts the gradient of a loss, times the loss scale, in place of the last one."""
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.loss_scale.value).backward()

    def descend(self, rate: float, decay: float) -> float:
        """One step of AdamW, and of the average; returns the gradient's norm before clipping.

        Where the norm is not finite, nothing is changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scale = self.loss_scale.value
        if scale != 1:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        if torch.isfinite(norm):
            if self.loss_scale.moves:  # steps that were left out count, as in every framework
                for state in self.optimizer.state.values():
                    state["step"].fill_(self.step)
            self.optimizer.step()
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return norm.item()

    def summed(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        return sum_values(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

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
            tensors = [self.optimizer.state[p][moment] for p in self.parameters]
            arrays |= self._named(f"{moment}.", tensors)
        return arrays

    def restore(self, saved: Checkpoint) -> None:
        """Takes weights, averages and moments from a checkpoint that has all of them."""
        assert saved.optimizer is not None
        assert saved.state is not None
        step = float(saved.state["step"])
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            parameter.data.copy_(as_tensor(saved.optimizer[WEIGHT_PREFIX + name]))
            self.average[index].copy_(as_tensor(saved.model[self.prefix + name]))
            self.optimizer.state[parameter] = {"step": torch.tensor(step, device=self.device)} | {
                moment: as_tensor(saved.optimizer[f"{moment}.{name}"]).to(self.device)
                for moment in MOMENTS
            }

    def _named(self, prefix: str, tensors: list[Tensor]) -> Arrays:
        return {
            prefix + name: tensor.detach().float().numpy(force=True).copy()
            for name, tensor in zip(self.names, tensors, strict=True)
        }


def as_tensor(array: np.ndarray) -> Tensor:
    """A copy on the CPU."""
    return torch.from_numpy(np.array(array))
