"""Tokenizers of the language models: a compact one of the domain's symbols, and GLM-4's own.

Both speak the chat form of GLM-4: ``[gMASK]<sop><|user|>``, a line feed, instruction and input,
``<|assistant|>``, a line feed, the answer, ``<|user|>`` as its end.

The compact tokenizer has one token for every element, space group, position (multiplicity and
letter), whole number and phrase that ``prompt`` writes; decimals are a whole number, a point with
its digit, and digits. It is made of tables, not of data, and so is always the same.

GLM-4 publishes its tokenizer as a list of ranks with code to load it. That code is not run: the
ranks are turned into a byte-level BPE of the library ``tokenizers``.
"""

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from common.composition import MAX_PRIMITIVE_ATOMS
from common.errors import UserError
from common.files import write_together
from common.language import prompt
from common.language.prompt import Question, Symmetry

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
MASK, START, USER, ASSISTANT = "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"
_CHAT = (MASK, START, USER, ASSISTANT)

#: How GLM-4 splits text before merging bytes (tokenization_chatglm.py of THUDM/glm-4-9b).
_GLM_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
#: Formula units in a conventional cell of four lattice points, one atom each, at the atom limit.
_MAX_NUMBER = 4 * MAX_PRIMITIVE_ATOMS
#: Whole parts of negative numbers: formation energies and oxidation states.
_MIN_NUMBER = -10


@dataclass(frozen=True)
class SymmetryTokenizer:
    """A tokenizer with the chat form around questions and answers.

    Attributes:
        tokenizer: of the library ``tokenizers``.
        head_size: number of logits of the model; at least the number of tokens.
    """

    tokenizer: Tokenizer
    head_size: int
    _pieces: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        missing = [t for t in (*_CHAT, END_OF_TEXT) if self.tokenizer.token_to_id(t) is None]
        if missing:
            raise UserError(f"the tokenizer has no token {', '.join(missing)}: give one of GLM-4")
        size = self.tokenizer.get_vocab_size()
        if size > self.head_size:
            raise UserError(
                f"the tokenizer has {size} tokens, but the model only {self.head_size} logits: "
                "they do not belong together"
            )

    @property
    def end_id(self) -> int:
        """What ends an answer."""
        return self._id(USER)

    @property
    def pad_id(self) -> int:
        """What fills batches."""
        return self._id(END_OF_TEXT)

    def _id(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        assert number is not None
        return int(number)

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, without anything around it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_piece(self, text: str) -> tuple[int, ...]:
        """Tokens of one of the pieces that answers are made of; remembered."""
        found = self._pieces.get(text)
        if found is None:
            found = tuple(self.encode(text))
            self._pieces[text] = found
        return found

    def decode(self, ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Text of tokens; the chat form's tokens are left out."""
        kept = [int(i) for i in ids]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text

    def question_ids(self, question: Question) -> list[int]:
        """Everything before the answer."""
        text = f"\n{prompt.INSTRUCTION}\n{prompt.write_question(question)}"
        start = [self._id(MASK), self._id(START), self._id(USER)]
        return [*start, *self.encode(text), *self.turn_ids()]

    def turn_ids(self) -> list[int]:
        """What comes right before an answer, the first one or one more."""
        return [self._id(ASSISTANT), *self.encode("\n")]

    def answer_ids(self, symmetry: Symmetry) -> list[int]:
        """The answer and its end."""
        return [*self.encode(prompt.write_answer(symmetry)), self.end_id]

    def files(self) -> dict[str, str]:
        """Content of tokenizer.json and tokenizer_config.json, as transformers reads them."""
        names = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 8192,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "eos_token": USER,
            "pad_token": END_OF_TEXT,
            "unk_token": UNKNOWN if UNKNOWN in names else None,
            "additional_special_tokens": [n for n in names if n not in (UNKNOWN, END_OF_TEXT)],
            "chat_template": _CHAT_TEMPLATE,
            "head_size": self.head_size,
        }
        return {
            "tokenizer.json": self.tokenizer.to_str(pretty=True) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes these files.

        Raises:
            UserError: if the folder is not writable.
        """
        write_together({Path(folder) / name: text for name, text in self.files().items()})


def load_tokenizer(folder: str | os.PathLike[str]) -> SymmetryTokenizer:
    """The tokenizer of a model's folder: tokenizer.json, or GLM-4's tokenizer.model.

    The head's size is that of config.json, or else of tokenizer_config.json.

    Raises:
        UserError: if there is none, it is damaged, it is not GLM-4's or another model's, or it is
            a compact one with other tokens than this version's.
    """
    path = Path(folder)
    if (path / "tokenizer.json").is_file():
        tokenizer = _read_json(path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        tokenizer = _from_ranks(_read_ranks(path / "tokenizer.model"))
        tokenizer.add_special_tokens(_glm_specials(path))
    else:
        raise UserError(
            f"no tokenizer in {path}: a folder with tokenizer.json or tokenizer.model is needed"
        )
    found = SymmetryTokenizer(tokenizer, _head_size(path) or tokenizer.get_vocab_size())
    _check_compact(tokenizer, path)
    _check_end(found, path)
    return found


def _check_compact(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises UserError for a list of words, as the compact tokenizer is, that is another one."""
    own = compact_tokenizer().tokenizer
    if isinstance(tokenizer.model, models.WordLevel) and tokenizer.to_str() != own.to_str():
        raise UserError(
            f"{folder}/tokenizer.json: its tokens are not those of this version's compact "
            "tokenizer; copy the model's folder again, or train it anew"
        )


def _check_end(tokenizer: SymmetryTokenizer, folder: Path) -> None:
    """Raises UserError if config.json names other tokens that end an answer."""
    path = folder / "config.json"
    ends = _read_config(path).get("eos_token_id") if path.is_file() else None
    known = ends if isinstance(ends, list) else [ends]
    if ends is not None and tokenizer.end_id not in known:
        raise UserError(
            f"{path}: answers end with token {' or '.join(map(str, known))}, but {USER} of the "
            f"tokenizer beside it is {tokenizer.end_id}; give the model's own tokenizer"
        )


def _read_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"cannot read the tokenizer {path}: {str(error)[:120]}") from error


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Ranks of byte strings: a line each, base64 and number; the numbers count up from zero."""
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii").splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError, binascii.Error) as error:
        raise UserError(f"cannot read the tokenizer {path}: {str(error)[:120]}") from error
    if list(ranks.values()) != list(range(len(lines))) or len(lines) < 256:
        raise UserError(f"cannot read the tokenizer {path}: truncated, or not a list of ranks")
    return ranks


def _glm_specials(folder: Path) -> list[AddedToken]:
    """The special tokens that the folder's configuration adds after the ranks."""
    added = _read_config(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if not isinstance(added, dict):
        raise UserError(f"{folder}/tokenizer_config.json: no added_tokens_decoder as GLM-4's has")
    ordered = sorted(added.items(), key=lambda item: int(item[0]))
    return [AddedToken(t["content"], normalized=False, special=True) for _, t in ordered]


def _head_size(folder: Path) -> int | None:
    for name, keys in (
        ("config.json", ("padded_vocab_size", "vocab_size")),
        ("tokenizer_config.json", ("head_size",)),
    ):
        config = _read_config(folder / name) if (folder / name).is_file() else {}
        for key in keys:
            if isinstance(config.get(key), int):
                return int(config[key])
    return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error)[:120]}") from error
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: a JSON object is expected")
    return config


