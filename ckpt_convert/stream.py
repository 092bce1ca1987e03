"""Safetensors that are larger than memory, copied piece by piece from file to file.

A folder has one file of weights, or several and an index that names each tensor's, as transformers
writes them. Nothing but headers, and a few chunks, is ever held.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from ckpt_convert.formats import DTYPES
from common.errors import UserError
from common.language.foreign import INDEX_SUFFIX, check_index, read_index

#: Bytes that are held at once.
CHUNK = 4 * 1024 * 1024
_SIZES = {dtype.safetensors: dtype.size for dtype in DTYPES}


class Content(Protocol):
    """Some bytes, which can be had a chunk at a time."""

    @property
    def size(self) -> int:
        """How many."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """They themselves."""
        ...


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file."""

    path: Path
    begin: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """Its content."""
        with self.path.open("rb") as file:
            file.seek(self.begin)
            left = self.size
            while left:
                data = file.read(min(CHUNK, left))
                if not data:
                    raise UserError(f"{self.path}: ends early; copy or download it again")
                left -= len(data)
                yield data


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in files.

    Attributes:
        dtype: by safetensors' name.
        shape: its own.
        pieces: its bytes, row-major and little-endian, one after the other.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Content, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.size for piece in self.pieces)

    def rows(self, begin: int, end: int) -> "Stored":
        """Some of the rows; pieces that are not a file's bytes can only be taken whole."""
        size = self.size // self.shape[0]
        first, last = begin * size, end * size
        taken: list[Content] = []
        offset = 0
        for piece in self.pieces:
            start, stop = max(first - offset, 0), min(last - offset, piece.size)
            if (start, stop) == (0, piece.size):
                taken.append(piece)
            elif start < stop:
                assert isinstance(piece, Piece)
                taken.append(Piece(piece.path, piece.begin + start, stop - start))
            offset += piece.size
        return Stored(self.dtype, (end - begin, *self.shape[1:]), tuple(taken))

    def split(self, count: int) -> list["Stored"]:
        """Equal shares of the rows."""
        rows = self.shape[0] // count
        return [self.rows(i * rows, (i + 1) * rows) for i in range(count)]


def join(parts: list[Stored]) -> Stored:
    """Rows of some tensors, which are alike, below one another."""
    rows = sum(part.shape[0] for part in parts)
    pieces = tuple(piece for part in parts for piece in part.pieces)
    return Stored(parts[0].dtype, (rows, *parts[0].shape[1:]), pieces)


@dataclass(frozen=True)
class Shard:
    """A file of weights.

    Attributes:
        name: of the file.
        tensors: by name.
        metadata: as safetensors has it, if any.
    """

    name: str
    tensors: dict[str, Stored]
    metadata: dict[str, str] | None


def read_shard(path: Path) -> Shard:
    """The header of a file.

    Raises:
        UserError: if it is absent, damaged, or holds numbers of an unknown type.
    """
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:  # checks every offset
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        reason = f"damaged or absent ({' '.join(str(error).split())[:120]})"
        raise UserError(f"{path}: {reason}; copy or download it again") from error
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in _SIZES:
            raise UserError(f"{path}: '{name}' holds {entry['dtype']}; known: {', '.join(_SIZES)}")
        piece = Piece(path, 8 + length + begin, end - begin)
        tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), (piece,))
    return Shard(path.name, tensors, metadata)


def write_shard(path: Path, shard: Shard) -> None:
    """Writes a new file, to the byte as safetensors' own writer does: wide types first, by name.

    Raises:
        UserError: if what it is copied from ends early.
        OSError: if the system refuses.
    """
    tensors = sorted(shard.tensors.items(), key=lambda item: (-_SIZES[item[1].dtype], item[0]))
    header: dict[str, Any] = {} if shard.metadata is None else {"__metadata__": shard.metadata}
    offset = 0
    for name, tensor in tensors:
        assert tensor.size == math.prod(tensor.shape) * _SIZES[tensor.dtype], name
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    with path.open("xb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for _, tensor in tensors:
            for piece in tensor.pieces:
                for data in piece.chunks():
                    file.write(data)


def find_shards(folder: Path, stem: str = "model") -> tuple[list[Shard], dict[str, Any] | None]:
    """Headers of all files of weights in a folder, and the index, if there is one.

    Raises:
        UserError: if there are none, one is damaged, or the index says otherwise than the files.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors{INDEX_SUFFIX}"
    if not index.is_file():
        if not single.is_file():
            raise UserError(f"{folder}: holds neither {single.name} nor {index.name}")
        return [read_shard(single)], None
    content = read_index(index)
    shards = [read_shard(folder / name) for name in sorted(set(content["weight_map"].values()))]
    check_index(index, content, {name: shard.name for shard in shards for name in shard.tensors})
    return shards, content


def index_text(index: Mapping[str, Any], shards: list[Shard]) -> bytes:
    """An index with the same content but these tensors' places, as transformers writes it."""
    places = {tensor: shard.name for shard in shards for tensor in shard.tensors}
    text = json.dumps({**index, "weight_map": places}, indent=2, sort_keys=True) + "\n"
    return text.encode()
