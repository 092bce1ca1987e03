"""Runs in the words of MindFormers' YAML: the shipped files, and what users get wrong."""

import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.checkpoint import shipped_language
from common.commands.train import check_start, parse_run, saved_run
from common.config import read_settings
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.language.mindformers import SAID_AT, sections
from common.language.mindformers_sections import USUAL, passed_on
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
    assert run.model_copy(update={"mindformers": {}, "network": {}}) == ours
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
        (lambda d: d["parallel"].update(parallel_mode=1), "parallel_mode is 1, but only 0"),
        (lambda d: d["parallel"].pop("parallel_mode"), "parallel.parallel_mode is missing"),
        (lambda d: d["parallel_config"].update(model_parallel=2), "model_parallel is 2, but only"),
        (lambda d: d["parallel_config"].update(pipeline_stage=2), "pipeline_stage is 2, but only"),
        (lambda d: d["parallel_config"].update(context_parallel=2), "would not be heeded"),
        (lambda d: d["context"].update(device_id=1), "context.device_id would not be heeded"),
        (lambda d: d["context"].update(mode=1), "context.mode is 1, but only 0"),
        (lambda d: d.update(resume_training=True), "resume_training is True, but only False"),
        (lambda d: d.update(auto_trans_ckpt=True), "auto_trans_ckpt is True, but only False"),
        (lambda d: d.update(only_save_strategy=True), "only_save_strategy is True, but only"),
        (lambda d: d.update(output_dir="x"), "output_dir would not be heeded: leave it out"),
        (lambda d: d.update(use_parallel=True), "use_parallel would not be heeded"),
        (lambda d: d.update(micro_batch_interleave_num=2), "interleave_num is 2, but only 1"),
    ],
)
def test_wrong_settings(change: Callable[[Data], object], told: str) -> None:
    assert told in changed(change)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("name=x", "name: unknown in MindFormers' words; here it is trainer.model_name"),
        ("train.steps=3", "train.steps: unknown in MindFormers' words; here it is lr_schedule.tot"),
        ("train.final_rate=0", "here it is lr_schedule.lr_end"),
        ("train.log_every=3", "here it is per_print_times of MFLossMonitor in callbacks"),
        ("train.ema=0.5", "here it is uni_mdm.ema"),
        ("lora.rank=2", "here it is model.model_config.pet_config.lora_rank"),
        ("model.layers=2", "here it is model.model_config.num_layers"),
        ("mindformers.profile=true", "here it is profile"),
        ("paralel_config.model_parallel=2", "did you mean parallel_config.model_parallel?"),
        ("colour=1", "colour: unknown in MindFormers' words"),
    ],
)
def test_words_that_are_not_mindformers(setting: str, told: str) -> None:
    """Such as our own, which a user gives to the launch scripts."""
    with pytest.raises(UserError) as caught:
        parse_run(read_settings(TINY, (setting,)), "x.yaml")
    assert told in str(caught.value)


def test_every_word_of_ours_has_a_place() -> None:
    """And what is said to be there is read from there."""
    run = parsed(TINY).model_dump()
    ours = {f"{part}.{name}" for part in ("model", "lora", "train") for name in run[part]}
    data = read_settings(TINY)
    assert SAID_AT.keys() == ours | {"name"}
    callbacks = {item["type"]: item for item in data["callbacks"]}
    for place in SAID_AT.values():
        found: Any = data | {"callbacks": callbacks}
        for key in place.split("."):
            found = found[key]


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("rope_ratio=500.0", "rope_ratio is 500.0, but 1.0 in "),
        ("padded_vocab_size=4096", "padded_vocab_size is 4096, but 1088 in "),
        ("eos_token_id=5", "eos_token_id is 5, but 4 in "),
        ("pad_token_id=7", "pad_token_id is 7, but 0 in "),
        ("layernorm_epsilon=0.1", "layernorm_epsilon is 0.1, but 1.5625e-07 in "),
        ("attention_dropout=0.5", "attention_dropout is 0.5, but 0.0 in "),
    ],
)
def test_network_is_the_bases(foreign: bool, setting: str, told: str, tmp_path: Path) -> None:
    """A checkpoint of this project, or a folder of transformers with the same weights."""
    base = shipped_language()["glm4_tiny"]
    if foreign:
        base = shutil.copytree(base, tmp_path / "base")
        (base / "manifest.json").unlink()
    overrides = (f"load_checkpoint={base}", f"model.model_config.{setting}")
    check_start(parse_run(read_settings(TINY, overrides[:1]), "x.yaml"))
    run = parse_run(read_settings(TINY, overrides), "x.yaml")
    if "epsilon" in setting and not foreign:
        told = "model.norm_eps 1.5625e-07, not 0.1"
    with pytest.raises(UserError, match=re.escape(told)):
        check_start(run)


