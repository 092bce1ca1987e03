"""Who may import whom, what no file may contain, and that the pinned versions are installed."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = [
    name
    for name in ("common", "torch_impl", "ms_impl", "ckpt_convert")
    if (REPOSITORY / name / "__init__.py").is_file()
]
FRAMEWORKS = {"torch", "mindspore", "torch_impl", "ms_impl"}
#: What each package must not import, directly or through others.
FORBIDDEN = {
    "common": FRAMEWORKS | {"ckpt_convert"},
    "torch_impl": {"mindspore", "ms_impl"},
    "ms_impl": {"torch", "torch_impl"},
    "ckpt_convert": FRAMEWORKS,
}
#: What a package may import where a function needs it, if it is there.
LAZY = {"ckpt_convert": {"torch"}}
#: These run code that a file brings along.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle"}


def sources() -> list[Path]:
    folders = [*PACKAGES, "scripts"]
    return sorted(path for name in folders for path in (REPOSITORY / name).rglob("*.py"))


def modules(package: str) -> list[str]:
    found = pkgutil.walk_packages([str(REPOSITORY / package)], prefix=f"{package}.")
    return [package, *(info.name for info in found if not info.name.endswith("__main__"))]


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of the packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def loads_only_weights(call: ast.Call) -> bool:
    """Whether torch is told to build nothing but tensors."""
    return any(ast.unparse(keyword) == "weights_only=True" for keyword in call.keywords)


def unsafe(tree: ast.AST) -> Iterator[str]:
    yield from imported(tree) & UNSAFE_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS and not loads_only_weights(node):
                yield ast.unparse(node.func)
            yield from (k.arg for k in node.keywords if k.arg in UNSAFE_KEYWORDS)
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield node.value


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "eval('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_scan_finds_unsafe_code(code: str) -> None:
    assert list(unsafe(ast.parse(code)))


def test_scan_accepts_harmless_code() -> None:
    code = "model.eval()\nyaml.safe_load(text)\nnp.load(path)\nimport json\nfrom . import pickles"
    code += "\ntorch.load(path, weights_only=True)"
    assert not list(unsafe(ast.parse(code)))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_file_holds_nothing_unsafe(path: Path) -> None:
    assert not list(unsafe(ast.parse(path.read_text())))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_names_a_forbidden_package(package: str) -> None:
    for path in (REPOSITORY / package).rglob("*.py"):
        forbidden = FORBIDDEN[package] - LAZY.get(package, set())
        assert not imported(ast.parse(path.read_text())) & forbidden, path


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_every_module_loads_no_forbidden_package(package: str) -> None:
    if package == "ms_impl":
        pytest.importorskip("mindspore", reason="MindSpore is not installed")
    names = modules(package)
    assert len(names) > 1
    script = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = {FORBIDDEN[package]} & set(sys.modules)\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_the_import_check_can_fail() -> None:
    importlib.import_module("torch")
    assert FORBIDDEN["common"] & set(sys.modules)


# Versions


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pyproject_requirements() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(line for extra in extras for line in extra)]


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "scripts" / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonical(name): pin for name, pin in pins}


@pytest.mark.parametrize("requirement", pyproject_requirements())
def test_requirement_is_pinned_to_what_is_installed(requirement: str) -> None:
    name, separator, pin = requirement.partition("==")
    assert separator, "every requirement is pinned with =="
    assert version(name).split("+")[0] == pin
    assert constraints()[canonical(name)] == pin


def test_constraints_are_what_is_installed() -> None:
    different = {}
    for name, pin in constraints().items():
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
        if found != pin:
            different[name] = (pin, found)
    assert not different


def test_torch_of_the_scripts_is_the_pinned_one() -> None:
    script = (REPOSITORY / "scripts" / "install.sh").read_text()
    assert re.search(r'^TORCH="(.*)"$', script, re.MULTILINE)[1] in pyproject_requirements()


def test_mindformers_of_the_scripts_is_the_pinned_one() -> None:
    """It is installed apart from the extra that holds what it imports."""
    script = (REPOSITORY / "scripts" / "install.sh").read_text()
    packages = re.search(r'^MINDFORMERS="(.*)"$', script, re.MULTILINE)[1].split()
    for name, _, pin in (package.partition("==") for package in packages):
        assert version(name) == pin
        assert constraints()[canonical(name)] == pin
