"""Runs in the words of MindFormers' YAML: the shipped files, and what users get wrong."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.commands.train import parse_run
from common.config import read_settings
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.language.mindformers import sections
from common.language.tokenizer import SymmetryTokenizer
from tests.conftest import REPOSITORY

FILES = sorted((REPOSITORY / "configs" / "mindformers").glob("*.yaml"))
TINY = REPOSITORY / "configs" / "mindformers" / "glm4_tiny_bg.yaml"
Data = dict[str, Any]


def parsed(path: Path) -> LanguageRunConfig:
    run = parse_run(read_settings(path), str(path))
    assert isinstance(run, LanguageRunConfig)
    return run


def test_every_adapter_has_a_file() -> None:
    ours = {path.stem for path in (REPOSITORY / "configs").glob("glm4_*_[bf]?.yaml")}
    assert {path.stem for path in FILES} == ours >= {"glm4_9b_bg", "glm4_9b_fm", "glm4_tiny_bg"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_is_the_same_run(path: Path) -> None:
    """As the file of that name in configs/, but for what only MindFormers has."""
    run, ours = parsed(path), parsed(path.parents[1] / path.name)
    assert run.mindformers.keys() >= {"context", "parallel", "parallel_config"}
    assert run.model_copy(update={"mindformers": {}}) == ours
    kept = yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json")))
    assert parse_run(kept, "checkpoint") == run


def test_shipped_file_has_this_tokenizer(compact: SymmetryTokenizer) -> None:
    run = parsed(TINY)
    network = run.model.to_huggingface(compact)
    assert sections(run, network) == yaml.safe_load(TINY.read_text())


def test_shipped_file_has_glm4s_tokenizer(glm4: SymmetryTokenizer) -> None:
    network = read_settings(TINY.with_name("glm4_9b_bg.yaml"))["model"]["model_config"]
    assert network["padded_vocab_size"] == glm4.head_size
    assert network["pad_token_id"] == glm4.pad_id
    assert glm4.end_id in network["eos_token_id"]


def changed(change: Callable[[Data], object]) -> str:
    """The one line that a user gets."""
    data = deepcopy(read_settings(TINY))
    change(data)
    with pytest.raises(UserError) as caught:
        parse_run(data, "x.yaml")
    message = str(caught.value)
    assert message.startswith("x.yaml: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["runner_config"].update(epochs=3), "runner_config.epochs is 3, but only 1"),
        (lambda d: d["optimizer"].update(betas=[0.9, 0.999]), "optimizer.betas"),
        (lambda d: d["optimizer"].update(swap=True), "optimizer.swap would not be heeded"),
        (lambda d: d["model"]["model_config"].update(qkv_concat=True), "qkv_concat is True"),
        (lambda d: d["model"]["model_config"].pop("use_past"), "use_past is missing"),
        (lambda d: d["model"]["model_config"].update(kv_channels=7), "kv_channels is 7"),
        (lambda d: d["model"]["model_config"].pop("num_layers"), "'num_layers' is missing"),
        (lambda d: d["lr_schedule"].update(learning_rate=0.0), "not as in configs/mindformers"),
        (lambda d: d["lr_schedule"].update(type="CosineWithWarmUpLR"), "only WarmUpCosineLR"),
        (lambda d: d.update(optimizer=[]), "not as in configs/mindformers"),
        (lambda d: d["uni_mdm"].update(questions=["colour"]), "train.questions"),
        (lambda d: d["uni_mdm"].update(colour=1), "train.colour"),
        (lambda d: d["uni_mdm"].pop("ema"), "uni_mdm.ema"),
    ],
)
def test_wrong_settings(change: Callable[[Data], object], told: str) -> None:
    assert told in changed(change)


def test_dropout_is_hidden_dropout(compact: SymmetryTokenizer) -> None:
    data = read_settings(TINY, ("model.model_config.hidden_dropout=0.25",))
    data["uni_mdm"]["analogue_dropout"] = 0.5
    run = parse_run(data, "x.yaml")
    assert isinstance(run, LanguageRunConfig)
    assert (run.train.dropout, run.train.analogue_dropout) == (0.25, 0.5)
    assert sections(run, run.model.to_huggingface(compact)) == data


def test_others_reach_mindformers() -> None:
    data = read_settings(TINY, ("context.max_device_memory=58GB", "profile=true"))
    run = parse_run(data, "x.yaml")
    assert isinstance(run, LanguageRunConfig)
    assert run.mindformers["context"]["max_device_memory"] == "58GB"
    assert run.mindformers["profile"] is True
