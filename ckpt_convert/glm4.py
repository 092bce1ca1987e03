"""GLM-4 between transformers' names and MindFormers', and what is done with its folders.

A folder holds ``config.json``, safetensors in one file or several, and whatever else belongs to the
model, which is copied. Both sides' folders have the same files, and each tensor stays in its file,
so that going there and back gives every byte again. Folders of this project, which have a manifest,
get one for what is written.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from ckpt_convert import lora
from ckpt_convert.formats import names_file
from ckpt_convert.mapping import Count, Framework, MisfitError, Report, check_counts
from ckpt_convert.stream import Shard, Stored, find_shards, index_text, join, write_shard
from common.checkpoint import (
    ADAPTER,
    MANIFEST,
    MINDFORMERS,
    MINDFORMERS_ADAPTER,
    NATIVE,
    Content,
    Layout,
    install,
    latest,
    provenance_of,
    sweep,
    verify,
)
from common.errors import UserError
from common.files import flush, flush_folder, refused, temporary_name
from common.language.adapters import check_adapter
from common.language.foreign import INDEX_SUFFIX, check_base
from common.language.parameters import Parameter, check_network, parameters

CONFIG = "config.json"
_LAYOUTS: dict[tuple[bool, Framework], Layout] = {
    (False, "torch"): NATIVE,
    (False, "mindspore"): MINDFORMERS,
    (True, "torch"): ADAPTER,
    (True, "mindspore"): MINDFORMERS_ADAPTER,
}
_ADVICE = "give a folder whose weights belong to its configuration"


@dataclass(frozen=True)
class Folder:
    """A language model's folder, or an adapter's, of which no tensor has been read.

    Attributes:
        path: itself.
        adapter: whether it holds what LoRA adds.
        config: content of config.json or adapter_config.json.
        shards: files of weights.
        index: content of theirs, if there are several.
        manifest: of a folder of this project.
    """

    path: Path
    adapter: bool
    config: dict[str, Any]
    shards: list[Shard]
    index: dict[str, Any] | None
    manifest: dict[str, Any] | None

    @property
    def others(self) -> dict[str, Path]:
        """Files that are neither weights nor speak of them, in the manifest's order."""
        own = {shard.name for shard in self.shards} | {f"{NATIVE.model}{INDEX_SUFFIX}", MANIFEST}
        names: Sequence[str] = sorted(path.name for path in self.path.iterdir() if path.is_file())
        if self.manifest is not None:
            names = list(self.manifest["files"])
        return {name: self.path / name for name in names if name not in own}


def is_language(source: Path) -> bool:
    """Whether a folder, or a run's latest step, has a configuration of transformers or peft."""
    folder = _step(source)
    return any((folder / name).is_file() for name in (CONFIG, lora.CONFIG))


