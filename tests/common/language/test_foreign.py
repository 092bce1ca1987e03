"""Folders of transformers: their weights number by number, and what is wrong with some."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.language.config import GlmConfig
from common.language.foreign import FolderWeights, is_foreign, network_config
from common.language.tokenizer import SymmetryTokenizer

MODEL = GlmConfig(layers=1, width=32, heads=4, groups=2, feed_forward=48)
TYPES = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16}


@pytest.fixture
def folder(tmp_path: Path, compact: SymmetryTokenizer) -> Path:
    """Two files of weights."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(3, 5).to(kind) for name, kind in TYPES.items()}
    save_file({"a": tensors["a"]}, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({n: tensors[n] for n in "bc"}, tmp_path / "model-00002-of-00002.safetensors")
    torch.save(tensors, tmp_path / "wanted.pt")
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_huggingface(compact)))
    return tmp_path


def test_weights(folder: Path) -> None:
    wanted = torch.load(folder / "wanted.pt", weights_only=True)
    weights = FolderWeights(folder)
    assert set(weights) == wanted.keys()
    assert len(weights) == 3
    for name, array in weights.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted[name].float().numpy())


def test_name_is_that_of_the_weights(folder: Path) -> None:
    name = FolderWeights(folder).name
    assert len(name) == 12
    assert FolderWeights(folder).name == name
    file = folder / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert FolderWeights(folder).name != name


def refused(folder: Path) -> str:
    """The one line that a user gets."""
    with pytest.raises(UserError) as caught:
        FolderWeights(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_weights(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no weights in" in refused(empty)
    file = folder / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    assert "is cut off" in refused(folder)
    file.write_bytes(b"\x10" + bytes(40))
    assert "no header of safetensors" in refused(folder)
    file.write_bytes(b"")
    assert "no header of safetensors" in refused(folder)
    save_file({"b": torch.zeros(2, dtype=torch.int8)}, file)
    assert "b is I8" in refused(folder)


def test_index(folder: Path) -> None:
    """Its files are the folder's weights, unless there is one file for all."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    places = {"a": files[0], "b": files[1], "c": files[1]}
    index = folder / "model.safetensors.index.json"
    name = FolderWeights(folder).name

    def write(places: dict[str, str]) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    write(places)
    assert FolderWeights(folder).name == name
    write({"b": files[1], "c": files[1]})
    assert set(FolderWeights(folder)) == {"b", "c"}
    write(places | {"c": files[0]})
    assert "its files differ from it, as in c" in refused(folder)
    write(places | {"d": "model-00003-of-00003.safetensors"})
    assert "model-00003-of-00003.safetensors is absent" in refused(folder)
    write(places | {"d": "../elsewhere.safetensors"})
    assert "outside of its folder" in refused(folder)
    index.write_text("{")
    assert "no index of weights" in refused(folder)
    save_file({"e": torch.zeros(1)}, folder / "model.safetensors")
    assert set(FolderWeights(folder)) == {"e"}


def test_network(folder: Path) -> None:
    assert is_foreign(folder)
    assert network_config(folder, MODEL)["num_key_value_heads"] == 2
    with pytest.raises(UserError, match=r"num_hidden_layers is 1, but model\.layers 2"):
        network_config(folder, MODEL.model_copy(update={"layers": 2}))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"glm"', '"chatglm"'))
    with pytest.raises(UserError, match="model_type is not glm"):
        network_config(folder, MODEL)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        network_config(folder, MODEL)
    (folder / "manifest.json").write_text("{}")
    assert not is_foreign(folder)
