"""The likeliest symmetries of a language model, each with its probability: best-first search.

The distribution is that of sampling under the grammar: at every choice the model's probabilities
are divided among the tokens that are allowed there, and what is determined costs nothing. So the
probabilities of all legal answers sum to one, and what the search has not seen is known exactly.
Answers that describe the same symmetry (relabelled by the group's normaliser) are added up.

The model is a callback, and knows nothing of the search; see ``Scorer``.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.language.grammar import Cursor, TokenGrammar
from common.language.prompt import Symmetry
from common.prior import SymmetryCandidate

SOURCE = "language model"

#: Called with the number of requests that are answered, and of all.
Progress = Callable[[int, int], None]


class Scorer(Protocol):
    """A model: what may follow sequences of tokens."""

    def __call__(
        self, sequences: Sequence[Sequence[int]], handles: Sequence[Any]
    ) -> tuple[NDArray[np.floating[Any]], Sequence[Any]]:
        """Scores one more token after each sequence.

        Args:
            sequences: tokens from the very first on, of different lengths.
            handles: for each what was returned for some beginning of it, or None. A model may keep
                its state there (keys and values); several sequences may share one, and it must not
                be changed.

        Returns:
            logits or log-probabilities [n, head], and a handle (or None) for each sequence.
        """
        ...


@dataclass(frozen=True)
class SearchRequest:
    """One question: its tokens, and the grammar of its answers."""

    prompt: tuple[int, ...]
    grammar: TokenGrammar


@dataclass(frozen=True)
class Ranking:
    """What a search has found for one request.

    Attributes:
        candidates: distinct symmetries in canonical form, the likeliest first.
        seen: probability of all answers that were completed; that of a candidate can be too small
            by at most what is missing to one.
        proven: whether no other symmetry and no other order is possible.
        scored: sequences that the model has scored.
    """

    candidates: tuple[SymmetryCandidate, ...]
    seen: float
    proven: bool
    scored: int


@dataclass(frozen=True, eq=False)
class _Node:
    """The beginning of an answer, up to a choice."""

    log_prob: float
    tokens: tuple[int, ...]
    cursor: Cursor
    handle: Any

    def filled(self) -> "_Node":
        """After what is determined here."""
        tokens = self.tokens + self.cursor.forced
        return _Node(self.log_prob, tokens, self.cursor.filled(), self.handle)


@dataclass(frozen=True, eq=False)
class _Step:
    """A choice after a beginning. Most are never taken, so what follows is not worked out yet."""

    log_prob: float
    before: _Node
    token: int
    handle: Any

    def take(self, grammar: TokenGrammar) -> _Node:
        """The beginning that it leads to."""
        after = grammar.advance(self.before.cursor, self.token)
        tokens = (*self.before.tokens, self.token)
        return _Node(self.log_prob, tokens, after, self.handle).filled()


class _Search:
    """One request's frontier and finds."""

    def __init__(self, request: SearchRequest, top: int, certain: bool, budget: int) -> None:
        self._request = request
        self._top = top
        self._certain = certain
        self._budget = budget
        self._order = count()
        self._frontier: list[tuple[float, int, _Node | _Step]] = []
        self._found: dict[Symmetry, float] = {}
        self._seen = 0.0
        self._worst = 0.0
        self._dropped = False
        self.scored = 0
        self._push(_Node(0.0, (), request.grammar.start, None).filled())

    def _push(self, entry: _Node | _Step) -> None:
        heapq.heappush(self._frontier, (-entry.log_prob, next(self._order), entry))

    def is_finished(self) -> bool:
        """Whether going on cannot, or shall not, change the result."""
        if not self._frontier or self.scored >= self._budget:
            return True
        if self._certain:
            return self._is_proven()
        return len(self._found) >= self._top and self._worst >= math.exp(-self._frontier[0][0])

    def _is_proven(self) -> bool:
        """Whether what is unseen is too little to bring another symmetry or order."""
        if not self._frontier and not self._dropped:
            return True
        masses = heapq.nlargest(self._top + 1, self._found.values())
        masses += [0.0] * (self._top + 1 - len(masses))
        return bool(-np.diff(masses).max() >= 1.0 - self._seen)

    def take(self, width: int) -> Iterator[_Node]:
        """The likeliest beginnings that are to be scored next; counts answers met on the way."""
        taken = 0
        while taken < width and not self.is_finished():
            entry = heapq.heappop(self._frontier)[2]
            node = entry.take(self._request.grammar) if isinstance(entry, _Step) else entry
            if node.cursor.is_done:
                self._count(node)
                continue
            taken += 1
            self.scored += 1
            yield node

    def _count(self, node: _Node) -> None:
        symmetry = self._request.grammar.read(node.tokens).canonical
        self._seen += math.exp(node.log_prob)
        self._found[symmetry] = self._found.get(symmetry, 0.0) + math.exp(node.log_prob)
        if len(self._found) >= self._top:
            self._worst = heapq.nlargest(self._top, self._found.values())[-1]

    def sequence(self, node: _Node) -> tuple[int, ...]:
        """Everything before the next token."""
        return self._request.prompt + node.tokens

    def expand(self, node: _Node, scores: NDArray[np.floating[Any]], handle: Any) -> None:
        """Adds all continuations of a beginning.

        Args:
            node: the beginning.
            scores: [choices], log-probabilities of its allowed tokens, summing to one.
            handle: of the model.
        """
        for token, score in zip(node.cursor.allowed, scores.tolist(), strict=True):
            log_prob = node.log_prob + score
            if score == -math.inf or (not self._certain and math.exp(log_prob) < self._worst):
                # Cannot enter the first ones any more.
                self._dropped |= score > -math.inf
                continue
            self._push(_Step(log_prob, node, token, handle))

    def result(self) -> Ranking:
        """What was found."""
        ranked = sorted(self._found.items(), key=lambda item: (-item[1], item[0].sites))
        candidates = tuple(
            SymmetryCandidate(s.space_group, s.sites, s.units, min(mass, 1.0), SOURCE)
            for s, mass in ranked[: self._top]
        )
        return Ranking(candidates, min(self._seen, 1.0), self._is_proven(), self.scored)


