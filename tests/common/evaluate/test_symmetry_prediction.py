"""Rates of rankings and their controls, on symmetries whose answer is plain."""

import pytest

from common.data.store import Record
from common.evaluate.symmetry_controls import TemplateControls
from common.evaluate.symmetry_prediction import (
    Outcome,
    calibration_error,
    legal_answers,
    outcome_of,
    rates,
    reliability,
)
from common.language.prompt import Symmetry, write_answer
from common.prior import SymmetryCandidate, TemplatePrior
from tests.crystals import TEXTBOOK
from tests.training import textbook_records

RECORDS = {record.material_id: record for record in textbook_records()}
ROCK_SALT = RECORDS["rock salt NaCl"]


def candidate(space_group: int, sites: str, probability: float = 0.5) -> SymmetryCandidate:
    """Of NaCl; ``sites`` as "Na a, Cl b"."""
    numbers = {"Na": 11, "Cl": 17}
    pairs = tuple((numbers[s.split()[0]], s.split()[1]) for s in sites.split(", "))
    return SymmetryCandidate(space_group, pairs, 4, probability, "template")


# Rates


def test_place_of_the_truth() -> None:
    """Cl on 4a and Na on 4b is the same structure from the other origin."""
    ranked = [
        candidate(221, "Na a, Cl b", 0.6),
        candidate(221, "Na b, Cl a"),
        candidate(216, "Na a, Cl c"),
        candidate(225, "Na b, Cl a"),
    ]
    found = outcome_of(ROCK_SALT.crystal, ranked)
    assert found == Outcome(group=2, assignment=3, first=0.6, legal=True)


def test_absent_truth() -> None:
    assert outcome_of(ROCK_SALT.crystal, []) == Outcome(None, None, 0.0, True)
    found = outcome_of(ROCK_SALT.crystal, [candidate(225, "Na d, Cl e")])
    assert (found.group, found.assignment) == (0, None)


@pytest.mark.parametrize("sites", ["Na a, Cl a", "Na a, Cl e", "Na a, Cl b, Cl d"])
def test_illegal_candidates(sites: str) -> None:
    """A position without freedom twice, the wrong number of atoms."""
    assert not outcome_of(ROCK_SALT.crystal, [candidate(225, sites)]).legal


def test_rates_by_cutoff() -> None:
    outcomes = [
        Outcome(0, 0, 0.9, True),
        Outcome(0, 4, 0.9, True),
        Outcome(7, 19, 0.9, True),
        Outcome(None, None, 0.9, True),
    ]
    found = rates(outcomes, [False, True, True, True])
    assert found["space_group"] == {1: 0.5, 5: 0.5, 20: 0.75}
    assert found["assignment"] == {1: 0.25, 5: 0.5, 20: 0.75}
    assert found["assignment_new_formula"] == {1: 0.0, 5: 0.3333, 20: 0.6667}
    assert (found["rows"], found["seen_formula"]) == (4, 0.25)


def test_calibration_error() -> None:
    """Sure by 0.95 and right in three of four: off by 0.2; by 0.35 and never right: by 0.35."""
    sure = [Outcome(0, place, 0.95, True) for place in (0, 0, 0, None)]
    assert calibration_error(sure) == pytest.approx(0.2)
    unsure = [Outcome(0, None, 0.35, True)] * 4
    assert calibration_error(unsure) == pytest.approx(0.35)
    assert calibration_error(sure + unsure) == pytest.approx(0.275)
    bins = [(one.rows, one.sure, one.right) for one in reliability(sure + unsure)]
    assert bins == [(4, pytest.approx(0.35), 0), (4, pytest.approx(0.95), 3)]


def test_legal_answers() -> None:
    right = write_answer(Symmetry.of_crystal(ROCK_SALT.crystal))
    other = write_answer(Symmetry.of(216, [(11, "a"), (17, "c")]))
    wrong = write_answer(Symmetry.of(225, [(11, "a"), (17, "e")]))
    untrue = right.replace("units: 4", "units: 8")
    texts = [right, other, wrong, right.replace("4a", "4z"), untrue, ""]
    assert legal_answers(texts, [ROCK_SALT.crystal] * 6) == pytest.approx(1 / 3)


