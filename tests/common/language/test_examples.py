"""Questions and answers as batches: complete, within the budget, and the same after a restart."""

from itertools import islice

import numpy as np
import pytest

from common.data.store import Record
from common.language.examples import IGNORED, Examples, fixed_shape, rows_asked
from common.language.prompt import Symmetry, parse_question, write_answer
from common.language.tokenizer import SymmetryTokenizer
from common.training import Shard
from tests.training import alike_records, textbook_records

QUESTIONS = ("none", "band_gap", "formation_energy")
BUDGET = 500
ALL = Shard()


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [*textbook_records(), *alike_records()]


@pytest.fixture(scope="module")
def examples(records: list[Record], compact: SymmetryTokenizer) -> Examples:
    return Examples(records, compact, QUESTIONS, BUDGET)


def targets_of(record: Record) -> list[str]:
    """What is asked about a row: nothing that it lacks."""
    return [name for name in QUESTIONS if name == "none" or record.properties[name] is not None]


def test_rows_that_lack_all_properties(records: list[Record], compact: SymmetryTokenizer) -> None:
    """They are left out where every question names one, and nothing changes for the others."""
    (lacking,) = [r for r in records if r.properties["formation_energy"] is None]
    assert rows_asked(records, ("none", "formation_energy")) == records
    others = rows_asked(records, ("formation_energy",))
    assert others == [record for record in records if record is not lacking]
    examples = Examples(others, compact, ("formation_energy",), BUDGET)
    for plan in (examples.epoch(0, 0), examples.in_order()):
        assert sum(len(rows) for rows, _ in plan) == len(others)
        assert all((forms == 0).all() for _, forms in plan)


def test_epoch_has_every_row_once(examples: Examples, records: list[Record]) -> None:
    rows = np.concatenate([rows for rows, _ in examples.epoch(7, 3)])
    assert sorted(rows.tolist()) == list(range(len(records)))


def test_three_epochs_ask_everything(examples: Examples, records: list[Record]) -> None:
    asked = {
        (int(row), int(form))
        for epoch in (4, 5, 6)
        for rows, forms in examples.epoch(7, epoch)
        for row, form in zip(rows, forms, strict=True)
    }
    wanted = [len(targets_of(record)) for record in records]
    assert len(QUESTIONS) * len(records) - sum(wanted) == 1, "one row lacks one property"
    assert len(asked) == sum(wanted)


def test_epochs_differ(examples: Examples) -> None:
    first, again, other = (
        [rows.tolist() for rows, _ in examples.epoch(*key)] for key in ((1, 0), (1, 0), (1, 1))
    )
    assert first == again != other


def test_what_is_asked_and_answered(
    examples: Examples, records: list[Record], compact: SymmetryTokenizer
) -> None:
    seen = set()
    for rows, forms in examples.epoch(0, 0):
        data = examples.collate(rows, forms, *ALL.rows(len(rows)))
        assert data.tokens.size <= BUDGET or len(rows) == 1
        assert data.answers == len(rows)
        assert data.answer_tokens == (data.targets != IGNORED).sum()
        for row, form, tokens, targets in zip(rows, forms, data.tokens, data.targets, strict=True):
            crystal = records[row].crystal
            answer = targets[targets != IGNORED]
            assert answer[-1] == compact.end_id
            assert compact.decode(answer) == write_answer(Symmetry.of_crystal(crystal))
            begin = int(np.flatnonzero(targets != IGNORED)[0]) + 1
            assert tokens[begin : begin + len(answer)].tolist() == answer.tolist()
            text = compact.decode(tokens[:begin]).rstrip("\n")
            question = parse_question(text[text.index("Composition") :])
            wanted = targets_of(records[row])[form]
            assert question.target == (None if wanted == "none" else wanted)
            seen.add(question.target)
    assert seen == {None, "band_gap", "formation_energy"}


@pytest.mark.parametrize("step", [0, 3, 20, 45])
def test_goes_on_in_the_middle(examples: Examples, step: int) -> None:
    whole = [rows.tolist() for rows, _, _ in islice(examples.batches(2, 0), step + 12)]
    rest = [rows.tolist() for rows, _, _ in islice(examples.batches(2, step), 12)]
    assert rest == whole[step:]


def test_shares_make_the_batch(examples: Examples) -> None:
    """Three processes count every answer once, and all know how many there are."""
    rows, forms = examples.epoch(0, 0)[0]
    whole = examples.collate(rows, forms, *ALL.rows(len(rows)))
    counted = []
    for rank in range(3):
        part = examples.collate(rows, forms, *Shard(rank, 3).rows(len(rows)))
        assert part.tokens.shape[1] == whole.tokens.shape[1]
        assert (part.answers, part.answer_tokens) == (whole.answers, whole.answer_tokens)
        counted += [row.tolist() for row in part.targets if (row != IGNORED).any()]
    assert counted == whole.targets.tolist()


# Fixed shapes


@pytest.mark.parametrize(
    ("length", "shape"),
    [(24, (384, 32)), (32, (384, 32)), (40, (76, 48)), (104, (29, 128)), (400, (7, 512))],
)
def test_few_shapes(length: int, shape: tuple[int, int]) -> None:
    assert fixed_shape(length, 3072, 512) == shape
    assert shape[0] >= 3072 // length


def test_lengths_end_at_the_limit() -> None:
    assert fixed_shape(104, 3072, 112) == (29, 112)
    assert fixed_shape(120, 3072, 112) == (29, 120)


def test_processes_share_the_rows() -> None:
    """More than the budget's tokens in all, for what is not there is padded, too."""
    assert fixed_shape(200, 16384, 1024, 8) == (11, 256)
    assert fixed_shape(300, 16384, 1024, 8) == (8, 384)
    assert 8 * 11 >= 16384 // 200
