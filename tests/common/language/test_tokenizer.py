"""Tokenizers: one token per symbol, nothing lost, and GLM-4's own without its code."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Element
from tokenizers import Tokenizer, models

from common.composition import MAX_PRIMITIVE_ATOMS
from common.crystal.wyckoff import wyckoff_summary
from common.errors import UserError
from common.language import prompt
from common.language import tokenizer as tokenizers_module
from common.language.prompt import Question, Symmetry, write_answer, write_question
from common.language.tokenizer import (
    UNKNOWN,
    SymmetryTokenizer,
    compact_tokenizer,
    load_tokenizer,
)
from tests.symmetries import atom_counts, symmetries


def test_symbols_are_single_tokens(compact: SymmetryTokenizer) -> None:
    symbols = [f" {Element.from_Z(z).symbol}" for z in range(1, 119)]
    for number in range(1, 231):
        group = wyckoff_summary(number)
        symbols.append(f" {number} {group.symbol}")
        symbols += [f" {m}{letter}" for letter, (m, _) in group.letters.items()]
    symbols += [f" {n}" for n in (0, 1, 230, 4 * MAX_PRIMITIVE_ATOMS, -10)]
    tokens = [compact.encode(symbol) for symbol in symbols]
    assert {len(ids) for ids in tokens} == {1}
    assert len({ids[0] for ids in tokens}) == len(set(symbols))
    assert compact.encode(" -0.35 eV") == [
        compact.tokenizer.token_to_id(token) for token in (" -0", ".3", "5", " eV")
    ]


@given(
    symmetries(),
    st.one_of(st.just({}), st.floats(-10, 10).map(lambda x: {"formation_energy": x})),
)
@settings(max_examples=150)
def test_compact_tokenizer_loses_nothing(symmetry: Symmetry, properties) -> None:
    tokenizer = COMPACT
    question = Question.ask(atom_counts(symmetry), properties)
    for text in (write_answer(symmetry), write_question(question)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.tokenizer.token_to_id(UNKNOWN) not in ids


COMPACT = compact_tokenizer()


def test_foreign_text_is_unknown(compact: SymmetryTokenizer) -> None:
    assert set(compact.encode("ß")) == {compact.tokenizer.token_to_id(UNKNOWN)}


def test_compact_tokenizer_is_always_the_same(compact: SymmetryTokenizer, tmp_path: Path) -> None:
    again = compact_tokenizer()
    assert again.tokenizer.to_str() == compact.tokenizer.to_str()
    compact.save(tmp_path / "one")
    loaded = load_tokenizer(tmp_path / "one")
    assert loaded.head_size == compact.head_size
    loaded.save(tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def texts(rows) -> list[str]:
    pairs = (
        (
            write_answer(Symmetry.of_crystal(crystal)),
            *(
                write_question(Question.ask(crystal.formula_counts, {name: value}))
                for name, value in properties.items()
            ),
        )
        for crystal, properties in rows
    )
    return [*chain.from_iterable(pairs), prompt.INSTRUCTION]


@pytest.mark.parametrize("name", ["compact", "glm4"])
def test_training_set_loses_nothing(name: str, training_rows, request) -> None:
    tokenizer: SymmetryTokenizer = request.getfixturevalue(name)
    unknown = tokenizer.tokenizer.token_to_id(UNKNOWN)
    for text in texts(training_rows):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert unknown not in ids
        assert max(ids) < tokenizer.head_size


@pytest.mark.parametrize("name", ["compact", "glm4"])
def test_pieces_are_tokenized_as_in_the_whole(name: str, training_rows, request) -> None:
    """What the grammar relies on."""
    tokenizer: SymmetryTokenizer = request.getfixturevalue(name)
    for crystal, _ in training_rows:
        symmetry = Symmetry.of_crystal(crystal)
        pieces = prompt.answer_pieces(symmetry)
        apart = [i for piece in pieces for i in tokenizer.encode_piece(piece)]
        assert [*apart, tokenizer.end_id] == tokenizer.answer_ids(symmetry)


def test_glm4_is_what_tiktoken_says(glm4: SymmetryTokenizer, glm4_folder, training_rows) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    oracle = tiktoken.Encoding(
        name="glm4",
        pat_str=tokenizers_module._GLM_WORDS,
        mergeable_ranks=tokenizers_module._read_ranks(glm4_folder / "tokenizer.model"),
        special_tokens={},
    )
    others = ["晶体结构 生成", "a  b\n\n c's don't 12345 naïve 🙂", " \t\n x"]
    for text in [*texts(training_rows), *others]:
        assert glm4.encode(text) == oracle.encode(text)
        assert glm4.decode(glm4.encode(text)) == text


def test_glm4_sizes_and_chat(glm4: SymmetryTokenizer, training_rows) -> None:
    assert glm4.tokenizer.get_vocab_size() == 151_343
    assert glm4.head_size == 151_552
    assert (glm4.end_id, glm4.pad_id) == (151_336, 151_329)
    ids = glm4.question_ids(Question.ask({8: 1}))
    assert ids[:3] == [151_331, 151_333, 151_336]
    assert ids[-2:] == [151_337, *glm4.encode("\n")]


def test_transformers_reads_the_saved_folder(compact: SymmetryTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    compact.save(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(fast, transformers.PreTrainedTokenizerFast)
    question = Question.ask({38: 1, 22: 1, 8: 3}, {"band_gap": 1.8})
    text = write_answer(Symmetry.of(221, [(38, "a"), (22, "b"), (8, "c")]))
    assert fast(text)["input_ids"] == compact.encode(text)
    assert fast.decode(fast(text)["input_ids"]) == text
    content = f"{prompt.INSTRUCTION}\n{write_question(question)}"
    chat = fast.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert chat == compact.question_ids(question)
    assert (fast.eos_token_id, fast.pad_token_id) == (compact.end_id, compact.pad_id)


def test_wrong_folders_are_user_errors(glm4_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    lines = (glm4_folder / "tokenizer.model").read_bytes().splitlines(keepends=True)
    shutil.copy(glm4_folder / "tokenizer_config.json", tmp_path)
    for damaged in (b"".join(lines[:100]), b"".join(lines[:500] + lines[501:900]), b"\xff\x00"):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read the tokenizer"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:400]))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="added_tokens_decoder"):
        load_tokenizer(tmp_path)


def test_other_tokenizers_are_user_errors(compact: SymmetryTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
    other = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    (tmp_path / "tokenizer.json").write_text(other.to_str())
    with pytest.raises(UserError, match=r"no token \[gMASK\]"):
        load_tokenizer(tmp_path)
    compact.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 64}))
    with pytest.raises(UserError, match="do not belong together"):
        load_tokenizer(tmp_path)


def test_tokenizers_of_other_models_are_user_errors(
    compact: SymmetryTokenizer, tmp_path: Path
) -> None:
    """Though all of their tokens have logits."""
    compact.save(tmp_path)
    config = tmp_path / "config.json"
    for ends in (4, [4, 151_336], None):
        config.write_text(json.dumps({"vocab_size": 151_552, "eos_token_id": ends}))
        assert load_tokenizer(tmp_path).end_id == 4
    config.write_text(json.dumps({"vocab_size": 151_552, "eos_token_id": [151_329, 151_336]}))
    with pytest.raises(UserError, match=r"config\.json: .* token 151329 or 151336, but .* is 4"):
        load_tokenizer(tmp_path)
    config.unlink()
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words[" Na"], words[" Cl"] = words[" Cl"], words[" Na"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: its tokens are not those"):
        load_tokenizer(tmp_path)
