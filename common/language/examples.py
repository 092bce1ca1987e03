"""Questions and answers as batches of tokens, in an order that seed and epoch decide.

Every row is asked about one target property in an epoch, about the others in the following ones.
Where questions tell of analogues, every second one tells of known polymorphs as well.
Rows of about the same length make a batch, so that little of it is padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from common.data.store import Record
from common.language.analogues import AnalogueIndex
from common.language.prompt import Analogues, Question, Symmetry
from common.language.tokenizer import SymmetryTokenizer

#: A target that is no token: its position does not count.
IGNORED = -100
#: Lengths are padded to multiples of this.
_LENGTH_STEP = 8
#: Rows among which those of about the same length are looked for.
_WINDOW = 4096
#: Rows from which on writing them takes a while.
_MANY = 1000

Int = NDArray[np.int64]


@dataclass(frozen=True)
class TokenBatch:
    """Some examples, padded at the end.

    Attributes:
        tokens: [B,T], questions and answers.
        targets: [B,T], the token that follows where it belongs to an answer, else ``IGNORED``.
        answers, answer_tokens: how many there are in the whole batch, of which this may be a share.
    """

    tokens: Int
    targets: Int
    answers: int
    answer_tokens: int


@dataclass(frozen=True)
class _Example:
    """Tokens of a question and its answer, which begins at ``start``."""

    tokens: NDArray[np.int32]
    start: int


class Examples:
    """A data set as tokens, in memory.

    Args:
        records: the crystals.
        tokenizer: of the model.
        questions: target properties, ``none`` among them; a row that lacks one is asked without.
        token_budget: padded tokens in a batch, at most.
        analogues: what questions tell of; nothing without it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: SymmetryTokenizer,
        questions: Sequence[str],
        token_budget: int,
        analogues: AnalogueIndex | None = None,
    ) -> None:
        self._pad = tokenizer.pad_id
        self._budget = token_budget
        shown = track(records, "Writing questions") if len(records) > _MANY else records
        self._forms = [_forms(record, tokenizer, questions, analogues) for record in shown]
        self._lengths = np.array([[len(e.tokens) for e in forms] for forms in self._forms])

    def epoch(self, seed: int, epoch: int) -> list[tuple[Int, Int]]:
        """Batches of one epoch in their order, each as rows and what these are asked."""
        random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        rows, count = self._lengths.shape
        # The same row is asked about all targets, one after the other.
        first = np.random.Generator(np.random.Philox(key=[seed, 2**32])).integers(count, size=rows)
        forms = (first + epoch) % count
        order = random.permutation(rows)
        plans = [
            (batch, forms[batch])
            for begin in range(0, rows, _WINDOW)
            for batch in self._cut(order[begin : begin + _WINDOW], forms)
        ]
        return [plans[i] for i in random.permutation(len(plans))]

    def in_order(self) -> list[tuple[Int, Int]]:
        """Batches of all rows, asked about the targets in turn; always the same."""
        rows, count = self._lengths.shape
        forms = np.arange(rows) % count
        return [(batch, forms[batch]) for batch in self._cut(np.arange(rows), forms)]

    def _cut(self, rows: Int, forms: Int) -> Iterator[Int]:
        """Rows of about the same length, as many as the budget allows."""
        lengths = self._lengths[rows, forms[rows]]
        rows = rows[np.argsort(-lengths, kind="stable")]
        while len(rows):
            longest = _padded(int(self._lengths[rows[0], forms[rows[0]]]))
            size = max(1, self._budget // longest)
            yield rows[:size]
            rows = rows[size:]

    def batches(self, seed: int, step: int) -> Iterator[tuple[Int, Int]]:
        """Endless batches, from a step on."""
        epoch = 0
        while True:
            plans = self.epoch(seed, epoch)
            yield from plans[step:]
            step = max(0, step - len(plans))
            epoch += 1

    def collate(self, rows: Int, forms: Int, share: Int, real: NDArray[np.bool_]) -> TokenBatch:
        """A process's share of a batch.

        Args:
            rows, forms: the batch.
            share, real: positions in it, and which of them count; see ``common.training.Shard``.
        """
        whole = [self._forms[row][form] for row, form in zip(rows, forms, strict=True)]
        length = _padded(max(len(example.tokens) for example in whole))
        tokens = np.full((len(share), length), self._pad, dtype=np.int64)
        targets = np.full((len(share), length), IGNORED, dtype=np.int64)
        for index, (position, counts) in enumerate(zip(share, real, strict=True)):
            example = whole[position]
            end = len(example.tokens)
            tokens[index, :end] = example.tokens
            if counts:
                targets[index, example.start - 1 : end - 1] = example.tokens[example.start :]
        answer_tokens = sum(len(example.tokens) - example.start for example in whole)
        return TokenBatch(tokens, targets, len(whole), answer_tokens)


def _forms(
    record: Record,
    tokenizer: SymmetryTokenizer,
    targets: Sequence[str],
    analogues: AnalogueIndex | None,
) -> list[_Example]:
    """All questions of a row, with its answer."""
    counts = record.crystal.formula_counts
    told = [Analogues()]
    if analogues is not None:
        told = [
            analogues.tell(
                Question.ask(counts), known=known, leave_out=record.material_id
            ).analogues
            for known in (False, True)
        ]
    answer = tokenizer.answer_ids(Symmetry.of_crystal(record.crystal))
    forms = []
    for own, target in product(told, targets):
        value = None if target == "none" else record.properties[target]
        properties = {} if value is None else {target: value}
        question = replace(Question.ask(counts, properties), analogues=own)
        ids = tokenizer.question_ids(question)
        forms.append(_Example(np.array(ids + answer, dtype=np.int32), len(ids)))
    return forms


def _padded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP
