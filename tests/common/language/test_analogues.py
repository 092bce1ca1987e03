"""What questions tell of known crystals: right, legal, in order, and never the answer itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import numpy as np
import pytest

from common.composition import parse_formula
from common.data.store import Record
from common.language.analogues import AnalogueIndex
from common.language.examples import IGNORED, Examples, Int, Told
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
from common.legal_sites import legal_units
from common.prior import TemplatePrior
from common.prior_fit import fit_prior
from common.templates import reduce_counts
from common.training import Shard
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
        assert legal_units(symmetry.space_group, symmetry.sites, question.counts)
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
    index = AnalogueIndex(fit_prior(records), 4)
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
    index = AnalogueIndex(fit_prior(records), 3)
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


# Analogues left out


@dataclass(frozen=True)
class Asked:
    """A row in a batch: whether it counts, its question, the answer, and the rehearsed ones."""

    row: int
    form: int
    question: Question
    answer: Symmetry
    rehearsed: list[Symmetry]


def asked_in(
    batch: tuple[Int, Int, Told], examples: Examples, tokenizer: SymmetryTokenizer
) -> Iterator[Asked]:
    """What tokens and targets of a batch say; their forms are checked on the way."""
    rows, forms, told = batch
    data = examples.collate(rows, forms, *Shard().rows(len(rows)), told)
    assert data.answer_tokens == (data.targets != IGNORED).sum()
    assert data.tokens.shape[1] <= examples.length(rows, forms)
    for row, form, tokens, targets in zip(rows, forms, data.tokens, data.targets, strict=True):
        counted = targets != IGNORED
        assert (targets[:-1][counted[:-1]] == tokens[1:][counted[:-1]]).all()
        begin = int(counted.argmax()) + 1
        text = tokenizer.decode(tokens[:begin])
        question = parse_question(text[text.index("Composition") :].rstrip("\n"))
        first, *others = tokenizer.decode(tokens[begin:]).split("\nSpace group:")
        counts = tokenizer.decode(targets[counted])
        assert counts == first + "".join(o[o.index("\nCandidate") :] for o in others)
        yield Asked(
            int(row),
            int(form),
            question,
            parse_answer(first),
            [parse_answer(f"Space group:{other}") for other in others],
        )


def dropping(
    examples: Examples, tokenizer: SymmetryTokenizer, share: float, epochs: range
) -> list[Asked]:
    """All that is asked in some epochs."""
    size = len(examples.epoch(3, 0))
    assert all(len(examples.epoch(3, epoch)) == size for epoch in epochs)
    batches = examples.batches(3, size * epochs.start, share)
    batches = islice(batches, size * len(epochs))
    return [asked for batch in batches for asked in asked_in(batch, examples, tokenizer)]


@pytest.mark.parametrize("real", [False, True], ids=["compact", "glm4"])
def test_analogues_left_out(
    compact: SymmetryTokenizer, glm4: SymmetryTokenizer, index: AnalogueIndex, real: bool
) -> None:
    """With their rehearsals; all else stays, and the tokens are those of the shorter question."""
    tokenizer = glm4 if real else compact
    records = textbook_records()
    examples = Examples(records, tokenizer, ("none", "band_gap"), 1, index, 2, 8192)
    whole = dropping(examples, tokenizer, 0.0, range(1))
    short = dropping(examples, tokenizer, 0.4, range(1))
    dropped = kept = rehearsed = 0
    for full, less in zip(whole, short, strict=True):
        assert (full.row, full.form, full.answer) == (less.row, less.form, less.answer)
        all_of_it, told = full.question.analogues, less.question.analogues
        assert less.question == replace(full.question, analogues=told)
        assert told.known == all_of_it.known
        assert list(told.similar) == [a for a in all_of_it.similar if a in told.similar]
        symmetries = [analogue.symmetry for analogue in told.similar]
        assert less.rehearsed == [s for s in full.rehearsed if s in symmetries]
        example = examples._forms[less.row][less.form]
        numbers = [a in told.similar for a in all_of_it.similar]
        padded = np.array(numbers + [False] * (examples._analogues - len(numbers)))
        tokens = example.without(padded).tokens.tolist()
        ids = tokenizer.question_ids(less.question)
        assert tokens[: len(ids)] == ids
        kept += len(told.similar)
        dropped += len(all_of_it.similar) - len(told.similar)
        rehearsed += len(less.rehearsed)
    assert dropped / (dropped + kept) == pytest.approx(0.4, abs=0.1)
    assert rehearsed < sum(len(full.rehearsed) for full in whole)
    assert any(full.question.analogues.known for full in whole)


def test_others_are_left_out_in_every_epoch(
    compact: SymmetryTokenizer, index: AnalogueIndex
) -> None:
    """Always the same ones in the same epoch, also when it is begun in the middle."""
    records = textbook_records()
    examples = Examples(records, compact, ("none",), 1, index)
    first, again, other = (
        {asked.row: asked.question for asked in dropping(examples, compact, 0.5, epochs)}
        for epochs in (range(2), range(2), range(2, 4))
    )
    assert first == again
    assert sum(first[row].analogues != other[row].analogues for row in first) > len(first) / 2
    plan = islice(examples.batches(3, 0, 0.5), 30)
    for (rows, _, told), (same, _, same_told) in zip(
        list(plan)[20:], islice(examples.batches(3, 20, 0.5), 10), strict=True
    ):
        np.testing.assert_array_equal(rows, same)
        np.testing.assert_array_equal(told, same_told)


def test_all_or_none_left_out(compact: SymmetryTokenizer, index: AnalogueIndex) -> None:
    records = textbook_records()
    examples = Examples(records, compact, ("none",), 1, index, 2, 8192)
    for asked in dropping(examples, compact, 1.0, range(1)):
        assert asked.question.analogues.similar == ()
        assert asked.rehearsed == []
    assert all(told is None for _, _, told in islice(examples.batches(3, 0), 60))


def test_processes_leave_out_the_same(compact: SymmetryTokenizer, index: AnalogueIndex) -> None:
    """Their shares have one length and make the batch."""
    examples = Examples(textbook_records(), compact, ("none",), 2500, index, 2, 8192)
    shorter = 0
    for rows, forms, told in islice(examples.batches(0, 0, 0.8), 10):
        whole = examples.collate(rows, forms, *Shard().rows(len(rows)), told)
        shorter += whole.tokens.shape[1] < examples.length(rows, forms)
        tokens = []
        for rank in range(3):
            part = examples.collate(rows, forms, *Shard(rank, 3).rows(len(rows)), told)
            assert part.tokens.shape[1] == whole.tokens.shape[1]
            assert (part.answers, part.answer_tokens) == (whole.answers, whole.answer_tokens)
            tokens += part.tokens[(part.targets != IGNORED).any(axis=1)].tolist()
        assert tokens == whole.tokens.tolist()
    assert shorter > 5


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
