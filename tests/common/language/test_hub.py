"""Repositories in place of folders: what is fetched of them, and what is refused beforehand."""

import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from requests import ConnectionError as NoConnection
from requests import Response

from common.errors import UserError
from common.language.hub import weights_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
}
OTHERS = {
    "pytorch_model.bin",
    "training_args.pt",
    "modeling_chatglm.py",
    "model.onnx",
    "README.md",
    "original/model.safetensors",
    "original/config.json",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A hub in place of the network; what it was asked for."""
    asked: list[tuple[str, str]] = []

    def fetch(
        name: str,
        *,
        revision: str,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        token: bool,
    ) -> str:
        asked.append((name, revision))
        assert token is False, "nobody's name is told"
        files = filter_repo_objects(
            WANTED | OTHERS, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in files:
            path = tmp_path / "cache" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("revision", [COMMIT, "v1.0"])
def test_weights_configuration_and_tokenizer_alone(
    hub: list[tuple[str, str]], revision: str
) -> None:
    folder = weights_folder(f"zai-org/glm-4-9b-hf@{revision}")
    assert hub == [("zai-org/glm-4-9b-hf", revision)]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == WANTED


def test_what_is_on_the_disk_is_a_folder(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    """Whatever its name; and so is what can be no repository, or is a mistyped path."""
    for name in ("zai-org/glm@v1", "models/glm"):
        Path(name).mkdir(parents=True)
        assert weights_folder(name) == Path(name)
    for name in ("absent", "a/b/c@v1", "/a/b@v1", str(tmp_path / "absent@v1"), "models/gml"):
        assert weights_folder(name) == Path(name)
    assert not hub


def refused(given: str) -> str:
    """The one line that a user gets."""
    with pytest.raises(UserError) as caught:
        weights_folder(given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_revision_is_demanded(hub: list[tuple[str, str]]) -> None:
    assert "with a commit or tag, as in zai-org/" in refused("zai-org/glm-4-9b-hf")
    for revision in ("", "main", "master", "HEAD", "refs/pr/1", "a b", "-x"):
        assert "give a commit or tag" in refused(f"zai-org/glm-4-9b-hf@{revision}")
    assert not hub


def answer() -> Response:
    response = Response()
    response.status_code = 404
    return response


@pytest.mark.parametrize(
    "error",
    [
        lambda: NoConnection("name or service\nnot known"),
        lambda: LocalEntryNotFoundError("no snapshot\nin the cache"),
        lambda: RepositoryNotFoundError("404\nnot found", response=answer()),
        lambda: PermissionError(13, "Permission denied"),
    ],
)
def test_nothing_fetched_is_one_line(
    error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(name: str, **_: object) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    told = refused("zai-org/glm-4-9b-hf@v1")
    assert told.startswith("cannot fetch zai-org/glm-4-9b-hf@v1 from Hugging Face's hub (")
    assert told.endswith("give a folder that holds these weights")


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, offline: what is not kept is refused, what is kept is found."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    name = f"zai-org/glm-4-9b-hf@{COMMIT}"
    assert "cannot fetch" in refused(name)
    kept = tmp_path / "models--zai-org--glm-4-9b-hf" / "snapshots" / COMMIT
    kept.mkdir(parents=True)
    assert weights_folder(name) == kept
    shutil.rmtree(kept)
    assert "cannot fetch" in refused(name)
