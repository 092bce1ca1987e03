"""Settings of language models: the shipped files, and what users get wrong."""

from pathlib import Path

import pytest
from transformers import GlmConfig as HuggingFaceConfig

from common.checkpoint import shipped_language
from common.commands.train import check_start, parse_run
from common.config import read_settings
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.language.tokenizer import SymmetryTokenizer
from common.training import start_folder
from tests.conftest import REPOSITORY

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("glm4_*.yaml"))


def test_there_are_shipped_files() -> None:
    assert "glm4_tiny" in {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_file(path: Path, compact: SymmetryTokenizer) -> None:
    """Is read, and says of GLM-4 what transformers says where sizes do not matter."""
    run = parse_run(read_settings(path), str(path))
    assert isinstance(run, LanguageRunConfig)
    assert run.name == path.stem
    own, usual = run.model.to_huggingface(compact), HuggingFaceConfig().to_dict()
    same = ("partial_rotary_factor", "rope_theta", "hidden_act", "attention_bias", "rms_norm_eps")
    for name in (*same, "tie_word_embeddings", "attention_dropout", "initializer_range"):
        assert own[name] == usual[name], name
    assert own.keys() - usual.keys() <= {"torch_dtype"}


@pytest.mark.parametrize("folder", ["configs", "configs/mindformers"])
@pytest.mark.parametrize("stem", ["glm4_tiny_bg", "glm4_tiny_fm"])
def test_shipped_adapters_find_their_base_from_anywhere(
    folder: str, stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = REPOSITORY / folder / f"{stem}.yaml"
    monkeypatch.chdir(tmp_path)
    run = parse_run(read_settings(path), str(path))
    check_start(run)
    assert start_folder(run) == shipped_language()["glm4_tiny"]


@pytest.mark.parametrize(
    ("section", "setting", "told"),
    [
        ("model", {"width": 100}, "4 * heads"),
        ("model", {"groups": 3}, "groups"),
        ("train", {"questions": ["colour"]}, "questions"),
        ("train", {"rehearsals": 2}, "give analogues"),
        ("train", {"analogue_dropout": 0.2}, "give analogues"),
        ("train", {"analogues": 6, "analogue_dropout": 1.1}, "train.analogue_dropout"),
        ("train", {"dropout": 1.0}, "train.dropout"),
        ("train", {"batch_size": 4}, "train.batch_size"),
        ("mindformers", {"optimizer": {"type": "SGD"}}, "mindformers.optimizer: other settings"),
    ],
)
def test_wrong_settings(section: str, setting: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told.replace("*", r"\*")):
        parse_run({"name": "x", "kind": "language", section: setting}, "x.yaml")


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="kind"):
        parse_run({"name": "x", "kind": "poem"}, "x.yaml")
