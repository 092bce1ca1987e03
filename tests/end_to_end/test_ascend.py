"""What only a machine with Ascend NPUs can show; docs/ascend.md lists it with the commands."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from common.checkpoint import shipped_language
from common.config import read_settings
from common.data.store import write_records
from common.language.config import LanguageRunConfig
from common.machine import ascend_count
from tests.conftest import REPOSITORY
from tests.language import language_run
from tests.training import alike_records, textbook_records, tiny_run

DOCUMENT = REPOSITORY / "docs" / "ascend.md"
LAUNCHER = REPOSITORY / "scripts" / "run_ascend_distributed.sh"
#: bfloat16 rounds by 2^-9 relative; a loss is a mean of what a dozen such products gave.
BFLOAT16 = 12 * 2**-9
#: Sums in another order, in float32.
FLOAT32 = 1e-4


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of three steps on crystals of one bucket; JSON is YAML."""
    records = alike_records()
    write_records(records, tmp_path / "alike.parquet")
    run = tiny_run(
        tmp_path / "alike.parquet", {"layers": 1}, steps=3, batch_size=8, edge_budget=1024
    )
    path = tmp_path / "run.yaml"
    path.write_text(run.model_dump_json())
    return path


@pytest.fixture
def adapter_config(tmp_path: Path) -> Path:
    """Three steps of LoRA on the shipped GLM-4, each on all textbook crystals."""
    base = shipped_language()["glm4_tiny"]
    write_records(textbook_records(), tmp_path / "textbook.parquet")
    settings = {"steps": 3, "token_budget": 8192, "learning_rate": 1e-3}
    run = language_run(tmp_path / "textbook.parquet", init_from=str(base), **settings)
    network = {"model": read_settings(base / "config.yaml")["model"], "lora": {"rank": 4}}
    path = tmp_path / "adapter.yaml"
    path.write_text(LanguageRunConfig.model_validate(run.model_dump() | network).model_dump_json())
    return path


def trained(
    config: Path, device: str, *settings: str, backend: str = "mindspore"
) -> list[dict[str, float]]:
    """What one process logs."""
    out = config.parent / "-".join((backend, device, *settings))
    changes = [word for setting in settings for word in ("--set", setting)]
    options = ["--backend", backend, "--device", device, "--out", out, *changes]
    call([sys.executable, "-m", "common", "train", *options, config])
    return logged(out)


def trained_by(config: Path, npus: int) -> list[dict[str, float]]:
    """What processes on so many NPUs log."""
    out = config.parent / f"npus-{npus}"
    call(["bash", LAUNCHER, "--worker_num", npus, "--out", out, config])
    return logged(out)


