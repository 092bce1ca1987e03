"""`uni-mdm bench` as users run it."""

import json
from pathlib import Path

import pytest
import yaml

from common.cli import run
from common.data.store import write_records
from tests.training import alike_records, tiny_run


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A tiny network, and crystals of one size."""
    rows, config = tmp_path / "rows.parquet", tmp_path / "config.yaml"
    write_records(alike_records(), rows)
    config.write_text(yaml.safe_dump(tiny_run(rows).model_dump(mode="json")))
    return [str(config), "--data", str(rows), "--calls", "1", "--threads", "1"]


def test_two_backends_on_the_same_shapes(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    choice = ["--backend", "mindspore", "--against", "torch", "--sizes", "1", "--out", str(out)]
    assert run(["bench", *arguments, *choice]) == 0
    networks = json.loads(out.read_text())["networks"]
    assert list(networks) == ["mindspore", "torch"]
    for name in ("cell", "parameters", "edges", "flops_per_call", "calls"):
        assert networks["mindspore"][name] == networks["torch"][name]
    for speed in networks.values():
        assert speed["training"] > 0
        assert speed["sampling"] > 0
    shown = capfd.readouterr().out
    ratio = networks["mindspore"]["sampling"] / networks["torch"]["sampling"]
    assert f"{ratio:.2f}" in next(line for line in shown.splitlines() if "sampling," in line)


def test_a_backend_against_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments, "--backend", "torch", "--against", "torch"]) == 2
    assert "two different" in capsys.readouterr().err
