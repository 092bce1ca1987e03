"""Where torch computes."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from common.errors import UserError


def devices() -> list[str]:
    """What ``device`` may be here, best first."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def available_device(device: str) -> str:
    """A device of this machine, or the best one for ``auto``.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, or ``cuda:1`` for the second GPU, and so on.

    Raises:
        UserError: if it is not here.
    """
    known = devices()
    if device == "auto":
        return known[0]
    if device not in (*known, *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        raise UserError(f"torch finds no device '{device}' here: give {' or '.join(known)}")
    return device


def compiles(wanted: bool, device: torch.device, tell: bool = True) -> bool:
    """Whether to compile: if that is wanted, and what torch needs for it is here.

    Otherwise a line on stderr says what is missing; the results are the same but for rounding.

    Args:
        wanted: as ``train.compile``.
        device: what is compiled for.
        tell: whether to say it; of many processes one does.
    """
    missing = _missing_compiler(device) if wanted else None
    if missing and tell:
        line = (
            f"train.compile: without effect, for {missing} is not found here; install it, or give "
            "--set train.compile=false"
        )
        print(line, file=sys.stderr, flush=True)
    return wanted and missing is None


def _missing_compiler(device: torch.device) -> str | None:
    """What torch compiles with: for CPUs C++, for GPUs C, and Python's headers."""
    if device.type == "cpu":
        names = [os.environ.get("CXX", "g++")]
    else:
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(name) for name in names):
        return " or ".join(names)
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"{header} (Python's development package)"
