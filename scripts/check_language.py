"""Checks the symmetry language on every row of a data set.

    python scripts/check_language.py [DATA] [FOLDER ...]

DATA is train (default), val, extra, or a CSV or Parquet file. For the compact tokenizer and for
that of every FOLDER: questions and answers come back from text and from tokens, the tokens of an
answer are those of its pieces, and the grammar accepts every answer. Then answers are decoded at
random for some of the compositions; all must be legal.
"""

import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import track

from common.composition import Formula, SiteRequest, check_sites
from common.crystal.wyckoff import wyckoff_summary
from common.data.locations import dataset
from common.data.store import Record
from common.errors import UserError
from common.language import prompt
from common.language.analogues import AnalogueIndex
from common.language.grammar import AnswerGrammar, TokenGrammar
from common.language.prompt import Question, Symmetry
from common.language.tokenizer import UNKNOWN, SymmetryTokenizer, compact_tokenizer, load_tokenizer
from common.templates import reduce_counts

_ANALOGUES = 6
_DECODED_ROWS = 200
_DECODES = 50


def formula_of(record: Record) -> Formula:
    """A row's reduced formula."""
    return Formula(tuple(sorted(reduce_counts(record.crystal.formula_counts)[0].items())))


def questions(record: Record) -> Iterator[Question]:
    """Without a property, with each that the row has, and with what is known of others."""
    counts = record.crystal.formula_counts
    yield Question.ask(counts)
    for known in (False, True):
        index = AnalogueIndex.shipped(_ANALOGUES)
        yield index.tell(Question.ask(counts), known=known, leave_out=record.material_id)
    for name in prompt.PROPERTY_TEXTS:
        value = record.properties[name]
        if value is not None:
            yield Question.ask(counts, {name: value})


def check_text(record: Record) -> list[str]:
    """A row's texts; each is read back."""
    symmetry = Symmetry.of_crystal(record.crystal)
    answer = prompt.write_answer(symmetry)
    assert prompt.parse_answer(answer) == symmetry
    summary = wyckoff_summary(symmetry.space_group)
    own = [(site.atomic_number, site.letter) for site in record.crystal.sites]
    assert summary.canonical(symmetry.sites) == summary.canonical(own)
    texts = [answer]
    for question in questions(record):
        texts.append(prompt.write_question(question))
        assert prompt.parse_question(texts[-1]) == question
    return texts


def check_tokens(tokenizer: SymmetryTokenizer, record: Record, texts: Sequence[str]) -> list[int]:
    """Lengths in tokens of a row's texts."""
    unknown = tokenizer.tokenizer.token_to_id(UNKNOWN)
    lengths = []
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert unknown not in ids
        lengths.append(len(ids))
    symmetry = Symmetry.of_crystal(record.crystal)
    pieces = prompt.answer_pieces(symmetry)
    apart = [i for piece in pieces for i in tokenizer.encode_piece(piece)]
    ids = tokenizer.answer_ids(symmetry)
    assert [*apart, tokenizer.end_id] == ids
    grammar = AnswerGrammar(formula_of(record), space_group=symmetry.space_group)
    assert TokenGrammar(grammar, tokenizer).cursor(ids).is_done
    return lengths


def decode(grammar: TokenGrammar, rng: np.random.Generator, seconds: list[float]) -> list[int]:
    """A random answer; adds the CPU time of every mask and step."""
    cursor, tokens = grammar.start, []
    while not cursor.is_done:
        tokens += cursor.forced
        cursor = cursor.filled()
        if cursor.is_done:
            break
        logits = rng.normal(size=grammar.head_size)
        begin = time.thread_time()
        mask = grammar.mask(cursor)
        between = time.thread_time()
        tokens.append(int(np.argmax(np.where(mask, logits, -np.inf))))
        after = time.thread_time()
        cursor = grammar.advance(cursor, tokens[-1])
        seconds.append(time.thread_time() - after + between - begin)
    return tokens


def check_decodes(tokenizer: SymmetryTokenizer, records: Sequence[Record]) -> list[float]:
    """CPU seconds of masks, after random answers for rows spread over the data set."""
    rng = np.random.default_rng(0)
    seconds: list[float] = []
    for record in track(records[:: max(1, len(records) // _DECODED_ROWS)], "random answers"):
        formula = formula_of(record)
        grammar = TokenGrammar(AnswerGrammar(formula), tokenizer)
        for _ in range(_DECODES):
            symmetry = prompt.parse_answer(tokenizer.decode(decode(grammar, rng, seconds)))
            sites = [SiteRequest(z, letter) for z, letter in symmetry.sites]
            assert check_sites(sites, symmetry.space_group, formula) == symmetry.units
    return seconds


def main(arguments: list[str]) -> None:
    """Runs the checks and prints what was measured; stops at the first row that fails."""
    console = Console()
    name = arguments[0] if arguments else "train"
    records = dataset(name)
    if not records:
        raise UserError(f"{name}: no rows to check")
    named = {"compact": compact_tokenizer(), **{x: load_tokenizer(x) for x in arguments[1:]}}
    lengths: dict[str, list[list[int]]] = {name: [] for name in named}
    for record in track(records, "rows"):
        texts = check_text(record)
        for name, tokenizer in named.items():
            lengths[name].append(check_tokens(tokenizer, record, texts))
    console.print(f"{len(records)} rows: text and tokens come back, the grammar accepts all")
    for name, tokenizer in named.items():
        answers = [row[0] for row in lengths[name]]
        asked = [n for row in lengths[name] for n in row[1:]]
        console.print(
            f"{name}: tokens of a question {np.mean(asked):.1f} (at most {max(asked)}), "
            f"of an answer {np.mean(answers):.1f} ({max(answers)})"
        )
        seconds = check_decodes(tokenizer, records)
        console.print(
            f"{name}: all random answers legal; ms per mask and step: "
            f"median {1e3 * np.median(seconds):.3f}, mean {1e3 * np.mean(seconds):.3f}, "
            f"99 % below {1e3 * np.quantile(seconds, 0.99):.2f}, at most {1e3 * max(seconds):.1f}"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
