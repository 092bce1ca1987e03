"""Questions and answers as batches of tokens, in an order that seed and epoch decide.

Every row is asked about one target property in an epoch, about the others in the following ones.
Where questions tell of analogues, every second one tells of known polymorphs as well. Most of an
answer is the sites of the analogue whose space group it has named. A row shows that for one of them
at most, so others may follow its answer, *rehearsals*: all but their space group counts.

A row can be learned by heart, for its analogues are the same in every epoch. Some of them, others
in every epoch, may be left out of training's questions, and with them their rehearsals. Known
polymorphs always stay: that the answer is none of them is part of the question.

Rows of about the same length make a batch, so that little of it is padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from common.data.store import Record
from common.diffusion.noise import noise
from common.language.analogues import AnalogueIndex
from common.language.prompt import (
    Analogues,
    Question,
    Symmetry,
    answer_pieces,
    write_analogue,
    write_target,
)
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
#: [B,A] by number of the analogue, or None where all are told of.
Told = NDArray[np.bool_] | None


@dataclass(frozen=True)
class TokenBatch:
    """Some examples, padded at the end.

    Attributes:
        tokens: [B,T], questions and answers.
        targets: [B,T], the token that follows where it counts, else ``IGNORED``.
        answers: rows of the whole batch, of which this may be a share.
        answer_tokens: targets that count in the whole batch.
    """

    tokens: Int
    targets: Int
    answers: int
    answer_tokens: int


@dataclass(frozen=True)
class _Example:
    """Tokens of a question and what is answered, and which of them are to be foretold.

    Attributes:
        tokens: [T].
        counted: [T].
        analogue: [T], number of the analogue that a token tells of or rehearses, from 0 on; or -1.
    """

    tokens: NDArray[np.int32]
    counted: NDArray[np.bool_]
    analogue: NDArray[np.int8]

    def without(self, told: NDArray[np.bool_]) -> "_Example":
        """With some analogues only: those whose number [A] is true."""
        kept = np.append(told, True)[self.analogue]
        return _Example(self.tokens[kept], self.counted[kept], self.analogue[kept])


class Examples:
    """A data set as tokens, in memory.

    Args:
        records: the crystals, of which each can be asked something; see ``rows_asked``.
        tokenizer: of the model.
        questions: target properties, or ``none``; a row is not asked about one that it lacks.
        token_budget: padded tokens in a batch, at most.
        analogues: what questions tell of; nothing without it.
        rehearsals: answers after the row's own, at most, as many as fit into ``positions`` tokens.
        positions: see there.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: SymmetryTokenizer,
        questions: Sequence[str],
        token_budget: int,
        analogues: AnalogueIndex | None = None,
        rehearsals: int = 0,
        positions: int = 0,
    ) -> None:
        self._pad = tokenizer.pad_id
        self._budget = token_budget
        shown = track(records, "Writing questions") if len(records) > _MANY else records
        self._forms = []
        for record in shown:
            answer = Symmetry.of_crystal(record.crystal)
            asked = _questions(record, questions, analogues)
            self._forms.append(
                [
                    _example(
                        tokenizer,
                        question,
                        _rehearsed(question, answer, turn, rehearsals),
                        positions,
                    )
                    for turn, question in enumerate(asked)
                ]
            )
        numbers = (int(e.analogue.max()) for forms in self._forms for e in forms)
        self._analogues = 1 + max(numbers, default=-1)
        self._counts = np.array([len(forms) for forms in self._forms])
        self._lengths = np.zeros((len(self._forms), self._counts.max()), dtype=np.int64)
        for row, forms in enumerate(self._forms):
            self._lengths[row, : len(forms)] = [len(e.tokens) for e in forms]

    @property
    def longest(self) -> tuple[int, int]:
        """The row with the longest question and answers, and the tokens that they are padded to."""
        row = int(self._lengths.max(axis=1).argmax())
        return row, _padded(int(self._lengths[row].max()))

    def epoch(self, seed: int, epoch: int) -> list[tuple[Int, Int]]:
        """Batches of one epoch in their order, each as rows and what these are asked."""
        random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        rows, count = self._lengths.shape
        # The same row is asked about all targets that it has, one after the other.
        first = np.random.Generator(np.random.Philox(key=[seed, 2**32])).integers(count, size=rows)
        forms = (first + epoch) % self._counts
        order = random.permutation(rows)
        plans = [
            (batch, forms[batch])
            for begin in range(0, rows, _WINDOW)
            for batch in self._cut(order[begin : begin + _WINDOW], forms)
        ]
        return [plans[i] for i in random.permutation(len(plans))]

    def in_order(self) -> list[tuple[Int, Int]]:
        """Batches of all rows, asked about the targets in turn; always the same."""
        rows = len(self._lengths)
        forms = np.arange(rows) % self._counts
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

    def batches(
        self, seed: int, step: int, analogue_dropout: float = 0.0
    ) -> Iterator[tuple[Int, Int, Told]]:
        """Endless batches, from a step on.

        Args:
            seed: of the run.
            step: the first one.
            analogue_dropout: share of the analogues that is left out.

        Yields:
            Rows, what these are asked, and which analogues they are told of, or None for all.
        """
        epoch = 0
        while True:
            plans = self.epoch(seed, epoch)
            told = self._told(seed, epoch, analogue_dropout)
            for rows, forms in plans[step:]:
                yield rows, forms, None if told is None else told[rows]
            step = max(0, step - len(plans))
            epoch += 1

    def _told(self, seed: int, epoch: int, dropout: float) -> Told:
        """Which analogues every row is told of in an epoch."""
        if not dropout:
            return None
        shape = len(self._forms), self._analogues
        return noise(seed, "train", 0, "analogues", epoch, shape, "uniform") >= dropout

    def length(self, rows: Int, forms: Int) -> int:
        """Tokens that every row of a batch is padded to."""
        return _padded(int(self._lengths[rows, forms].max()))

    def collate(
        self, rows: Int, forms: Int, share: Int, real: NDArray[np.bool_], told: Told = None
    ) -> TokenBatch:
        """A process's share of a batch.

        Args:
            rows, forms: the batch.
            share, real: positions in it, and which of them count; see ``common.training.Shard``.
            told: which analogues its rows are told of; all without it.
        """
        whole = [self._forms[row][form] for row, form in zip(rows, forms, strict=True)]
        if told is not None:
            whole = [example.without(own) for example, own in zip(whole, told, strict=True)]
        length = _padded(max(len(example.tokens) for example in whole))
        tokens = np.full((len(share), length), self._pad, dtype=np.int64)
        targets = np.full((len(share), length), IGNORED, dtype=np.int64)
        for index, (position, counts) in enumerate(zip(share, real, strict=True)):
            example = whole[position]
            end = len(example.tokens)
            tokens[index, :end] = example.tokens
            if counts:
                following = np.where(example.counted, example.tokens, IGNORED)
                targets[index, : end - 1] = following[1:]
        answer_tokens = sum(int(example.counted.sum()) for example in whole)
        return TokenBatch(tokens, targets, len(whole), answer_tokens)


