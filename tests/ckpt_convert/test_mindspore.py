"""MindSpore itself reads what is written for it, and what it writes is read.

One process does all of MindSpore's part: importing it takes longer than everything else here.
"""

import json
import shutil
import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_convert.convert import convert
from ckpt_convert.crystal_dit import parameters
from ckpt_convert.formats import Tensor, read_tensors
from common.config import load_config
from torch_impl.crystal_dit import CrystalDiT

SCRIPT = """
import hashlib, json, sys
from pathlib import Path

import numpy as np
import mindspore as ms

folder = Path(sys.argv[1])
found = {}
for name in ("model", "optimizer", "half"):
    loaded = ms.load_checkpoint(str(folder / f"{name}.ckpt"), crc_check=True)
    found[name] = {
        key: [str(p.dtype), list(p.shape), hashlib.sha256(p.asnumpy().tobytes()).hexdigest()]
        for key, p in loaded.items()
    }

class Net(ms.nn.Cell):
    def __init__(self, shapes):
        super().__init__()
        for index, (name, shape) in enumerate(shapes):
            setattr(self, f"p{index}", ms.Parameter(ms.Tensor(np.zeros(shape, np.float32)), name))

net = Net(json.loads((folder / "shapes.json").read_text()))
weights = ms.load_checkpoint(str(folder / "model.ckpt"))
found["unloaded"] = ms.load_param_into_net(net, weights, strict_load=True)
found["net"] = {
    p.name: hashlib.sha256(p.asnumpy().tobytes()).hexdigest() for p in net.get_parameters()
}
theirs = [{"name": key, "data": p} for key, p in weights.items()]
ms.save_checkpoint(theirs, str(folder / "theirs.ckpt"), crc_check=True)
ms.save_checkpoint(theirs, str(folder / "without_crc.ckpt"))
ms.save_checkpoint(theirs, str(folder / "theirs.safetensors"), format="safetensors")
(folder / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(step_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made for MindSpore, a file of bfloat16, and then MindSpore's own files."""
    if find_spec("mindspore") is None:
        pytest.skip("MindSpore is not installed: pip install mindspore")
    folder = tmp_path_factory.mktemp("mindspore") / "files"
    convert(step_folder, folder, "mindspore")
    config = folder / "config.yaml"
    network = CrystalDiT(load_config(config).model).bfloat16()
    torch.save(network.state_dict(), folder / "half.pt")
    convert(folder / "half.pt", folder / "half.ckpt", "mindspore", config=config)
    shapes = list(parameters(network.config))
    (folder / "shapes.json").write_text(json.dumps(shapes))
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What MindSpore has read."""
    content: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return content


def digest(tensor: Tensor) -> str:
    return sha256(tensor.data.tobytes()).hexdigest()


def described(tensor: Tensor) -> list[object]:
    return [tensor.dtype.mindspore, list(tensor.shape), digest(tensor)]


def test_mindspore_reads_the_same_tensors(
    folder: Path, step_folder: Path, found: dict[str, Any]
) -> None:
    sides = {
        "model": read_tensors(step_folder / "model.safetensors"),
        "optimizer": read_tensors(step_folder / "optimizer.safetensors"),
        "half": read_tensors(folder / "half.pt"),
    }
    assert {tensor.dtype.name for tensor in sides["half"].values()} == {"bfloat16"}
    for name, tensors in sides.items():
        expected = {key.removeprefix("model."): described(t) for key, t in tensors.items()}
        assert found[name] == expected


def test_every_parameter_of_a_network_is_loaded(folder: Path, found: dict[str, Any]) -> None:
    """Under its exact name and type; what stays are the statistics."""
    not_in_file, not_in_network = found["unloaded"]
    assert not not_in_file
    assert all(name.startswith("standardizer.") for name in not_in_network)
    assert len(not_in_network) == 5
    tensors = read_tensors(folder / "model.ckpt")
    assert found["net"] == {
        name: digest(tensor) for name, tensor in tensors.items() if name not in not_in_network
    }


def test_mindspore_writes_the_same_bytes(folder: Path) -> None:
    ours = (folder / "model.ckpt").read_bytes()
    assert (folder / "theirs.ckpt").read_bytes() == ours
    assert (folder / "without_crc.ckpt").read_bytes() == ours[:-17]


@pytest.mark.parametrize("name", ["theirs.ckpt", "without_crc.ckpt", "theirs.safetensors"])
def test_what_mindspore_writes_is_read(
    folder: Path, step_folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(folder / name, tmp_path / name)
    convert(tmp_path / name, tmp_path / "t", "torch", config=folder / "config.yaml")
    expected = (step_folder / "model.safetensors").read_bytes()
    assert (tmp_path / "t" / "model.safetensors").read_bytes() == expected
