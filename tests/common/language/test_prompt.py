"""Questions and answers as text: what they look like, and that nothing is lost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.crystal.wyckoff import wyckoff_summary
from common.language.prompt import (
    AnswerError,
    Question,
    Symmetry,
    parse_answer,
    parse_question,
    write_answer,
    write_question,
)
from tests.symmetries import atom_counts, placements, symmetries

PEROVSKITE = Symmetry.of(221, [(38, "a"), (22, "b"), (8, "c")])
ANSWER = """\
Space group: 221 Pm-3m
Candidate positions: 1a 1b 3c 3d 6e 6f 8g 12h 12i 12j 24k 24l 24m 48n
Formula units: 1
Sites: Sr 1a Ti 1b O 3c"""
QUESTION = """\
Composition: Sr 1, Ti 1, O 3
Element Sr: group 2, period 5, electronegativity 0.95, radius 2.00, oxidation states 2
Element Ti: group 4, period 4, electronegativity 1.54, radius 1.40, oxidation states 4
Element O: group 16, period 2, electronegativity 3.44, radius 0.60, oxidation states -2
Band gap: 1.77 eV"""


def test_texts() -> None:
    assert write_answer(PEROVSKITE) == ANSWER
    question = Question.ask({22: 2, 8: 6, 38: 2}, {"band_gap": 1.7723})
    assert write_question(question) == QUESTION
    assert write_question(Question.ask({22: 1, 8: 2})).endswith("\nProperty: none")
    energy = Question.ask({11: 1, 17: 1}, {"formation_energy": -0.00001})
    assert write_question(energy).endswith("\nFormation energy: 0.000 eV/atom")
    assert ": group 18, period 2, electronegativity none," in write_question(Question.ask({10: 1}))


@given(placements(), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_equivalent_descriptions_have_one_text(placement, rng: random.Random) -> None:
    number, sites = placement
    summary = wyckoff_summary(number)
    relabelling = dict(zip(summary.letters, rng.choice(summary.permutations), strict=True))
    moved = [(z, relabelling[letter]) for z, letter in sites]
    rng.shuffle(moved)
    text = write_answer(Symmetry.of(number, sites))
    assert write_answer(Symmetry.of(number, moved)) == text
    parsed = parse_answer(text)
    assert parsed == parsed.canonical == Symmetry.of(number, sites)
    assert summary.canonical(parsed.sites) == summary.canonical(sites)
    assert write_answer(parsed) == text


@given(placements(4), placements(4))
@settings(max_examples=100)
def test_texts_are_equal_only_for_equivalent_sites(first, second) -> None:
    number, sites = first
    others = tuple(s for s in second[1] if s[1] in wyckoff_summary(number).letters) or sites
    canonical = wyckoff_summary(number).canonical
    same = canonical(sites) == canonical(others)
    assert (
        write_answer(Symmetry.of(number, sites)) == write_answer(Symmetry.of(number, others))
    ) == same


@given(symmetries())
def test_units_are_those_of_the_cell(symmetry: Symmetry) -> None:
    counts = Question.ask(atom_counts(symmetry)).counts
    assert {z: n * symmetry.units for z, n in counts.items()} == atom_counts(symmetry)


@given(
    st.dictionaries(st.integers(1, 118), st.integers(1, 120), min_size=1, max_size=8),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"band_gap": st.floats(0, 25)}),
        st.fixed_dictionaries({"formation_energy": st.floats(-10, 10)}),
    ),
)
def test_questions_come_back(counts, properties) -> None:
    question = Question.ask(counts, properties)
    assert parse_question(write_question(question)) == question
    for name, value in properties.items():
        assert question.target == name
        assert question.value == pytest.approx(value, abs=0.0051)


def test_training_set_comes_back(training_rows) -> None:
    assert len(training_rows) > 100
    for crystal, properties in training_rows:
        symmetry = Symmetry.of_crystal(crystal)
        assert parse_answer(write_answer(symmetry)) == symmetry
        own = [(site.atomic_number, site.letter) for site in crystal.sites]
        canonical = wyckoff_summary(crystal.space_group).canonical
        assert canonical(symmetry.sites) == canonical(own)
        assert atom_counts(symmetry) == crystal.formula_counts
        for name, value in properties.items():
            question = Question.ask(crystal.formula_counts, {name: value})
            assert parse_question(write_question(question)) == question


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Space group", "Group"),
        ("221 Pm-3m", "225 Fm-3m"),
        ("221 Pm-3m", "221 Pm-3"),
        ("221 Pm-3m", "231 Pm-3m"),
        (" 1b 3c", " 3c"),
        ("O 3c", "O 4c"),
        ("O 3c", "O 3z"),
        ("O 3c", "Xx 3c"),
        ("O 3c", "O"),
        ("O 3c", "O 3c "),
        ("O 3c", "O 3c\n"),
        ("Formula units: 1", "Formula units: 01"),
        ("Formula units: 1", "Formula units:"),
    ],
)
def test_other_text_is_no_answer(old: str, new: str) -> None:
    assert old in ANSWER
    with pytest.raises(AnswerError):
        parse_answer(ANSWER.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Sr 1", "Sr 0"),
        ("Sr 1", "Xx 1"),
        ("Sr 1, Ti 1", "Ti 1, Sr 1"),
        ("0.95", "0.96"),
        ("1.77 eV", "1.774 eV"),
        ("1.77 eV", "nan eV"),
        ("1.77", ""),
        ("Composition:", ""),
    ],
)
def test_other_text_is_no_question(old: str, new: str) -> None:
    assert old in QUESTION
    with pytest.raises(AnswerError):
        parse_question(QUESTION.replace(old, new))


def test_questions_that_make_no_sense() -> None:
    for properties in (
        {"band_gap": 1.0, "formation_energy": -1.0},
        {"colour": 1.0},
        {"band_gap": float("nan")},
    ):
        with pytest.raises(ValueError, match="property"):
            Question.ask({8: 1}, properties)
