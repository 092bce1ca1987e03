"""There and back gives every bit again; whatever does not fit is named, and nothing is written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ckpt_convert.convert import MisfitError, convert
from ckpt_convert.crystal_dit import OPTIMIZER_PARTS, parameters
from ckpt_convert.formats import read_tensors
from common.checkpoint import (
    MINDSPORE,
    load_checkpoint,
    save_checkpoint,
    shipped,
    shipped_language,
    verify,
)
from common.cli import run
from common.config import load_config, parse_config
from common.errors import UserError
from common.precedents import load_precedents
from torch_impl.backend import train
from torch_impl.crystal_dit import CrystalDiT


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line on stderr of a command that fails with exit code 2."""
    capsys.readouterr()
    assert run(["convert", *map(str, arguments)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


@pytest.fixture
def loose(step_folder: Path, tmp_path: Path) -> Path:
    """The step's model.safetensors in a folder without a manifest, for a test to change."""
    folder = tmp_path / "loose"
    shutil.copytree(step_folder, folder)
    (folder / "manifest.json").unlink()
    return folder / "model.safetensors"


# There and back


def test_shipped_checkpoint_comes_back(shipped_folder: Path, tmp_path: Path) -> None:
    report = convert(shipped_folder, tmp_path / "ms", "mindspore")
    assert report.files == ("config.yaml", "model.ckpt", "README.md", "manifest.json")
    assert [(c.part, c.used) for c in report.counts] == [("network", 165), ("standardizer", 5)]
    assert not any(c.unused or c.missing or c.reshaped for c in report.counts)
    convert(tmp_path / "ms", tmp_path / "back", "torch")
    assert content(tmp_path / "back") == content(shipped_folder)


def test_training_state_comes_back(step_folder: Path, tmp_path: Path) -> None:
    convert(step_folder, tmp_path / "ms", "mindspore")
    assert content(tmp_path / "ms").keys() == {
        "config.yaml",
        "model.ckpt",
        "optimizer.ckpt",
        "state.json",
        "README.md",
        "manifest.json",
    }
    for name in ("config.yaml", "state.json", "README.md"):
        assert (tmp_path / "ms" / name).read_bytes() == (step_folder / name).read_bytes()
    verify(tmp_path / "ms", MINDSPORE)
    convert(tmp_path / "ms" / "model.ckpt", tmp_path / "back", "torch")  # means its folder
    assert content(tmp_path / "back") == content(step_folder)
    convert(tmp_path / "back", tmp_path / "again", "mindspore")
    assert content(tmp_path / "again") == content(tmp_path / "ms")


def test_training_goes_on_from_what_came_back(
    run_folder: Path, step_folder: Path, tmp_path: Path
) -> None:
    """To the same weights as the run that was never converted."""
    convert(step_folder, tmp_path / "ms", "mindspore")
    convert(tmp_path / "ms", tmp_path / "run" / step_folder.name, "torch")
    config = load_config(step_folder / "config.yaml")
    train(config, tmp_path / "run", resume=True, device="cpu")
    assert content(tmp_path / "run" / "final") == content(run_folder / "final")


@pytest.mark.parametrize("folder", shipped().values(), ids=shipped())
def test_every_shipped_checkpoint_comes_back(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "ms", "mindspore")
    convert(tmp_path / "ms", tmp_path / "back", "torch")
    assert content(tmp_path / "back") == content(folder)


def test_a_single_file_finds_its_training_rows_again(tmp_path: Path) -> None:
    """By the checkpoint folder of its configuration, or by the rows beside it."""
    folder = shipped()["crystal_dit_small_fm"]
    convert(folder, tmp_path / "model.ckpt", "mindspore")
    convert(tmp_path / "model.ckpt", tmp_path / "a", "torch", config=folder / "config.yaml")
    assert load_checkpoint(tmp_path / "a").fingerprint == load_checkpoint(folder).fingerprint
    shutil.copy(folder / "config.yaml", tmp_path)
    convert(tmp_path / "model.ckpt", tmp_path / "b", "torch")
    with pytest.raises(UserError, match="--config"):
        load_precedents(tmp_path / "b", load_checkpoint(tmp_path / "b").fingerprint, np.ones(119))
    rows = (tmp_path / "precedents.parquet", tmp_path / "c" / "precedents.parquet")
    rows[0].write_bytes(b"rows")
    convert(tmp_path / "model.ckpt", tmp_path / "c", "torch")
    assert rows[1].read_bytes() == rows[0].read_bytes()
    shutil.copytree(folder, tmp_path / "own")  # of a run with rows that are not shipped
    (tmp_path / "own" / "precedents.parquet").write_bytes(b"own rows")
    rows[0].unlink()
    own = tmp_path / "own" / "config.yaml"
    convert(tmp_path / "model.ckpt", tmp_path / "d", "torch", config=own)
    assert (tmp_path / "d" / "precedents.parquet").read_bytes() == b"own rows"


def test_a_run_is_its_latest_step(run_folder: Path, tmp_path: Path) -> None:
    convert(run_folder, tmp_path / "latest", "torch")
    assert content(tmp_path / "latest") == content(run_folder / "step_00000004")


def test_without_the_manifest(loose: Path, step_folder: Path, tmp_path: Path) -> None:
    """A folder, or a file with its neighbours, gives the same tensors; the origin is lost."""
    convert(loose, tmp_path / "ms", "mindspore")
    (tmp_path / "ms" / "manifest.json").unlink()
    report = convert(tmp_path / "ms", tmp_path / "back", "torch")
    assert "no manifest.json" in report.notes[0]
    before, after = content(step_folder), content(tmp_path / "back")
    manifest = json.loads(after.pop("manifest.json"))
    assert manifest["extra"] == {"converted_from": "model.ckpt"}
    assert manifest["files"] == json.loads(before.pop("manifest.json"))["files"]
    assert after == before
    load_checkpoint(tmp_path / "back", optimizer=True)


@pytest.mark.parametrize("properties", [[], ["band_gap"]])
def test_empty_parameters_come_back(
    step_folder: Path, properties: list[str], tmp_path: Path
) -> None:
    """Also where MindSpore has left them out."""
    saved = load_checkpoint(step_folder)
    data = saved.config | {"model": saved.config["model"] | {"properties": properties}}
    shapes = dict(parameters(parse_config(data, "config").model))
    ones = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    model = {name: a for name, a in saved.model.items() if name.startswith("standardizer.")}
    model |= {f"model.{name}": array for name, array in ones.items()}
    optimizer = {f"{part}.{name}": a for part in OPTIMIZER_PARTS for name, a in ones.items()}
    save_checkpoint(tmp_path / "a", config=data, model=model, optimizer=optimizer)
    convert(tmp_path / "a", tmp_path / "ms", "mindspore")
    convert(tmp_path / "ms", tmp_path / "back", "torch")
    assert content(tmp_path / "back") == content(tmp_path / "a")
    filled = {name: array for name, array in model.items() if array.size}
    assert (len(filled) < len(model)) == (not properties)
    save_file(filled, tmp_path / "filled.safetensors")
    config = tmp_path / "a" / "config.yaml"
    convert(tmp_path / "filled.safetensors", tmp_path / "b", "torch", config=config)
    name = "model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


# Single files


@pytest.mark.parametrize(
    ("first", "second"),
    [("m.ckpt", "t.safetensors"), ("m.safetensors", "t.pt"), ("m.ckpt", "t.pth")],
)
def test_files(loose: Path, tmp_path: Path, first: str, second: str) -> None:
    config = loose.with_name("config.yaml")
    report = convert(loose, tmp_path / first, "mindspore")
    assert report.notes == ("optimizer.safetensors stays behind: a file holds the weights alone",)
    convert(tmp_path / first, tmp_path / second, "torch", config=config)
    convert(tmp_path / second, tmp_path / "end", "torch", config=config)
    assert (tmp_path / "end" / loose.name).read_bytes() == loose.read_bytes()


def test_a_torch_file_loads_into_the_network(step_folder: Path, tmp_path: Path) -> None:
    convert(step_folder, tmp_path / "w.pt", "torch")
    network = CrystalDiT(load_config(step_folder / "config.yaml").model)
    network.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True)["model"])
    saved = load_checkpoint(step_folder).model
    for name, parameter in network.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), saved[f"model.{name}"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_type_is_kept(step_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """A network's own state_dict, without the statistics, there and back."""
    config = step_folder / "config.yaml"
    network = CrystalDiT(load_config(config).model).to(dtype)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    report = convert(tmp_path / "a.pt", tmp_path / "b.ckpt", "mindspore", config=config)
    assert "statistics" in report.notes[0]
    name = str(dtype).removeprefix("torch.")
    assert [(count.part, count.dtypes) for count in report.counts] == [("network", (name,))]
    convert(tmp_path / "b.ckpt", tmp_path / "c.safetensors", "torch", config=config)
    convert(tmp_path / "c.safetensors", tmp_path / "d.pt", "torch", config=config)
    found = torch.load(tmp_path / "d.pt", weights_only=True)["model"]
    for key, tensor in network.state_dict().items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], tensor)


