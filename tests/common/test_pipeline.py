"""From a formula to files, with the real network (small and untrained) and the shipped prior."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Composition, Structure
from rich.console import Console

from common import pipeline, ranking, runs
from common.backend import SampleRequest
from common.checkpoint import checkpoint_folder, load_checkpoint, save_checkpoint
from common.cli import run
from common.commands.generate import _show_table, _title
from common.config import RunConfig
from common.crystal.structure import Crystal, Site
from common.data.store import Record
from common.errors import UserError
from common.pipeline import (
    OTHER_VOLUME,
    Settings,
    answer,
    find_checkpoint,
    generate,
    load_engine,
    make_query,
)
from common.prior import load_prior
from common.ranking import rank_symmetries
from common.reference import volume_text
from common.requests import read_requests
from common.runs import Outcome, generate_many
from common.selection import choose_sample

TINY = {"layers": 1, "width": 16, "edge_width": 16, "heads": 2, "properties": ("band_gap",)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the real network at birth, with the statistics of two rock salts."""
    from torch_impl.train_dit import Trainer

    records = [
        Record(
            f"x-{a}",
            Crystal(225, (Site(z, "a"), Site(17, "b")), a * np.eye(3)),
            None,
            {"band_gap": a - 1.0},
        )
        for z, a in ((11, 5.64), (19, 6.29))
    ]
    config = RunConfig.model_validate(
        {"name": "tiny", "model": TINY, "diffusion": {"steps": 3}, "train": {"batch_size": 2}}
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    trainer = Trainer(config, records, records)
    save_checkpoint(folder, config=config.model_dump(mode="json"), model=trainer.model_arrays())
    return folder


def make(checkpoint: Path, **arguments):
    return generate("SrTiO3", checkpoint=checkpoint, **{"top": 3, "num_samples": 2, **arguments})


def test_crystals_are_exact_and_described(checkpoint: Path) -> None:
    crystals = make(checkpoint, band_gap=1.8)
    assert [c.rank for c in crystals] == [1, 2, 3]
    probabilities = [c.symmetry.probability for c in crystals]
    assert probabilities == sorted(probabilities, reverse=True)
    for c in crystals:
        assert isinstance(c.structure, Structure)
        assert c.composition_exact
        assert c.structure.composition.reduced_formula == "SrTiO3"
        assert len(c.structure) == 5 * c.symmetry.z
        assert c.query.properties == {"band_gap": 1.8}
        assert len(c.checkpoint["hash"]) == 12
        again = Structure.from_str(c.to_cif(), fmt="cif")
        assert again.composition == c.structure.composition
        assert StructureMatcher(primitive_cell=False).fit(again, c.structure)
        assert c.density == pytest.approx(c.structure.density)
        assert json.loads(json.dumps(c.to_dict())) == c.to_dict()


@pytest.mark.parametrize(
    ("formula", "length", "note"),
    [
        ("NaCl", 3.2, "Na and Cl are only 1.60 A apart"),
        ("NaCl", 3.24, None),
        ("NaH", 2.8, "Na and Na are only 1.98 A apart"),
        ("NaH", 2.84, None),
    ],
)
def test_atoms_that_are_too_close_are_said(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    formula: str,
    length: float,
    note: str | None,
) -> None:
    """Radii of Na, Cl and H: 1.66, 1.02 and 0.31 A."""
    engine = load_engine(["band_gap"], checkpoint=checkpoint, symmetry_model="prior")

    def sample(requests: Sequence[SampleRequest], *_: object, **__: object) -> list[Crystal]:
        return [
            Crystal(r.space_group, tuple(Site(*site) for site in r.sites), length * np.eye(3))
            for r in requests
        ]

    monkeypatch.setattr(engine.generator, "sample", sample)
    symbols = Composition(formula)
    sites = " ".join(f"{e.symbol}:4{letter}" for e, letter in zip(symbols, "ab", strict=True))
    query = make_query(formula, space_group=225, sites=sites)
    ranked = rank_symmetries(query, engine.ranker, 1)
    (crystal,) = answer(query, ranked, engine, Settings(1, 1))
    assert crystal.min_distance == pytest.approx(length / 2)
    assert [text for text in crystal.warnings if "apart" in text] == ([note] if note else [])


@pytest.mark.parametrize("change", [0.0, 0.18, 0.22, -0.18, -0.3])
def test_another_volume_than_that_of_the_known_crystal(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    """Of cubic SrTiO3, whose atoms lie where these do."""
    engine = load_engine(["band_gap"], checkpoint=checkpoint, symmetry_model="prior")
    query = make_query("SrTiO3", space_group=221, sites="Sr:1a Ti:1b O:3c")
    ranked = rank_symmetries(query, engine.ranker, 1)
    known = engine.prior.reference
    (row,) = known.rows_of_formula(query.formula.counts)
    lattice = known.crystal(row).lattice * (1 + change) ** (1 / 3)
    crystal = Crystal(221, tuple(Site(*site) for site in ranked[0].sites), lattice)
    monkeypatch.setattr(engine.generator, "sample", lambda *_, **__: [crystal])
    (found,) = answer(query, ranked, engine, Settings(1, 1))
    nearest = found.to_dict()["nearest"]
    assert (nearest["kind"], nearest["distance"]) == ("same composition", 0.0)
    assert nearest["volume_change"] == pytest.approx(change, abs=1e-6)
    assert volume_text(nearest) == f"{round(100 * change):+d} %"
    said = any("volume per atom" in text for text in found.warnings)
    assert said == (abs(change) > OTHER_VOLUME)


@pytest.mark.parametrize(("gap", "said"), [(1.8, False), (0.0, False), (20.0, True)])
def test_a_property_that_training_has_nowhere(checkpoint: Path, gap: float, said: bool) -> None:
    for crystal in make(checkpoint, band_gap=gap):
        text = f"band gap {gap:g} eV is beyond the known crystals' (0 to 17.9)"
        assert any(note.startswith(text) for note in crystal.warnings) == said


def test_unknown_symmetry_model_is_refused_before_anything_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the network is loaded")

    monkeypatch.setattr(pipeline, "load_generator", load)
    with pytest.raises(UserError, match="'glm5' does not exist"):
        load_engine(["band_gap"], checkpoint=checkpoint, symmetry_model="glm5")
    with pytest.raises(AssertionError, match="is loaded"):
        load_engine(["band_gap"], checkpoint=checkpoint, symmetry_model="prior")


def test_seed_decides_and_nothing_else(checkpoint: Path) -> None:
    first = [c.to_cif() for c in make(checkpoint, seed=4)]
    assert [c.to_cif() for c in make(checkpoint, seed=4)] == first
    assert [c.to_cif() for c in make(checkpoint, seed=5)] != first
    alone = make(checkpoint, seed=4, top=1)
    assert alone[0].to_cif() == first[0]


def test_space_group_by_symbol(checkpoint: Path, tmp_path: Path) -> None:
    assert make_query("SrTiO3", space_group="Pm-3m") == make_query("SrTiO3", space_group=221)
    assert make_query("SrTiO3", space_group="Pm-3m").note == ""
    with pytest.warns(UserWarning, match="Pbnm is space group 62 in another setting"):
        (crystal,) = make(checkpoint, space_group="Pbnm", top=1)
    assert crystal.crystal.space_group == crystal.query.space_group == 62
    path = tmp_path / "requests.csv"
    path.write_text("formula,space_group\nSrTiO3,Pm-3m\nSrTiO3,Pbnm\nNaCl,P b n m\nNaCl,225\n")
    queries = read_requests(path)
    assert [query.space_group for query in queries] == [221, 62, 62, 225]
    settings = Settings(1, 1)
    outcome = generate_many(
        queries, tmp_path / "out", settings, checkpoint=checkpoint, symmetry_model="prior"
    )
    assert not outcome.failed
    (note,) = outcome.notes
    assert note.startswith("Pbnm is space group 62 in another setting")


def test_no_request_is_no_run(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no request"):
        generate_many([], tmp_path / "out", checkpoint=checkpoint)
    assert not (tmp_path / "out").exists()


def test_fixed_symmetry_is_obeyed(checkpoint: Path) -> None:
    (given,) = make(checkpoint, space_group=221, sites="Sr:1a Ti:1b O:3c")
    assert (given.crystal.space_group, given.symmetry.source) == (221, "given")
    assert given.symmetry.probability == 1.0
    assert set(given.found_groups.values()) == {221}
    assert {c.symmetry.z for c in make(checkpoint, z=2)} == {2}
    for c in generate("Sr2Ti2O6", checkpoint=checkpoint, top=3, num_samples=1):
        centering = len(c.crystal.group.centering)
        assert c.symmetry.z in (2, 2 * centering)


def test_z_counts_the_formula_that_is_shown(checkpoint: Path) -> None:
    settings = {"checkpoint": checkpoint, "top": 3, "num_samples": 1}
    for formula, shown in (("O2", "O"), ("Na2O2", "NaO"), ("S", "S")):
        for c in generate(formula, **settings):
            row = c.to_dict()
            assert row["formula"] == shown
            held = Composition(shown) * row["z"]
            assert c.structure.composition == held
            assert f"_cell_formula_units_Z   {row['z']}\n" in c.to_cif()
    with pytest.warns(UserWarning, match="z = 1 counts N, not N2"):
        (one,) = generate("N2", z=1, space_group=221, **settings | {"top": 1})
    assert (one.formula, len(one.structure), one.query.asked) == ("N", 1, "N2")
    both = make_query("O2", z=4, space_group="Pbnm").note
    assert "\n" not in both
    assert both.endswith("Pnma; z = 4 counts O, not O2")
    assert make_query("O", z=4).note == make_query("O2").note == ""


@pytest.mark.parametrize(
    "given",
    [
        {"space_group": 1, "z": 40},
        {"space_group": 2, "sites": " ".join(["Sr:2i"] * 20 + ["Ti:2i"] * 20 + ["O:2i"] * 60)},
    ],
)
def test_two_hundred_atoms_in_the_primitive_cell(checkpoint: Path, given: dict) -> None:
    (crystal,) = make(checkpoint, top=1, num_samples=1, **given)
    assert crystal.crystal.num_primitive_atoms == 200
    assert crystal.composition_exact
    assert crystal.structure.composition.as_dict() == {"Sr": 40, "Ti": 40, "O": 120}
    assert np.isfinite(crystal.structure.cart_coords).all()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"formula": "Xx"}, "unknown element"),
        ({"band_gap": float("nan")}, "nan"),
        ({"band_gap": -1.0}, "-1"),
        ({"band_gap": 1.0, "formation_energy": -1.0}, "not both"),
        ({"formation_energy": -1.0}, "not with formation_energy"),
        ({"space_group": 231}, "1 to 230"),
        ({"space_group": "pnma"}, "like it: Pnma"),
        ({"space_group": 221.5}, "whole number"),
        ({"z": 0}, "positive"),
        ({"z": True}, "whole number"),
        ({"sites": ["Sr:1a"]}, "give text"),
        ({"formula": "Sr2Ti2O6", "z": 3}, "counts 2 formula units"),
        ({"z": 100000}, "at most"),
        ({"space_group": 1, "z": 41}, "205 atoms"),
        ({"space_group": 1, "sites": "Sr:1a " * 201}, "201 sites"),
        ({"space_group": 227, "z": 1}, "cannot be placed"),
        ({"space_group": 221, "sites": "Sr:1a Ti:1a O:3c"}, "only once"),
        ({"space_group": 221, "sites": "Sr:1a Ti:1b O:3c", "z": 2}, "z is 2"),
        ({"sites": "Sr:96a Ti:1b O:3c"}, "Sr:96a"),
        ({"top": 0}, "top is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 2.5}, "whole number"),
        ({"checkpoint": "absent"}, "absent"),
        ({"backend": "abacus"}, "abacus"),
    ],
)
def test_mistakes_are_one_line(checkpoint: Path, arguments: dict, part: str) -> None:
    with pytest.raises(UserError) as error:
        generate(**{"formula": "SrTiO3", "checkpoint": checkpoint, **arguments})
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_numbers_of_any_kind_are_kept_as_json_has_them() -> None:
    settings = Settings(top=np.int32(2), seed=np.int64(3))
    assert json.loads(json.dumps(settings.to_dict()))["seed"] == 3


