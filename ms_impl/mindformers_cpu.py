"""What MindFormers' GLM-4 needs replaced where MindSpore computes on a CPU; nothing on Ascend.

Names, shapes and values of parameters stay as they are.
"""

from typing import Any

import mindspore as ms
from mindspore import nn, ops


class RmsNorm(nn.Cell):
    """RMSNorm of elementary operations: the kernel that MindFormers calls is Ascend's.

    Args:
        norm: MindFormers', whose weight is shared.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__(auto_prefix=False)
        self.weight = norm.weight
        self.eps = float(norm.eps.asnumpy())
        self.precision = norm.compute_type

    def construct(self, x: ms.Tensor) -> ms.Tensor:  # [B,T,D]
        wide = x.astype(self.precision)
        mean = ops.mean(wide * wide, -1, True)
        scaled = wide * ops.rsqrt(mean + self.eps) * self.weight.astype(self.precision)
        return scaled.astype(x.dtype)


class MaskProduct(nn.Cell):
    """A mask times a number, as a number.

    MindFormers multiplies a mask of type uint8 by -10000: on a CPU the product has that type too,
    is 240, and makes every token look at what follows it.
    """

    def __init__(self, precision: Any) -> None:
        super().__init__(auto_prefix=False)
        self.precision = precision

    def construct(self, mask: ms.Tensor, number: float) -> ms.Tensor:  # [B,1,T,T]
        return mask.astype(self.precision) * number


def make_computable(network: nn.Cell) -> None:
    """Replaces, in a network of MindFormers, what a CPU cannot compute or computes wrongly.

    Args:
        network: ChatGLM2ForConditionalGeneration; itself changed.
    """
    if ms.get_context("device_target") != "CPU":
        return
    from mindformers.models.glm2.glm2_modules import ChatGLM2RMSNorm
    from mindformers.models.glm2.glm2_transformer import CoreAttention

    for _, cell in list(network.cells_and_names()):
        for name, child in cell.name_cells().items():
            if isinstance(child, ChatGLM2RMSNorm):
                # As an attribute it would take the parent's name before its weight's.
                cell._cells[name] = RmsNorm(child)
        if isinstance(cell, CoreAttention):
            cell.mul_mask = MaskProduct(cell.compute_dtype)


def step_class() -> type:
    """MindFormers' training step, which looks for overflow with an operation of Ascend's."""
    from mindformers.wrapper import MFTrainOneStepCell

    if ms.get_context("device_target") != "CPU":
        return MFTrainOneStepCell

    class TrainOneStep(MFTrainOneStepCell):
        """Whose overflow is a gradient that is not finite."""

        def get_overflow_status(self, status: Any, compute_output: Any) -> ms.Tensor:
            finite = ops.ones((), ms.bool_)
            for gradient in compute_output:
                finite = ops.logical_and(finite, ops.isfinite(gradient).all())
            return ops.logical_not(finite)

    return TrainOneStep
