"""Crystals of both frameworks from one checkpoint, as users get them: objects and files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymatgen.core import Structure

from common import cli, runs
from common.backend import SampleRequest, load_generator
from common.checkpoint import save_checkpoint
from common.config import RunConfig
from common.crystal.structure import Crystal
from common.crystal.symmetry import space_group
from common.pipeline import Settings, make_query
from common.weights import MODEL_PREFIX, STANDARDIZER_PREFIX, Arrays
from tests.networks import SMALL, fill_value, fitted, random_items
from tests.parity.twins import Change, DisagreementError
from torch_impl.crystal_dit import CrystalDiT

CONFIG = RunConfig.model_validate(
    {"name": "tiny", "model": SMALL | {"layers": 1}, "diffusion": {"steps": 10}}
)
#: Space groups and sites, all of one bucket: primitive and centred cells, oblique sites.
SYSTEMS = ((2, "aii"), (12, "aij"), (139, "aeh"), (160, "ab"), (186, "bc"))
#: Sampled for each of them, with a property and without.
SAMPLES = 3
#: What the frameworks may differ by: lattice vectors in A, and fractional coordinates modulo 1.
#: A tenth of what is promised, for the sampling is short; rounding makes some 2e-6 of it.
LENGTH, COORDINATE = 1e-4, 1e-4
PACKAGES = {"torch": "torch_impl", "mindspore": "ms_impl"}
#: Weights that are changed by a twentieth, from one end of the network to the other.
WEIGHTS = (
    "property.null",
    "edges.lattice.weight",
    "blocks.0.fusion.weight.weight",
    "blocks.0.attention.query.weight",
    "coordinate_head.hidden.weight",
    "lattice_head.hidden.weight",
)


def calm(name: str, values: NDArray) -> NDArray:
    """Slow coordinates: fast ones make sampling chaotic, and rounding decides where it ends."""
    return 0.2 * values if name.startswith(("edge_head", "coordinate_head.output")) else values


def save(folder: Path, change: Change | None = None) -> Path:
    """A checkpoint in which nothing is zero.

    Args:
        folder: of the checkpoint.
        change: turns the weights into others, by name.
    """
    model: Arrays = {}
    for name, parameter in CrystalDiT(CONFIG.model).named_parameters():
        values = calm(name, fill_value(name, parameter.shape))
        model[MODEL_PREFIX + name] = change(name, values) if change else values
    for name, array in fitted(random_items()).to_arrays().items():
        model[STANDARDIZER_PREFIX + name] = array.astype(np.float32)
    save_checkpoint(folder, config=CONFIG.model_dump(mode="json"), model=model)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints") / "tiny")


def check(found: Structure, expected: Structure, where: object) -> None:
    """Raises DisagreementError if two structures differ, atom by atom."""
    if found.species != expected.species:
        raise DisagreementError(f"{where}: {found.formula}, not {expected.formula}")
    vectors = found.lattice.matrix - expected.lattice.matrix  # rows, A
    length = np.linalg.norm(vectors, axis=1).max()
    coords = found.frac_coords - expected.frac_coords
    coordinate = np.abs(coords - np.round(coords)).max()
    if not (length < LENGTH and coordinate < COORDINATE):
        raise DisagreementError(f"{where}: {length:.1e} A, {coordinate:.1e} of a cell")


# Objects


def requests() -> list[SampleRequest]:
    return [
        SampleRequest(
            group,
            tuple((11 + index, letter) for index, letter in enumerate(letters)),
            properties,
            key=f"{group} {letters} {sorted(properties)}",
            sample=sample,
        )
        for group, letters in SYSTEMS
        for properties in ({}, {"band_gap": 2.0}, {"formation_energy": -1.0})
        for sample in range(SAMPLES)
    ]


def sampled(backend: str, checkpoint: Path, seed: int = 0) -> list[Crystal]:
    generator = load_generator(checkpoint, backend, "cpu")
    assert type(generator).__module__ == f"{PACKAGES[backend]}.generator"
    assert generator.properties == CONFIG.model.properties
    return generator.sample(requests(), seed)


@pytest.fixture(scope="module")
def of_mindspore(checkpoint: Path) -> list[Crystal]:
    return sampled("mindspore", checkpoint)


def compare(found: Sequence[Crystal], expected: Sequence[Crystal]) -> None:
    """Holds crystals against others: symmetry exactly, numbers within the limits."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if (one.space_group, one.sites_string) != (other.space_group, other.sites_string):
            raise DisagreementError(f"{index}: {one.sites_string}, not {other.sites_string}")
        check(one.to_structure(), other.to_structure(), index)


