"""Which framework is taken, and what is said where one cannot be."""

from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

import common.backend as backend
from common.backend import available_backends, load_backend, wrong_version
from common.errors import UserError
from common.machine import ascend_count


@pytest.fixture
def npus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an NPU, as far as ``common`` looks."""
    monkeypatch.setattr(backend, "ascend_count", lambda: 1)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both frameworks are installed, and their backends are these modules."""
    entries = [
        EntryPoint("mindspore", "colorsys", backend.ENTRY_POINT_GROUP),
        EntryPoint("torch", "cmath", backend.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(backend, "entry_points", lambda group: entries)
    monkeypatch.setattr(backend, "find_spec", lambda name: object())


@pytest.mark.usefixtures("both")
def test_torch_on_cpus() -> None:
    assert available_backends() == ["torch", "mindspore"]
    assert load_backend().__name__ == "cmath"
    assert load_backend("mindspore").__name__ == "colorsys"


@pytest.mark.usefixtures("both", "npus")
def test_mindspore_on_npus() -> None:
    assert available_backends() == ["mindspore", "torch"]
    assert load_backend().__name__ == "colorsys"
    assert load_backend("torch").__name__ == "cmath"


@pytest.mark.usefixtures("both")
def test_the_device_decides() -> None:
    assert load_backend("auto", "ascend").__name__ == "colorsys"
    assert load_backend("auto", "cuda").__name__ == "cmath"
    assert load_backend("auto", "cpu").__name__ == "cmath"


@pytest.mark.usefixtures("both")
def test_a_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libge_runner.so: cannot open shared object file\nmore")

    monkeypatch.setattr(backend, "import_module", fail)
    message = r"^backend 'mindspore' cannot be imported: libge_runner.so: .* file more$"
    with pytest.raises(UserError, match=message):
        load_backend("mindspore")
    monkeypatch.setattr(backend, "version", lambda name: "2.4.1")
    message = "imported: mindspore 2.4.1 is installed, .* install mindspore==2"
    with pytest.raises(UserError, match=message):
        load_backend("mindspore")


def test_language_model_is_put_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best device here if nothing is said, and the backend that has it."""
    asked: list[tuple[object, ...]] = []
    module = SimpleNamespace(load_language_model=lambda *given: asked.append(given))

    def load(name: str, device: str) -> object:
        asked.append((name, device))
        return module

    monkeypatch.setattr(backend, "load_backend", load)
    folder, base = Path("folder"), Path("base")
    backend.load_language_model(folder)
    backend.load_language_model(folder, "torch", base, "cuda")
    assert asked == [
        ("auto", "auto"),
        (folder, "auto", None),
        ("torch", "cuda"),
        (folder, "cuda", base),
    ]


def test_how_a_backend_is_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available_backends", lambda: ["torch"])
    how = r"pip install 'uni-mdm\[mindspore\]'; available: torch$"
    with pytest.raises(UserError, match=f"'mindspore' is not installed: {how}"):
        load_backend("mindspore")


def test_unknown_backend() -> None:
    with pytest.raises(UserError, match="'jax' is not available here; available: "):
        load_backend("jax")


def test_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_version("numpy") is None
    monkeypatch.setattr(backend, "version", lambda name: "0.1+cpu")
    assert wrong_version("numpy").startswith("numpy 0.1+cpu is installed")


def test_npus_are_counted_by_their_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import common.machine as machine

    for name in ("davinci0", "davinci11", "davinci_manager", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path)
    assert ascend_count() == 2