def test_network_of_no_weights_is_this_versions() -> None:
    words = ("load_checkpoint=''", "model.model_config.pet_config=null", "run_mode=train")
    data = read_settings(TINY, words)
    del data["model"]["model_config"]["pet_config"]
    check_start(parse_run(data, "x.yaml"))
    data["model"]["model_config"]["rope_ratio"] = 2.0
    with pytest.raises(UserError, match=r"rope_ratio is 2\.0, but 1\.0 in this version's network"):
        check_start(parse_run(data, "x.yaml"))


def test_dropout_is_hidden_dropout(compact: SymmetryTokenizer) -> None:
    data = read_settings(TINY, ("model.model_config.hidden_dropout=0.25",))
    data["uni_mdm"]["analogue_dropout"] = 0.5
    run = parse_run(data, "x.yaml")
    assert isinstance(run, LanguageRunConfig)
    assert (run.train.dropout, run.train.analogue_dropout) == (0.25, 0.5)
    assert sections(run, run.model.to_huggingface(compact)) == data


def test_others_reach_mindformers(compact: SymmetryTokenizer) -> None:
    data = read_settings(TINY, ("context.max_device_memory=58GB", "profile=true"))
    run = parse_run(data, "x.yaml")
    assert isinstance(run, LanguageRunConfig)
    found = sections(run, run.model.to_huggingface(compact))
    assert found["context"] == data["context"]
    assert found["context"]["max_device_memory"] == "58GB"
    assert found["profile"] is True


def test_others_in_our_words() -> None:
    """The rest of a section stays as usual."""
    usual = {"name": "x", "kind": "language"}
    given = {"context": {"max_device_memory": "58GB"}, "parallel": {"parallel_mode": 0}}
    run = LanguageRunConfig.model_validate(usual | {"mindformers": given})
    assert passed_on(run.mindformers) == {
        **USUAL,
        "context": {**USUAL["context"], "max_device_memory": "58GB"},
    }
    for wrong, told in (
        ({"parallel": {"parallel_mode": 1}}, "mindformers.parallel.parallel_mode is 1"),
        ({"parallel_config": {"model_parallel": 2}}, "parallel_config.model_parallel is 2"),
        ({"paralel": {}}, "mindformers.paralel would not be heeded"),
    ):
        with pytest.raises(UserError, match=told):
            parse_run(usual | {"mindformers": wrong}, "x.yaml")
    with pytest.raises(UserError, match=r"network\.rope: only attention_dropout, .* are compared"):
        parse_run(usual | {"network": {"rope": 1}}, "x.yaml")


def test_what_earlier_checkpoints_kept_is_left_out() -> None:
    """Their settings cannot be written anew."""
    usual = {"name": "x", "kind": "language"}
    former = {"output_dir": "o", "context": {"max_device_memory": "58GB", "device_id": 3}}
    run = saved_run(usual | {"mindformers": former}, "step_1")
    assert isinstance(run, LanguageRunConfig)
    assert passed_on(run.mindformers) == {
        **USUAL,
        "context": {**USUAL["context"], "max_device_memory": "58GB"},
    }
    kept = {"context": {"max_device_memory": "58GB"}}
    assert saved_run(usual | {"mindformers": kept}, "x").mindformers == kept
