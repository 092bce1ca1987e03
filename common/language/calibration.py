"""How likely a model finds true answers, and what makes them likeliest: temperature, sharpness."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from common.composition import MAX_PRIMITIVE_ATOMS
from common.language.grammar import TokenGrammar
from common.language.model import LanguageModel, as_trained, search_request
from common.language.prompt import Question, Symmetry
from common.language.search import Progress

_CHUNK = 64
#: Natural logarithms of the temperatures and exponents that are tried.
_RANGE = (-2.0, 2.0)


@dataclass(frozen=True)
class Choice:
    """One choice on the way to a true answer: scores of what is allowed there, and the true one."""

    scores: NDArray[np.float64]
    truth: int

    def nats(self, temperature: float = 1.0) -> float:
        """Minus the logarithm of the true one's probability."""
        scaled = self.scores / temperature
        highest = scaled.max()
        return float(highest + np.log(np.exp(scaled - highest).sum()) - scaled[self.truth])


@dataclass(frozen=True)
class _Place:
    """Where a true answer makes a choice: what stands before it, what may follow, what does."""

    sequence: tuple[int, ...]
    allowed: tuple[int, ...]
    truth: int


def true_choices(
    model: LanguageModel,
    questions: Sequence[Question],
    symmetries: Sequence[Symmetry],
    *,
    max_atoms: int = MAX_PRIMITIVE_ATOMS,
    known: bool = False,
    progress: Progress | None = None,
) -> list[list[Choice]]:
    """The choices on the way to each question's true answer, as the search would meet them.

    Args:
        model: what scores.
        questions: compositions, with or without a target property.
        symmetries: the true one of each.
        max_atoms: in the primitive cell.
        known: as in ``as_trained``.
        progress: called with the questions that are done, and all.

    Raises:
        ValueError: if a symmetry is none of its question's composition.
    """
    found: list[list[Choice]] = []
    for begin in range(0, len(questions), _CHUNK):
        chunk = as_trained(model, questions[begin : begin + _CHUNK], known)
        rows = zip(chunk, symmetries[begin:], strict=False)
        paths = []
        for question, symmetry in rows:
            request = search_request(model.tokenizer, question, max_atoms)
            answer = model.tokenizer.answer_ids(symmetry)
            paths.append(list(_places(request.prompt, request.grammar, answer)))
        found += _scored(model, paths)
        if progress is not None:
            progress(len(found), len(questions))
    return found


def _places(
    prompt: tuple[int, ...], grammar: TokenGrammar, answer: Sequence[int]
) -> Iterator[_Place]:
    cursor = grammar.start
    for index, token in enumerate(answer):
        if not cursor.forced:
            allowed = cursor.allowed
            truth = allowed.index(token) if token in allowed else -1  # which advance refuses
            yield _Place((*prompt, *answer[:index]), allowed, truth)
        cursor = grammar.advance(cursor, token)


def _scored(model: LanguageModel, paths: Sequence[Sequence[_Place]]) -> list[list[Choice]]:
    """All paths side by side, each place with what the model kept of the one before it."""
    found: list[list[Choice]] = [[] for _ in paths]
    handles: dict[int, Any] = {}
    for depth in range(max(map(len, paths))):
        rows = [row for row, path in enumerate(paths) if len(path) > depth]
        places = [paths[row][depth] for row in rows]
        scores, kept = model([p.sequence for p in places], [handles.get(row) for row in rows])
        for row, place, values, handle in zip(rows, places, scores, kept, strict=True):
            handles[row] = handle
            own = np.asarray(values, dtype=np.float64)[list(place.allowed)]
            found[row].append(Choice(own, place.truth))
    return found


def answer_nats(choices: Sequence[Sequence[Choice]], temperature: float = 1.0) -> float:
    """Mean over answers of minus the logarithm of their probability under the grammar."""
    return float(np.mean([sum(c.nats(temperature) for c in path) for path in choices]))


def fit_temperature(choices: Sequence[Sequence[Choice]]) -> float:
    """The temperature at which the true answers are likeliest."""

    def nats(logarithm: float) -> float:
        return answer_nats(choices, float(np.exp(logarithm)))

    return float(np.exp(minimize_scalar(nats, bounds=_RANGE, method="bounded").x))


def fit_sharpness(rankings: Sequence[tuple[Sequence[float], int | None]]) -> float:
    """The exponent with which the true symmetries are likeliest; see ``common.ranking.sharpened``.

    Args:
        rankings: probabilities of the listed symmetries, and the place of the true one, None if it
            is not listed, which no exponent changes.

    Returns:
        the exponent; 1 if no ranking lists the true one.
    """
    listed = []
    for own, place in rankings:
        if place is not None and own[place] > 0:
            likely = np.log([p for p in own if p > 0])
            listed.append((likely, math.log(own[place])))
    if not listed:
        return 1.0

    def nats(logarithm: float) -> float:
        exponent = math.exp(logarithm)
        parts = (np.logaddexp.reduce(exponent * own) - exponent * true for own, true in listed)
        return float(sum(parts))

    return float(np.exp(minimize_scalar(nats, bounds=_RANGE, method="bounded").x))
