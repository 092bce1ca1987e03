"""Where MindSpore computes, and how; chosen before anything is compiled."""

import sys
import time
from contextlib import suppress
from functools import cache
from typing import Any

import mindspore as ms
from mindspore import nn

from common.backend import wrong_version
from common.config import TORCH_ONLY, Optimisation
from common.data.batch import Batch
from common.errors import UserError
from common.machine import ascend_count
from ms_impl.layers import Linear

TARGETS = {"cpu": "CPU", "ascend": "Ascend"}
#: Types by the names that ``train.precision`` gives them.
PRECISIONS = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}
#: What MindSpore 2.9 cannot compile for a CPU.
MISSING_ON_CPU = ("bfloat16",)
#: What was chosen last in this process.
_chosen: list[str] = []


def use_device(device: str) -> str:
    """Whole graphs are compiled for a device from now on.

    Args:
        device: ``auto``, ``cpu`` or ``ascend``.

    Returns:
        The device, which is not ``auto``.

    Raises:
        UserError: if there is no such device, what drives it is missing, or MindSpore's version is
            another one than the verified one.
    """
    wrong = wrong_version("mindspore")
    if wrong:
        raise UserError(wrong)
    if device == "auto":
        device = "ascend" if ascend_count() else "cpu"
    if device not in TARGETS:
        raise UserError(f"device '{device}' is unknown to MindSpore: give {' or '.join(TARGETS)}")
    try:
        _set_up(TARGETS[device])
    except RuntimeError as error:
        raise UserError(f"device '{device}': {_reason(str(error))}") from error
    _chosen[:] = [device]
    return device


def chosen_device(otherwise: str) -> str:
    """What ``use_device`` has chosen in this process, or another one if it was not called yet."""
    return _chosen[0] if _chosen else otherwise


@cache  # for it must not be chosen again once processes are connected
def _set_up(target: str) -> None:
    """Whole graphs, whose kernels start one after another.

    By itself MindSpore starts them from several threads that wait for one another, which takes
    twenty times as long where other programs keep the CPUs busy.
    """
    ms.set_device(target)
    ms.set_context(mode=ms.GRAPH_MODE, jit_syntax_level=ms.STRICT)
    with suppress(RuntimeError):  # it was set before, and can be set only once
        ms.runtime.dispatch_threads_num(1)


def _reason(message: str) -> str:
    """What a user can mend, in one line."""
    if "libge_runner.so" in message:
        return (
            f"MindSpore {ms.__version__} finds no CANN (libge_runner.so): install it and source "
            "its set_env.sh, or give --device cpu"
        )
    return " ".join(message.split("-----")[0].split())


def set_precision(network: nn.Cell, precision: str, device: str) -> None:
    """Chooses the type in which a network's products of matrices are computed.

    Args:
        network: the network.
        precision: as in ``train.precision``.
        device: where a type is missing, float32 takes its place, which is said.
    """
    precision = available_precision(precision, device)
    for _, cell in network.cells_and_names():
        if isinstance(cell, Linear):
            cell.precision = PRECISIONS[precision]


def say_unheeded(train: Optimisation) -> None:
    """Names the settings of a run that are torch's alone, in one line, if it has any."""
    found = [f"train.{name}" for name in TORCH_ONLY if getattr(train, name, False)]
    if found:
        line = f"{', '.join(found)}: torch's alone, without effect on MindSpore"
        print(line, file=sys.stderr, flush=True)


def available_precision(precision: str, device: str) -> str:
    """A precision, or float32 where the device has none such, which is said."""
    if device == "cpu" and precision in MISSING_ON_CPU:
        line = f"{precision} cannot be compiled for a CPU: float32 takes its place"
        print(line, file=sys.stderr, flush=True)
        return "float32"
    return precision


class PerBucket:
    """A graph that is compiled at its first call for a bucket, and says so before and after.

    Args:
        graph: called with what follows the batch.
    """

    def __init__(self, graph: nn.Cell) -> None:
        self.graph = graph
        self._known: set[tuple[int, ...]] = set()

    def __call__(self, batch: Batch, *inputs: Any) -> Any:
        shape = (*batch.shape, batch.size)
        if shape in self._known:
            return self.graph(*inputs)
        tokens, atoms, size = shape
        what = f"{tokens} tokens, {atoms} atoms, {size} crystals"
        print(f"compiling for {what}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        results = self.graph(*inputs)
        self._known.add(shape)
        seconds = f"{time.perf_counter() - start:.1f} s"
        print(f"compiled for {what} in {seconds}", file=sys.stderr, flush=True)
        return results
