"""One checkpoint from one framework's files to the other's.

    source                                             destination
    a checkpoint or run folder of this project         a folder, in the layout of the framework
    a folder that this converter made for MindSpore    a file: the weights alone
    a file of weights, with config.yaml and, perhaps,
    optimizer.*, state.json and README.md beside it,
    and precedents.parquet there or beside config.yaml

The folder for torch is a checkpoint folder, which both backends load and train on from. The folder
for MindSpore has the same files, byte for byte, but ``.ckpt`` instead of safetensors. Going there
and back gives every file again, bit by bit, the manifest too.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_convert import crystal_dit, glm4
from ckpt_convert.formats import (
    FLOAT32,
    SUFFIXES,
    Tensor,
    names_file,
    read_tensors,
    write_tensors,
)
from ckpt_convert.mapping import Framework, Match, MisfitError, Report, match
from common.checkpoint import (
    CARD,
    COMPANIONS,
    CONFIG,
    MANIFEST,
    MINDSPORE,
    NATIVE,
    PRECEDENTS,
    STATE,
    Content,
    Layout,
    install,
    latest,
    make_provenance,
    provenance_of,
    read_manifest,
    verify,
)
from common.config import ModelConfig, RunConfig, load_config
from common.errors import UserError
from common.files import atomic_path

Notes = tuple[str, ...]

LAYOUTS: dict[Framework, Layout] = {"mindspore": MINDSPORE, "torch": NATIVE}
#: What a file that is written may be.
FILE_SUFFIXES: dict[Framework, tuple[str, ...]] = {
    "mindspore": (".ckpt", ".safetensors"),
    "torch": (".pt", ".pth", ".safetensors"),
}


@dataclass(frozen=True)
class Source:
    """Where a checkpoint's files lie.

    Attributes:
        place: the folder or the file that stands for all.
        model, optimizer: files of tensors.
        config: ``config.yaml``.
        others: files that are copied, by their names.
        provenance: what the manifest says of the origin, if there is one.
        order: of the files in the manifest; "model" and "optimizer" stand for theirs.
    """

    place: Path
    model: Path
    optimizer: Path | None
    config: Path
    others: dict[str, Path]
    provenance: dict[str, Any] | None = None
    order: tuple[str, ...] = (CONFIG, "model", CARD, "optimizer", STATE, PRECEDENTS)


def convert(
    source: Path,
    destination: Path,
    to: Framework,
    *,
    config: Path | None = None,
    base: Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Converts a checkpoint.

    A folder with transformers' or peft's configuration holds a language model's: see `glm4`.

    Args:
        source: see above.
        destination: a file if its suffix is one of `SUFFIXES`, else a folder.
        to: the framework whose files to write.
        config: ``config.yaml`` of a source that is a file, if it is not beside it.
        base: the language model that an adapter is to be worked into.
        overwrite: whether to replace a destination of the same kind.

    Raises:
        MisfitError: if tensors do not fit; nothing is written then.
        UserError: if the source cannot be read, or the destination cannot be written or is there.
    """
    if glm4.is_language(source):
        if config is not None:
            raise UserError(f"{source} has a configuration of its own; leave out --config")
        return glm4.convert(source, destination, to, base=base, overwrite=overwrite)
    if base is not None:
        raise UserError(f"{source}: no adapter of a language model; leave out --base")
    files = find_source(source, config)
    _check_destination(destination, to, files.place, overwrite)
    run = load_config(files.config)
    single = destination.suffix in SUFFIXES
    matches, notes = _read(files, run.model, single)
    report = Report(tuple(count for found in matches.values() for count in found.counts), notes)
    try:
        for found in matches.values():
            found.check()
            _check_numbers(found, to, single)
    except UserError as error:
        raise MisfitError(str(error), report) from error
    named = {role: found.named(to) for role, found in matches.items()}
    if not single:
        return replace(report, files=_write_folder(destination, to, files, run, named))
    with atomic_path(destination) as temporary:
        write_tensors(temporary, named["model"])
    return replace(report, files=(destination.name,))


# The source


def find_source(path: Path, config: Path | None = None) -> Source:
    """Where the files of a source lie; those with a manifest are verified.

    Raises:
        UserError: if some are missing, damaged, or more than one could be meant.
    """
    if path.is_file() and not _in_checkpoint(path):
        return _loose(path, config)
    folder = path.parent if path.is_file() else path
    if folder.is_dir() and not (folder / MANIFEST).is_file() and latest(folder) is None:
        return _loose(_only_model(folder), config)
    layout = _layout(folder)
    folder, manifest = verify(folder, layout)
    if config is not None:
        raise UserError(f"{path} has a {CONFIG} of its own; leave out --config")
    roles = {layout.model: "model", layout.optimizer: "optimizer"}
    names = tuple(manifest["files"])
    return Source(
        place=folder,
        model=folder / layout.model,
        optimizer=folder / layout.optimizer if layout.optimizer in names else None,
        config=folder / CONFIG,
        others={name: folder / name for name in (CARD, STATE, *COMPANIONS) if name in names},
        provenance=provenance_of(manifest),
        order=tuple(roles.get(name, name) for name in names),
    )


def _layout(folder: Path) -> Layout:
    """The layout that a folder's manifest names; it need not be right."""
    manifest = folder / MANIFEST
    stated = manifest.read_bytes() if manifest.is_file() else b""
    return MINDSPORE if MINDSPORE.format.encode() in stated else NATIVE