# Controls


@pytest.fixture(scope="module")
def controls() -> TemplateControls:
    """The textbook crystals, with NaCl twice under other names."""
    twice = [Record(f"again-{i}", ROCK_SALT.crystal) for i in range(2)]
    return TemplateControls([*RECORDS.values(), *twice])


@pytest.mark.parametrize("name", TEXTBOOK)
def test_controls_know_the_training_set(controls: TemplateControls, name: str) -> None:
    """The nearest composition is the row itself; the truth is among the templates."""
    record: Record = RECORDS[name]
    counts = record.crystal.formula_counts
    truth = Symmetry.of_crystal(record.crystal)
    same = [c.crystal for c in RECORDS.values() if c.reduced_formula == record.reduced_formula]
    polymorphs = {Symmetry.of_crystal(crystal) for crystal in same}
    nearest = controls.nearest(counts)[: len(polymorphs)]
    assert {Symmetry(c.space_group, c.z, c.sites) for c in nearest} == polymorphs
    assert outcome_of(record.crystal, controls.majority(counts, top=50)).assignment is not None
    assert truth in polymorphs


def test_majority_counts(controls: TemplateControls) -> None:
    """KBr is given what is most frequent for AB, whatever the elements."""
    first = controls.majority({19: 4, 35: 4})[0]
    assert Symmetry(first.space_group, first.z, first.sites) == Symmetry.of(
        225, [(19, "a"), (35, "b")]
    )
    shares = [c.probability for c in controls.majority({19: 1, 35: 1}, top=50)]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)


def test_controls_are_legal(controls: TemplateControls) -> None:
    for record in RECORDS.values():
        counts = record.crystal.formula_counts
        for ranked in (controls.majority(counts), controls.nearest(counts)):
            assert outcome_of(record.crystal, ranked).legal


def test_nothing_alike(controls: TemplateControls) -> None:
    assert controls.majority({11: 7, 17: 12}) == []
    assert controls.nearest({11: 7, 17: 12}) == []


def test_known_polymorphs_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What training has of TiO2; the others keep their order and their odds."""
    prior = TemplatePrior.load()
    counts = RECORDS["rutile TiO2"].crystal.formula_counts
    rows = prior.reference.rows_of_formula(counts)
    known = {Symmetry.of_crystal(prior.reference.crystal(row)) for row in rows}
    assert len(known) > 2
    plain = prior.rank(counts, top=20 + len(known))
    ranked = [Symmetry.of(c.space_group, c.sites) for c in plain]
    assert ranked[0] in known
    found = prior.rank_new(counts)
    symmetries = [Symmetry.of(c.space_group, c.sites) for c in found]
    rest = [c for c, symmetry in zip(plain, ranked, strict=True) if symmetry not in known]
    assert [c.sites for c in found] == [c.sites for c in rest]
    assert found[0].probability > rest[0].probability
    ratio = found[0].probability / found[1].probability
    assert ratio == pytest.approx(rest[0].probability / rest[1].probability)
    assert known.isdisjoint(symmetries)
    # Where there are no more than that, they are the last.
    monkeypatch.setattr(prior, "rank", lambda *_, **__: plain[:8])
    few = prior.rank_new(counts)
    assert len(few) == 8
    tail = [c for c in few if c.probability == 0]
    assert few[-len(tail) :] == tail
    assert [c.sites for c in tail] == [
        c.sites for c, symmetry in zip(plain[:8], ranked, strict=False) if symmetry in known
    ]
    assert sum(c.probability for c in few) <= 1


def test_unknown_compositions_are_ranked_as_ever() -> None:
    prior = TemplatePrior.load()
    counts = {55: 1, 118: 1}
    assert prior.reference.rows_of_formula(counts) == []
    assert prior.rank_new(counts) == prior.rank(counts)
