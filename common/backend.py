"""What `common` asks of a framework, and how it finds one without importing it.

A backend is a module behind an entry point of the group ``uni_mdm.backends``, with the functions

    load(checkpoint: Path, device: str) -> Generator
    train(config: RunConfig, out: Path, *, resume: bool, threads: int, device: str) -> None
    devices() -> list[str]      what `device` may be here, best first
    problems(device: str, processes: int) -> list[str]      what is missing to train with that many
    load_language_model(folder: Path, device: str, base: Path | None) -> LanguageModel
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.crystal.structure import Crystal
from common.errors import UserError
from common.machine import ascend_count, let_threads_sleep

if TYPE_CHECKING:
    from common.language.model import LanguageModel

ENTRY_POINT_GROUP = "uni_mdm.backends"
#: The package a backend needs, by its name, in the order in which ``auto`` tries them.
REQUIRED_PACKAGE = {"torch": "torch", "mindspore": "mindspore"}
#: What only one backend can use.
_BACKEND_OF_DEVICE = {"cuda": "torch", "ascend": "mindspore"}


@dataclass(frozen=True)
class SampleRequest:
    """One crystal to sample.

    Attributes:
        space_group: number 1-230.
        sites: atomic number and Wyckoff letter of every orbit.
        properties: ``band_gap`` (eV) or ``formation_energy`` (eV/atom); absent means not given.
        key: names the request in the noise, so that its samples depend on nothing else.
        sample: counts the samples of one request.
    """

    space_group: int
    sites: tuple[tuple[int, str], ...]
    properties: dict[str, float] = field(default_factory=dict)
    key: str = ""
    sample: int = 0

    @classmethod
    def of(
        cls, crystal: Crystal, key: str, properties: dict[str, float], sample: int = 0
    ) -> "SampleRequest":
        """For the symmetry of a crystal, of which nothing else is used."""
        sites = tuple((site.atomic_number, site.letter) for site in crystal.sites)
        return cls(crystal.space_group, sites, properties, key, sample)


class Generator(Protocol):
    """A loaded checkpoint that samples crystals."""

    #: Names of the properties that the checkpoint was trained with.
    properties: tuple[str, ...]
    #: Where it samples, as the framework calls it: ``cpu``, ``cuda``, ``ascend``.
    device: str
    #: The same in words, for reports.
    device_name: str

    def sample(
        self,
        requests: Sequence[SampleRequest],
        seed: int,
        steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Crystal]:
        """One crystal per request, in their order.

        The crystal depends on the request and the seed alone, not on the other requests.

        Args:
            requests: what to sample.
            seed: of the noise.
            steps: network calls; the checkpoint's own number without it.
            progress: called with the number of crystals finished since the last call.
        """
        ...


def available_backends() -> list[str]:
    """Installed backends whose framework is installed too, the preferred one first.

    That is MindSpore where there is an NPU; on CPUs torch takes half the time and compiles nothing.
    """
    installed = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    found = [
        name
        for name, package in REQUIRED_PACKAGE.items()
        if name in installed and find_spec(package) is not None
    ]
    return found[::-1] if ascend_count() else found


def wrong_version(package: str) -> str | None:
    """A line if a package is not there in the version that was verified, or none."""
    pins = {line.split(";")[0].strip() for line in requires("uni-mdm") or ()}
    wanted = next(pin for pin in pins if pin.startswith(f"{package}=="))
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"package '{package}' is not installed: install {wanted}"
    if found.split("+")[0] != wanted.split("==")[1]:
        return f"{package} {found} is installed, which was never tried here: install {wanted}"
    return None


def backend_name(name: str = "auto", device: str = "auto") -> str:
    """Which framework a name stands for; arguments and errors as in `load_backend`."""
    available = available_backends()
    if name == "auto":
        if not available:
            raise UserError("no framework is installed: pip install 'uni-mdm[torch]'")
        name = _BACKEND_OF_DEVICE.get(device, available[0])
    if name not in available:
        names = ", ".join(available) or "none"
        missing = REQUIRED_PACKAGE.get(name)
        how = f"package '{missing}' is not installed: pip install 'uni-mdm[{name}]'; "
        raise UserError(
            f"backend '{name}' is not available here; {how if missing else ''}available: {names}"
        )
    return name


def load_backend(name: str = "auto", device: str = "auto") -> Any:
    """The module of a framework.

    Args:
        name: ``torch``, ``mindspore``, or ``auto`` for the one that has the device, or for the
            preferred one here.
        device: what will be asked of it.

    Raises:
        UserError: if there is no such backend here, or it cannot be imported.
    """
    name = backend_name(name, device)
    let_threads_sleep()
    entry = next(e for e in entry_points(group=ENTRY_POINT_GROUP) if e.name == name)
    try:
        return import_module(entry.value)
    except (ImportError, OSError) as error:  # OSError: a library of the framework is missing
        reason = wrong_version(REQUIRED_PACKAGE[name]) or " ".join(str(error).split())
        raise UserError(f"backend '{name}' cannot be imported: {reason}") from error


def load_generator(checkpoint: Path, backend: str = "auto", device: str = "auto") -> Generator:
    """Loads a checkpoint with a framework.

    Args:
        checkpoint: the folder.
        backend: as in `load_backend`.
        device: ``auto`` or what the framework calls its devices.

    Raises:
        UserError: if there is no such backend here, or the checkpoint cannot be read.
    """
    generator: Generator = load_backend(backend, device).load(checkpoint, device)
    return generator


def load_language_model(
    folder: Path, backend: str = "auto", base: Path | None = None, device: str = "auto"
) -> "LanguageModel":
    """Loads a language model with a framework.

    Args:
        folder: of the model, or of an adapter.
        backend: as in `load_backend`.
        base: what an adapter adds to, if not the one that it names.
        device: as in `load_generator`.

    Raises:
        UserError: if there is no such backend here, or the model cannot be read.
        ModuleNotFoundError: if a package that it needs is not installed.
    """
    model: LanguageModel = load_backend(backend, device).load_language_model(folder, device, base)
    return model
