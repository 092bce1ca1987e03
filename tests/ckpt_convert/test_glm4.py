"""GLM-4's folders from transformers to MindFormers and back, adapters, and what does not fit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GlmForCausalLM
from typer.testing import CliRunner

from ckpt_convert.convert import convert
from ckpt_convert.stream import CHUNK, Piece, Stored, find_shards
from common.checkpoint import (
    ADAPTER,
    NATIVE,
    load_checkpoint,
    save_checkpoint,
    shipped,
    shipped_language,
)
from common.cli import app
from common.errors import UserError
from common.language.config import GlmConfig, LoraConfig
from common.language.foreign import FolderWeights, base_of, check_base
from common.language.parameters import lora_parameters, parameters
from common.language.tokenizer import compact_tokenizer
from tests.conftest import REPOSITORY
from torch_impl.glm4 import add_adapter, build
from torch_impl.language_model import load_language_model

TOKENIZER = compact_tokenizer()
CONFIG = GlmConfig(
    layers=2, width=32, heads=4, groups=2, feed_forward=48, positions=64
).to_huggingface(TOKENIZER)


def network(seed: int = 0) -> GlmForCausalLM:
    """Whose tensors are all different, norms and biases too."""
    torch.manual_seed(seed)
    model = build(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of transformers, in several files."""
    folder = tmp_path / "hf"
    network().to(request.param).save_pretrained(folder, max_shard_size="20KB")
    TOKENIZER.save(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_there_and_back_to_the_byte(sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "mf", "mindspore")
    convert(tmp_path / "mf", tmp_path / "back", "torch")
    assert contents(tmp_path / "back") == contents(sharded)
    assert contents(tmp_path / "mf") != contents(sharded)


def test_mindformers_names(sharded: Path, tmp_path: Path) -> None:
    """By hand, a tensor of every kind."""
    convert(sharded, tmp_path / "mf", "mindspore")
    ours, theirs = tensors(sharded), tensors(tmp_path / "mf")
    layer, encoder = "model.layers.1.", "transformer.encoder.layers.1."
    for here, there in {
        "model.embed_tokens.weight": "transformer.embedding.embedding_weight",
        "lm_head.weight": "transformer.output_layer.weight",
        "model.norm.weight": "transformer.encoder.final_layernorm.weight",
        f"{layer}self_attn.q_proj.weight": f"{encoder}self_attention.wq.weight",
        f"{layer}self_attn.k_proj.bias": f"{encoder}self_attention.wk.bias",
        f"{layer}self_attn.v_proj.weight": f"{encoder}self_attention.wv.weight",
        f"{layer}self_attn.o_proj.weight": f"{encoder}self_attention.dense.weight",
        f"{layer}mlp.down_proj.weight": f"{encoder}mlp.dense_4h_to_h.weight",
        f"{layer}input_layernorm.weight": f"{encoder}input_layernorm.weight",
    }.items():
        assert same(ours[here], theirs[there]), here
    gate, up = ours[f"{layer}mlp.gate_up_proj.weight"].chunk(2)
    assert same(gate, theirs[f"{encoder}mlp.dense_left.weight"])
    assert same(up, theirs[f"{encoder}mlp.dense_right.weight"])
    assert len(theirs) == len(ours) + CONFIG["num_hidden_layers"]


def test_index_names_the_files(sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "mf", "mindspore")
    index = json.loads((tmp_path / "mf" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "mf" / file)
    assert index["weight_map"].keys() == tensors(tmp_path / "mf").keys()


def test_halves_in_different_files_are_joined(sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "mf", "mindspore")
    index = tmp_path / "mf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "transformer.encoder.layers.0.mlp.dense_right.weight"
    old = content["weight_map"][name]
    new = next(f for f in sorted(set(content["weight_map"].values())) if f != old)
    moved = load_file(tmp_path / "mf" / old)
    other = load_file(tmp_path / "mf" / new) | {name: moved.pop(name)}
    save_file(moved, tmp_path / "mf" / old)
    save_file(other, tmp_path / "mf" / new)
    content["weight_map"][name] = new
    index.write_text(json.dumps(content))
    convert(tmp_path / "mf", tmp_path / "back", "torch")
    found = tensors(tmp_path / "back")
    assert all(same(tensor, found[key]) for key, tensor in tensors(sharded).items())


def test_checkpoint_of_this_project(tmp_path: Path) -> None:
    """Its manifest, and what else it holds, come back as well."""
    model = {n: p.detach().numpy() for n, p in network().named_parameters()}
    companions = {name: text.encode() for name, text in TOKENIZER.files().items()}
    companions["config.json"] = json.dumps(CONFIG).encode()
    save_checkpoint(
        tmp_path / "own", config={"name": "x"}, model=model, card="# x\n", companions=companions
    )
    convert(tmp_path / "own", tmp_path / "mf", "mindspore")
    with pytest.raises(UserError):
        load_language_model(tmp_path / "mf")
    convert(tmp_path / "mf", tmp_path / "back", "torch")
    assert contents(tmp_path / "back") == contents(tmp_path / "own")
    load_language_model(tmp_path / "back")
    convert(tmp_path / "own", tmp_path / "mf", "mindspore", overwrite=True)
    with pytest.raises(UserError, match="already there"):
        convert(tmp_path / "own", tmp_path / "mf", "mindspore")


def test_what_has_a_manifest_is_not_replaced_by_what_has_none(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is said before any weight is written."""
    out = tmp_path / "out"
    convert(shipped_language()["glm4_tiny"], out, "torch")
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr("ckpt_convert.glm4.rename", None)
    with pytest.raises(UserError, match="takes its place"):
        convert(pair[0], out, "mindspore", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("there", "name"),
    [
        ("crystal_dit_small_fm", "glm4_tiny"),
        ("glm4_tiny", "crystal_dit_small_fm"),
        ("glm4_tiny", "glm4_tiny_fm"),
        ("glm4_tiny_fm", "glm4_tiny"),
    ],
)
def test_another_kind_of_network_is_not_replaced(there: str, name: str, tmp_path: Path) -> None:
    folders = shipped() | shipped_language()
    out = tmp_path / "out"
    convert(folders[there], out, "torch")
    before = contents(out)
    with pytest.raises(UserError, match="stays; give another path"):
        convert(folders[name], out, "torch", overwrite=True)
    assert contents(out) == before
    convert(folders[there], out, "torch", overwrite=True)


# Adapters


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter of it, as the libraries write them."""
    network().save_pretrained(tmp_path / "base")
    TOKENIZER.save(tmp_path / "base")
    config = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "o_proj"))
    adapter = add_adapter(network(), config.to_peft(None, None))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def test_nothing_is_left_of_a_conversion_that_was_killed(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The next one to the same folder takes it away."""
    killed = (
        "import os, sys; from pathlib import Path; from ckpt_convert import glm4\n"
        "glm4.write_shard = lambda *_, **__: os._exit(9)\n"
        "glm4.convert(Path(sys.argv[1]), Path(sys.argv[2]), 'mindspore')"
    )
    out = tmp_path / "out" / "mf"
    command = [sys.executable, "-c", killed, str(pair[0]), str(out)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 9
    (left,) = out.parent.iterdir()
    assert left.name.startswith(".mf.")
    convert(pair[0], out, "mindspore")
    assert list(out.parent.iterdir()) == [out]


def test_adapter_there_and_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert(pair[1], tmp_path / "mf", "mindspore")
    convert(tmp_path / "mf", tmp_path / "back", "torch")
    assert contents(tmp_path / "back") == contents(pair[1])
    theirs = tensors(tmp_path / "mf")
    ours = tensors(pair[1])["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"]
    name = "transformer.encoder.layers.1.self_attention.dense.mindpet_delta_lora_b"
    assert same(ours, theirs[name])
    assert len(theirs) == 2 * 2 * 3


@pytest.mark.parametrize("first", ["torch", "mindspore"])
def test_merged_as_peft_does(pair: tuple[Path, Path], tmp_path: Path, first: Any) -> None:
    """Whichever side's names the base and the adapter have."""
    base, adapter = (tmp_path / "b", tmp_path / "a") if first == "mindspore" else pair
    if first == "mindspore":
        convert(pair[0], base, "mindspore")
        convert(pair[1], adapter, "mindspore")
    convert(adapter, tmp_path / "merged", "torch", base=base)
    wanted = PeftModel.from_pretrained(network(), pair[1]).merge_and_unload().state_dict()
    before, found = tensors(pair[0]), tensors(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)
        changed = any(part in name for part in ("q_proj.weight", "v_proj.w", "o_proj.w"))
        assert torch.equal(tensor, before[name]) != changed, name


@pytest.mark.parametrize("own", [False, True], ids=["transformers", "this project"])
@pytest.mark.parametrize("renamed", [("base",), ("adapter",), ("base", "adapter")], ids=str)
def test_merged_under_mindformers_names(
    pair: tuple[Path, Path], tmp_path: Path, renamed: tuple[str, ...], own: bool
) -> None:
    """To the byte what comes of a base and an adapter under torch's names."""
    known = shipped_language()
    base, adapter = (known["glm4_tiny"], known["glm4_tiny_fm"]) if own else pair
    convert(adapter, tmp_path / "wanted", "mindspore", base=base)
    folders = {"base": base, "adapter": adapter}
    for name in renamed:
        convert(folders[name], tmp_path / "ms" / name, "mindspore")
        folders[name] = tmp_path / "ms" / name
    convert(folders["adapter"], tmp_path / "found", "mindspore", base=folders["base"])
    assert contents(tmp_path / "found") == contents(tmp_path / "wanted")
    convert(tmp_path / "found", tmp_path / "back", "torch")
    convert(adapter, tmp_path / "merged", "torch", base=base)
    assert contents(tmp_path / "back") == contents(tmp_path / "merged")


def test_rows_of_several_pieces(tmp_path: Path) -> None:
    """Cut within them, at their ends, and across."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(24)))
    pieces = (Piece(path, 0, 4), Piece(path, 10, 6), Piece(path, 20, 2))
    whole = Stored("U8", (6, 2), pieces)
    data = b"".join(c for piece in pieces for c in piece.chunks())
    for begin in range(6):
        for end in range(begin + 1, 7):
            part = whole.rows(begin, end)
            assert (part.shape, part.size) == ((end - begin, 2), 2 * (end - begin))
            found = b"".join(c for piece in part.pieces for c in piece.chunks())
            assert found == data[2 * begin : 2 * end]


def test_merged_bfloat16_is_rounded_like_torch(pair: tuple[Path, Path], tmp_path: Path) -> None:
    network().bfloat16().save_pretrained(tmp_path / "half")
    convert(pair[1], tmp_path / "merged", "torch", base=tmp_path / "half")
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = tensors(pair[1])
    a, b = (parts[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
    wanted = tensors(tmp_path / "half")[name].float() + 5 / 3 * b @ a
    found = tensors(tmp_path / "merged")[name]
    assert (found != wanted.bfloat16()).float().mean() < 0.01  # where float32 rounds otherwise
    torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=0)


def test_adapter_of_another_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    wide = GlmConfig(layers=2, width=64, heads=4, groups=2, feed_forward=48)
    build(wide.to_huggingface(TOKENIZER)).save_pretrained(tmp_path / "wide")
    deep = GlmConfig(layers=3, width=32, heads=4, groups=2, feed_forward=48)
    build(deep.to_huggingface(TOKENIZER)).save_pretrained(tmp_path / "deep")
    for name in ("wide", "deep"):
        with pytest.raises(UserError, match="give the adapter's own base"):
            convert(pair[1], tmp_path / "merged", "torch", base=tmp_path / name)
    with pytest.raises(UserError, match="is no adapter"):
        convert(pair[0], tmp_path / "merged", "torch", base=tmp_path / "wide")
    assert not (tmp_path / "merged").exists()


def test_adapter_of_other_weights(tmp_path: Path) -> None:
    """Of the same shapes, in this project's folder and in transformers'."""
    known = shipped_language()
    saved = load_checkpoint(known["glm4_tiny"])
    companions = {n: (saved.path / n).read_bytes() for n in ("config.json", "tokenizer.json")}
    weights = {name: array + np.float32(0.01) for name, array in saved.model.items()}
    own, foreign, renamed = (tmp_path / name for name in ("own", "foreign", "renamed"))
    save_checkpoint(own, config=saved.config, model=weights, companions=companions)
    shutil.copytree(own, foreign)
    (foreign / "manifest.json").unlink()
    for other in (own, foreign):
        with pytest.raises(UserError, match="give its own base"):
            convert(known["glm4_tiny_fm"], tmp_path / "merged", "torch", base=other)
    assert not (tmp_path / "merged").exists()
    convert(known["glm4_tiny"], renamed, "mindspore")
    report = convert(known["glm4_tiny_fm"], tmp_path / "merged", "torch", base=renamed)
    assert "nobody knows whether" in report.notes[-1]


def test_a_copy_of_the_base_without_manifest_is_the_base(tmp_path: Path) -> None:
    """And gives the same weights; one that an earlier version has named differently does, too."""
    known = shipped_language()
    copy, adapter = tmp_path / "copy", tmp_path / "adapter"
    shutil.copytree(known["glm4_tiny"], copy)
    (copy / "manifest.json").unlink()
    convert(known["glm4_tiny_fm"], tmp_path / "wanted", "torch", base=known["glm4_tiny"])
    convert(known["glm4_tiny_fm"], tmp_path / "found", "torch", base=copy)
    wanted = contents(tmp_path / "wanted")["model.safetensors"]
    assert contents(tmp_path / "found")["model.safetensors"] == wanted
    assert FolderWeights(copy).name == load_checkpoint(known["glm4_tiny"]).hash
    saved = load_checkpoint(known["glm4_tiny_fm"])
    config = json.loads((saved.path / "adapter_config.json").read_text())
    config["revision"] = FolderWeights(copy).sample
    companions = {"adapter_config.json": json.dumps(config).encode()}
    save_checkpoint(
        adapter, config=saved.config, model=saved.model, companions=companions, layout=ADAPTER
    )
    for base in (copy, known["glm4_tiny"]):
        assert base_of(load_checkpoint(adapter), base)[0] == base
        assert base_of(saved, base)[0] == base
        check_base(adapter, config, base)


@pytest.mark.parametrize("without", ["base", "adapter"])
def test_a_merged_model_has_a_manifest_where_its_base_has(
    without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes the place of one that has a manifest, whether or not the adapter has one."""
    known = shipped_language()
    folders = {"base": known["glm4_tiny"], "adapter": known["glm4_tiny_fm"]}
    shutil.copytree(folders[without], tmp_path / without)
    (tmp_path / without / "manifest.json").unlink()
    folders[without] = tmp_path / without
    adapter, base, out = folders["adapter"], folders["base"], tmp_path / "out"
    convert(known["glm4_tiny"], out, "torch")
    before = contents(out)
    if without == "adapter":
        convert(adapter, out, "torch", base=base, overwrite=True)
        assert contents(out)["model.safetensors"] != before["model.safetensors"]
        return
    monkeypatch.setattr("ckpt_convert.glm4.rename", None)  # it is said before anything is read
    with pytest.raises(UserError, match="takes its place"):
        convert(adapter, out, "torch", base=base, overwrite=True)
    assert contents(out) == before


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"target_modules": "all-linear"}],
    ids=str,
)
def test_other_adapters_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    path = pair[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=next(iter(change))):
        convert(pair[1], tmp_path / "mf", "mindspore")


