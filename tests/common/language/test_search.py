"""Best-first search against enumeration: every legal answer, scored by a small synthetic model."""

import math
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from common.composition import parse_formula
from common.language.grammar import AnswerGrammar, TokenGrammar
from common.language.prompt import Question, Symmetry, parse_answer
from common.language.search import Ranking, SearchRequest, rank_answers
from common.language.tokenizer import SymmetryTokenizer, compact_tokenizer
from tests.common.language.test_grammar import all_answers

COMPACT = compact_tokenizer()
PROMPT = tuple(COMPACT.question_ids(Question.ask({11: 1, 17: 1})))


class Synthetic:
    """Random logits that depend on the whole sequence; counts its calls and checks its handles."""

    def __init__(
        self, head_size: int = COMPACT.head_size, sharpness: float = 2.0, seed: int = 0
    ) -> None:
        self.head_size = head_size
        self.sharpness = sharpness
        self.seed = seed
        self.batches: list[int] = []
        self.reused = 0

    def logits(self, sequence: Sequence[int]) -> NDArray[np.float64]:
        seed = self.seed + zlib.crc32(np.array(sequence, dtype=np.int32).tobytes())
        return self.sharpness * np.random.default_rng(seed).normal(size=self.head_size)

    def __call__(self, sequences, handles):
        self.batches.append(len(sequences))
        for sequence, handle in zip(sequences, handles, strict=True):
            if handle is not None:
                assert tuple(sequence[: len(handle)]) == handle
                assert len(handle) < len(sequence)
                self.reused += 1
        return np.stack([self.logits(s) for s in sequences]), [tuple(s) for s in sequences]


def request(
    text: str, prompt: tuple[int, ...] = PROMPT, tokenizer: SymmetryTokenizer = COMPACT, **fixed
) -> SearchRequest:
    grammar = AnswerGrammar(parse_formula(text), **fixed)
    return SearchRequest(prompt, TokenGrammar(grammar, tokenizer))


def exact(
    text: str,
    model: Synthetic,
    temperature: float = 1.0,
    tokenizer: SymmetryTokenizer = COMPACT,
    **fixed,
) -> dict[Symmetry, float]:
    """Probability of every symmetry, the likeliest first, token by token over all answers."""
    grammar = AnswerGrammar(parse_formula(text), **fixed)
    tokens = TokenGrammar(grammar, tokenizer)
    masses: Counter[Symmetry] = Counter()
    for answer in all_answers(grammar):
        ids = [*tokenizer.encode(answer), tokenizer.end_id]
        log_prob, cursor = 0.0, tokens.start
        for i, token in enumerate(ids):
            mask = tokens.mask(cursor)
            if mask.sum() > 1:
                scores = np.where(mask, model.logits([*PROMPT, *ids[:i]]) / temperature, -np.inf)
                log_prob += scores[token] - np.log(np.exp(scores).sum())
            cursor = tokens.advance(cursor, token)
        masses[parse_answer(answer).canonical] += math.exp(log_prob)
    return dict(sorted(masses.items(), key=lambda item: -item[1]))


def found(ranking: Ranking) -> dict[Symmetry, float]:
    return {Symmetry(c.space_group, c.z, c.sites): c.probability for c in ranking.candidates}


CASES = [
    ("NaCl", {"max_atoms": 2}),
    ("NaCl", {"space_group": 2, "max_atoms": 4}),
    ("CaF2", {"space_group": 47, "max_atoms": 3}),
    ("NaCl", {"space_group": 225, "max_atoms": 30}),
    ("Si", {"space_group": 230, "max_atoms": 40}),
]


