"""What a user may call a device, and what is said of one that is not here."""

import pytest
import torch

from common.errors import UserError
from torch_impl.devices import available_device


@pytest.mark.parametrize(
    ("gpus", "auto", "known", "unknown"),
    [
        (0, "cpu", ["cpu"], ["cuda", "cuda:0", "cpu:0", "cpu:1", "ascend", "mps", ""]),
        (2, "cuda", ["cpu", "cuda", "cuda:0", "cuda:1"], ["cuda:2", "cuda:x", "cuda:", "cpu:0"]),
    ],
)
def test_devices_by_name(
    gpus: int,
    auto: str,
    known: list[str],
    unknown: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert available_device("auto") == auto
    assert [available_device(name) for name in known] == known
    for name in unknown:
        with pytest.raises(UserError, match=f"finds no device '{name}' here: give "):
            available_device(name)
