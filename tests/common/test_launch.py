"""What a launcher asks beforehand."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import typer

from common import launch
from common.checkpoint import save_step, shipped_language
from common.commands import train
from common.config import AnyRunConfig, RunConfig
from common.errors import UserError
from common.language.config import GlmConfig, LanguageRunConfig
from common.language.tokenizer import compact_tokenizer
from tests.training import tiny_run

LANGUAGE = LanguageRunConfig(name="example", kind="language")


@pytest.mark.parametrize(
    ("run", "backend", "told"),
    [
        (LANGUAGE, "mindspore", ["mindformers"]),
        (LANGUAGE, "torch", ["peft"]),
        (RunConfig(name="example"), "mindspore", []),
        (RunConfig(name="example"), "torch", ["tensorboard"]),
    ],
)
def test_packages_of_language_models(
    monkeypatch: pytest.MonkeyPatch, run: AnyRunConfig, backend: str, told: list[str]
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None if name in told else find_spec(name))
    lines = train.absent_packages(run, backend)
    assert [line.split("'")[1] for line in lines] == told


def test_absent_packages_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "peft" else object())
    config = tmp_path / "run.yaml"
    data = f"{{data: {config}, validation: {config}}}"  # which is only looked for
    config.write_text(f"name: example\nkind: language\ntrain: {data}\n")
    with pytest.raises(typer.Exit):
        launch.main(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: package 'peft' is not installed")


def test_settings_that_cannot_be_read_without_a_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def parse(*_: object) -> None:
        raise ModuleNotFoundError(name="tokenizers")

    monkeypatch.setattr(launch, "parse_run", parse)
    config = tmp_path / "run.yaml"
    config.write_text("kind: language")
    with pytest.raises(typer.Exit):
        launch.main(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: package 'tokenizers' is not installed")


def refused(capsys: pytest.CaptureFixture[str], config: Path, out: Path) -> str:
    with pytest.raises(typer.Exit):
        launch.main(config, out=out)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_processes_would_refuse_is_told_before(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With what the scripts have: no --fresh."""
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    absent = tmp_path / "absent.parquet"
    run = tiny_run(config)
    config.write_text(run.model_dump_json())
    launch.main(config, out=out)
    assert capsys.readouterr().out == f"{out}\n"
    settings = run.model_dump(mode="json")
    tensors = {"w": np.ones(1, np.float32)}
    save_step(out, 1, config=settings, model=tensors, optimizer=tensors, state={"step": 1})
    launch.main(config, out=out)
    capsys.readouterr()
    config.write_text(tiny_run(config, seed=7).model_dump_json())
    line = refused(capsys, config, out)
    assert line == f"error: the run in {out} has other train.seed: give another --out"
    config.write_text(tiny_run(absent).model_dump_json())
    assert refused(capsys, config, out).startswith(f"error: no data set at {absent}: give a CSV")


def test_absent_weights_are_told_before_processes_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And so is a folder of transformers that lacks a part."""
    base, config = tmp_path / "base", tmp_path / "run.yaml"

    def told() -> str:
        with pytest.raises(typer.Exit):
            launch.main(config)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    train = f"train: {{data: {config}, validation: {config}, init_from: {base}}}"
    config.write_text(f"name: example\nkind: language\nlora: {{}}\n{train}\n")
    assert f"{base} does not exist" in told()
    shipped = shipped_language()["glm4_tiny"]
    shutil.copytree(shipped, base)
    assert "has another network: model.width 192, not 256" in told()
    (base / "manifest.json").unlink()
    assert "hidden_size is 192, but model.width 256" in told()
    text = (base / "config.json").read_text()
    sizes = GlmConfig().to_huggingface(compact_tokenizer())
    (base / "config.json").write_text(json.dumps(json.loads(text) | sizes))
    launch.main(config)
    (base / "model.safetensors").unlink()
    assert f"no weights in {base}" in told()


def test_adapters_to_start_from_are_told_what_to_make_of_them(tmp_path: Path) -> None:
    """Those of peft, and this project's with their manifest."""
    own = shipped_language()["glm4_tiny_bg"]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(own / name, bare)
    for folder in (own, bare):
        data = {"name": "x", "kind": "language", "train": {"init_from": str(folder)}}
        with pytest.raises(UserError, match="is an adapter: make a model of it") as error:
            train.check_start(LanguageRunConfig.model_validate(data))
        assert f"uni-mdm convert {folder} OUT" in str(error.value)
