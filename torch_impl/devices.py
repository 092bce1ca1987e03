"""Where torch computes."""

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
