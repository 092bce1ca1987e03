"""A loaded symmetry language model, of whatever framework, and what it ranks."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from common.composition import MAX_PRIMITIVE_ATOMS, Formula
from common.language.analogues import AnalogueIndex
from common.language.grammar import AnswerGrammar, TokenGrammar
from common.language.prompt import Question
from common.language.search import Progress, Ranking, Scorer, SearchRequest, rank_answers
from common.language.tokenizer import SymmetryTokenizer
from common.prior import TemplatePrior, load_prior

#: Questions that are searched side by side; what bounds memory.
_CHUNK = 64
#: Tokens of an answer that is written without constraint, at most. With GLM-4's tokenizer an answer
#: of as many atoms as there may be, each on a site of its own, has about 400.
LONGEST_ANSWER = 512


class LanguageModel(Scorer, Protocol):
    """What scores sequences for the search, with its tokenizer.

    Attributes:
        tokenizer: its own.
        name: of the weights, for reports.
        analogues: how many of them it was trained to be told of.
    """

    tokenizer: SymmetryTokenizer
    name: str
    analogues: int

    def write(self, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        """Answers without any constraint, always the likeliest token; without the end's token.

        Args:
            prompts: tokens of questions.
            limit: tokens of an answer, at most.
        """
        ...


def as_trained(
    model: LanguageModel,
    questions: Iterable[Question],
    known: bool = False,
    prior: TemplatePrior | None = None,
) -> list[Question]:
    """Questions with what the model was trained to be told of known crystals.

    Args:
        model: of whatever training; where it was without analogues, questions stay as they are.
        questions: without any.
        known: whether a symmetry is wanted that no known polymorph has.
        prior: of the known crystals; the shipped one without it.
    """
    if not model.analogues:
        return list(questions)
    index = AnalogueIndex.of(prior or load_prior(), model.analogues)
    return [index.tell(question, known=known) for question in questions]


def search_request(
    tokenizer: SymmetryTokenizer,
    question: Question,
    max_atoms: int = MAX_PRIMITIVE_ATOMS,
    grammar: AnswerGrammar | None = None,
) -> SearchRequest:
    """A question in tokens, with the grammar of all its legal answers.

    Args:
        tokenizer: of the model.
        question: the composition, with or without a target property.
        max_atoms: in the primitive cell.
        grammar: of fewer answers, in place of all with so many atoms.
    """
    if grammar is None:
        formula = Formula(tuple(sorted(question.formula)))
        grammar = AnswerGrammar(formula, max_atoms=max_atoms)
    allowed = TokenGrammar(grammar, tokenizer)
    return SearchRequest(tuple(tokenizer.question_ids(question)), allowed)


def rank_questions(
    model: LanguageModel,
    questions: Sequence[Question],
    *,
    top: int = 20,
    temperature: float = 1.0,
    max_atoms: int = MAX_PRIMITIVE_ATOMS,
    grammars: Sequence[AnswerGrammar] | None = None,
    known: bool = False,
    prior: TemplatePrior | None = None,
    progress: Progress | None = None,
) -> list[Ranking]:
    """The likeliest symmetries that the compositions of some questions can legally have.

    Args:
        model: what ranks.
        questions: compositions, with or without a target property.
        top, temperature: as in ``rank_answers``.
        max_atoms: in the primitive cell.
        grammars: of the answers to each question, where not all legal ones will do.
        known, prior: as in ``as_trained``.
        progress: called with the questions that are answered, and all.
    """
    rankings: list[Ranking] = []
    allowed: Sequence[AnswerGrammar | None] = grammars or [None] * len(questions)
    rows = list(zip(as_trained(model, questions, known, prior), allowed, strict=True))
    for begin in range(0, len(rows), _CHUNK):
        chunk = rows[begin : begin + _CHUNK]
        requests = [search_request(model.tokenizer, q, max_atoms, g) for q, g in chunk]
        rankings += rank_answers(requests, model, top=top, temperature=temperature)
        if progress is not None:
            progress(len(rankings), len(questions))
    return rankings


def write_answers(
    model: LanguageModel,
    questions: Sequence[Question],
    *,
    batch_size: int = 64,
    known: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """What the model answers without any constraint, in the order of the questions.

    Args:
        model: what writes.
        questions: those of about the same length are answered together.
        batch_size: of these.
        known: as in ``as_trained``.
        progress: called with the questions that are answered, and all.
    """
    told = as_trained(model, questions, known)
    prompts = [model.tokenizer.question_ids(question) for question in told]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, str] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        written = model.write([prompts[index] for index in chosen], LONGEST_ANSWER)
        texts = map(model.tokenizer.decode, written)
        answers |= dict(zip(chosen, texts, strict=True))
        if progress is not None:
            progress(len(answers), len(order))
    return [answers[index] for index in range(len(order))]