def convert(
    source: Path,
    destination: Path,
    to: Framework,
    *,
    base: Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Converts the folder of a language model, or of an adapter.

    Args:
        source: the folder.
        destination: the folder to make.
        to: the framework whose names to write.
        base: of an adapter, which is worked into it: the result is a model.
        overwrite: whether to replace a folder with a manifest, of the same kind.

    Raises:
        MisfitError: if tensors do not fit; nothing is written then.
        UserError: if the source cannot be read, if it is an adapter of another base, or if the
            destination cannot be written or is there.
    """
    found = open_folder(source)
    origin = found if base is None else _open_base(found, base)
    kind = lora.CONFIG if origin.adapter else CONFIG
    _check_destination(destination, [found.path, origin.path], overwrite, kind)
    if origin.manifest is None and destination.is_dir() and any(destination.iterdir()):
        raise UserError(f"{destination}: only what has a {MANIFEST} takes its place; give another")
    if base is None:
        shards, counts = rename(found, to)
        report = Report(tuple(counts))
    else:
        shards, report = _merged(found, origin, to)
    files: dict[str, Content] = {}
    for name, path in origin.others.items():
        files[name] = partial(_copy, path)
    weights: dict[str, Content] = {s.name: partial(write_shard, shard=s) for s in shards}
    if origin.index is not None:
        weights[f"{NATIVE.model}{INDEX_SUFFIX}"] = index_text(origin.index, shards)
    _write(destination, origin, base is not None, to, files, weights)
    return replace(report, files=(*weights, *files))


def _open_base(adapter: Folder, base: Path) -> Folder:
    """The model that an adapter is worked into, which decides what the result's folder is."""
    if not adapter.adapter:
        raise UserError(f"{adapter.path}: is no adapter, and so needs no --base")
    found = open_folder(base)
    if found.adapter:
        raise UserError(f"{base}: is an adapter itself; give the model that it belongs to")
    return found


def _merged(adapter: Folder, base: Folder, to: Framework) -> tuple[list[Shard], Report]:
    """A base's files of weights with an adapter worked in, under the names of a framework."""
    additions, counts = rename(adapter, "torch")
    own, more = rename(base, "torch")
    notes = [f"{adapter.path} worked into {base.path}", *_check_base(adapter, base)]
    merged = lora.merge(adapter.path, adapter.config, additions, own)
    shards = rename_shards(merged, list(parameters(base.config)), to)
    return shards, Report((*counts, *more), tuple(notes))


def _check_base(adapter: Folder, base: Folder) -> list[str]:
    """Compares the weights that an adapter names with the base's, where both have a name.

    An adapter of peft's names none (its revision is the hub's, if any), and weights under
    MindFormers' names have another name than under those that the adapter was trained with.

    Returns:
        What to tell the user if they cannot be compared.

    Raises:
        UserError: if the adapter was trained on other weights.
    """
    if adapter.manifest is None:
        return []
    names = {name for shard in base.shards for name in shard.tensors}
    if not any(parameter.torch in names for parameter in parameters(base.config)):
        return [f"nobody knows whether {base.path}, under MindFormers' names, is its own base"]
    check_base(adapter.path, adapter.config, base.path)
    return []


def open_folder(source: Path) -> Folder:
    """Reads configuration and headers; a manifest is verified.

    Raises:
        UserError: if something is missing, damaged, or of another kind of network.
    """
    folder, manifest = _step(source), None
    adapter = (folder / lora.CONFIG).is_file()
    if (folder / MANIFEST).is_file():
        stated = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
        side: Framework = "mindspore" if "uni-mdm MindFormers" in stated else "torch"
        folder, manifest = verify(folder, _LAYOUTS[adapter, side])
    path = folder / (lora.CONFIG if adapter else CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error)[:120]}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON object is expected")
    if adapter:
        check_adapter(config, str(path))
    else:
        check_network(config, str(path))
    shards, index = find_shards(folder, "adapter_model" if adapter else "model")
    return Folder(folder, adapter, config, shards, index, manifest)


def rename(folder: Folder, to: Framework) -> tuple[list[Shard], list[Count]]:
    """A folder's files of weights under the names of a framework, and what was found in them.

    Raises:
        MisfitError: naming them, if tensors are missing, unknown or of another shape or type.
    """
    stored = {name: t for shard in folder.shards for name, t in shard.tensors.items()}
    config = folder.config
    table = lora.table(config, stored) if folder.adapter else list(parameters(config))
    counts = [_count(folder, stored, table)]
    try:
        check_counts(folder.path, counts, _ADVICE)
    except UserError as error:
        raise MisfitError(str(error), Report(tuple(counts))) from error
    return rename_shards(folder.shards, table, to), counts


