"""Processes that train one network together, as msrun starts them.

Every process holds all data and works on its share of every batch (``common.training.Shard``);
gradients and losses are sums over the processes. A process waits for the others as long as the
framework's communication does: on Ascend HCCL_EXEC_TIMEOUT, on a CPU half a minute.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.communication import GlobalComm, get_group_size, get_rank, init

from common.errors import UserError
from common.machine import launched_by
from common.training import Shard
from ms_impl.device import use_device
from ms_impl.leaving import leave_at_once

#: What msrun tells every process.
VARIABLES = ("MS_WORKER_NUM", "MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT")
#: Versions of CANN that MindSpore 2.9 accepts.
CANN = ("8.2", "8.3", "8.5", "9.0")


@contextmanager
def joined(device: str) -> Iterator[Shard]:
    """Within it this process is one of those that a launcher started, or alone without one.

    msrun's scheduler runs the same program and never gets beyond this.

    Args:
        device: ``cpu`` or ``ascend``; there each process has the NPU of its number on its machine.

    Raises:
        UserError: if the environment is not msrun's.
    """
    if launched_by("WORLD_SIZE"):
        reason = "started by torchrun, which is PyTorch's"
        raise UserError(f"{reason}: use scripts/run_ascend_distributed.sh")
    if not launched_by("MS_WORKER_NUM"):
        yield Shard()
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        reason = f"MS_WORKER_NUM is set without {', '.join(missing)}"
        raise UserError(f"{reason}: use scripts/run_ascend_distributed.sh")
    use_device(device)
    init()
    yield Shard(get_rank(), get_group_size())
    leave_at_once()


def sum_values(values: Tensor) -> Tensor:
    """Sums over the processes, the same in all of them; float32."""
    return _sum()(values) if GlobalComm.INITED else values


def problems(device: str, processes: int) -> list[str]:
    """What is missing here to train with so many processes, one line each.

    Args:
        device: ``cpu`` or ``ascend``.
        processes: on this machine.
    """
    if device == "cpu":
        return []
    return [line for line in (_without_cann(), _without_npus(processes)) if line]


def _without_cann() -> str | None:
    home = os.environ.get("ASCEND_HOME_PATH")
    source = f"source set_env.sh of CANN {CANN[-1]}"
    if not home:
        return f"CANN is not found (ASCEND_HOME_PATH is not set): {source}"
    if not Path(home).is_dir():
        return f"CANN is not found in ASCEND_HOME_PATH={home}, which is no folder: {source}"
    try:
        text = (Path(home) / "compiler" / "version.info").read_text(errors="replace")
    except OSError:
        return None  # a layout of its own, which MindSpore takes as it is
    found = re.search(r"^Version=(\d+\.\d+)", text, re.MULTILINE)
    version = found[1] if found else "of unknown version"
    if version not in CANN:
        return f"CANN {version} in {home} is not for MindSpore {ms.__version__}: {source}"
    return None


def _without_npus(processes: int) -> str | None:
    command = ["npu-smi", "info", "-l"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "npu-smi is not found: install the driver of the NPUs"
    except subprocess.TimeoutExpired:
        return "npu-smi does not answer: mend the driver of the NPUs"
    count = re.search(r"Total Count\s*:\s*(\d+)", listed.stdout)
    if listed.returncode or not count:
        return f"npu-smi fails: {' '.join((listed.stdout + listed.stderr).split())}"
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    number = len(visible.split(",")) if visible else int(count[1])
    if processes > number:
        return f"{processes} processes, but {number} NPUs are visible; npu-smi lists {count[1]}"
    return None


@cache
def _sum() -> ops.AllReduce:
    return ops.AllReduce(ops.ReduceOp.SUM)
