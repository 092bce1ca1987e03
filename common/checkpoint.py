"""Checkpoints: a folder that is either complete and verified, or reported.

    config.yaml            what was trained, a dumped config model
    model.safetensors      float32 tensors under torch's parameter names, for every framework
    optimizer.safetensors  only while training, with
    state.json             what resuming needs besides tensors (step, data position, ...)
    README.md              model card
    config.json, ...       companions: what other programs want beside the weights
    manifest.json          size and SHA-256 of each file above, its own digest, and the origin

Safetensors has no checksum of its own, hence the manifest; no pickle is ever read. A run folder
holds ``step_00001000/``, ... and the file ``latest``, which names one of them; when it has ended
also ``final/``.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as dump_safetensors

from common.errors import UserError
from common.files import (
    flush,
    flush_folder,
    refused,
    temporary_name,
    temporary_pattern,
    write_atomic,
)

FORMAT = "uni-mdm checkpoint"
FORMAT_VERSION = 1

CONFIG = "config.yaml"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
CARD = "README.md"
MANIFEST = "manifest.json"
LATEST = "latest"
#: A run's finished checkpoint.
FINAL = "final"
#: Training rows that the Crystal DiT starts from; see ``common.precedents``.
PRECEDENTS = "precedents.parquet"
#: Files that may lie beside ``model.safetensors``: that one, and what transformers and peft read.
COMPANIONS = frozenset(
    {
        PRECEDENTS,
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "adapter_config.json",
    }
)
_MP_20 = "v2:080a8998fb7571be64dced342c96249199a9f6b4bc71efc6bf7997de9cbc714f"
#: What earlier versions called MP-20's training rows, with and without AVX-512, and their name now.
_RENAMED = {
    "914230fd2ef49eb0b6d93702083851ecaed0eddfd765ae675bae87cd41f57102": _MP_20,
    "43267ef8110d2da3dab582fff07ffe3296c9907dd2cb02030a2f8cdeca5e0747": _MP_20,
}
#: Checkpoints that come with the project, a folder each.
SHIPPED = Path(__file__).resolve().parent / "assets" / "checkpoints"
SHIPPED_LANGUAGE = SHIPPED.parent / "language"

_STEP = re.compile(r"step_(\d{8,})")
#: What is no path to somewhere else, nor a repository with its revision.
_NAME = re.compile(r"[^/@]+")
#: Packages whose versions decide what a checkpoint does.
_VERSIONED = ("numpy", "safetensors", "pymatgen", "spglib", "moyopy", "torch", "mindspore")

Tensors = Mapping[str, NDArray[Any]]
#: What goes into a file, or what writes the file of that path.
Content = bytes | Callable[[Path], None]


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint folder: what its manifest calls it, and its files of tensors."""

    format: str = FORMAT
    model: str = MODEL
    optimizer: str = OPTIMIZER


NATIVE = Layout()
#: What LoRA adds to a network, under the names of peft's files.
ADAPTER = Layout("uni-mdm adapter", "adapter_model.safetensors")
_LAYOUTS = {layout.format: layout for layout in (NATIVE, ADAPTER)}
#: What `uni-mdm convert --to mindspore` makes of them, for other tools.
MINDSPORE = Layout("uni-mdm MindSpore checkpoint", "model.ckpt", "optimizer.ckpt")
MINDFORMERS = Layout("uni-mdm MindFormers checkpoint", NATIVE.model)
MINDFORMERS_ADAPTER = Layout("uni-mdm MindFormers adapter", ADAPTER.model)
_CONVERTED = {layout.format for layout in (MINDSPORE, MINDFORMERS, MINDFORMERS_ADAPTER)}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: the folder that was read (a step's folder when a run folder was given).
        config: content of ``config.yaml``.
        model: float32 tensors by torch's parameter names; treat them as read-only.
        optimizer: its tensors, or None if absent or not asked for.
        state: content of ``state.json``, or None if absent.
        manifest: content of ``manifest.json``.
    """

    path: Path
    config: dict[str, Any]
    model: dict[str, NDArray[np.float32]]
    optimizer: dict[str, NDArray[Any]] | None
    state: dict[str, Any] | None
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        """The first 12 hex digits of the SHA-256 of the model's file: names the weights."""
        name = _LAYOUTS[self.manifest["format"]].model
        digest: str = self.manifest["files"][name]["sha256"]
        return digest[:12]

    @property
    def rows_seen(self) -> tuple[tuple[str, int], ...]:
        """Data sets that the weights have learned from, and their numbers of rows.

        Those of earlier runs, which their own went on from, come first.
        """
        extra = self.manifest["extra"]
        own = self.config.get("train", {}).get("data")
        listed = extra.get("data", [(own, extra.get("training_rows", 0))] if own else [])
        return tuple((str(name), int(rows)) for name, rows in listed)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the training rows, empty if it was not recorded.

        As ``common.data.store.fingerprint`` gives it; of other rows than MP-20's, a checkpoint of
        an earlier version has one that cannot be compared.
        """
        fingerprint: str = self.manifest["training_fingerprint"]
        return _RENAMED.get(fingerprint, fingerprint)


def save_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, Any],
    model: Tensors,
    card: str = "",
    optimizer: Tensors | None = None,
    state: Mapping[str, Any] | None = None,
    fingerprint: str = "",
    extra: Mapping[str, Any] | None = None,
    companions: Mapping[str, bytes] | None = None,
    layout: Layout = NATIVE,
) -> None:
    """Write a checkpoint, whole or not at all; one that is already there is replaced.

    The same arguments and package versions give the same bytes.

    Args:
        folder: where; missing parents are made.
        config: YAML-able, e.g. a pydantic model's ``model_dump(mode="json")``.
        model: float32 tensors by torch's parameter names.
        card: text of the model card (Markdown).
        optimizer: tensors of any dtype that numpy has.
        state: JSON-able.
        fingerprint: of the training rows.
        extra: JSON-able, kept in the manifest.
        companions: further files, of the names in ``COMPANIONS``.
        layout: the kind of folder.

    Raises:
        UserError: if a tensor is not finite, or the system refuses (no space, no permission).
        TypeError: if a model tensor is not float32.
    """
    _check_model(folder, model)
    files = {
        CONFIG: yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode(),
        layout.model: _dump_tensors(folder, layout.model, model),
        CARD: card.encode(),
        **(companions or {}),
    }
    if optimizer is not None:
        files[OPTIMIZER] = _dump_tensors(folder, OPTIMIZER, optimizer)
    if state is not None:
        files[STATE] = _dump_json(state)
    install(folder, files, make_provenance(config, fingerprint, extra), layout)


def save_step(
    run_folder: Path,
    step: int,
    *,
    keep: int = 2,
    config: Mapping[str, Any],
    model: Tensors,
    card: str = "",
    optimizer: Tensors | None = None,
    state: Mapping[str, Any] | None = None,
    fingerprint: str = "",
    extra: Mapping[str, Any] | None = None,
    companions: Mapping[str, bytes] | None = None,
    layout: Layout = NATIVE,
) -> Path:
    """Save a training step, then make it the latest, then delete older steps but the last `keep`.

    Steps above `step` (left by a run that went further) are not touched.

    Returns:
        The step's folder. The other arguments and errors are those of `save_checkpoint`.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} and keep {keep}: must be at least 0 and 1")
    folder = run_folder / f"step_{step:08d}"
    save_checkpoint(
        folder,
        config=config,
        model=model,
        card=card,
        optimizer=optimizer,
        state=state,
        fingerprint=fingerprint,
        extra=extra,
        companions=companions,
        layout=layout,
    )
    write_atomic(run_folder / LATEST, folder.name + "\n")
    older = [path for number, path in _steps(run_folder) if number <= step]
    with _reporting(run_folder):
        for path in older[:-keep]:
            _remove(path)
        sweep(run_folder, "step_*")
    return folder


def latest(run_folder: Path) -> Path | None:
    """The step that ``latest`` names, else the highest one, else None."""
    try:
        named = (run_folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    if _STEP.fullmatch(named) and _exists(run_folder / named):
        return run_folder / named
    steps = _steps(run_folder)
    return steps[-1][1] if steps else None


def load_checkpoint(folder: Path, optimizer: bool = False) -> Checkpoint:
    """Read a checkpoint and verify every file that is read.

    Args:
        folder: a checkpoint, or a run folder, whose latest step is read.
        optimizer: whether the optimizer's tensors are needed.

    Raises:
        UserError: if it is absent, incomplete, damaged, of an unknown format, has no optimizer
            although one is needed, or has tensors that are not finite float32.
    """
    folder = _locate(Path(folder))
    layout = _layout_of(folder)
    manifest = read_manifest(folder, layout)
    entries = manifest["files"]
    if optimizer and OPTIMIZER not in entries:
        raise _broken(folder, "holds no optimizer state", "it cannot be resumed, start a new run")
    content = {
        name: _read_verified(folder, name, entry)
        for name, entry in entries.items()
        if optimizer or name != OPTIMIZER
    }
    model = _parse_tensors(folder, layout.model, content[layout.model])
    wrong = next((name for name, tensor in model.items() if tensor.dtype != np.float32), None)
    if wrong is not None:
        problem = f"{layout.model}: '{wrong}' is {model[wrong].dtype}, not float32"
        raise _broken(folder, problem, "convert it to float32")
    return Checkpoint(
        path=folder,
        config=_parse_mapping(folder, CONFIG, content[CONFIG]),
        model=model,
        optimizer=_parse_tensors(folder, OPTIMIZER, content[OPTIMIZER]) if optimizer else None,
        state=_parse_mapping(folder, STATE, content[STATE]) if STATE in content else None,
        manifest=manifest,
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, or a run's, and not one of another tool."""
    return any((folder / name).is_file() for name in (LATEST, MANIFEST))


def rows_seen_by(folder: Path) -> tuple[tuple[str, int], ...]:
    """``Checkpoint.rows_seen``; empty for a folder of another tool, which does not say.

    Raises:
        UserError: as ``load_checkpoint``.
    """
    return load_checkpoint(folder).rows_seen if is_checkpoint(folder) else ()


def shipped() -> dict[str, Path]:
    """Name and folder of each Crystal DiT that comes with the project."""
    return _checkpoints_in(SHIPPED)


def shipped_language() -> dict[str, Path]:
    """Name and folder of each language model that comes with the project."""
    return _checkpoints_in(SHIPPED_LANGUAGE)


def checkpoint_folder(name: str | Path, known: Mapping[str, Path] | None = None) -> Path:
    """The folder that is named, or that of what goes by this name.

    Args:
        name: a path, or a name.
        known: folders by their names; those of the shipped Crystal DiTs without it.

    Raises:
        UserError: if a mere name is neither; a path that is absent is left to who reads it.
    """
    folder = Path(name)
    if folder.exists():
        return folder
    known = shipped() if known is None else known
    if str(name) in known:
        return known[str(name)]
    if _NAME.fullmatch(str(name)):
        raise UserError(
            f"'{name}' does not exist, nor is one shipped by that name; shipped: "
            f"{', '.join(known) or 'none'}"
        )
    return folder


def _checkpoints_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if (path / MANIFEST).is_file()}


def write_card(folder: Path, card: str, layout: Layout = NATIVE) -> None:
    """Replace the model card of a checkpoint and leave everything else as it is.

    Args:
        folder: of the checkpoint.
        card: Markdown.
        layout: the kind of folder that it is.

    Raises UserError like `load_checkpoint` and `save_checkpoint`.
    """
    folder = _locate(Path(folder))
    manifest = read_manifest(folder, layout)
    entries = manifest["files"]
    files = {name: _read_verified(folder, name, entry) for name, entry in entries.items()}
    install(folder, files | {CARD: card.encode()}, provenance_of(manifest), layout)


def verify(folder: Path, layout: Layout = NATIVE) -> tuple[Path, dict[str, Any]]:
    """Verify every file of a checkpoint without holding one in memory.

    Args:
        folder: a checkpoint, or a run folder, whose latest step is verified.
        layout: the kind of folder that it must be.

    Returns:
        The checkpoint's folder and its manifest.

    Raises UserError like `load_checkpoint`, but does not look into the files.
    """
    folder = _locate(Path(folder))
    manifest = read_manifest(folder, layout)
    for name, entry in manifest["files"].items():
        with _reading(folder, name):
            found = _entry(folder / name)
        _compare(folder, name, found, entry)
    return folder, manifest


# Writing


def make_provenance(
    config: Mapping[str, Any], fingerprint: str = "", extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Where a new checkpoint comes from, for its manifest; arguments as in `save_checkpoint`."""
    return {
        "config_sha256": _digest(config),
        "training_fingerprint": fingerprint,
        "created_by": f"uni-mdm {_version('uni-mdm') or 'unknown'}",
        "versions": _versions(),
        "extra": dict(extra or {}),
    }


def provenance_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says besides the files: where the checkpoint comes from."""
    own = ("format", "format_version", "files", "manifest_sha256")
    return {key: value for key, value in manifest.items() if key not in own}


def install(
    folder: Path,
    files: Mapping[str, Content],
    provenance: Mapping[str, Any],
    layout: Layout = NATIVE,
) -> None:
    """Write files and manifest into a temporary sibling folder, then put it in place.

    A folder cannot be renamed over another: the old one steps aside first, under a name where
    `_locate` finds it should the process die in between.

    Raises:
        UserError: if the folder is something else than a checkpoint, or the system refuses.
    """
    folder = Path(os.path.realpath(folder))
    temporary = folder.with_name(temporary_name(folder.name))
    aside = _aside(folder)
    with _reporting(folder):
        if folder.exists() and not (folder / MANIFEST).is_file() and not _is_empty(folder):
            raise _broken(folder, "is something else", "give a path that does not exist yet")
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent, escape(folder.name))
        try:
            temporary.mkdir()
            entries = {name: _put(temporary / name, content) for name, content in files.items()}
            _write(temporary / MANIFEST, _dump_json(_manifest(layout, entries, provenance)))
            flush_folder(temporary)
            if folder.exists():
                if aside.exists():
                    _remove(aside)
                folder.rename(aside)
            temporary.rename(folder)
            flush_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists():
            _remove(aside)


def _manifest(
    layout: Layout, entries: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    head = {"format": layout.format, "format_version": FORMAT_VERSION, "files": entries}
    manifest = {**head, **provenance}
    return {**manifest, "manifest_sha256": _digest(manifest)}


def _put(path: Path, content: Content) -> dict[str, Any]:
    """Write a file; returns its entry in the manifest."""
    if isinstance(content, bytes):
        _write(path, content)
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    content(path)
    flush(path)
    return _entry(path)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def _digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-able content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _remove(folder: Path) -> None:
    """Delete a folder so that a kill in between leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(temporary_name(folder.name.strip(".")))
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(parent: Path, pattern: str) -> None:
    """Delete what killed saves of the folders that match `pattern` have left in `parent`.

    What another process saves beside them, under a name that goes on after a dot, stays.
    """
    for name in (pattern, f"{pattern}.previous"):
        for rest in parent.glob(temporary_pattern(name)):
            shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    """Turn the system's refusals into one line."""
    try:
        yield
    except OSError as error:
        raise refused(f"checkpoint {folder}", error) from error


def _check_model(folder: Path, model: Tensors) -> None:
    for name, tensor in model.items():
        if tensor.dtype != np.float32:
            raise TypeError(f"checkpoint {folder}: '{name}' is {tensor.dtype}, not float32")


def _dump_tensors(folder: Path, file: str, tensors: Tensors) -> bytes:
    _check_finite(folder, file, tensors, "lower the learning rate and resume the step before")
    return dump_safetensors({name: np.asarray(t, order="C") for name, t in tensors.items()})


def _dump_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    found = {name: _version(name) for name in _VERSIONED}
    return {"python": python_version()} | {name: v for name, v in found.items() if v is not None}


# Reading


def _locate(folder: Path) -> Path:
    """The folder that holds the checkpoint which `folder` names."""
    if not folder.exists():
        if _aside(folder).is_dir():
            return _aside(folder)
        raise UserError(f"checkpoint {folder} does not exist; check the path")
    if not folder.is_dir():
        raise _broken(folder, "is not a folder", f"give the folder that holds {MANIFEST}")
    if (folder / MANIFEST).exists():
        return folder
    step = latest(folder)
    if step is None:
        raise _broken(folder, f"has no {MANIFEST}", "give a checkpoint or a run folder")
    return _locate(step)


def _exists(folder: Path) -> bool:
    return folder.is_dir() or _aside(folder).is_dir()


def _steps(run_folder: Path) -> list[tuple[int, Path]]:
    """Step numbers and folders of a run, ascending."""
    if not run_folder.is_dir():
        return []
    found = ((_STEP.fullmatch(path.name), path) for path in run_folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def _layout_of(folder: Path) -> Layout:
    """What the manifest of that very folder says it is; one of this project's own otherwise."""
    manifest = _parse_mapping(folder, MANIFEST, _read(folder, MANIFEST))
    return _LAYOUTS.get(str(manifest.get("format")), NATIVE)


def read_manifest(folder: Path, layout: Layout = NATIVE) -> dict[str, Any]:
    """The manifest of that very folder; raises UserError if it is damaged or of another layout."""
    manifest = _parse_mapping(folder, MANIFEST, _read(folder, MANIFEST))
    if manifest.get("format") != layout.format:
        advice = as_torch(folder) if manifest.get("format") in _CONVERTED else "give another folder"
        raise _broken(folder, f"{MANIFEST} is not of a {layout.format}", advice)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = f"has format version {manifest.get('format_version')!r}, not {FORMAT_VERSION}"
        raise _broken(folder, found, "use the release of uni-mdm that wrote it")
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    entries = manifest.get("files")
    required, optional = {CONFIG, layout.model, CARD}, {layout.optimizer, STATE, *COMPANIONS}
    well_formed = (
        manifest.get("manifest_sha256") == _digest(content)
        and isinstance(entries, dict)
        and required <= entries.keys() <= required | optional
        and all(_is_entry(entry) for entry in entries.values())
        and isinstance(manifest.get("training_fingerprint"), str)
    )
    if not well_formed:
        raise _broken(folder, f"{MANIFEST} is damaged", "copy or download the checkpoint again")
    return manifest


def as_torch(folder: Path) -> str:
    """What to do with a folder that was converted to MindSpore's names."""
    return (
        "give another folder: what it was converted from, which every backend reads, or OUT of "
        f"'uni-mdm convert {folder} OUT --to torch'"
    )


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256"))) is not None
    )


def _read(folder: Path, name: str) -> bytes:
    with _reading(folder, name):
        return (folder / name).read_bytes()


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    """Turn the system's refusals into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise _broken(folder, f"lacks {name}", "copy or download it again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise _broken(folder, f"cannot read {name}: {reason}", "check its permissions") from error


def _read_verified(folder: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    data = _read(folder, name)
    found = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _compare(folder, name, found, entry)
    return data


def _compare(folder: Path, name: str, found: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    again = "copy or download it again"
    if found["size"] != entry["size"]:
        problem = f"{name} has {found['size']} bytes, {MANIFEST} says {entry['size']}"
        raise _broken(folder, problem, again)
    if found["sha256"] != entry["sha256"]:
        raise _broken(folder, f"{name} is damaged or edited (SHA-256 differs)", again)


def _parse_tensors(folder: Path, file: str, data: bytes) -> dict[str, NDArray[Any]]:
    try:
        tensors: dict[str, NDArray[Any]] = parse_safetensors(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _broken(folder, f"{file} is not readable ({error})", "write it again") from error
    _check_finite(folder, file, tensors, "use another checkpoint")
    return tensors


def _check_finite(folder: Path, file: str, tensors: Tensors, advice: str) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise _broken(folder, f"{file}: '{name}' has NaN or infinite values", advice)


def _parse_mapping(folder: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
        value = yaml.safe_load(text) if name == CONFIG else json.loads(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "YAML" if name == CONFIG else "JSON"
        raise _broken(folder, f"{name} is not valid {kind}", "write it again") from error
    if not isinstance(value, dict):
        raise _broken(folder, f"{name} holds no mapping", "write it again")
    return value


def _broken(folder: Path, problem: str, advice: str) -> UserError:
    line = " ".join(f"checkpoint {folder}: {problem}; {advice}".split())
    return UserError(line)