def rename_shards(shards: list[Shard], table: list[Parameter], to: Framework) -> list[Shard]:
    """Files of weights, of which all fit, under the names of a framework."""
    stored = {name: t for shard in shards for name, t in shard.tensors.items()}
    of_torch = {p.torch: p for p in table}
    of_part = {part: p for p in table for part in p.mindformers}
    renamed = []
    for shard in shards:
        tensors: dict[str, Stored] = {}
        for name, tensor in shard.tensors.items():
            if (name in of_torch) == (to == "torch"):
                tensors[name] = tensor
            elif to == "mindspore":
                parts = of_torch[name].mindformers
                whole = len(parts) == 1
                split = [tensor] if whole else tensor.split(len(parts))
                tensors |= dict(zip(parts, split, strict=True))
            elif name == of_part[name].mindformers[0]:  # where the first is, all are joined
                parameter = of_part[name]
                tensors[parameter.torch] = join([stored[part] for part in parameter.mindformers])
        renamed.append(replace(shard, tensors=tensors))
    return renamed


def _count(folder: Folder, stored: Mapping[str, Stored], table: list[Parameter]) -> Count:
    """What became of a folder's tensors, which have the names of either side."""
    torch_side = {p.torch: p.shape for p in table}
    parts = {name: shape for p in table for name, shape in p.parts.items()}
    shapes = max((torch_side, parts), key=lambda side: len(side.keys() & stored.keys()))
    reshaped = [
        f"{name} {stored[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    for parameter in table:
        kinds = {stored[part].dtype for part in parameter.mindformers if part in stored}
        if len(kinds) > 1:
            reshaped.append(f"{parameter.mindformers[0]} {' and '.join(sorted(kinds))}")
    used = [stored[name] for name in shapes if name in stored]
    return Count(
        folder.path.name,
        "adapter" if folder.adapter else "network",
        len(used),
        sum(math.prod(tensor.shape) for tensor in used),
        tuple(sorted({tensor.dtype for tensor in used})),
        missing=tuple(name for name in shapes if name not in stored),
        unused=tuple(name for name in stored if name not in shapes),
        reshaped=tuple(reshaped),
    )


# Folders


def _step(source: Path) -> Path:
    """The latest step of a run's folder; any other is itself."""
    if not source.is_dir() or (source / MANIFEST).is_file():
        return source
    return latest(source) or source


def _check_destination(path: Path, sources: list[Path], overwrite: bool, kind: str) -> None:
    """Raises UserError if nothing can or may be written there.

    ``kind`` is a file that must be in what is replaced.
    """
    if names_file(path):
        raise UserError(f"{path}: a language model is a folder; give a name without {path.suffix}")
    real = path.resolve()
    for source in sources:
        given = source.resolve()
        if real == given or real in given.parents or given in real.parents:
            raise UserError(f"{path}: is, holds or lies in {source} itself; give another path")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{path} is already there; give another path, or --overwrite")
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: has no {MANIFEST}, and so is not replaced; give another path")
    if not (path / kind).is_file():
        raise UserError(f"{path}: has no {kind}, is of another kind, and stays; give another path")


def _copy(source: Path, destination: Path) -> None:
    shutil.copyfile(source, destination)


def _write(
    destination: Path,
    origin: Folder,
    merged: bool,
    to: Framework,
    files: dict[str, Content],
    weights: dict[str, Content],
) -> None:
    """Makes the folder, whole or not at all."""
    if origin.manifest is None:
        _install(destination, files | weights)
        return
    order = [name for name in origin.manifest["files"] if name in files or name in weights]
    provenance = provenance_of(origin.manifest)
    if merged:
        provenance["extra"] = {**provenance.get("extra", {}), "merged": True}
    layout = _LAYOUTS[origin.adapter, to]
    install(destination, {name: (files | weights)[name] for name in order}, provenance, layout)


def _install(folder: Path, files: Mapping[str, Content]) -> None:
    """Writes files into a temporary sibling folder, then puts it in place."""
    folder = Path(os.path.realpath(folder))
    temporary = folder.with_name(temporary_name(folder.name))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent, escape(folder.name))
        try:
            temporary.mkdir()
            for name, content in files.items():
                if isinstance(content, bytes):
                    (temporary / name).write_bytes(content)
                else:
                    content(temporary / name)
                flush(temporary / name)
            flush_folder(temporary)
            temporary.rename(folder)
            flush_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise refused(folder, error) from error
