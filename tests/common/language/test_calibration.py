"""How sure a model is of the truth, against enumeration and a known temperature."""

import math

import numpy as np
import pytest

from common.composition import MAX_PRIMITIVE_ATOMS, parse_formula
from common.crystal.wyckoff import wyckoff_summary
from common.language.calibration import (
    Choice,
    answer_nats,
    fit_sharpness,
    fit_temperature,
    true_choices,
)
from common.language.grammar import AnswerGrammar, TokenGrammar
from common.language.model import rank_questions, search_request, write_answers
from common.language.prompt import Question, Symmetry, parse_answer, write_answer
from common.language.search import SearchRequest
from common.language.tokenizer import SymmetryTokenizer
from tests.common.language.test_search import COMPACT, Synthetic, exact


class Model(Synthetic):
    """Random logits as a language model."""

    tokenizer = COMPACT
    name = "synthetic"
    analogues = 0

    def write(self, prompts, limit):
        """The answer that each question's own tokens seed, whatever it is asked."""
        return [COMPACT.encode(f" {len(prompt)}") for prompt in prompts]


GAN = Question.ask({31: 1, 7: 1})
WURTZITE = Symmetry.of(186, [(31, "b"), (7, "b")])


def test_truth_is_as_likely_as_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group whose normaliser relabels nothing, so that a symmetry is one answer."""
    assert len(wyckoff_summary(186).permutations) == 1

    def only_186(tokenizer, question, max_atoms):
        grammar = AnswerGrammar(parse_formula("GaN"), space_group=186, z=2)
        prompt = tuple(COMPACT.question_ids(Question.ask({11: 1, 17: 1})))
        return SearchRequest(prompt, TokenGrammar(grammar, COMPACT))

    monkeypatch.setattr("common.language.calibration.search_request", only_186)
    model = Model()
    wanted = exact("GaN", model, space_group=186, z=2)
    assert len(wanted) > 2
    for symmetry, probability in wanted.items():
        (path,) = true_choices(model, [GAN], [symmetry])
        assert math.exp(-answer_nats([path])) == pytest.approx(probability)
    assert model.reused


def test_illegal_truth() -> None:
    with pytest.raises(ValueError, match="token"):
        true_choices(Model(), [Question.ask({11: 1, 17: 2})], [WURTZITE])


def test_temperature_is_found() -> None:
    """Truths drawn at 1.7 from random scores."""
    rng = np.random.default_rng(0)
    choices = []
    for _ in range(4000):
        scores = 3 * rng.normal(size=6)
        weights = np.exp(scores / 1.7)
        choices.append([Choice(scores, int(rng.choice(6, p=weights / weights.sum())))])
    assert fit_temperature(choices) == pytest.approx(1.7, rel=0.05)
    assert answer_nats(choices, 1.7) < min(answer_nats(choices), answer_nats(choices, 3.0))


def test_ranking_many_questions() -> None:
    """More than are searched at a time: each as if it were alone."""
    metals = list(range(20, 31))
    questions = [Question.ask({z: 1}) for z in metals] * 7
    seen = []
    rankings = rank_questions(
        Model(), questions, top=2, max_atoms=2, progress=lambda *n: seen.append(n)
    )
    assert seen[-1] == (77, 77)
    for question, ranking in zip(questions, rankings, strict=True):
        assert {z for c in ranking.candidates for z, _ in c.sites} == set(question.counts)
    (alone,) = rank_questions(Model(), questions[70:71], top=2, max_atoms=2)
    assert alone.candidates == rankings[70].candidates


def test_answers_keep_their_order() -> None:
    """Questions are sorted by length and cut into batches in between."""
    questions = [Question.ask(dict.fromkeys(range(3, 3 + n), 1)) for n in (4, 1, 3, 2, 5)]
    texts = write_answers(Model(), questions, batch_size=2)
    assert texts == [f" {len(COMPACT.question_ids(question))}" for question in questions]


def test_longest_answers_are_written_whole(glm4: SymmetryTokenizer) -> None:
    """Of as many atoms as there may be, each on a site of its own, in GLM-4's small tokens."""
    symmetry = Symmetry.of(5, [(1, "c"), *[(14, "c")] * (MAX_PRIMITIVE_ATOMS - 1)])

    class Knowing(Model):
        tokenizer = glm4

        def write(self, prompts, limit):
            return [glm4.answer_ids(symmetry)[:-1][:limit] for _ in prompts]

    assert write_answers(Knowing(), [Question.ask({1: 1, 14: 119})]) == [write_answer(symmetry)]


def test_request_is_the_question() -> None:
    request = search_request(COMPACT, GAN)
    assert list(request.prompt) == COMPACT.question_ids(GAN)
    answer = COMPACT.answer_ids(WURTZITE)
    assert request.grammar.cursor(answer).is_done
    assert parse_answer(write_answer(WURTZITE)) == request.grammar.read(answer)


def test_sharpness_is_found_again() -> None:
    """Truths are drawn from the probabilities to a power, among those that are listed."""
    rng = np.random.default_rng(3)
    rankings: list[tuple[list[float], int | None]] = []
    for _ in range(4000):
        own = rng.dirichlet([0.5] * 4)
        powers = own**1.6
        rankings.append((list(own), int(rng.choice(4, p=powers / powers.sum()))))
    assert fit_sharpness(rankings) == pytest.approx(1.6, rel=0.05)
    beside = [([0.9, 0.1], None), ([0.7, 0.0, 0.2], 1), ([], None)]
    assert fit_sharpness([*rankings, *beside]) == fit_sharpness(rankings)
    assert fit_sharpness(beside) == 1.0
