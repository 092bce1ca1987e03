"""What a launcher asks beforehand."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from common import launch
from common.config import AnyRunConfig, RunConfig
from common.language.config import LanguageRunConfig

LANGUAGE = LanguageRunConfig(name="example", kind="language")


@pytest.mark.parametrize(
    ("run", "backend", "told"),
    [
        (LANGUAGE, "mindspore", ["mindformers"]),
        (LANGUAGE, "torch", ["peft"]),
        (RunConfig(name="example"), "mindspore", []),
        (RunConfig(name="example"), "torch", []),
    ],
)
def test_packages_of_language_models(
    monkeypatch: pytest.MonkeyPatch, run: AnyRunConfig, backend: str, told: list[str]
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name in told else find_spec(name))
    lines = launch.absent_packages(run, backend)
    assert [line.split("'")[1] for line in lines] == told


def test_absent_packages_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "peft" else object())
    config = tmp_path / "run.yaml"
    config.write_text("name: example\nkind: language\n")
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