def test_crystals(checkpoint: Path, of_mindspore: list[Crystal]) -> None:
    compare(of_mindspore, sampled("torch", checkpoint))


@pytest.mark.parametrize("name", WEIGHTS)
def test_another_weight_is_noticed(tmp_path: Path, of_mindspore: list[Crystal], name: str) -> None:
    def larger(other: str, values: NDArray) -> NDArray:
        return np.float32(1.05) * values if other == name else values

    with pytest.raises(DisagreementError, match="of a cell"):
        compare(of_mindspore, sampled("torch", save(tmp_path / "other", larger)))


def test_another_seed_is_noticed(checkpoint: Path, of_mindspore: list[Crystal]) -> None:
    with pytest.raises(DisagreementError, match="of a cell"):
        compare(of_mindspore, sampled("torch", checkpoint, seed=1))


# Files


def site_text(group: int, letters: str) -> tuple[str, str]:
    """Formula and sites as users write them: each site another element."""
    counts = [space_group(group).wyckoff[letter].multiplicity for letter in letters]
    unit = np.gcd.reduce(counts)
    sites = list(zip(("Na", "Mg", "Al"), counts, letters, strict=False))
    formula = "".join(f"{symbol}{count // unit}" for symbol, count, _ in sites)
    return formula, " ".join(f"{symbol}:{count}{letter}" for symbol, count, letter in sites)


def generated(backend: str, checkpoint: Path, folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """What `uni-mdm generate` wrote for all systems: its rows, each with the structure of its CIF.

    One request more names no symmetry.
    """
    folder.mkdir()
    rows = [(*site_text(group, letters), str(group)) for group, letters in SYSTEMS]
    table = [("formula", "sites", "space_group", "band_gap")]
    table += [(*row, "1.5") for row in (*rows, ("NaCl", "", ""))]
    (folder / "requests.csv").write_text("".join(",".join(row) + "\n" for row in table))
    options = {
        "input": folder / "requests.csv",
        "out": folder / "out",
        "backend": backend,
        "checkpoint": checkpoint,
        "num-samples": SAMPLES,
        "top": 1,
        "seed": seed,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert cli.run(["generate", *arguments]) == 0
    entries = json.loads((folder / "out" / "results.json").read_text())["results"]
    assert [entry["status"] for entry in entries] == ["done"] * len(table[1:])
    found = [row for entry in entries for row in entry["crystals"]]
    return [row | {"structure": Structure.from_file(folder / "out" / row["file"])} for row in found]


#: What must be the same to the last digit.
SAME = ("file", "space_group", "sites", "z", "num_atoms", "found_space_groups", "checkpoint")


def compare_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        check(one["structure"], other["structure"], one["file"])
        for name in SAME:
            if one[name] != other[name]:
                raise DisagreementError(f"{one['file']}: {name}")
        if one["choice"]["sample"] != other["choice"]["sample"]:
            raise DisagreementError(f"{one['file']}: another sample")


# Of ten digits of 1/3, of which pymatgen makes sixteen.
@pytest.mark.filterwarnings("ignore:Issues encountered while parsing CIF:UserWarning")
def test_files(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mindspore = generated("mindspore", checkpoint, tmp_path / "mindspore")
    assert "compiled for 8 tokens, 8 atoms," in capsys.readouterr().err
    compare_rows(mindspore, generated("torch", checkpoint, tmp_path / "torch"))
    assert "compiled" not in capsys.readouterr().err
    with pytest.raises(DisagreementError, match="of a cell"):
        compare_rows(mindspore, generated("torch", checkpoint, tmp_path / "other", seed=1))


def test_a_run_goes_on_with_the_framework_that_began_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(backend: str) -> runs.Outcome:
        queries = [make_query("NaCl", band_gap=gap) for gap in (1.0, 2.0)]
        models = {"checkpoint": checkpoint, "symmetry_model": "prior"}
        return runs.generate_many(
            queries, tmp_path / "out", Settings(1, 1), backend=backend, **models
        )

    sample, calls = runs.sample_symmetries, []

    def interrupted(*arguments: Any) -> list[list[list[Crystal]]]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(runs, "_BATCH", 1)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "sample_symmetries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made("torch")
    for backend, folder, resumed in (("mindspore", "out-2", 0), ("torch", "out", 1)):
        outcome = made(backend)
        assert (outcome.folder, outcome.resumed) == (tmp_path / folder, resumed)
        assert json.loads((outcome.folder / "results.json").read_text())["backend"] == backend