def test_consensus_is_the_middle() -> None:
    """Of five rutiles three are alike; the choice is the middle one of these."""
    samples = [
        Crystal(136, (Site(22, "a"), Site(8, "f", (x, 0.0, 0.0))), np.diag([4.594, 4.594, 2.959]))
        for x in (0.22, 0.300, 0.305, 0.310, 0.39)
    ]
    choice = choose_sample(samples)
    assert (choice.sample, choice.samples) == (2, 5)
    crowded = Crystal(136, (Site(22, "a"), Site(8, "f", (0.01, 0, 0))), samples[0].lattice)
    assert choose_sample([crowded, crowded, crowded, samples[3]]).sample == 3


def test_single_run_has_all_files(checkpoint: Path, tmp_path: Path) -> None:
    query = make_query("SrTiO3", 1.8)
    outcome = generate_many([query], tmp_path / "run", Settings(2, 2), checkpoint=checkpoint)
    names = sorted(path.name for path in outcome.folder.iterdir())
    assert names == sorted(
        [row["file"] for row in outcome.entries[0]["crystals"]]
        + ["journal.jsonl", "report.html", "results.extxyz", "results.json", "run.json"]
    )
    results = json.loads((outcome.folder / "results.json").read_text())
    frames = read_extxyz(outcome.folder / "results.extxyz")
    for row, (symbols, lattice, positions) in zip(
        results["results"][0]["crystals"], frames, strict=True
    ):
        structure = Structure.from_file(outcome.folder / row["file"])
        assert structure.composition.reduced_formula == "SrTiO3"
        other = Structure(lattice, symbols, positions, coords_are_cartesian=True)
        rms, _ = StructureMatcher(scale=False).get_rms_dist(structure, other)
        assert rms < 1e-5
        assert row["found_space_groups"].keys() == {"spglib", "moyopy"}
    console = Console(record=True, width=140)
    _show_table(console, outcome.entries[0])
    assert "Sr:" in console.export_text()


