"""Files of named tensors: safetensors, MindSpore's ``.ckpt``, torch's ``.pt``.

A tensor is read as a view of the mapped file and written from it; memory holds a copy only of those
that a ``.ckpt`` has cut into slices. Bytes are little-endian and row-major in all three formats.

MindSpore's ``.ckpt`` is a protobuf message (mindspore/train/checkpoint.proto)

    Checkpoint  { repeated Value value = 1 }
    Value       { string tag = 1;  TensorProto tensor = 2;  MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1;  string tensor_type = 2;  bytes tensor_content = 3 }

in which a large tensor takes several values of one tag, and which may end with ``crc_num`` and ten
bytes, big-endian, the CRC-32 of everything before.
"""

import binascii
import errno
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from common.errors import UserError


@dataclass(frozen=True)
class DType:
    """A type of numbers: numpy's and torch's name, the files' names, and bytes per number."""

    name: str
    safetensors: str
    mindspore: str
    size: int

    @property
    def floating(self) -> bool:
        return "float" in self.name


DTYPES = (
    DType("bool", "BOOL", "Bool", 1),
    DType("int8", "I8", "Int8", 1),
    DType("uint8", "U8", "UInt8", 1),
    DType("int16", "I16", "Int16", 2),
    DType("uint16", "U16", "UInt16", 2),
    DType("int32", "I32", "Int32", 4),
    DType("uint32", "U32", "UInt32", 4),
    DType("int64", "I64", "Int64", 8),
    DType("uint64", "U64", "UInt64", 8),
    DType("float16", "F16", "Float16", 2),
    DType("bfloat16", "BF16", "BFloat16", 2),
    DType("float32", "F32", "Float32", 4),
    DType("float64", "F64", "Float64", 8),
)
_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
_BY_MINDSPORE = {dtype.mindspore: dtype for dtype in DTYPES}
FLOAT32 = _BY_NAME["float32"]

_CRC_MARK = b"crc_num"
_CRC_SIZE = 10
#: Bytes of a tensor in one value of a ``.ckpt``, as MindSpore cuts them.
_SLICE = 512 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a file.

    Attributes:
        dtype: of its numbers.
        shape: its own.
        data: [bytes], not necessarily aligned.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


Tensors = Mapping[str, Tensor]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, in the file's order.

    Raises:
        UserError: if it is absent, damaged, of another format, or holds anything but tensors.
    """
    if path.suffix not in _READERS:
        raise UserError(f"{path}: not a file of tensors; give one of {', '.join(_READERS)}")
    try:
        path.open("rb").close()  # the readers differ in how they say that it cannot be read
        return _READERS[path.suffix](path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {path}: {reason}; check the path") from error


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a new file in the format of its suffix.

    Raises:
        UserError: if the format needs torch, which is not installed, or the system refuses.
        OSError: if the system refuses.
    """
    _WRITERS[path.suffix](path, tensors)


def _map(path: Path) -> NDArray[np.uint8]:
    """A file's bytes. Writable for torch's sake; what is written never reaches the file."""
    if not path.stat().st_size:  # there is nothing to map
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "c")


def _damaged(path: Path, reason: object) -> UserError:
    line = f"{path}: damaged, or not a {path.suffix} file ({reason}); copy or download it again"
    return UserError(" ".join(line.split()))


# Safetensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy"):  # checks the header and every offset
            content = _map(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = _known(path, name, entry["dtype"], _BY_SAFETENSORS)
        begin, end = entry["data_offsets"]
        data = content[start + begin : start + end]
        tensors[name] = Tensor(dtype, tuple(entry["shape"]), data)
    return tensors


def _known(path: Path, name: str, dtype: str, table: Mapping[str, DType]) -> DType:
    if dtype not in table:
        raise UserError(f"{path}: '{name}' holds {dtype}; known types: {', '.join(table)}")
    return table[dtype]


def _write_safetensors(path: Path, tensors: Tensors) -> None:
    specs = {
        name: TensorSpec(
            dtype=tensor.dtype.name,
            shape=tensor.shape,
            data_ptr=tensor.data.ctypes.data,
            data_len=tensor.data.nbytes,
        )
        for name, tensor in tensors.items()
    }
    with path.open("xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        serialize_file(specs, path)
        path.chmod(mode)  # what safetensors writes is for its owner alone
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


# MindSpore


def _read_ckpt(path: Path) -> dict[str, Tensor]:
    content = _map(path).data
    slices: dict[str, list[Tensor]] = {}
    last = ""
    try:
        for number, value in _fields(_without_crc(content)):
            if number != 1 or isinstance(value, int):
                raise ValueError("it starts with no tensor")
            name, tensor = _parse_value(path, value)
            if name in slices and name != last:
                raise ValueError(f"'{name}' is there twice")
            slices.setdefault(name, []).append(tensor)
            last = name
        return {name: _join(name, parts) for name, parts in slices.items()}
    except ValueError as error:
        raise _damaged(path, error) from error


def _without_crc(content: memoryview) -> memoryview:
    """A ``.ckpt`` without the checksum at its end, which is verified."""
    end = len(content) - _CRC_SIZE - len(_CRC_MARK)
    if end < 0 or content[end:-_CRC_SIZE] != _CRC_MARK:
        return content
    if binascii.crc32(content[:end]) != int.from_bytes(content[-_CRC_SIZE:], "big"):
        raise ValueError("the checksum differs")
    return content[:end]


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protobuf message.

    Raises ValueError if it ends early or holds what no ``.ckpt`` does.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        value, position = _varint(message, position)
        if kind == 0:
            yield number, value
        elif kind == 2:
            if position + value > len(message):
                raise ValueError("it ends early")
            yield number, message[position : position + value]
            position += value
        else:
            raise ValueError(f"field {number} is of kind {kind}")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A protobuf integer, and where it ends."""
    value = 0
    for index in range(10):
        if position + index >= len(message):
            raise ValueError("it ends early")
        byte = message[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("an integer is too long")


def _parse_value(path: Path, message: memoryview) -> tuple[str, Tensor]:
    """Name and tensor, or slice of one, of a value."""
    fields = dict(_fields(message))
    tag, tensor = fields.get(1), fields.get(2)
    if not isinstance(tag, memoryview) or not isinstance(tensor, memoryview):
        raise ValueError("an entry is no tensor")
    name = str(tag, "utf-8")
    inner = list(_fields(tensor))
    shape = tuple(dim for number, dim in inner if number == 1 and isinstance(dim, int))
    dtype, data = dict(inner).get(2), dict(inner).get(3)
    if not isinstance(dtype, memoryview) or not isinstance(data, memoryview):
        raise ValueError(f"'{name}' lacks its type or content")
    known = _known(path, name, str(dtype, "utf-8"), _BY_MINDSPORE)
    return name, Tensor(known, shape, np.frombuffer(data, np.uint8))


def _join(name: str, slices: list[Tensor]) -> Tensor:
    """One tensor of its slices."""
    dtype, shape = slices[0].dtype, slices[0].shape
    data = slices[0].data
    if len(slices) > 1:
        data = np.concatenate([part.data for part in slices])
    if shape == (0,) and data.size == dtype.size:  # so MindSpore also writes a single number
        shape = ()
    if data.size != math.prod(shape) * dtype.size:
        raise ValueError(f"'{name}' has {data.size} bytes, which shape {shape} does not")
    return Tensor(dtype, shape, data)


def _write_ckpt(path: Path, tensors: Tensors) -> None:
    crc = 0
    with path.open("xb") as file:
        for name, tensor in tensors.items():
            # MindSpore leaves empty tensors out of its files, but reads them.
            for start in range(0, max(1, tensor.data.size), _SLICE):
                data = tensor.data[start : start + _SLICE]
                for part in (_value_head(name, tensor, data.size), data.data):
                    file.write(part)
                    crc = binascii.crc32(part, crc)
        file.write(_CRC_MARK + crc.to_bytes(_CRC_SIZE, "big"))


def _value_head(name: str, tensor: Tensor, size: int) -> bytes:
    """A value up to its tensor's content of that many bytes."""
    dims = b"".join(_key(1, 0) + _encoded(dim) for dim in tensor.shape)
    dtype = _text(2, tensor.dtype.mindspore)
    inner = dims + dtype + _key(3, 2) + _encoded(size)
    outer = _text(1, name) + _key(2, 2) + _encoded(len(inner) + size)
    return _key(1, 2) + _encoded(len(outer) + len(inner) + size) + outer + inner


def _key(number: int, kind: int) -> bytes:
    return bytes([number << 3 | kind])


def _text(number: int, text: str) -> bytes:
    data = text.encode()
    return _key(number, 2) + _encoded(len(data)) + data


def _encoded(value: int) -> bytes:
    """A protobuf integer."""
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


# torch


def _torch(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        advice = "pip install 'uni-mdm[torch]', or use .safetensors"
        raise UserError(f"{path}: a torch file needs torch, which is absent; {advice}") from error
    return torch


def _read_pt(path: Path) -> dict[str, Tensor]:
    torch = _torch(path)
    zipped = _is_zip(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises whatever the content makes it stumble over
        if not zipped:
            raise _damaged(path, "no torch file") from error
        raise _refused(path, "objects, which could run code") from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in _leaves(path, torch, value, ""):
        if name in tensors:
            raise UserError(f"{path}: '{name}' is there twice; name every tensor once")
        dtype = _known(path, name, str(tensor.dtype).removeprefix("torch."), _BY_NAME)
        data = tensor.detach().contiguous().reshape(-1)
        flat = data.view(torch.uint8).numpy() if data.numel() else np.empty(0, np.uint8)
        tensors[name] = Tensor(dtype, tuple(tensor.shape), flat)
    return tensors


def _is_zip(path: Path) -> bool:
    """Whether a file is an archive, as torch makes it by now; its checksums are verified.

    At those torch itself does not look.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # names, lengths and kinds of compression may be damaged as well
        raise _damaged(path, error) from error
    if damaged is not None:
        raise _damaged(path, f"the checksum of its part {damaged!r} differs")
    return True


def _leaves(path: Path, torch: Any, value: object, prefix: str) -> Iterator[tuple[str, Any]]:
    """Tensors of dictionaries within dictionaries, keys joined by dots."""
    if isinstance(value, torch.Tensor) and prefix:
        if value.layout is not torch.strided or value.is_quantized:
            raise _refused(path, f"'{prefix}', a sparse or quantized tensor")
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _refused(path, f"the key {key!r}, which is no name")
            yield from _leaves(path, torch, item, f"{prefix}.{key}" if prefix else key)
    else:
        raise _refused(path, f"'{prefix}', a {type(value).__name__}" if prefix else "no dictionary")


def _refused(path: Path, what: str) -> UserError:
    return UserError(f"{path}: holds {what}; save a dictionary of named tensors and nothing else")


def _write_pt(path: Path, tensors: Tensors) -> None:
    """Dictionaries by the part of a name up to its first dot, for ``load_state_dict``."""
    torch = _torch(path)
    value: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        dtype = getattr(torch, tensor.dtype.name)
        if tensor.data.size:
            converted = torch.from_numpy(tensor.data).view(dtype).reshape(tensor.shape)
        else:
            converted = torch.empty(tensor.shape, dtype=dtype)
        group, _, rest = name.partition(".")
        value.setdefault(group, {})[rest] = converted
    with path.open("xb") as file:  # given a path, torch writes its name into the file
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's writer, which cannot end what it could not write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


_READERS = {
    ".safetensors": _read_safetensors,
    ".ckpt": _read_ckpt,
    ".pt": _read_pt,
    ".pth": _read_pt,
}
_WRITERS = {
    ".safetensors": _write_safetensors,
    ".ckpt": _write_ckpt,
    ".pt": _write_pt,
    ".pth": _write_pt,
}
#: Suffixes of the files that can be read and written.
SUFFIXES = tuple(_READERS)


def names_file(path: Path) -> bool:
    """Whether a path that may not exist yet is a file's by its ending: .xyz, but not .5 or none."""
    return path.suffix[1:2].isalpha() and not path.is_dir()