def fixed_shape(length: int, budget: int, limit: int, processes: int = 1) -> tuple[int, int]:
    """Rows and length that each process pads its share of a batch to, for a graph of a fixed shape.

    Lengths are powers of two and halfway between these; each has the rows that the shortest batch
    padded to it can have.

    Args:
        length: of a batch, as ``Examples.length`` has it.
        budget: its ``token_budget``.
        limit: the longest length.
        processes: that share the rows.
    """
    shorter, longer = 0, 32
    while longer < length:
        power = 1 << (longer.bit_length() - 1)
        shorter, longer = longer, (3 * power // 2 if longer == power else 2 * power)
    rows = max(1, budget // (shorter + _LENGTH_STEP))
    return -(-rows // processes), max(length, min(longer, limit))


def rows_asked(records: Sequence[Record], questions: Sequence[str]) -> list[Record]:
    """The records that have one of the properties at least; all where ``none`` is among them."""
    return [record for record in records if _targets(record, questions)]


def _targets(record: Record, questions: Sequence[str]) -> list[str]:
    """What a row can be asked about: ``none``, and the properties that it has."""
    return [name for name in questions if name == "none" or record.properties[name] is not None]


def _questions(
    record: Record, targets: Sequence[str], analogues: AnalogueIndex | None
) -> list[Question]:
    """All that a row is asked."""
    counts = record.crystal.formula_counts
    told = [Analogues()]
    if analogues is not None:
        told = [
            analogues.tell(
                Question.ask(counts), known=known, leave_out=record.material_id
            ).analogues
            for known in (False, True)
        ]
    asked = []
    for own, target in product(told, _targets(record, targets)):
        value = None if target == "none" else record.properties[target]
        properties = {} if value is None else {target: value}
        asked.append(replace(Question.ask(counts, properties), analogues=own))
    return asked


def _rehearsed(question: Question, answer: Symmetry, turn: int, count: int) -> list[Symmetry]:
    """The answer, then some other analogues; every turn begins with the next one."""
    others = [a.symmetry for a in question.analogues.similar if a.symmetry != answer]
    start = turn % max(1, len(others))
    return [answer, *(others[start:] + others[:start])[:count]]


def _example(
    tokenizer: SymmetryTokenizer, question: Question, answers: Sequence[Symmetry], positions: int
) -> _Example:
    """A question and its answers, as turns of the assistant; the first one is the row's."""
    (first, *rehearsals) = answers
    tokens = tokenizer.question_ids(question)
    analogue = _analogue_numbers(tokenizer, question, len(tokens))
    own = tokenizer.answer_ids(first)
    counted = [False] * len(tokens) + [True] * len(own)
    analogue += [-1] * len(own)
    tokens = tokens + own
    numbers = {told.symmetry: number for number, told in enumerate(question.analogues.similar)}
    for symmetry in rehearsals:
        turn = [*tokenizer.turn_ids(), *tokenizer.answer_ids(symmetry)]
        if len(tokens) + len(turn) > positions:
            break
        opening = answer_pieces(symmetry)[:2]  # up to the space group
        start = len(tokenizer.turn_ids())
        start += sum(len(tokenizer.encode_piece(piece)) for piece in opening)
        counted += [False] * start + [True] * (len(turn) - start)
        analogue += [numbers[symmetry]] * len(turn)
        tokens += turn
    return _Example(
        np.array(tokens, dtype=np.int32), np.array(counted), np.array(analogue, dtype=np.int8)
    )


def _analogue_numbers(tokenizer: SymmetryTokenizer, question: Question, length: int) -> list[int]:
    """``_Example.analogue`` of a question's tokens: only its last line follows the analogues'."""
    numbers: list[int] = []
    for number, told in enumerate(question.analogues.similar):
        numbers += [number] * len(tokenizer.encode(write_analogue(told)))
    after = len(tokenizer.encode(write_target(question))) + len(tokenizer.turn_ids())
    return [-1] * (length - after - len(numbers)) + numbers + [-1] * after


def _padded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP
