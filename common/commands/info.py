"""`uni-mdm info`: what is installed and found here."""

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from common.backend import available_backends, load_backend
from common.checkpoint import load_checkpoint, shipped, shipped_language
from common.data.locations import cache_dir, data_dir
from common.errors import UserError
from common.machine import cpu_count


def command() -> None:
    """Show versions, devices, folders and checkpoints found here."""
    parts = (_machine, _backends, _folders, _checkpoints, _packages)
    pairs = [pair for part in parts for pair in part()]
    width = max(len(name) for name, _ in pairs)
    console = Console()
    for name, value in pairs:
        # The terminal breaks what is too long, so that a path is copied whole.
        console.print(f"[bold]{name:<{width}}[/bold]  {value}", soft_wrap=True, highlight=False)


def _machine() -> list[tuple[str, str]]:
    return [
        ("uni-mdm", version("uni-mdm")),
        ("python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU cores", str(cpu_count())),
    ]


def _backends() -> list[tuple[str, str]]:
    available = available_backends()
    if not available:
        return [("backends", "none: pip install 'uni-mdm[torch]'")]
    return [(f"backend {name}", _devices(name)) for name in available]


def _devices(backend: str) -> str:
    try:
        return ", ".join(load_backend(backend).devices())
    except UserError as error:
        return f"[red]{escape(str(error))}[/red]"


def _folders() -> list[tuple[str, str]]:
    folders = {"data (UNI_MDM_DATA)": data_dir(), "cache (UNI_MDM_CACHE)": cache_dir()}
    return [
        (name, escape(str(path)) + ("" if path.is_dir() else " (absent)"))
        for name, path in folders.items()
    ]


def _checkpoints() -> list[tuple[str, str]]:
    found = shipped() | shipped_language()
    return [(f"checkpoint {name}", _described(path)) for name, path in found.items()]


def _described(checkpoint: Path) -> str:
    try:
        loaded = load_checkpoint(checkpoint)
    except UserError as error:
        return f"[red]{escape(str(error))}[/red]"
    parameters = sum(tensor.size for tensor in loaded.model.values())
    return f"{loaded.hash}, {parameters:,} parameters, {escape(str(checkpoint))}"


def _packages() -> list[tuple[str, str]]:
    """The packages that the project pins, and their versions here."""
    names = sorted({re.split(r"[^\w.-]", line)[0] for line in requires("uni-mdm") or ()})
    return [(name, _version(name)) for name in names]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