def _in_checkpoint(path: Path) -> bool:
    """Whether a file is the model of a checkpoint folder, which is meant then."""
    folder = path.parent
    return (folder / MANIFEST).is_file() and path.name == _layout(folder).model


def _only_model(folder: Path) -> Path:
    """The file of weights in a folder without a manifest."""
    found = [folder / f"model{suffix}" for suffix in SUFFIXES]
    found = [path for path in found if path.is_file()]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or f"neither {MANIFEST} nor a model file"
        raise UserError(f"{folder} holds {names}; give a checkpoint folder or one file")
    return found[0]


def _loose(path: Path, config: Path | None) -> Source:
    """A file of weights and what lies beside it."""
    if config is not None and not config.is_file():
        raise UserError(f"{config} does not exist; give --config the network's {CONFIG}")
    config = config or path.with_name(CONFIG)
    if not config.is_file():
        what = f"{path}: its network's {CONFIG} is neither given nor beside it"
        raise UserError(f"{what}; give --config")
    optimizer = path.with_name(f"optimizer{path.suffix}")
    others = {name: path.with_name(name) for name in (CARD, STATE, PRECEDENTS)}
    if not others[PRECEDENTS].is_file():
        others[PRECEDENTS] = config.with_name(PRECEDENTS)
    return Source(
        place=path,
        model=path,
        optimizer=optimizer if optimizer.is_file() and optimizer != path else None,
        config=config,
        others={name: other for name, other in others.items() if other.is_file()},
    )


def _read(source: Source, config: ModelConfig, single: bool) -> tuple[dict[str, Match], Notes]:
    """The source's tensors by role, "model" and "optimizer", and what to tell the user of them.

    A single file holds weights alone, and does not need the data set's statistics.
    """
    notes = []
    tensors = read_tensors(source.model)
    rows = crystal_dit.model_rows(config)
    if single and not crystal_dit.STANDARDIZER.keys() & tensors.keys():
        rows = tuple(row for row in rows if row.torch not in crystal_dit.STANDARDIZER)
        notes.append("without the data set's statistics, which a checkpoint folder needs")
    matches = {"model": match(source.model, tensors, rows)}
    if source.optimizer is not None and single:
        notes.append(f"{source.optimizer.name} stays behind: a file holds the weights alone")
    elif source.optimizer is not None:
        tensors, rows = read_tensors(source.optimizer), crystal_dit.optimizer_rows(config)
        matches["optimizer"] = match(source.optimizer, tensors, rows)
        if source.provenance is None:
            notes.append(f"no {MANIFEST}, so nobody knows the training rows: no run can go on")
    return matches, tuple(notes)


# The destination


def _check_destination(path: Path, to: Framework, source: Path, overwrite: bool) -> None:
    """Raises UserError if nothing can or may be written there."""
    suffixes = FILE_SUFFIXES[to]
    if names_file(path) and path.suffix not in suffixes:
        known = ", ".join(suffixes)
        raise UserError(f"{path}: not a file for {to}; give a folder, or one of {known}")
    real, given = path.resolve(), source.resolve()
    if real == given or real in given.parents or given in real.parents:
        raise UserError(f"{path}: is, holds or lies in {source} itself; give another path")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{path} is already there; give another path, or --overwrite")
    if path.suffix not in SUFFIXES:
        read_manifest(path, LAYOUTS[to])
        if glm4.is_language(path):
            raise UserError(f"{path}: holds a language model, which stays; give another path")


def _trained_on(source: Source) -> str:
    """The fingerprint of the training rows, where the configuration lies in a checkpoint folder."""
    folder = source.config.parent
    if not (folder / MANIFEST).is_file():
        return ""
    manifest = read_manifest(folder, _layout(folder))
    return str(manifest["training_fingerprint"])


def _check_numbers(found: Match, to: Framework, single: bool) -> None:
    """Raises UserError for numbers that the destination cannot hold."""
    path = found.path
    for name, tensor in found.named(to).items():
        if not tensor.dtype.floating:
            raise UserError(f"{path}: '{name}' holds {tensor.dtype.name}; weights are fractions")
        if single or to == "mindspore":
            continue
        if tensor.dtype != FLOAT32:
            advice = f"a checkpoint folder holds float32; give a {' or '.join(FILE_SUFFIXES[to])}"
            raise UserError(f"{path}: '{name}' is {tensor.dtype.name}; {advice} to keep it")
        if not np.isfinite(tensor.data.view("<f4")).all():
            raise UserError(f"{path}: '{name}' has NaN or infinite values; use another checkpoint")


def _write_folder(
    folder: Path,
    to: Framework,
    source: Source,
    run: RunConfig,
    named: dict[str, dict[str, Tensor]],
) -> tuple[str, ...]:
    """Writes a checkpoint folder; returns the names of its files."""
    layout = LAYOUTS[to]
    contents: dict[str, Content] = {CARD: f"# {run.name}\n".encode()}
    contents |= {name: path.read_bytes() for name, path in source.others.items()}
    contents[CONFIG] = source.config.read_bytes()
    for role, tensors in named.items():
        contents[role] = partial(write_tensors, tensors=tensors)
    names = {"model": layout.model, "optimizer": layout.optimizer}
    files = {names.get(key, key): contents[key] for key in source.order if key in contents}
    provenance = source.provenance
    if provenance is None:
        extra = {"converted_from": source.model.name}
        provenance = make_provenance(run.model_dump(mode="json"), _trained_on(source), extra)
    install(folder, files, provenance, layout)
    return (*files, MANIFEST)
