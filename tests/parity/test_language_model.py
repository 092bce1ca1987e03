"""The search asks MindSpore for what torch answers: scores with and without a past, rankings."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from common import backend
from common.checkpoint import load_checkpoint, shipped_language
from common.cli import app
from common.composition import parse_formula
from common.errors import UserError
from common.language.model import LanguageModel, rank_questions, write_answers
from common.language.prompt import Question
from common.ranking import load_ranker
from ms_impl.language_model import load_language_model as load_mindspore
from torch_impl.language_model import load_language_model as load_torch

SHIPPED = shipped_language()
ADAPTER, BASE = SHIPPED["glm4_tiny_fm"], SHIPPED["glm4_tiny"]
LOADERS = (load_torch, load_mindspore)
#: Of logits that lie within about ten of zero.
LIMIT = 1e-4
QUESTIONS = [
    Question.ask(dict(parse_formula(formula).counts), {"formation_energy": -2.0})
    for formula in ("NaCl", "SrTiO3")
]


@pytest.fixture(scope="module")
def models() -> list[LanguageModel]:
    """torch's and MindSpore's."""
    return [load(ADAPTER, base=BASE) for load in LOADERS]


def logits(
    model: LanguageModel, sequences: list[list[int]], handles: list[Any]
) -> tuple[np.ndarray, list[Any]]:
    found, pasts = model(sequences, handles)
    assert np.abs(found).max() > 1
    return np.asarray(found), list(pasts)


def test_loaded_alike(models: list[LanguageModel]) -> None:
    first, second = models
    assert first.name == second.name
    assert first.analogues == second.analogues == 6
    assert first.tokenizer.files() == second.tokenizer.files()


def test_scores(models: list[LanguageModel]) -> None:
    """Sequences of different lengths; then more of them, with what was kept and without."""
    ids = [models[0].tokenizer.question_ids(question) for question in QUESTIONS]
    assert len(ids[0]) != len(ids[1])
    longer = [[*ids[0], 40, 41], [*ids[1], 50], [*ids[1], 60, 61, 62, 63, 64, 65]]
    results = []
    for model in models:
        short, pasts = logits(model, ids, [None, None])
        after, kept = logits(model, longer, [pasts[0], pasts[1], pasts[1]])
        further, _ = logits(model, [[*longer[2], 70]], [kept[2]])
        whole, _ = logits(model, [*longer, [*longer[2], 70]], [None] * 4)
        assert np.abs(np.concatenate([after, further]) - whole).max() < LIMIT
        results.append([short, after, further])
    for ours, theirs in zip(*results, strict=True):
        assert np.abs(ours - theirs).max() < LIMIT
    assert np.abs(results[0][0][0] - results[0][0][1]).max() > 1


def test_rankings_and_answers(models: list[LanguageModel]) -> None:
    first, second = (rank_questions(model, QUESTIONS, top=10, known=True) for model in models)
    for ours, theirs in zip(first, second, strict=True):
        assert [(c.space_group, c.sites) for c in ours.candidates] == [
            (c.space_group, c.sites) for c in theirs.candidates
        ]
        assert [c.probability for c in ours.candidates] == pytest.approx(
            [c.probability for c in theirs.candidates], rel=1e-3
        )
    assert write_answers(models[0], QUESTIONS) == write_answers(models[1], QUESTIONS)


def test_mindspore_alone_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available_backends", lambda: ["mindspore"])
    ranker = load_ranker(["formation_energy"], "glm4")
    assert type(ranker.model).__module__ == "ms_impl.language_model"
    assert not ranker.note


@pytest.mark.parametrize("load", LOADERS, ids=["torch", "mindspore"])
def test_repositories_of_the_hub(
    load: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the adapter's folder and of its base's."""
    held = {"some/adapter": ADAPTER, "some/base": BASE}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(held[name]))
    found = load("some/adapter@v1", base=Path("some/base@v1"))
    assert found.name == load_checkpoint(ADAPTER).hash


def foreign(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The shipped base as a folder of transformers, whose config.json is another one."""
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder)
    config = json.loads((BASE / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_what_a_folder_does_not_say_is_as_usual(name: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path, lambda config: config.pop(name))
    first, second = (load(folder) for load in LOADERS)
    ids = [first.tokenizer.question_ids(QUESTIONS[0])]
    ours, theirs = (logits(model, ids, [None])[0] for model in (first, second))
    assert np.abs(ours - theirs).max() < LIMIT


def test_a_folder_is_named_by_its_weights(tmp_path: Path) -> None:
    """Alike by both, wherever it is; other weights in a folder of its name are others."""
    places = [tmp_path / "a" / "model", tmp_path / "b", tmp_path / "c" / "model"]
    for place in places:
        place.mkdir(parents=True)
        foreign(place, lambda config: None)
    weights = load_file(places[2] / "model.safetensors")
    larger = {name: np.float32(1.01) * array for name, array in weights.items()}
    save_file(larger, places[2] / "model.safetensors")
    names = [[load(place).name for load in LOADERS] for place in places]
    same, other = names[0][0], names[2][0]
    assert names == [[same] * 2, [same] * 2, [other] * 2]
    assert same != other
    assert re.fullmatch("[0-9a-f]{12}", same)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "gelu"), ("rope_scaling", {"rope_type": "linear", "factor": 4.0})],
)
def test_other_networks_are_not_computed_as_if_they_were_glm4(
    name: str, value: object, tmp_path: Path
) -> None:
    folder = foreign(tmp_path, lambda config: config.update({name: value}))
    with pytest.raises(UserError, match=f"{name} is "):
        load_mindspore(folder)


@pytest.mark.parametrize("load", LOADERS, ids=["torch", "mindspore"])
@pytest.mark.parametrize(
    ("folder", "told"), [(Path("absent"), "absent"), (ADAPTER, "give its own base")]
)
def test_what_cannot_be_loaded(load: Callable[..., LanguageModel], folder: Path, told: str) -> None:
    """The adapter's base is asked for where another model is."""
    other = SHIPPED["glm4_tiny_bg"]
    with pytest.raises(UserError, match=told) as error:
        load(folder, base=other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", LOADERS, ids=["torch", "mindspore"])
def test_adapters_of_peft(load: Callable[..., LanguageModel], tmp_path: Path) -> None:
    """Are told from other folders, with the command that makes them models."""
    adapter = tmp_path / "adapter"
    shutil.copytree(ADAPTER, adapter)
    (adapter / "manifest.json").unlink()
    with pytest.raises(UserError, match="is an adapter: make") as error:
        load(adapter)
    command = str(error.value).split("'")[1]
    assert command.startswith("uni-mdm ")
    places = {"OUT": str(tmp_path / "model"), "GLM4": "glm4_tiny"}
    words = [places.get(word, word) for word in command.split()[1:]]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "model").analogues == load_checkpoint(BASE).config["train"]["analogues"]
