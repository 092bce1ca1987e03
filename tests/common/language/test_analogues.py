"""What questions tell of known crystals: right, legal, in order, and never the answer itself."""

from dataclasses import replace
from itertools import pairwise

import pytest

from common.composition import parse_formula
from common.data.store import Record
from common.evaluate.symmetry_prediction import is_legal
from common.language.analogues import AnalogueIndex
from common.language.examples import Examples
from common.language.prompt import (
    AnswerError,
    Question,
    Symmetry,
    parse_answer,
    parse_question,
    write_answer,
    write_question,
)
from common.language.tokenizer import UNKNOWN, SymmetryTokenizer
from common.prior import TemplatePrior
from common.templates import reduce_counts
from tests.training import textbook_records

PEROVSKITE = Symmetry.of(221, [(38, "a"), (22, "b"), (8, "c")])
FORMULAS = ("SrTiO3", "NaCl", "MgAl2O4", "BaLaCuO4", "Fe2O3", "KCuF3", "LiCoO2", "Sr2FeMoO6")


@pytest.fixture(scope="module")
def index() -> AnalogueIndex:
    return AnalogueIndex.shipped(6)


def ask(formula: str) -> Question:
    return Question.ask(dict(parse_formula(formula).counts))


def test_perovskites_are_told_of(index: AnalogueIndex) -> None:
    question = index.tell(ask("SrTiO3"), known=False)
    assert not question.analogues.known
    first = question.analogues.similar[0]
    assert first.symmetry == PEROVSKITE
    assert first.elements != (38, 22, 8)
    text = write_question(question).splitlines()
    assert text[4].startswith(f"Analogue: {first.percent} 221 Pm-3m 1, Sr 1a Ti 1b O 3c as ")


def test_known_polymorphs_are_no_analogues(index: AnalogueIndex) -> None:
    question = index.tell(ask("SrTiO3"), known=True)
    assert PEROVSKITE in question.analogues.known
    assert "\nKnown: 221 Pm-3m 1, Sr 1a Ti 1b O 3c\n" in write_question(question)
    similar = [analogue.symmetry for analogue in question.analogues.similar]
    assert len(similar) == 6
    assert not set(similar) & set(question.analogues.known)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("known", [False, True])
def test_what_is_told_is_legal_ordered_and_comes_back(
    index: AnalogueIndex,
    compact: SymmetryTokenizer,
    glm4: SymmetryTokenizer,
    formula: str,
    known: bool,
) -> None:
    question = index.tell(ask(formula), known=known)
    told = question.analogues
    symmetries = [*told.known, *(analogue.symmetry for analogue in told.similar)]
    assert len(set(symmetries)) == len(symmetries) > 3
    for symmetry in symmetries:
        assert symmetry == symmetry.canonical
        assert is_legal(symmetry.space_group, symmetry.sites, question.counts)
    percents = [analogue.percent for analogue in told.similar]
    assert percents == sorted(percents, reverse=True)
    assert 0 < sum(percents) <= 103  # each is rounded
    text = write_question(question)
    assert parse_question(text) == question
    for tokenizer in (compact, glm4):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert compact.tokenizer.token_to_id(UNKNOWN) not in compact.encode(text)


def test_a_crystal_is_not_told_of_itself() -> None:
    """With itself left out nothing is known of a composition that has one crystal."""
    records = textbook_records()
    index = AnalogueIndex(TemplatePrior.fit(records), 4)
    alone = [
        r for r in records if [s.reduced_formula for s in records].count(r.reduced_formula) < 2
    ]
    assert len(alone) > 5
    for record in alone:
        question = Question.ask(record.crystal.formula_counts)
        told = index.tell(question, known=True, leave_out=record.material_id).analogues
        assert told.known == ()
        assert all(a.elements != tuple(question.counts) for a in told.similar)
        told = index.tell(question, known=True).analogues
        assert told.known == (Symmetry.of_crystal(record.crystal),)


def test_votes_are_those_of_other_compositions() -> None:
    """As if the composition's own crystals had never been seen, but for the fitted weights."""
    shipped = TemplatePrior.load()
    counts = dict(parse_formula("SrTiO3").counts)
    votes = shipped.votes(counts, top=5)
    rows = set(shipped.reference.rows_of_formula(counts))
    assert rows
    keep = [row for row in range(len(shipped.reference)) if row not in rows]
    without = TemplatePrior(shipped._table.take(keep), shipped.metadata)
    expected = without.rank(counts, top=5)
    assert [(v.space_group, v.sites) for v in votes] == [(c.space_group, c.sites) for c in expected]
    assert [v.share for v in votes] == pytest.approx([c.probability for c in expected])
    assert shipped.rank(counts, top=5) != expected


