"""Folders of GLM-4 as transformers writes them: config.json, safetensors, a tokenizer.

Weights are read one by one, as float32, so that a model of any size needs the memory of its largest
tensor. Nothing that comes with them is run, and no pickle is read.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from common.checkpoint import (
    Checkpoint,
    as_torch,
    checkpoint_folder,
    is_checkpoint,
    latest,
    load_checkpoint,
    shipped_language,
)
from common.errors import UserError
from common.language.config import GlmConfig
from common.language.hub import weights_folder
from common.language.parameters import check_network, parameters

CONFIG = "config.json"
#: What follows the name that weights in one file would have, where they are in several.
INDEX_SUFFIX = ".index.json"
_WHOLE = "model.safetensors"
_HEADER = 8
_SAMPLE = 2**20
_TYPES: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
#: What transformers takes where config.json does not say.
_USUAL = {"rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0}
#: Our settings of a network, and what config.json calls them.
_SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "feed_forward": "intermediate_size",
}


def is_foreign(folder: Path) -> bool:
    """Whether a folder is one of transformers and none of this project."""
    return not is_checkpoint(folder) and (folder / CONFIG).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """An object from one of the files beside the weights.

    Raises:
        UserError: if it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error)[:120]}; give GLM-4's folder") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: a JSON object is expected")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Content of config.json, and what transformers takes where it does not say.

    Raises:
        UserError: if it cannot be read, is another network's than GLM-4's, or if the folder is an
            adapter's.
    """
    refuse_adapter(folder)
    path = folder / CONFIG
    config = read_json(path)
    if config.get("model_type") != "glm":
        raise UserError(f"{path}: model_type is not glm; give a folder of GLM-4")
    return _USUAL | config


def refuse_adapter(folder: Path) -> None:
    """Raises UserError if a folder holds an adapter and no network, and says what to do with it."""
    step = latest(folder) or folder
    if not (step / CONFIG).is_file() and (step / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is an adapter: make a model of it with 'uni-mdm convert {folder} OUT "
            "--to torch --base GLM4', GLM4 being its base, and give OUT"
        )


def base_of(adapter: Checkpoint, base: Path | None = None) -> tuple[Path, Checkpoint | None]:
    """What an adapter was trained on: its folder, and the checkpoint there if it is one of ours.

    Args:
        adapter: with its adapter_config.json.
        base: the folder or repository; by default what the adapter names.

    Raises:
        UserError: if it is another one, or cannot be read.
    """
    config = read_json(adapter.path / "adapter_config.json")
    named = base or str(config.get("base_model_name_or_path"))
    folder = weights_folder(checkpoint_folder(named, shipped_language()))
    saved = None if is_foreign(folder) else load_checkpoint(folder)
    place, known = (folder, None) if saved is None else (saved.path, saved.hash)
    check_base(adapter.path, config, place, known=known)
    return folder, saved


def check_base(
    adapter: Path,
    config: Mapping[str, Any],
    folder: Path,
    *,
    known: str | None = None,
    advice: str = "give its own base",
) -> None:
    """Makes sure that an adapter of this project was trained on these weights.

    Args:
        adapter: its folder, for the error.
        config: content of its adapter_config.json.
        folder: of the base, this project's or another tool's.
        known: 12 hex digits that name the base's weights, if they are known.
        advice: what to do with another one.

    Raises:
        UserError: if it was trained on others, or if there are none.
    """
    wanted = config.get("revision")
    if wanted != known and not (folder / "adapter_config.json").is_file():
        weights = FolderWeights(folder)  # earlier versions took the sample of every folder
        known = weights.sample if wanted == weights.sample else weights.name
    if wanted != known:
        raise UserError(
            f"adapter {adapter} belongs to weights {wanted}, but {folder} holds {known}: {advice}"
        )


def network_config(folder: Path, model: GlmConfig) -> dict[str, Any]:
    """Content of config.json, if it is the network that a run names.

    Raises:
        UserError: if it cannot be read, is not GLM-4's or of other sizes.
    """
    path = folder / CONFIG
    content = read_config(folder)
    check_network(content, str(path))
    for ours, theirs in _SIZES.items():
        if content[theirs] != getattr(model, ours):
            line = f"{path}: {theirs} is {content[theirs]}, but model.{ours} {getattr(model, ours)}"
            raise UserError(f"{line}: give the folder of the network that the run names")
    return content


def check_names(weights: Mapping[str, Any], network: Mapping[str, Any], folder: Path) -> None:
    """Makes sure that a folder's tensors are those of its network, by their names.

    Args:
        weights: the tensors by name.
        network: content of config.json.
        folder: theirs, for the error.

    Raises:
        UserError: if they are others, or have MindFormers' names.
    """
    table = list(parameters(network))
    wrong = sorted(weights.keys() ^ {parameter.torch for parameter in table})
    if not wrong:
        return
    if weights.keys() == {part for parameter in table for part in parameter.mindformers}:
        raise UserError(f"{folder} has MindFormers' names: {as_torch(folder)}")
    raise UserError(f"{folder}: weights do not belong to its network: {', '.join(wrong[:5])}")


def read_index(path: Path) -> dict[str, Any]:
    """Content of an index, whose ``weight_map`` names the file of every tensor.

    Raises:
        UserError: if it cannot be read, or names files outside of its folder.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = set(dict(content["weight_map"]).values())
        inside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no index of weights; download it again") from error
    if not inside:
        raise UserError(f"{path}: names files outside of its folder; download it again")
    return content