def test_a_checkpoint_folder_holds_float32(
    loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = {name: array.astype(np.float16) for name, array in load_file(loose).items()}
    save_file(halves, loose)
    line = error_of(capsys, loose, tmp_path / "t", "--to", "torch")
    assert "'model.tokens.element.weight' is float16" in line
    convert(loose, tmp_path / "ms", "mindspore")
    assert read_tensors(tmp_path / "ms/model.ckpt")["norm.bias"].dtype.name == "float16"


# What does not fit


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.norm.bias"]


def add(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.blocks.9.norm"] = np.ones(2, np.float32)


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.edges.lattice.weight"] = tensors["model.edges.lattice.weight"].T.copy()


def rename(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.gamma"] = tensors.pop("model.norm.weight")


def drop_statistics(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if name.startswith("standardizer.")]:
        del tensors[name]


def round_off(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.bias"] = tensors["model.norm.bias"].astype(np.int32)


def spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.bias"][1] = np.nan


MISFITS = [
    (drop, "missing model.norm.bias;"),
    (add, "unknown model.blocks.9.norm;"),
    (reshape, "reshaped model.edges.lattice.weight (6, 12) instead of (12, 6);"),
    (rename, "missing model.norm.weight; unknown model.norm.gamma;"),
    (round_off, "'model.norm.bias' holds int32"),
    (spoil, "'model.norm.bias' has NaN"),
]
NO_STATISTICS = "missing standardizer.element_volume, standardizer.lattice_mean, "


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        *(("model", change, expected) for change, expected in MISFITS),
        ("model", drop_statistics, NO_STATISTICS),
        *(("exp_avg", change, expected) for change, expected in MISFITS),
    ],
)
def test_misfits_are_named(
    loose: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    change: Callable[[dict[str, np.ndarray]], None],
    expected: str,
) -> None:
    path = loose if part == "model" else loose.with_name("optimizer.safetensors")
    tensors = {renamed(name, part, "model"): a for name, a in load_file(path).items()}
    change(tensors)
    save_file({renamed(name, "model", part): a for name, a in tensors.items()}, path)
    expected = expected.replace("model.", f"{part}.")
    assert expected in error_of(capsys, loose, tmp_path / "out", "--to", "torch")
    assert not (tmp_path / "out").exists()


def renamed(name: str, old: str, new: str) -> str:
    return f"{new}.{name.removeprefix(f'{old}.')}" if name.startswith(f"{old}.") else name


def test_table_lists_every_misfit(
    loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(loose)
    for change in (add, reshape, drop):
        change(tensors)
    save_file(tensors, loose)
    with pytest.raises(MisfitError) as caught:
        convert(loose, tmp_path / "out", "mindspore")
    network, _, unknown, *_ = caught.value.report.counts
    assert (len(network.missing), len(network.reshaped), len(unknown.unused)) == (1, 1, 1)
    run(["convert", str(loose), str(tmp_path / "out"), "--to", "mindspore"])
    shown = capsys.readouterr().out
    for line in ("missing: model.norm.bias", "unused: model.blocks.9.norm", "(6, 12) instead of"):
        assert line in shown


def test_another_network_s_configuration(
    loose: Path, shipped_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shipped_folder / "config.yaml"
    line = error_of(capsys, loose, tmp_path / "o", "--to", "torch", "--config", config)
    assert "missing model.precedent.site.weight" in line
    assert "reshaped model.tokens.element.weight (119, 16) instead of (119, 128)" in line


# What cannot be read, and where nothing may be written


def test_damaged_folders(
    step_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(step_folder, tmp_path / "ms", "mindspore")
    for name in ("model.ckpt", "optimizer.ckpt", "state.json"):
        path = tmp_path / "ms" / name
        data = path.read_bytes()
        path.write_bytes(data[:-9])
        assert f"{name} has" in error_of(capsys, tmp_path / "ms", tmp_path / "o", "--to", "torch")
        path.unlink()
        line = error_of(capsys, tmp_path / "ms", tmp_path / "o", "--to", "torch")
        assert f"lacks {name}" in line
        path.write_bytes(data)
    convert(tmp_path / "ms", tmp_path / "o", "torch")


def test_a_truncated_file(
    step_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = step_folder / "config.yaml"
    for name, to in (("a.ckpt", "mindspore"), ("a.safetensors", "torch"), ("a.pt", "torch")):
        path = tmp_path / name
        convert(step_folder, path, to)
        path.write_bytes(path.read_bytes()[:-3000])
        line = error_of(capsys, path, tmp_path / "o", "--to", "torch", "--config", config)
        assert f"{name}: damaged" in line
        assert not (tmp_path / "o").exists()


def test_sources_that_are_none(
    loose: Path, shipped_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = loose.with_name("config.yaml")

    def error(source: Path, *options: object) -> str:
        return error_of(capsys, source, out, "--to", "torch", *options)

    assert "does not exist" in error(tmp_path / "none")
    assert "does not exist" in error(tmp_path / "none", "--config", config)
    assert "neither manifest.json nor a model file" in error(tmp_path)
    assert "leave out --config" in error(shipped_folder, "--config", config)
    shutil.copy(loose, loose.with_suffix(".pt"))
    assert "model.safetensors and model.pt" in error(loose.parent)
    loose.with_suffix(".pt").unlink()
    elsewhere = config.rename(tmp_path / "elsewhere.yaml")
    assert "give --config" in error(loose)
    absent = tmp_path / "absent.yaml"
    assert f"{absent} does not exist" in error(loose, "--config", absent)
    assert "not a file of tensors" in error(elsewhere, "--config", elsewhere)
    assert "not YAML" in error(loose, "--config", loose)


def test_destinations_that_are_there(
    step_folder: Path, shipped_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(target: Path, to: str, *options: str) -> str:
        before = content(target) if target.is_dir() else {}
        line = error_of(capsys, step_folder, target, "--to", to, *options)
        assert not target.is_dir() or content(target) == before
        return line

    ours, ms = tmp_path / "ours", tmp_path / "ms"
    ours.mkdir()  # empty
    convert(shipped_folder, ours, "torch")
    convert(shipped_folder, ms, "mindspore")
    assert "already there" in error(ours, "torch")
    assert "is not of a uni-mdm MindSpore checkpoint" in error(ours, "mindspore", "--overwrite")
    assert "is not of a uni-mdm checkpoint" in error(ms, "torch", "--overwrite")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    assert "lacks manifest.json" in error(tmp_path / "other", "torch", "--overwrite")
    convert(step_folder, ours, "torch", overwrite=True)
    assert content(ours) == content(step_folder)
    file = tmp_path / "w.ckpt"
    file.write_text("old")
    assert "already there" in error(file, "mindspore")
    convert(step_folder, file, "mindspore", overwrite=True)
    assert "norm.bias" in read_tensors(file)
    for target in (step_folder, step_folder / "w.ckpt", step_folder.parent, Path("/")):
        assert "itself" in error(target, "mindspore", "--overwrite")
    assert "not a file for torch" in error(tmp_path / "w.ckpt", "torch", "--overwrite")
    assert "not a file for mindspore" in error(tmp_path / "w.pt", "mindspore")


def test_endings_that_no_file_has(
    step_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, step_folder, tmp_path / "weights.xyz", "--to", "torch")
    assert "weights.xyz: not a file for torch; give a folder, or one of .pt, .pth, .safet" in line
    tiny = shipped_language()["glm4_tiny"]
    line = error_of(capsys, tiny, tmp_path / "weights.bin", "--to", "torch")
    assert "weights.bin: a language model is a folder; give a name without .bin" in line
    assert not list(tmp_path.glob("weights*"))
    convert(step_folder, tmp_path / "version-1.5", "torch")
    assert content(tmp_path / "version-1.5") == content(step_folder)


@pytest.mark.parametrize("name", ["pytorch", "MindSpore", "tensorflow"])
def test_unknown_frameworks(
    shipped_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    line = error_of(capsys, shipped_folder, tmp_path / "o", "--to", name)
    assert f"'{name}' is not one of 'mindspore', 'torch'" in line
    assert "--to" in error_of(capsys, shipped_folder, tmp_path / "o")


def test_convert_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        convert(tmp_path / "none", tmp_path / "o", "torch")


# Neither framework


def test_no_framework_is_needed(step_folder: Path, tmp_path: Path) -> None:
    """`python -m ckpt_convert` where torch and MindSpore cannot be imported."""
    script = """
import runpy, sys
sys.modules |= {"torch": None, "mindspore": None}
source, target, to = sys.argv[1:]
sys.argv = ["ckpt_convert", source, target, "--to", to]
runpy.run_module("ckpt_convert", run_name="__main__")
"""

    def call(source: Path, target: Path, to: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(source), str(target), to]
        return subprocess.run(command, capture_output=True, text=True)

    for source, target, to in (
        (step_folder, tmp_path / "ms", "mindspore"),
        (tmp_path / "ms", tmp_path / "back", "torch"),
    ):
        finished = call(source, target, to)
        assert finished.returncode == 0, finished.stderr
    assert "exp_avg_sq" in finished.stdout
    assert content(tmp_path / "back") == content(step_folder)
    finished = call(step_folder, tmp_path / "w.pt", "torch")
    assert finished.returncode == 2
    assert "needs torch, which is absent" in finished.stderr
    assert not (tmp_path / "w.pt").exists()
