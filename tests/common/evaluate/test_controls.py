"""The controls, and a whole evaluation with the shipped checkpoint on textbook crystals."""

import numpy as np
import pytest
from pymatgen.core import Element

from common.backend import load_generator
from common.checkpoint import load_checkpoint, shipped
from common.crystal.lattice import k_constraints
from common.crystal.structure import Crystal, Site
from common.data.store import Record
from common.evaluate.controls import fit_standardizer, random_draw
from common.evaluate.run import Evaluation, Told, read_back
from common.evaluate.symmetry import SymmetryLabel


def rock_salt(cation: str, anion: str, a: float, swapped: bool = False) -> Crystal:
    letters = "ba" if swapped else "ab"
    sites = [Site(Element(e).Z, letter) for e, letter in zip((cation, anion), letters, strict=True)]
    return Crystal(225, tuple(sites), np.eye(3) * a)


def rutile(cation: str, anion: str, a: float, c: float, u: float) -> Crystal:
    sites = (Site(Element(cation).Z, "a"), Site(Element(anion).Z, "f", (u, 0.0, 0.0)))
    return Crystal(136, sites, np.diag([a, a, c]))


TRAINING = [
    rock_salt("Na", "Cl", 5.64),
    rock_salt("Mg", "O", 4.21),
    rutile("Ti", "O", 4.594, 2.959, 0.305),
    rutile("Mn", "F", 4.873, 3.310, 0.305),
]


def test_random_draw_keeps_the_symmetry_and_guesses_the_volume() -> None:
    standardizer = fit_standardizer(TRAINING)
    query = rutile("Sn", "O", 4.737, 3.186, 0.307)
    first, again, other = (random_draw([query], ["x"], standardizer, seed)[0] for seed in (0, 0, 1))
    assert first.to_dict() == again.to_dict() != other.to_dict()
    emitted = read_back(first)
    assert emitted.composition_exact
    assert emitted.symmetry is not SymmetryLabel.LOST
    volume = sum(standardizer.element_volume[z] * n for z, n in query.formula_counts.items())
    expected = volume * np.exp(np.sqrt(3) * standardizer.lattice_mean[3, 5])
    assert np.linalg.det(first.lattice) == pytest.approx(expected, rel=1e-4)
    assert k_constraints(136)[0].sum() == 2


def test_candidates_of_one_composition_are_pooled() -> None:
    """METRe: a reference missed by its own candidate is found by that of its polymorph."""
    salt, other = (
        rock_salt("K", "Br", 6.6),
        Crystal(221, (Site(19, "a"), Site(35, "b")), np.eye(3) * 3.95),
    )
    references = [Record("salt", salt), Record("chloride", other)]
    evaluation = Evaluation(references, "x", references, "x", workers=1)
    run = evaluation.controls(seed=0)[0].run
    row = evaluation._row(run, [[other], [salt]])
    assert row.metrics.match_rate.value == 0.0
    assert row.metrics.metre.value == 1.0


def layers(*elements: str) -> Crystal:
    """Three elements, or fewer, on equal positions of P4/nmm."""
    sites = zip(elements, (0.64, 0.17, 0.36), strict=True)
    return Crystal(
        129,
        tuple(Site(Element(element).Z, "c", (0.0, 0.0, z)) for element, z in sites),
        np.diag([3.9, 3.9, 6.9]),
    )


def test_only_the_precedent_shares_positions_out_in_another_way() -> None:
    wanted = layers("K", "Rb", "Cl")
    references, training = [Record("new", wanted)], [Record("known", layers("K", "K", "Cl"))]
    rows = Evaluation(references, "x", training, "x", workers=1).controls(seed=0)
    assert [row.run.name for row in rows] == ["random draw", "nearest template", "precedent"]
    drawn, template, precedent = (row.outcomes[0] for row in rows)
    assert template.candidates == drawn.candidates
    assert not template.seen_prototype
    assert precedent.first_rms == pytest.approx(0.0, abs=1e-3)


def test_evaluation_of_the_shipped_checkpoint_and_its_controls() -> None:
    references = [
        Record(
            f"ref-{i}", crystal, crystal.to_structure(primitive=True), {"formation_energy": -2.0}
        )
        for i, crystal in enumerate(
            [rock_salt("K", "Br", 6.6), rutile("Sn", "O", 4.74, 3.19, 0.31)]
        )
    ]
    training = [Record(f"train-{i}", crystal) for i, crystal in enumerate(TRAINING)]
    evaluation = Evaluation(references, "textbook", training, "textbook", workers=1)
    folder = shipped()["crystal_dit_small_fm"]
    row = evaluation.model(
        load_generator(folder, "torch", "cpu"),
        name="model",
        checkpoint=load_checkpoint(folder).hash,
        k=2,
        seed=0,
        steps=20,
        device="cpu",
        told=Told.of(references, ("formation_energy",), "true", 0),
    )
    assert row.run.given == "true symmetry, formation_energy"
    # Both are common prototypes in its training data: a trained network makes them.
    assert row.metrics.match_rate.value == 1.0
    assert row.metrics.composition_exact is not None
    assert row.metrics.composition_exact.value == 1.0
    assert all(label is not SymmetryLabel.LOST for one in row.outcomes for label in one.symmetry)
    drawn, substituted, _ = evaluation.controls(seed=0)
    assert [one.seen_prototype for one in substituted.outcomes] == [True, True]
    assert substituted.metrics.match_rate.value == 1.0
    assert drawn.outcomes[0].first_rms is not None  # rock salt has no freedom but its size