# What does not fit

Tensors = dict[str, torch.Tensor]


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {key: tensor for key, tensor in found.items() if key != name}


def with_more(found: Tensors) -> Tensors:
    return found | {"model.layers.2.mlp.down_proj.weight": torch.ones(1)}


def transposed(found: Tensors) -> Tensors:
    name = "model.layers.0.mlp.down_proj.weight"
    return found | {name: found[name].T.contiguous()}


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (without("model.norm.weight"), r"missing model\.norm\.weight"),
        (with_more, r"unknown model\.layers\.2"),
        (transposed, r"reshaped .*down_proj\.weight \(48, 32\) instead of \(32, 48\)"),
    ],
)
def test_misfits(pair: tuple[Path, Path], tmp_path: Path, spoil: Any, line: str) -> None:
    path = pair[0] / "model.safetensors"
    save_file(spoil(load_file(path)), path, {"format": "pt"})
    with pytest.raises(UserError, match=line) as caught:
        convert(pair[0], tmp_path / "mf", "mindspore")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mf").exists()


def test_adapter_misfits(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = pair[1] / "adapter_model.safetensors"
    found = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for changed, line in (
        (without(name)(found), "missing"),
        (found | {"x": torch.ones(1)}, "unknown x"),
        (found | {name: torch.ones(3, 31)}, "reshaped"),
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=line):
            convert(pair[1], tmp_path / "mf", "mindspore")


def test_damaged_folders(sharded: Path, tmp_path: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    index = sharded / "model.safetensors.index.json"

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            convert(sharded, tmp_path / "mf", "mindspore")
        assert not (tmp_path / "mf").exists()
        return str(caught.value)

    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    assert shards[1].name in refused()
    shards[1].unlink()
    assert shards[1].name in refused()
    shards[1].write_bytes(whole)
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert "outside" in refused()
    index.write_text("{")
    assert index.name in refused()
    index.unlink()
    assert "holds neither" in refused()
    (sharded / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type" in refused()


def test_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    arguments = ["convert", str(pair[1]), str(merged), "--to", "mindspore", "--base", str(pair[0])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "transformer.output_layer.weight" in tensors(merged)
    assert "worked into" in result.output


def test_shipped_models_go_by_their_names(tmp_path: Path) -> None:
    """Both what is converted and what it is worked into."""
    known = shipped_language()
    by_name, by_folder = tmp_path / "by_name", tmp_path / "by_folder"
    arguments = ["convert", "glm4_tiny_fm", str(by_name), "--to", "torch", "--base", "glm4_tiny"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    convert(known["glm4_tiny_fm"], by_folder, "torch", base=known["glm4_tiny"])
    assert (by_name / NATIVE.model).read_bytes() == (by_folder / NATIVE.model).read_bytes()


# Size

#: GLM-4-9B with one layer.
GLM4_9B = {
    **CONFIG,
    "vocab_size": 151_552,
    "hidden_size": 4096,
    "intermediate_size": 13_696,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
#: Its proportions at half its width, of which every byte is written and compared.
LARGE = {
    **GLM4_9B,
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 6848,
    "num_attention_heads": 16,
}
#: Bytes that a conversion may take, whatever the size of files and tensors.
HELD = 16 * CHUNK
#: Bytes of a sparse tensor that are not zero, at three places of each of its parts.
STRIPE = 64

MEASURED = """
import sys
from pathlib import Path
from ckpt_convert.convert import convert

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

before = peak()
if sys.argv[3] == "whole":
    content = Path(sys.argv[1], "model.safetensors").read_bytes()
else:
    base = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], base=base)
print(peak() - before)
"""

#: Before it: new files have holes where zeros are written, and so take no room on the disk.
SPARSE = """
import io
from pathlib import Path

class Sparse(io.FileIO):
    def write(self, data):
        if data != bytes(len(data)):
            return super().write(data)
        self.seek(len(data), 1)
        return len(data)

def opened(path, mode="r", **options):
    return Sparse(path, mode) if mode == "xb" else open(path, mode, **options)

Path.open = opened
"""


def peak_memory(*arguments: object, before: str = "") -> int:
    """Bytes that a conversion takes, in a process of its own; ``whole`` reads a file instead."""
    command = [sys.executable, "-c", before + MEASURED, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_memory_on_large_tensors(tmp_path: Path) -> None:
    """One layer, in bfloat16; each further one would be written in the same memory."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE))
    random = np.random.default_rng(0)
    block = torch.from_numpy(random.integers(0, 2**15, 2**20, dtype=np.int16)).view(torch.bfloat16)
    weights = {}
    for p in parameters(LARGE):
        count = int(np.prod(p.shape))
        weights[p.torch] = block.repeat(-(-count // len(block)))[:count].reshape(p.shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    size = sum(tensor.nbytes for tensor in weights.values())
    del weights
    assert peak_memory(folder, "", "whole") > size
    assert peak_memory(folder, tmp_path / "mf", "mindspore") < size / 4
    assert peak_memory(tmp_path / "mf", tmp_path / "back", "torch") < size / 4
    assert contents(tmp_path / "back") == contents(folder)
    shutil.rmtree(tmp_path / "mf")


def stripe_places(size: int) -> tuple[int, int, int]:
    """Where the parts of a sparse tensor, of so many bytes, are not zero."""
    return 0, (size - STRIPE) // 2, size - STRIPE


def save_sparse(folder: Path, config: dict[str, Any]) -> None:
    """Weights in bfloat16, zero but for stripes; a file each for embedding, layer, norm and head.

    MindFormers' parts of them have stripes of their own.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    places = {p.torch: f"{p.torch.rsplit('.')[-2]}.safetensors" for p in parameters(config)}
    places |= {name: "layer.safetensors" for name in places if ".layers." in name}
    for file in set(places.values()):
        header, stripes, end = {}, [], 0
        for p in (p for p in parameters(config) if places[p.torch] == file):
            size = 2 * int(np.prod(p.shape)) // len(p.mindformers)
            begin = end
            for _ in p.mindformers:
                stripes += [end + place for place in stripe_places(size)]
                end += size
            header[p.torch] = {"dtype": "BF16", "shape": p.shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as content:
            content.write(len(text).to_bytes(8, "little") + text)
            content.truncate(8 + len(text) + end)
            for stripe in stripes:
                content.seek(8 + len(text) + stripe)
                content.write(random.bytes(STRIPE))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def stripes(tensor: Stored) -> list[bytes]:
    """Of a part of a sparse tensor."""
    (piece,) = tensor.pieces
    content = np.memmap(piece.path, np.uint8, "r", piece.begin, piece.size)
    return [content[place : place + STRIPE].tobytes() for place in stripe_places(piece.size)]


def stored(folder: Path) -> dict[str, Stored]:
    return {name: t for shard in find_shards(folder)[0] for name, t in shard.tensors.items()}


def test_memory_on_tensors_of_glm4_9b(tmp_path: Path) -> None:
    """One layer; the embedding alone is a file of 1.2 GB."""
    hf, mf, back = (tmp_path / name for name in ("hf", "mf", "back"))
    save_sparse(hf, GLM4_9B)
    largest = max(path.stat().st_size for path in hf.iterdir())
    assert largest > 1.2e9
    assert peak_memory(hf, mf, "mindspore", before=SPARSE) < HELD < 2 * largest
    assert peak_memory(mf, back, "torch", before=SPARSE) < HELD
    ours, theirs, again = (stored(folder) for folder in (hf, mf, back))
    for p in parameters(GLM4_9B):
        count = len(p.mindformers)
        parts, back_again = ours[p.torch].split(count), again[p.torch].split(count)
        for name, part, other in zip(p.mindformers, parts, back_again, strict=True):
            assert theirs[name].shape == other.shape == part.shape, name
            assert len(set(stripes(part))) == 3, name
            assert stripes(theirs[name]) == stripes(other) == stripes(part), name


def test_memory_of_merging(tmp_path: Path) -> None:
    """Into a layer of GLM-4-9B's, of which a product's weight alone is 67 MB in float32."""
    hf, adapter, merged = (tmp_path / name for name in ("hf", "adapter", "merged"))
    save_sparse(hf, GLM4_9B | {"vocab_size": 1024})
    lora = LoraConfig()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(lora.to_peft(None, None)))
    table = lora_parameters(GLM4_9B, lora.rank, lora.targets)
    additions = {p.torch: torch.ones(p.shape) for p in table}
    for name, values in additions.items():
        if "lora_B" in name:
            values *= torch.arange(len(values))[:, None] // 16
    save_file(additions, adapter / "adapter_model.safetensors")
    assert peak_memory(adapter, merged, "torch", hf, before=SPARSE) < HELD
    found = load_file(merged / "layer.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    wanted = torch.arange(4096)[:, None] // 16 * lora.rank * (lora.alpha / lora.rank)
    assert torch.equal(found[1:-1, 64:4000], wanted.bfloat16().expand(4096, 3936)[1:-1])