def check_index(path: Path, index: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Makes sure that files hold what their index says.

    Args:
        path: of the index, for the error.
        index: its content.
        found: names of the files that hold the tensors.

    Raises:
        UserError: if a tensor is missing, is more, or is elsewhere.
    """
    wrong = sorted(name for name, _ in found.items() ^ index["weight_map"].items())
    if wrong:
        raise UserError(f"{path}: its files differ from it, as in {wrong[0]}; download them again")


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class FolderWeights(Mapping[str, NDArray[np.float32]]):
    """A folder's tensors by name, read when they are asked for.

    Attributes:
        sample: 12 hex digits, of every file's size, header, and first and last MiB.

    Raises:
        UserError: if there is none, a file is damaged, or one that an index names is absent.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / f"{_WHOLE}{INDEX_SUFFIX}"
        index = None
        if (folder / _WHOLE).is_file():  # as transformers takes it
            files = [folder / _WHOLE]
        elif path.is_file():
            index = read_index(path)
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        else:
            files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"no weights in {folder}: {_WHOLE} or its parts are needed")
        absent = [file for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{absent[0]} is absent, but {path.name} names it; copy it again")
        self._entries: dict[str, _Entry] = {}
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                size = file.stat().st_size
                header = _read_header(stream, size, file)
                stream.seek(0)
                digest.update(f"{size} ".encode() + stream.read(_SAMPLE))
                stream.seek(max(0, size - _SAMPLE))
                digest.update(stream.read())
            self._entries |= header
        if index is not None:
            found = {name: entry.file.name for name, entry in self._entries.items()}
            check_index(path, index, found)
        self.sample = digest.hexdigest()[:12]
        self._files = files

    @cached_property
    def name(self) -> str:
        """12 hex digits that name the weights.

        Of a single file its SHA-256, as ``Checkpoint.hash``; so the same weights have the same
        name with a manifest and without. Of several files ``sample``, for all of it takes minutes.
        Earlier versions called a single file so as well.
        """
        if len(self._files) > 1:
            return self.sample
        with self._files[0].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        entry = self._entries[name]
        kind = np.dtype(_TYPES[entry.dtype])
        with entry.file.open("rb") as stream:
            stream.seek(entry.begin)
            raw = np.frombuffer(stream.read(entry.end - entry.begin), kind).reshape(entry.shape)
        if entry.dtype == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)


def _read_header(stream: BinaryIO, size: int, file: Path) -> dict[str, _Entry]:
    try:
        length = int.from_bytes(stream.read(_HEADER), "little")
        header = json.loads(stream.read(min(length, size)))
        header.pop("__metadata__", None)
        first = _HEADER + length
        entries = {
            name: _Entry(
                file, t["dtype"], tuple(t["shape"]), *(first + o for o in t["data_offsets"])
            )
            for name, t in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: no header of safetensors; copy it again") from error
    for name, entry in entries.items():
        if entry.dtype not in _TYPES:
            raise UserError(f"{file}: {name} is {entry.dtype}; known: {', '.join(_TYPES)}")
        width = np.dtype(_TYPES[entry.dtype]).itemsize
        if entry.end > size or entry.end - entry.begin != width * int(np.prod(entry.shape)):
            raise UserError(f"{file} is damaged: {name} is cut off; copy it again")
    return entries