def call(command: list[object]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def logged(out: Path) -> list[dict[str, float]]:
    """Losses, coordinates' and lattices' parts, and gradients' norms."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    names = ("loss", "coordinate", "lattice", "gradient_norm")
    return [{name: line[name] for name in names if name in line} for line in lines]


def check(found: list[dict[str, float]], expected: list[dict[str, float]], limit: float) -> None:
    assert len(found) == len(expected) == 4  # three steps and a validation
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=limit)


# On Ascend


@pytest.mark.ascend(npus=8)
def test_launcher_finds_nothing_missing(config: Path) -> None:
    options = ["--backend", "mindspore", "--device", "ascend", "--processes", 8]
    call([sys.executable, "-m", "common.launch", *options, config])


@pytest.mark.ascend(npus=1)
def test_float32_training_agrees_with_a_cpu(config: Path) -> None:
    check(trained(config, "ascend"), trained(config, "cpu"), FLOAT32)


@pytest.mark.ascend(npus=1)
def test_bfloat16_training_agrees_with_a_cpu(config: Path) -> None:
    found = trained(config, "ascend", "train.precision=bfloat16")
    check(found, trained(config, "cpu"), BFLOAT16)
    with pytest.raises(AssertionError):  # it was float32 all the same
        check(found, trained(config, "ascend"), 1e-6)


@pytest.mark.ascend(npus=2)
def test_two_npus_train_as_one(config: Path) -> None:
    check(trained_by(config, 2), trained(config, "ascend"), FLOAT32)


@pytest.mark.ascend(npus=8)
def test_eight_npus_train_as_one(config: Path) -> None:
    check(trained_by(config, 8), trained(config, "ascend"), FLOAT32)


SAMPLE = """
import json, sys
import numpy as np
from common.backend import SampleRequest, load_generator
from common.checkpoint import shipped

generator = load_generator(shipped()["crystal_dit_small_fm"], "mindspore", sys.argv[1])
cubic = SampleRequest(221, ((38, "a"), (22, "b"), (8, "c")), key="SrTiO3")
oblique = SampleRequest(62, ((38, "c"), (22, "b"), (8, "c"), (8, "d")), key="SrTiO3")
for crystal in generator.sample([cubic, oblique], seed=0):
    structure = crystal.to_structure()
    print(json.dumps([structure.lattice.abc, structure.frac_coords.tolist()]))
"""


def sampled(device: str) -> list[tuple[list[float], list[list[float]]]]:
    """Lengths (A) and fractional coordinates of two crystals."""
    lines = call([sys.executable, "-c", SAMPLE, device]).splitlines()
    return [json.loads(line) for line in lines if line.startswith("[[")]


@pytest.mark.ascend(npus=1)
def test_sampler_agrees_with_a_cpu() -> None:
    found, expected = sampled("ascend"), sampled("cpu")
    assert len(found) == len(expected) == 2
    for (lengths, coordinates), (other_lengths, others) in zip(found, expected, strict=True):
        assert lengths == pytest.approx(other_lengths, abs=1e-3)
        for mine, other in zip(coordinates, others, strict=True):
            apart = [(a - b + 0.5) % 1.0 - 0.5 for a, b in zip(mine, other, strict=True)]
            assert max(map(abs, apart)) < 1e-3


@pytest.mark.ascend(npus=1)
def test_lora_training_agrees_with_torch(adapter_config: Path) -> None:
    """Through MindFormers, whose attention has kernels for narrow numbers only."""
    found = trained(adapter_config, "ascend", "train.precision=bfloat16")
    check(found, trained(adapter_config, "cpu", backend="torch"), BFLOAT16)


RANKING = """
import json, sys
from common.backend import load_language_model
from common.checkpoint import shipped_language
from common.language.model import rank_questions
from common.language.prompt import Question
from ms_impl.device import use_device

backend, device = sys.argv[1:]
if backend == "mindspore":
    use_device(device)
folders = shipped_language()
model = load_language_model(folders["glm4_tiny_fm"], backend, folders["glm4_tiny"])
rows = ({11: 1, 17: 1}, {38: 1, 22: 1, 8: 3})
questions = [Question.ask(counts, {"formation_energy": -2.0}) for counts in rows]
logits, _ = model([model.tokenizer.question_ids(question) for question in questions], [None] * 2)
for own, ranking in zip(logits, rank_questions(model, questions, top=5, known=True)):
    first = ranking.candidates[0]
    print(json.dumps([own.tolist(), [first.space_group, first.sites, first.probability]]))
"""


def ranked(backend: str, device: str) -> list[tuple[list[float], list]]:
    """Logits behind two questions, and the likeliest symmetries with their probabilities."""
    lines = call([sys.executable, "-c", RANKING, backend, device]).splitlines()
    return [json.loads(line) for line in lines if line.startswith("[[")]


@pytest.mark.ascend(npus=1)
def test_language_model_agrees_with_torch() -> None:
    found, expected = ranked("mindspore", "ascend"), ranked("torch", "cpu")
    assert len(found) == len(expected) == 2
    for (logits, first), (others, other) in zip(found, expected, strict=True):
        assert logits == pytest.approx(others, abs=1e-3)  # they lie within about ten of zero
        assert first[:2] == other[:2]
        assert first[2] == pytest.approx(other[2], abs=1e-3)


# Here: nothing is skipped in silence


def marked(path: Path) -> list[str]:
    """Names by which pytest calls the tests of a file that need NPUs."""
    place = path.relative_to(REPOSITORY).as_posix()
    return [
        f"{place}::{node.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("mark.ascend" in ast.unparse(mark) for mark in node.decorator_list)
    ]


def listed() -> list[str]:
    """Names in the document's commands."""
    return re.findall(r"^\.venv/bin/python -m pytest (\S+)$", DOCUMENT.read_text(), re.MULTILINE)


def test_document_lists_what_needs_npus() -> None:
    files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    expected = [name for file in files for name in marked(file)]
    assert len(expected) == 8
    assert sorted(listed()) == sorted(expected)


def test_skipped_test_says_how_to_run_it() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "ascend", "-rs", Path(__file__)]
    if ascend_count():
        pytest.skip("there are NPUs, and nothing is skipped")
    output = call(command)
    assert f"{len(listed())} skipped" in output
    for name in listed():
        assert f"Ascend NPUs; there: .venv/bin/python -m pytest {name}\n" in output


# MindSpore Graph Learning


def test_graph_learning_is_neither_there_nor_needed() -> None:
    """The reason in the document, as far as it can stop being true here.

    Messages run over all pairs of tokens and atoms, [B,T,A], so nothing is scattered to nodes.
    """
    names = {(d.metadata["Name"] or "").lower().replace("_", "-") for d in distributions()}
    assert "mindspore" in names
    assert not [name for name in names if name.startswith("mindspore-gl")]
    pins = (REPOSITORY / "scripts" / "constraints.txt").read_text().lower()
    assert "\nmindspore==" in pins
    assert "mindspore-gl" not in pins.replace("_", "-")
    called = {
        node.attr
        for file in (REPOSITORY / "ms_impl").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert {"bmm", "gather"} <= called
    assert not [
        name for name in called if re.search("scatter|segment|index_add|mindspore_gl", name)
    ]
