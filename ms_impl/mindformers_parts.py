"""What MindFormers' Trainer is given from outside, through its register: rate and step."""

import math
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.nn.learning_rate_schedule import LearningRateSchedule

from ms_impl.mindformers_cpu import step_class


class WarmUpCosineLR(LearningRateSchedule):
    """``common.training.TrainingRun.learning_rate``, in a graph.

    MindFormers' CosineWithWarmUpLR begins its warm-up with nothing, here the first of n steps has
    the n-th part of the rate.

    Args:
        learning_rate: the peak.
        lr_end: after the last step.
        warmup_steps, total_steps: how many, the former among the latter.
    """

    def __init__(
        self, learning_rate: float, lr_end: float, warmup_steps: int, total_steps: int
    ) -> None:
        super().__init__()
        self.peak, self.end = learning_rate, lr_end
        self.warmup = float(warmup_steps)
        self.decay = float(max(1, total_steps - warmup_steps))
        self.zero = Tensor(0.0, ms.float32)
        self.one = Tensor(1.0, ms.float32)

    def construct(self, global_step: Tensor) -> Tensor:
        """Of a step, from zero on."""
        step = global_step.astype(ms.float32)
        progress = ops.clip_by_value((step - self.warmup) / self.decay, self.zero, self.one)
        cosine = 0.5 * (1.0 + ops.cos(math.pi * progress))
        rate = self.end + (self.peak - self.end) * cosine
        if self.warmup == 0.0:
            return rate
        return ops.select(step < self.warmup, self.peak * (step + 1.0) / self.warmup, rate)


def register_parts() -> None:
    """Makes them known to MindFormers; the device must have been chosen."""
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

    if MindFormerRegister.is_exist(MindFormerModuleType.LR, WarmUpCosineLR.__name__):
        return
    MindFormerRegister.register_cls(WarmUpCosineLR, MindFormerModuleType.LR)
    MindFormerRegister.register_cls(_answer_step(), MindFormerModuleType.WRAPPER)


def _answer_step() -> type:
    class AnswerStep(step_class()):  # type: ignore[misc]
        """MindFormers' training step for shares with different numbers of answers.

        The gradients of processes are averaged. The network's loss is the mean of its own tokens;
        what belongs to it is multiplied by its share of all tokens and the number of processes, so
        that the average is that of the mean of all.
        """

        def grads_for_legacy(
            self, scaling_sens: Tensor, tokens: Tensor, targets: Tensor, share: Tensor
        ) -> tuple[Any, Any, Any]:
            """The loss of its own, scaled gradients, and what else these were multiplied by.

            Args:
                scaling_sens: of the loss.
                tokens, targets: [B,T].
                share: [1], what gradients are multiplied by.
            """
            loss = self.network(tokens, targets)
            sens = ops.ones_like(loss) * scaling_sens.astype(loss.dtype) * share.reshape(())
            gradients = self.grad(self.network, self.weights)(tokens, targets, sens)
            return loss, gradients, self.grad_scale_factor

    return AnswerStep