def _from_ranks(ranks: Mapping[bytes, int]) -> Tokenizer:
    """A byte-level BPE that merges as tiktoken does: always the pair of the lowest rank."""
    names = _byte_names()
    text = {token: "".join(names[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(text[left], text[right]) for left, right in pairs]
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GLM_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def _byte_names() -> tuple[str, ...]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in plain else next(others)) for byte in range(256))


def compact_tokenizer() -> SymmetryTokenizer:
    """The tokenizer of the domain's symbols, see the module."""
    symbols = _symbols()
    vocabulary = {token: i for i, token in enumerate((END_OF_TEXT, UNKNOWN, *_CHAT, *symbols))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_words()), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in (END_OF_TEXT, UNKNOWN, *_CHAT)]
    )
    # Heads of a multiple of 64 logits multiply faster.
    return SymmetryTokenizer(tokenizer, -(-len(vocabulary) // 64) * 64)


def _phrases() -> list[str]:
    """What is always written the same, the longest first."""
    phrases = {
        prompt.INSTRUCTION,
        prompt.COMPOSITION,
        prompt.ELEMENT,
        *prompt.ELEMENT_LABELS,
        prompt.NO_VALUE,
        prompt.NO_PROPERTY,
        prompt.KNOWN,
        prompt.ANALOGUE,
        prompt.REPLACED,
        prompt.SPACE_GROUP,
        prompt.CANDIDATES,
        prompt.FORMULA_UNITS,
        prompt.SITES,
        ",",
        "\n",
    }
    for style in prompt.PROPERTY_TEXTS.values():
        phrases |= {style.label, style.unit}
    return sorted(phrases, key=lambda phrase: (-len(phrase), phrase))


def _symbols() -> list[str]:
    """All tokens but the special ones, in a fixed order."""
    groups = range(1, 231)
    positions = {(int(p[1:-1]), p[-1]) for n in groups for p in prompt.site_pieces(n).values()}
    # A sign stays where the whole part is zero.
    negative = [" -0", *(f" {n}" for n in range(-1, _MIN_NUMBER - 1, -1))]
    return [
        *_phrases(),
        *(prompt.element_piece(z) for z in range(1, 119)),
        *(prompt.group_piece(n) for n in groups),
        *(f" {multiplicity}{letter}" for multiplicity, letter in sorted(positions)),
        *(f" {n}" for n in range(_MAX_NUMBER + 1)),
        *negative,
        *(f".{digit}" for digit in range(10)),
        *(str(digit) for digit in range(10)),
    ]


def _words() -> str:
    """A regular expression of one token's text; the first alternative that fits is taken."""
    phrases = "|".join(_escaped(phrase) for phrase in _phrases())
    return (
        f"{phrases}| [0-9]+ [PABCFIR][^\\s]*| [0-9]+[a-zA]| [A-Z][a-z]?| -?[0-9]+"
        r"|\.[0-9]|[0-9]|."
    )


def _escaped(phrase: str) -> str:
    return phrase.replace(".", r"\.").replace("\n", r"\n")
