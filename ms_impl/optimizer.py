"""AdamW and the average of the weights, over one vector that holds all parameters.

A kernel on a CPU costs as much to start as to compute for most parameters: MindSpore's optimisers,
which go parameter by parameter, take ten times as long. One vector is also what several processes
sum in one go.
"""

import math
from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops.auto_generate import SplitWithSize
from numpy.typing import NDArray

_as_row = ops.MultitypeFuncGraph("as_row")
_put = ops.MultitypeFuncGraph("put")


@_as_row.register("Tensor")
def _tensor_as_row(x: Tensor) -> Tensor:
    return ops.Reshape()(x, (-1,))


@_put.register("Tensor", "Tensor")
def _put_row(parameter: Tensor, row: Tensor) -> Tensor:
    return ops.Assign()(parameter, ops.Reshape()(row, parameter.shape))


class Gradient(nn.Cell):
    """A function's results, and its gradient with respect to all parameters in one vector.

    A cell, for a jitted function would keep the parameters of the first network it was made for.

    Args:
        function: of the inputs; gives the number to differentiate and a tuple of results.
        parameters: whose gradients are wanted.
    """

    def __init__(self, function: Callable, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.gradient = ms.value_and_grad(function, None, ParameterTuple(parameters), has_aux=True)

    def construct(self, scale: Tensor, *inputs: Tensor) -> tuple[tuple, Tensor]:
        """The tuple of results, and the gradient [N] of the number times a scale."""
        (_, results), gradients = self.gradient(scale, *inputs)
        return results, ops.Concat()(ops.HyperMap()(_as_row, gradients))


class Norm(nn.Cell):
    """Euclidean norm."""

    def construct(self, x: Tensor) -> Tensor:
        """[N] -> []."""
        return ops.sqrt(ops.square(x).sum())


class Put(nn.Cell):
    """Puts the entries of a vector into parameters."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.sizes = tuple(parameter.size for parameter in parameters)

    def construct(self, vector: Tensor) -> Tensor:
        """[N] -> [N], when that is done."""
        rows = SplitWithSize()(vector, self.sizes, 0)
        return ops.Depend()(vector, ops.HyperMap()(_put, self.parameters, rows))


class Step(nn.Cell):
    """One step of AdamW, of the average, and of the network's parameters."""

    def __init__(
        self,
        weight: Parameter,
        exp_avg: Parameter,
        exp_avg_sq: Parameter,
        average: Parameter,
        betas: tuple[float, float],
        put: Put,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.average = weight, average
        self.exp_avg, self.exp_avg_sq = exp_avg, exp_avg_sq
        self.beta1, self.beta2 = (Tensor(beta, ms.float32) for beta in betas)
        self.put = put

    def construct(
        self, gradient: Tensor, scale: Tensor, rate: Tensor, eps: Tensor, decay: Tensor, new: Tensor
    ) -> Tensor:
        """[N] and numbers -> [N], the new weights."""
        moments = self.weight, self.exp_avg, self.exp_avg_sq
        gradient = gradient * scale
        done = ops.AdamWeightDecay()(*moments, rate, self.beta1, self.beta2, eps, decay, gradient)
        weight = self.put(ops.Depend()(self.weight, done))
        average = self.average + new * (weight - self.average)
        return ops.Depend()(weight, ops.Assign()(self.average, average))


class AdamW:
    """torch's AdamW, and beside it an exponential average of the weights.

    Attributes:
        weight, exp_avg, exp_avg_sq, average: vectors [N].

    Args:
        parameters: of a network, none of them empty; they follow ``weight``.
        betas, eps, weight_decay: as torch calls them.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        start = np.concatenate([parameter.asnumpy().ravel() for parameter in parameters])
        self.weight, self.average = _vector("weight", start), _vector("average", start)
        self.exp_avg = _vector("exp_avg", np.zeros_like(start))
        self.exp_avg_sq = _vector("exp_avg_sq", np.zeros_like(start))
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.put = Put(parameters)
        self._step = Step(self.weight, self.exp_avg, self.exp_avg_sq, self.average, betas, self.put)

    def step(
        self, gradient: Tensor, number: int, rate: float, average_decay: float, scale: float
    ) -> None:
        """Changes everything.

        MindSpore's kernel knows no bias correction: w <- w - r (m / (sqrt(v) + e) + d w). With

            r = rate sqrt(1 - beta2^n) / (1 - beta1^n)
            e = eps sqrt(1 - beta2^n)
            d = weight_decay rate / r

        it is torch's w <- (1 - rate weight_decay) w - rate m' / (sqrt(v') + eps), where m' and v'
        are corrected.

        Args:
            gradient: [N].
            number: of the step, n, from one on.
            rate: of learning.
            average_decay: what remains of the average.
            scale: of the gradient.
        """
        first, second = (1 - beta**number for beta in self.betas)
        corrected = rate * math.sqrt(second) / first
        decay = self.weight_decay * rate / corrected if rate else 0.0
        numbers = scale, corrected, self.eps * math.sqrt(second), decay, 1 - average_decay
        self._step(gradient, *(Tensor(value, ms.float32) for value in numbers))


def _vector(name: str, values: NDArray[np.float32]) -> Parameter:
    return Parameter(Tensor(values), name=name, requires_grad=False)