def rank_answers(
    requests: Sequence[SearchRequest],
    scorer: Scorer,
    *,
    top: int = 20,
    temperature: float = 1.0,
    width: int = 8,
    batch_size: int = 256,
    budget: int = 2000,
    certain: bool = False,
    progress: Progress | None = None,
) -> list[Ranking]:
    """The likeliest symmetries of every request.

    The search ends when as many symmetries are found as wanted and no unfinished answer is likelier
    than the last of them. Equivalent answers that are still less likely are then missing from the
    probabilities; ``certain`` searches on until they cannot matter.

    Args:
        requests: searched side by side, so that the model always gets whole batches.
        scorer: the model.
        top: symmetries per request.
        temperature: divides the scores; fitted by calibration.
        width: beginnings of one request that are scored at a time.
        batch_size: sequences per call of the model, at most.
        budget: sequences per request, at most.
        certain: see above.
        progress: called after every round.

    Raises:
        ValueError: if the model gives no finite score to any allowed token.
    """
    searches = [_Search(request, top, certain, budget) for request in requests]
    while True:
        picked = [(search, node) for search in searches for node in search.take(width)]
        if not picked:
            break
        for begin in range(0, len(picked), batch_size):
            _score(picked[begin : begin + batch_size], scorer, temperature)
        if progress is not None:
            progress(sum(search.is_finished() for search in searches), len(searches))
    return [search.result() for search in searches]


def _score(picked: Sequence[tuple[_Search, _Node]], scorer: Scorer, temperature: float) -> None:
    """Has the model score some beginnings, and adds their continuations."""
    sequences = [search.sequence(node) for search, node in picked]
    scores, handles = scorer(sequences, [node.handle for _, node in picked])
    for (search, node), row, handle in zip(picked, scores, handles, strict=True):
        search.expand(node, _normalised(row[list(node.cursor.allowed)], temperature), handle)


def _normalised(scores: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.float64]:
    """Log-probabilities among the allowed tokens."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    highest = scaled.max()
    if not np.isfinite(highest):
        raise ValueError("the model gives no finite score to any allowed token")
    shifted = scaled - highest
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