def test_counted_formula_units_are_in_the_title() -> None:
    asked = make_query("Sr2Ti2O6", 1.8).to_dict()
    title = "SrTiO3, asked as Sr2Ti2O6, 2 formula units per cell, band gap 1.8 eV"
    assert _title(asked) == title
    assert _title(make_query(" SrTiO3 ").to_dict()) == "SrTiO3"


def test_a_spelling_of_ones_own_is_kept() -> None:
    assert make_query(" BiFeO3 ").to_dict() | {"formula": "FeBiO3", "asked": "BiFeO3"} == (
        make_query("BiFeO3").to_dict()
    )
    assert make_query("FeBiO3").to_dict()["asked"] is None


def test_ids_are_quoted_in_extxyz(checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings(1, 1)
    queries = [make_query("NaCl", name=name) for name in ('a "b"', "c\\", "")]
    outcome = generate_many(
        queries, tmp_path, settings, checkpoint=checkpoint, symmetry_model="prior"
    )
    first, second, third = (outcome.folder / "results.extxyz").read_text().split("Lattice=")[1:]
    assert r' request=1 id="a \"b\"" formula="NaCl" ' in first
    assert r' request=2 id="c\\" formula="NaCl" ' in second
    assert ' request=3 formula="NaCl" ' in third


def read_extxyz(path: Path) -> list[tuple[list[str], np.ndarray, np.ndarray]]:
    frames, lines = [], path.read_text().splitlines()
    while lines:
        count = int(lines[0])
        lattice = lines[1].split('Lattice="')[1].split('"')[0]
        rows = [line.split() for line in lines[2 : 2 + count]]
        frames.append(
            (
                [row[0] for row in rows],
                np.array(lattice.split(), dtype=float).reshape(3, 3),
                np.array([row[1:] for row in rows], dtype=float),
            )
        )
        lines = lines[2 + count :]
    return frames


REQUESTS = """id,formula,band_gap,space_group,z
a,NaCl,5,,
b,CsCl,,221,
c,NaCl,1,227,3
d,KBr,2,,
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "journal.jsonl"
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_many_requests(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Answered in small batches, interrupted and resumed: the same bytes; never overwritten."""
    file = tmp_path / "requests.csv"
    file.write_text(REQUESTS)
    queries = read_requests(file)
    settings = Settings(2, 2)
    whole = generate_many(queries, tmp_path / "whole", settings, checkpoint=checkpoint)
    assert [entry["status"] for entry in whole.entries] == ["done", "done", "failed", "done"]
    assert "227" in whole.failed[0]["error"]
    frames = (whole.folder / "results.extxyz").read_text().split("Lattice=")[1:]
    named = [re.search(r'request=(\d) id="(.)" .* rank=(\d) ', frame).groups() for frame in frames]
    expected = [(number, name, rank) for number, name in ("1a", "2b", "4d") for rank in "12"]
    assert named == expected

    def parts() -> Outcome:
        out = tmp_path / "parts"
        return generate_many(queries, out, settings, checkpoint=checkpoint, workers=workers)

    monkeypatch.setattr(runs, "_BATCH", 4)
    monkeypatch.setattr(runs, "_CRYSTALS_PER_WORKER", 1)
    original, calls = runs.sample_symmetries, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(runs, "sample_symmetries", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parts()
    assert not (tmp_path / "parts" / "results.json").exists()
    with open(tmp_path / "parts" / "journal.jsonl", "ab") as journal:
        journal.write(b'{"index": 3, "cut sho')
    monkeypatch.setattr(runs, "sample_symmetries", original)
    finished = parts()
    assert finished.folder == tmp_path / "parts"
    assert 0 < finished.resumed < 4
    assert contents(finished.folder) == contents(whole.folder)

    second = generate_many(queries, tmp_path / "whole", settings, checkpoint=checkpoint)
    assert second.folder == tmp_path / "whole-2"
    assert contents(second.folder) == contents(whole.folder)
    other = generate_many(queries[:1], tmp_path / "whole", settings, checkpoint=checkpoint)
    assert other.folder == tmp_path / "whole-3"


def test_a_run_goes_on_where_it_was_begun(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices compute other last digits; for frameworks see parity/test_generate.py."""
    device = "cpu"

    def load(*arguments) -> pipeline.Engine:
        engine = load_engine(*arguments)
        engine.generator.device = device
        return engine

    def made(backend: str = "torch") -> Outcome:
        return generate_many(
            [make_query("NaCl"), make_query("KBr")],
            tmp_path / "out",
            Settings(1, 1),
            backend=backend,
            checkpoint=checkpoint,
            symmetry_model="prior",
        )

    original, calls = runs.sample_symmetries, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(runs, "load_engine", load)
    monkeypatch.setattr(runs, "_BATCH", 1)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "sample_symmetries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made()
    device = "cpu:0"
    other = made()
    assert (other.folder, other.resumed) == (tmp_path / "out-2", 0)
    device = "cpu"
    finished = made("auto")
    assert (finished.folder, finished.resumed) == (tmp_path / "out", 1)
    for folder, name in ((tmp_path / "out", "cpu"), (tmp_path / "out-2", "cpu:0")):
        results = json.loads((folder / "results.json").read_text())
        assert (results["backend"], results["device"]) == ("torch", name)
        assert f"torch on {name}" in (folder / "report.html").read_text()


def test_progress_of_many_requests(checkpoint: Path, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        told.setdefault(stage, []).append((done, total))

    queries = [make_query("NaCl"), make_query("KBr")]
    generate_many(queries, tmp_path, Settings(1, 2), checkpoint=checkpoint, progress=progress)
    assert told["Requests"] == [(0, 2), (1, 2), (2, 2)]
    assert told["Ranking"] == [(0, 2), (1, 2), (2, 2)]
    assert told["Sampling"][-1] == (4, 4)
    assert told["Comparing"] == 2 * [(0, 1), (1, 1)]


def test_one_checkpoint_for_two_kinds_of_request_is_named_once(
    checkpoint: Path, tmp_path: Path
) -> None:
    queries = [make_query("NaCl", 5.0), make_query("KBr")]
    generate_many(queries, tmp_path, Settings(1, 1), checkpoint=checkpoint, symmetry_model="prior")
    (named,) = json.loads((tmp_path / "run.json").read_text())["checkpoints"]
    assert named["hash"] == load_checkpoint(checkpoint).hash


def die(_job: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line_and_costs_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [make_query(formula) for formula in ("NaCl", "KBr", "CsI")]
    monkeypatch.setattr(runs, "_CRYSTALS_PER_WORKER", 1)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "_answer_apart", die)
        with pytest.raises(UserError, match=r"killed.*--workers 1"):
            generate_many(queries, tmp_path, Settings(1, 1), checkpoint=checkpoint, workers=2)
    outcome = generate_many(queries, tmp_path, Settings(1, 1), checkpoint=checkpoint)
    assert outcome.folder == tmp_path
    assert not outcome.failed


def test_language_model_ranks(
    checkpoint: Path, textbook_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named everywhere, and its answers are the same bytes alone and in company."""
    queries = [make_query("NaCl", 5.0), make_query("SrTiO3"), make_query("KBr", 2.0)]
    settings = Settings(3, 1)

    def made(number: int, asked: list, model: Path | str) -> dict:
        out = tmp_path / str(number)
        generate_many(asked, out, settings, checkpoint=checkpoint, symmetry_model=model)
        return json.loads((out / "results.json").read_text())

    together, again = made(1, queries, textbook_model), made(2, queries, textbook_model)
    assert together == again
    (identity,) = together["symmetry_models"]
    prior_hash = load_prior().hash
    assert identity == {
        "name": "run and template prior",
        "hash": f"{load_checkpoint(textbook_model).hash}, {prior_hash}",
    }
    assert identity["hash"] in (tmp_path / "1" / "report.html").read_text()
    alone, prior = made(3, queries[:1], textbook_model), made(4, queries[:1], "prior")
    (crystals,) = ([dict(row) for row in entry["crystals"]] for entry in alone["results"])
    company = together["results"][0]["crystals"]
    for row, other in zip(crystals, company, strict=True):
        assert row | {"file": Path(other["file"]).name} == other | {"file": row["file"]}
    assert {row["symmetry_source"] for row in company} == {"language model"}
    assert prior["symmetry_models"] == [{"name": "template prior", "hash": prior_hash}]
    assert [r["sites"] for r in prior["results"][0]["crystals"]] != [r["sites"] for r in company]
    command = ["generate", "NaCl", "--top", "1", "--num-samples", "1"]
    command += ["--checkpoint", str(checkpoint), "--symmetry-model", str(textbook_model)]
    assert run([*command, "--out", str(tmp_path / "5")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"symmetries ranked by run and template prior ({identity['hash']})" in told


def test_missing_language_packages_are_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        raise ModuleNotFoundError(name="peft")

    monkeypatch.setattr(ranking, "load_language_model", load)
    command = ["generate", "--formula", "NaCl", "--top", "1", "--num-samples", "1"]
    command += ["--checkpoint", str(checkpoint), "--symmetry-model", "glm4_tiny"]
    assert run([*command, "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert output.count("'peft' is not installed; pip install 'uni-mdm[language,") == 1
    assert "symmetries ranked by template prior" in output
    with pytest.warns(UserWarning, match="'peft' is not installed"):
        make(checkpoint, top=1, num_samples=1, symmetry_model="glm4_tiny")


def test_foreign_folder_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    query = make_query("NaCl", space_group=225, sites="Na:4a Cl:4b")
    outcome = generate_many([query], tmp_path / "mine", Settings(1, 1), checkpoint=checkpoint)
    assert outcome.folder == tmp_path / "mine-2"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_a_kill_leaves_is_no_content(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the first write in a folder, nor of later ones; other hidden files are."""

    def made(name: str) -> Outcome:
        queries = [make_query("NaCl"), make_query("KBr")]
        arguments = {"checkpoint": checkpoint, "symmetry_model": "prior"}
        return generate_many(queries, tmp_path / name, Settings(1, 1), **arguments)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def leave(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("half of")

    leave("a/.lock", "a/.trial.0123456789ab.tmp", "a/.run.0123456789ab.tmp.json")
    with monkeypatch.context() as patched:
        patched.setattr(runs, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made("a")
    later = ["a/.results.0123456789ab.tmp.json", "a/.report.0123456789ab.tmp.html"]
    later += ["a/.run.0123456789ab.tmp.json", "a/00002_KBr/.01_KBr_225.0123456789ab.tmp.cif"]
    leave(*later, "a/00001_NaCl/.mine.cif")
    finished = made("a")
    assert (finished.folder, finished.resumed) == (tmp_path / "a", 2)
    assert list(finished.folder.rglob(".*")) == [tmp_path / "a" / "00001_NaCl" / ".mine.cif"]
    leave("b/.notes.0123456789ab.tmp.txt")
    assert made("b").folder == tmp_path / "b-2"
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".notes.0123456789ab.tmp.txt"]


def test_file_in_the_folders_place_is_refused_before_a_network_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="mine is a file, not a folder: give another --out"):
        generate_many([make_query("NaCl")], tmp_path / "mine", checkpoint=tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_killed_process_is_resumed(checkpoint: Path, tmp_path: Path) -> None:
    """A real kill -9 in the middle of a run of the command; running it again finishes it."""
    file = tmp_path / "requests.jsonl"
    pairs = [(a, b) for a in ("Li", "Na", "K", "Rb") for b in ("F", "Cl", "Br", "I")]
    formulas = [a + b for a, b in pairs]
    rows = [{"formula": a + b, "space_group": 225, "sites": f"{a}:4a {b}:4b"} for a, b in pairs]
    file.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-c", "from common.cli import main; main()", "generate"]
    command += ["--input", str(file), "--out", str(tmp_path / "out"), "--top", "1"]
    command += ["--num-samples", "64", "--checkpoint", str(checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    journal = tmp_path / "out" / "journal.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while not journal.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert journal.exists()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    made = [entry["query"]["formula"] for entry in results["results"]]
    assert made == [Composition(f).reduced_formula for f in formulas]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"
    assert not list(tmp_path.glob("out-*"))


# Which checkpoint


@pytest.fixture
def library(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shipped checkpoints, the larger one first by name."""
    folder = tmp_path / "shipped"
    for name in ("a_large", "b_small"):
        shutil.copytree(checkpoint, folder / name)
    (folder / "a_large" / "more.bin").write_bytes(bytes(1000))
    monkeypatch.setattr("common.checkpoint.SHIPPED", folder)
    return folder


def test_the_smallest_shipped_checkpoint_is_taken(library: Path) -> None:
    assert find_checkpoint(["band_gap"]) == library / "b_small"
    assert find_checkpoint([]) == library / "b_small"


def test_a_shipped_checkpoint_goes_by_its_name(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless there is a folder of that name."""
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("a_large") == library / "a_large"
    (tmp_path / "a_large").mkdir()
    assert checkpoint_folder("a_large") == Path("a_large")
    assert checkpoint_folder("elsewhere/c") == Path("elsewhere/c")
    with pytest.raises(UserError, match="'glm4_tiny'"):  # a language model is no Crystal DiT
        checkpoint_folder("glm4_tiny")
    with pytest.raises(UserError, match="elsewhere"):
        generate("SrTiO3", checkpoint="elsewhere")
    assert len(generate("SrTiO3", checkpoint="b_small", top=1, num_samples=1)) == 1
