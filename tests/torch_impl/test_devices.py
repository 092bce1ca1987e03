"""What a user may call a device, and what is said of one that is not here."""

import sysconfig
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from torch_impl.devices import available_device, compiles


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


def test_without_a_compiler_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what is missing and what to do, if one is wanted."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    def told(device: torch.device) -> str:
        assert not compiles(True, device)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("install it, or give --set train.compile=false")
        return line

    assert "g++ is not found here" in told(cpu)
    assert "gcc or clang is not found here" in told(gpu)
    for name in ("g++", "clang"):
        (tmp_path / name).touch(0o755)
    assert "Python.h" in told(cpu)
    assert "Python.h" in told(gpu)
    assert not compiles(True, cpu, tell=False)
    assert not compiles(False, cpu)
    (tmp_path / "Python.h").touch()
    assert compiles(True, cpu)
    assert compiles(True, gpu)
    assert not compiles(False, cpu)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("CXX", "absent-compiler")
    assert "absent-compiler is not found here" in told(cpu)
