"""What float32 lets two implementations of one network differ by, and how they are held together.

The reference is torch in float64. MindSpore's distance from it must not be more than a few times
torch's own in float32: the limit grows with what rounding does to a quantity, and not with what is
wrong in MindSpore.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from unittest.mock import patch

import mindspore as ms
import numpy as np
import torch
from mindspore import nn
from numpy.typing import NDArray

from common.data.batch import Batch
from common.diffusion.scaler import Standardizer
from ms_impl.tensors import TensorBatch as MindSporeBatch
from tests.networks import fill_value
from torch_impl.tensors import TensorBatch as TorchBatch

Arrays = Mapping[str, NDArray]

#: MindSpore's error may be so many times torch's, whose own is one draw of rounding.
FACTOR = 8.0
#: Rounding of a result itself, over its largest element: torch's error may be less by luck.
FLOOR = 4 * float(np.finfo(np.float32).eps)


#: Biases alike for all that softmax compares, which change nothing, so that their gradients are
#: rounding alone, and the weights whose gradients are as large as what rounds there.
SOFTMAX_BIASES = {"weight.bias": "weight.weight", "key.bias": "key.weight"}


class DisagreementError(AssertionError):
    """A comparison of the two frameworks failed."""


def compare(found: Arrays, single: Arrays, exact: Arrays) -> None:
    """Holds results of MindSpore against torch's.

    Args:
        found: MindSpore's, float32.
        single: torch's in float32.
        exact: torch's in float64.

    Raises:
        DisagreementError: for another name, dtype or shape, for NaN and infinity, and for a larger
            error than rounding explains.
    """
    if found.keys() != exact.keys():
        raise DisagreementError(f"names differ: {sorted(found.keys() ^ exact.keys())}")
    for name, values in found.items():
        check_form(name, values, single[name])
    for name, values in found.items():
        if not values.size:
            continue
        own = np.abs(single[name] - exact[name]).max()
        limit = FACTOR * max(own, FLOOR * _size(name, exact))
        error = np.abs(values - exact[name]).max()
        if error > limit:
            raise DisagreementError(
                f"{name}: error {error:.1e} over {limit:.1e}, torch's {own:.1e}"
            )


def _size(name: str, exact: Arrays) -> float:
    """Largest element of a result, or of what it is the small difference of."""
    for bias, weight in SOFTMAX_BIASES.items():
        if name.endswith(bias):
            name = name.removesuffix(bias) + weight
    return float(np.abs(exact[name]).max())


def check_form(name: str, values: NDArray, expected: NDArray) -> None:
    """Raises DisagreementError for another dtype or shape, and for what is not finite."""
    if values.dtype != np.float32 or expected.dtype != np.float32:
        raise DisagreementError(f"{name}: {values.dtype} and {expected.dtype}, not float32")
    if values.shape != expected.shape:
        raise DisagreementError(f"{name}: shape {values.shape}, not {expected.shape}")
    if not np.isfinite(values).all() or not np.isfinite(expected).all():
        raise DisagreementError(f"{name}: not finite")


@contextmanager
def double_precision() -> Iterator[None]:
    """Makes torch_impl, which says float32 where a type matters, compute in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with (
            patch.object(torch, "float32", torch.float64),
            patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def precision(exact: bool) -> Iterator[torch.dtype]:
    """torch in float64 or in float32."""
    if exact:
        with double_precision():
            yield torch.float64
    else:
        yield torch.float32


Change = Callable[[str, NDArray], NDArray]


def fill_torch(module: torch.nn.Module, change: Change | None = None) -> None:
    """Gives every parameter values that depend on its name and shape alone.

    ``change`` turns them into others, by name.
    """
    for name, parameter in module.named_parameters():
        values = fill_value(name, parameter.shape)
        values = torch.from_numpy(change(name, values) if change else values)
        parameter.data = values.to(parameter.dtype)


def fill_mindspore(cell: nn.Cell, change: Change | None = None) -> None:
    """Likewise."""
    for name, parameter in cell.parameters_and_names():
        values = fill_value(name, parameter.shape)
        parameter.set_data(ms.Tensor(change(name, values) if change else values))


def zeroed(part: str) -> Change:
    """Puts zeros into every parameter whose name has this part."""

    def change(name: str, values: NDArray) -> NDArray:
        return np.zeros_like(values) if part in name else values

    return change


class Gradient(nn.Cell):
    """A function's results and gradients, compiled once for inputs of the same shapes.

    A cell: a jitted function keeps the parameters it was compiled with.

    Args:
        function: gives the number to differentiate, and a tuple of results.
        positions: of the inputs whose gradients are wanted.
        parameters: whose gradients are wanted.
    """

    def __init__(
        self, function: Callable, positions: tuple[int, ...], parameters: list[ms.Parameter]
    ) -> None:
        super().__init__(auto_prefix=False)
        self.gradient = ms.value_and_grad(
            function, positions or None, parameters or None, has_aux=True
        )
        self.of_inputs, self.of_parameters = bool(positions), bool(parameters)

    def construct(self, *inputs: object) -> tuple:
        return self.gradient(*inputs)

    def results(self, *inputs: object) -> tuple[tuple, list[ms.Tensor]]:
        """The tuple of results, and the gradients of inputs and parameters."""
        (_, found), gradients = self(*inputs)
        if not (self.of_inputs and self.of_parameters):
            gradients = (gradients,)
        flat: list[ms.Tensor] = []
        for group in gradients:
            flat += [group] if isinstance(group, ms.Tensor) else group
        return found, flat


def torch_batch(batch: Batch, standardizer: Standardizer, names: tuple[str, ...]) -> TorchBatch:
    """A batch in torch's current default precision."""
    tensors = TorchBatch.from_batch(batch, standardizer, names)
    values = {f.name: getattr(tensors, f.name) for f in fields(tensors)}
    real = {n: v.to(torch.get_default_dtype()) for n, v in values.items() if v.is_floating_point()}
    return replace(tensors, **real)


def mindspore_batch(
    batch: Batch, standardizer: Standardizer, names: tuple[str, ...]
) -> MindSporeBatch:
    """A batch for MindSpore."""
    return MindSporeBatch.from_batch(batch, standardizer, names)
