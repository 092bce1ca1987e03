"""`uni-mdm bench` as users run it."""

import json
from pathlib import Path

import pytest
import yaml

from common.backend import SampleRequest, backend_name
from common.checkpoint import load_checkpoint, shipped
from common.cli import run
from common.config import load_config
from common.data.store import write_records
from common.delivery import deliver
from common.speed import measure_steps_apart
from tests.training import alike_records, textbook_records, tiny_run
from torch_impl.generator import load


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
    alike = ("cell", "parameters", "edges", "flops_per_call", "calls")
    for name in (*alike, "flops_per_sample", "diffcsp_pp_flops", "saving"):
        assert networks["mindspore"][name] == networks["torch"][name]
    for speed in networks.values():
        assert speed["training"] > 0
        assert speed["sampling"] > 0
        for use in ("training", "sampling"):
            assert 0 < speed[f"{use}_share"] < 1  # of a peak by the same framework
    shown = capfd.readouterr().out
    ratio = networks["mindspore"]["sampling"] / networks["torch"]["sampling"]
    assert f"{ratio:.2f}" in next(line for line in shown.splitlines() if "sampling," in line)
    peak = next(line for line in shown.splitlines() if "GEMM peak" in line)
    saving = next(line for line in shown.splitlines() if "times as many" in line)
    for network in networks.values():
        assert f"{network['peak'] * 1e-9:,.1f}" in peak
        assert f"{network['saving']:,.1f}" in saving
    total = networks["torch"]["diffcsp_pp_flops"] * 1e-9
    assert f"= {total:,.0f} GFLOP" in " ".join(shown.split())


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_costs_of_steps_by_a_backend(backend: str, arguments: list[str]) -> None:
    """Two runs on the same rows, in a process of their own; the wider one computes more."""
    narrow = load_config(Path(arguments[0]))
    wide = load_config(Path(arguments[0]), ("model.width=32",))
    costs = measure_steps_apart(backend, [narrow, wide], 1, 1, "cpu")
    assert all(cost.seconds > 0 for cost in costs)
    assert costs[0].flops < costs[1].flops
    assert [cost.epoch for cost in costs] == [3, 3]  # twelve crystals, four in a batch


def test_a_backend_against_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for choice in (["--backend", "torch", "--against", "torch"], ["--against", backend_name()]):
        assert run(["bench", *arguments, *choice]) == 2
        assert "two different" in capsys.readouterr().err


def test_cost_against_size(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture, out = tmp_path / "size.png", tmp_path / "size.json"
    choice = ["--backend", "torch", "--by-size", str(picture), "--out", str(out)]
    assert run(["bench", *arguments, *choice]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(out.read_text())
    assert sorted({entry["atoms"] for entry in figures["sizes"]})[-2:] == [52, 200]
    exponent = figures["laws"]["seconds"]["exponent"]
    shown = capfd.readouterr().out
    said = " ".join(shown.split())
    assert "up to 52 atoms: 4,096 padded edges in a call at most" in said
    for entry in figures["sizes"][-3:]:
        assert f"200 atoms on {entry['tokens']} sites: {entry['seconds']:.2f} s" in said
    first = next(line for line in shown.split("ms per crystal")[1:])
    assert f"{exponent:.2f}" in " ".join(first.split())


def test_cost_against_size_is_of_one_network(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in (["--sizes", "1"], ["--against", "torch"]):
        assert run(["bench", *arguments, "--by-size", str(tmp_path / "x.png"), *other]) == 2
        assert "--by-size" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_how_long_a_checkpoint_takes(
    backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a shipped model: its own calls, precedents found, the times adding up."""
    rows, out = tmp_path / "rows.parquet", tmp_path / "figures.json"
    write_records(textbook_records()[:8], rows)
    choice = ["--checkpoint", "crystal_dit_small_fm", "--data", str(rows), "--backend", backend]
    assert run(["bench", *choice, "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    config = load_checkpoint(shipped()["crystal_dit_small_fm"]).config
    assert figures["calls"] == config["diffusion"]["steps"]
    assert figures["crystals"] == 8
    parts = ("loading", "precedents", "network", "other")
    assert min(figures[name] for name in parts) > 0
    assert figures["seconds"] == pytest.approx(sum(figures[name] for name in parts))
    assert figures["saving"] == figures["diffcsp_pp_flops"] / figures["flops"] > 50
    assert figures["share"] > 0
    assert figures["hash"] == load_checkpoint(shipped()["crystal_dit_small_fm"]).hash
    shown = capfd.readouterr().out
    assert f"{figures['flops'] * 1e-9:.3f}" in shown
    assert f"{figures['crystals'] / figures['seconds']:,.1f}" in shown
    assert "nothing warmed up" in " ".join(shown.split())


def test_fewer_calls_of_a_checkpoint(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.parquet", tmp_path / "figures.json"
    write_records(textbook_records()[:8], rows)
    choice = ["--checkpoint", "crystal_dit_small_fm", "--data", str(rows), "--device", "cpu"]
    assert run(["bench", *choice, "--limit", "8", "--calls", "2", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert (figures["calls"], figures["crystals"]) == (2, 8)


def test_more_crystals_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.parquet"
    write_records(textbook_records()[:8], rows)
    choice = ["--checkpoint", "crystal_dit_small_fm", "--data", str(rows), "--limit", "9"]
    assert run(["bench", *choice]) == 2
    assert "8 usable rows: give --limit 8 or less" in capsys.readouterr().err


def test_delivery_is_what_the_sampler_gives() -> None:
    """The crystals are those of the checkpoint, and precedents are looked for in it."""
    records = textbook_records()[:6]
    folder = shipped()["crystal_dit_small_fm"]
    times, crystals = deliver(lambda: load(folder, "cpu"), records, 1e9)
    requests = [
        SampleRequest(
            record.crystal.space_group,
            tuple((site.atomic_number, site.letter) for site in record.crystal.sites),
            {n: v for n, v in record.properties.items() if n == "formation_energy" and v},
            key=record.material_id,
        )
        for record in records
    ]
    expected = load(folder, "cpu").sample(requests, 0)
    assert [c.to_dict() for c in crystals] == [c.to_dict() for c in expected]
    assert times.precedents > 0


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", "crystal_dit_small_fm", "--sizes", "2"], "--checkpoint goes without"),
        (["--device", "cpu"], "--device goes with --checkpoint"),
        (["--checkpoint", "crystal_dit_small_fm", "--data", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_wrong_choices_of_a_checkpoint(
    choice: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *choice]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