@pytest.mark.parametrize(("text", "fixed"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_certain_search_is_exact(text: str, fixed, temperature: float) -> None:
    model = Synthetic()
    expected = exact(text, model, temperature, **fixed)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-9)
    (ranking,) = rank_answers(
        [request(text, **fixed)],
        model,
        top=10,
        temperature=temperature,
        certain=True,
        budget=10**6,
    )
    assert ranking.proven
    assert list(found(ranking)) == list(expected)[:10]
    for symmetry, probability in found(ranking).items():
        missing = 1 - ranking.seen
        assert expected[symmetry] - missing - 1e-9 <= probability <= expected[symmetry] + 1e-9


def test_all_symmetries_and_all_probability_are_found() -> None:
    model = Synthetic()
    expected = exact("NaCl", model, space_group=225, max_atoms=8)
    (ranking,) = rank_answers(
        [request("NaCl", space_group=225, max_atoms=8)], model, top=1000, certain=True
    )
    assert ranking.proven
    assert ranking.seen == pytest.approx(1)
    assert found(ranking) == pytest.approx(expected)
    # Rock salt can be written in two ways, which are one symmetry.
    rock_salt = Symmetry.of(225, [(11, "a"), (17, "b")])
    answers = list(all_answers(AnswerGrammar(parse_formula("NaCl"), space_group=225, max_atoms=8)))
    assert sum(parse_answer(answer).canonical == rock_salt for answer in answers) == 2
    assert rock_salt in found(ranking)
    assert len(found(ranking)) < len(answers)


@pytest.mark.parametrize("seed", range(5))
def test_sharp_models_are_searched_quickly(seed: int) -> None:
    """What a trained model is like: far fewer calls, and what is missing is known."""
    model = Synthetic(sharpness=8.0, seed=seed)
    expected = exact("NaCl", model, max_atoms=2)
    (ranking,) = rank_answers([request("NaCl", max_atoms=2)], model, top=5)
    (patient,) = rank_answers([request("NaCl", max_atoms=2)], model, top=5, certain=True)
    assert list(found(patient)) == list(expected)[:5]
    assert list(found(ranking))[:2] == list(expected)[:2]
    for symmetry, probability in found(ranking).items():
        assert expected[symmetry] + ranking.seen - 1 - 1e-9 <= probability
        assert probability <= expected[symmetry] + 1e-9
    assert ranking.scored < patient.scored < len(expected)
    assert not rank_answers([request("NaCl", max_atoms=2)], model, top=5, budget=3)[0].proven


@pytest.mark.parametrize(("width", "batch_size"), [(1, 1), (3, 4), (16, 256)])
def test_batches_change_nothing(width: int, batch_size: int) -> None:
    texts = ["NaCl", "CaF2", "SrTiO3", "Fe"]
    requests = [request(text, (*PROMPT, i), max_atoms=6) for i, text in enumerate(texts)]
    model = Synthetic(sharpness=4.0)
    together = rank_answers(requests, model, top=4, width=width, batch_size=batch_size)
    assert max(model.batches) <= batch_size
    assert model.reused > 0
    for one, ranking in zip(requests, together, strict=True):
        (alone,) = rank_answers([one], Synthetic(sharpness=4.0), top=4)
        assert list(found(alone)) == list(found(ranking))
        assert found(alone) == pytest.approx(found(ranking), rel=0.2)


def test_glm4_tokens_are_searched_exactly(glm4: SymmetryTokenizer) -> None:
    model = Synthetic(glm4.head_size)
    fixed = {"space_group": 225, "max_atoms": 10}
    expected = exact("NaCl", model, tokenizer=glm4, **fixed)
    one = request("NaCl", tokenizer=glm4, **fixed)
    (ranking,) = rank_answers([one], model, top=5, certain=True)
    assert list(found(ranking)) == list(expected)[:5]


def test_one_answer_needs_no_model() -> None:
    (ranking,) = rank_answers(
        [request("NaCl", space_group=225, sites=None, z=4, max_atoms=2)], Synthetic(), top=3
    )
    assert ranking.seen == pytest.approx(1)
    (only,) = rank_answers([request("W", space_group=229, max_atoms=1)], Synthetic(), top=3)
    assert (only.scored, only.proven, only.seen) == (0, True, 1)
    (candidate,) = only.candidates
    assert (candidate.sites, candidate.z, candidate.probability) == (((74, "a"),), 2, 1)


def test_models_without_finite_scores_are_refused() -> None:
    def broken(sequences, handles):
        return np.full((len(sequences), COMPACT.head_size), np.nan), [None] * len(sequences)

    with pytest.raises(ValueError, match="finite"):
        rank_answers([request("NaCl", max_atoms=2)], broken)


def test_impossible_tokens_are_left_out() -> None:
    def single_minded(sequences, handles):
        scores = np.full((len(sequences), COMPACT.head_size), -np.inf)
        scores[:, COMPACT.answer_ids(Symmetry.of(225, [(11, "a"), (17, "b")]))] = 0.0
        return scores, [None] * len(sequences)

    (ranking,) = rank_answers([request("NaCl", max_atoms=2)], single_minded, top=2)
    assert [c.space_group for c in ranking.candidates] == [225]
    assert ranking.proven
    assert ranking.candidates[0].probability == pytest.approx(1)