def test_examples_alternate_between_what_is_known(compact: SymmetryTokenizer) -> None:
    records = textbook_records()
    index = AnalogueIndex(TemplatePrior.fit(records), 3)
    examples = Examples(records, compact, ("none", "band_gap"), 2000, index)
    plain = Examples(records, compact, ("none", "band_gap"), 2000)
    told, asked = [texts(e, records, compact) for e in (examples, plain)]
    assert all("Analogue:" not in text and "Known:" not in text for text in asked)
    assert any("Analogue:" in text for text in told)
    assert len(told) == 2 * len(asked) == 4 * len(records)


@pytest.mark.parametrize("real", [False, True], ids=["compact", "glm4"])
def test_rehearsals_are_analogues_told_of(
    compact: SymmetryTokenizer, glm4: SymmetryTokenizer, index: AnalogueIndex, real: bool
) -> None:
    """The row's own answer counts whole, as without them, and the others all but their group."""
    tokenizer = glm4 if real else compact
    records = textbook_records()
    plain, more = (
        Examples(records, tokenizer, ("none", "band_gap"), 2000, index, count, 8192)
        for count in (0, 2)
    )
    turns_differ = []
    for record, forms, longer in zip(records, plain._forms, more._forms, strict=True):
        begins: list[tuple[list[Symmetry], list[Symmetry]]] = []
        for own, example in zip(forms, longer, strict=True):
            size = len(own.tokens)
            assert example.tokens[:size].tolist() == own.tokens.tolist()
            assert example.counted[:size].tolist() == own.counted.tolist()
            start = int(own.counted.argmax())
            text = tokenizer.decode(own.tokens[:start])
            question = parse_question(text[text.index("Composition") :].rstrip("\n"))
            answer = Symmetry.of_crystal(record.crystal)
            others = [a.symmetry for a in question.analogues.similar if a.symmetry != answer]
            turns = tokenizer.decode(example.tokens[size:]).split("\nSpace group:")[1:]
            told = [parse_answer(f"Space group:{turn}") for turn in turns]
            assert len(set(told)) == len(told) == min(2, len(others))
            assert set(told) <= set(others)
            counted = tokenizer.decode(example.tokens[size:][example.counted[size:]])
            assert counted == "".join(
                write_answer(s)[write_answer(s).index("\nCandidate") :] for s in told
            )
            begins.append((others, told))
        # Questions that tell of the same analogues do not rehearse the same ones.
        for (others, told), (same, next_told) in pairwise(begins):
            if others == same and len(others) > 1:
                turns_differ.append(told != next_told)
    assert len(turns_differ) > len(records)
    assert all(turns_differ)


def test_rehearsals_fit(compact: SymmetryTokenizer, index: AnalogueIndex) -> None:
    """As many as the network has positions for."""
    records = textbook_records()
    whole = Examples(records, compact, ("none",), 2000, index, 6, 8192)
    short = Examples(records, compact, ("none",), 2000, index, 6, 200)
    none = Examples(records, compact, ("none",), 2000, index)
    assert short._lengths[none._lengths <= 200].max() <= 200 < whole._lengths.max()
    assert (short._lengths >= none._lengths).all()
    assert (short._lengths > none._lengths).any()


def texts(examples: Examples, records: list[Record], tokenizer: SymmetryTokenizer) -> set[str]:
    """Row and question of every form of every row, over as many epochs as there are forms."""
    found = set()
    for epoch in range(4):
        for rows, forms in examples.epoch(0, epoch):
            for row, form in zip(rows, forms, strict=True):
                example = examples._forms[row][form]
                text = tokenizer.decode(example.tokens[: int(example.counted.argmax())])
                question = parse_question(text[text.index("Composition") :].rstrip("\n"))
                counts = records[row].crystal.formula_counts
                assert question.counts == reduce_counts(counts)[0]
                found.add(f"{row} {form} {text}")
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Analogue: ", "Analogue: x"),
        ("221 Pm-3m 1,", "221 Pm-3m"),
        ("221 Pm-3m", "231 Pm-3m"),
        (" 3c as", " 4c as"),
        (" as ", " like "),
    ],
)
def test_other_text_is_no_analogue(index: AnalogueIndex, old: str, new: str) -> None:
    text = write_question(index.tell(ask("SrTiO3"), known=False))
    assert old in text
    with pytest.raises(AnswerError):
        parse_question(text.replace(old, new, 1))


def test_long_questions_are_cut(compact: SymmetryTokenizer) -> None:
    """However many sites analogues have, questions stay short enough for the network."""
    index = AnalogueIndex.shipped(40)
    question = index.tell(ask("Ba2YCu3O7"), known=True)
    assert len(compact.question_ids(question)) < 400
    unasked = replace(question, analogues=type(question.analogues)())
    assert len(compact.question_ids(unasked)) < 120
