"""Files of tensors: the same bytes as the libraries write, and no damage passes."""

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save_file as save_torch

from ckpt_convert.formats import DTYPES, DType, Tensor, read_tensors, write_tensors
from common.errors import UserError

SUFFIXES = (".safetensors", ".ckpt", ".pt")


def tensor(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes; of a bool, zeros and ones."""
    random = np.random.default_rng(seed)
    size = int(np.prod(shape, dtype=int)) * dtype.size
    high = 2 if dtype.name == "bool" else 256
    return Tensor(dtype, shape, random.integers(0, high, size, dtype=np.uint8))


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape, a.data.tobytes()) == (b.dtype, b.shape, b.data.tobytes())


def write(path: Path, tensors: dict[str, Tensor]) -> bytes:
    path.unlink(missing_ok=True)
    write_tensors(path, tensors)
    return path.read_bytes()


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert ";" in message, "says what to do"
    return message


EXAMPLE = {
    "model.weight": tensor(DTYPES[11], (2, 3)),
    "model.half": tensor(DTYPES[10], (5,)),
    "statistics.mean": tensor(DTYPES[11], ()),
    "statistics.none": tensor(DTYPES[12], (0, 4)),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=5
    )
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    kinds: list[tuple[DType, list[int]]],
) -> None:
    path = tmp_path_factory.mktemp("formats") / f"file{suffix}"
    tensors = {
        f"group.ä {index}": tensor(dtype, tuple(shape), index)
        for index, (dtype, shape) in enumerate(kinds)
    }
    content = write(path, tensors)
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)
    assert write(path, dict(found)) == content


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_read_may_be_replaced(tmp_path: Path, suffix: str) -> None:
    """And a file has the permissions of any other."""
    path = tmp_path / f"file{suffix}"
    write_tensors(path, EXAMPLE)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    found = read_tensors(path)
    path.unlink()
    assert all(same(found[name], EXAMPLE[name]) for name in EXAMPLE)


def test_safetensors_are_the_library_s(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.ones((2, 0), np.float32),
        "long": np.arange(3),
        "flag": np.array(True),
    }
    path = tmp_path / "file.safetensors"
    path.write_bytes(save(arrays))
    assert write(path, read_tensors(path)) == save(arrays)


def test_torch_s_own_files(tmp_path: Path) -> None:
    """Views, transposes and bfloat16, flat or nested, of the old format too."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    values = {"row": base[1], "transposed": base.T, "half": base.bfloat16(), "one": torch.ones(())}
    torch.save(values, tmp_path / "flat.pt")
    torch.save({"model": values}, tmp_path / "nested.pth")
    torch.save(values, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    dense = {name: value.contiguous().clone() for name, value in values.items()}
    save_torch(dense, tmp_path / "file.safetensors")
    expected = read_tensors(tmp_path / "file.safetensors")
    for name, prefix in (("flat.pt", ""), ("nested.pth", "model."), ("old.pt", "")):
        found = read_tensors(tmp_path / name)
        assert found.keys() == {prefix + key for key in expected}
        assert all(same(found[prefix + key], expected[key]) for key in expected)


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file.pt", EXAMPLE)
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert found.keys() == {"model", "statistics"}
    assert found["model"]["half"].dtype == torch.bfloat16
    raw = found["model"]["weight"].numpy().tobytes()
    assert raw == EXAMPLE["model.weight"].data.tobytes()


# Damage


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_anywhere(tmp_path: Path, suffix: str) -> None:
    """An error or, between two values of a file without its checksum, fewer tensors."""
    path = tmp_path / f"file{suffix}"
    content = write(path, EXAMPLE)
    for size in range(0, len(content), 1 if suffix == ".ckpt" else 37):
        path.write_bytes(content[:size])
        try:
            assert len(read_tensors(path)) < len(EXAMPLE) or size > len(content) - 18
        except UserError:
            error_of(path)


def test_every_flipped_bit_of_a_ckpt_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    content = write(path, EXAMPLE)
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        error_of(path)


def test_flipped_bits_of_a_torch_file_are_found(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    content = write(path, EXAMPLE)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [archive.read(info) for info in archive.infolist() if info.file_size > 8]
    for part in parts:
        damaged = bytearray(content)
        damaged[content.index(part) + len(part) // 2] ^= 4
        path.write_bytes(damaged)
        assert "damaged" in error_of(path)


def test_flipped_bits_of_a_torch_file_s_directory(tmp_path: Path) -> None:
    """An error in one line, or the same tensors where no reader needs what is flipped."""
    path = tmp_path / "file.pt"
    content = write(path, EXAMPLE)
    same = {name: tensor.data.tobytes() for name, tensor in read_tensors(path).items()}
    for index in range(content.index(b"PK\x01\x02"), len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        try:
            found = read_tensors(path)
        except UserError:
            error_of(path)
        else:
            assert {name: tensor.data.tobytes() for name, tensor in found.items()} == same


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_not_such_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    assert "No such file" in error_of(path)
    path.mkdir()
    error_of(path)
    for content in (b"", b"name,value\n1,2\n", b"\x0a" * 40, bytes(100), b"PK\x03\x04" + bytes(90)):
        path.with_name(f"other{suffix}").write_bytes(content)
        try:
            assert not read_tensors(path.with_name(f"other{suffix}"))
        except UserError:
            error_of(path.with_name(f"other{suffix}"))
    assert "not a file of tensors" in error_of(tmp_path / "weights.bin")


def field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def value(*fields: bytes, name: bytes = b"a") -> bytes:
    return field(1, field(1, name) + field(2, b"".join(fields)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (value(b"\x08\x02", field(2, b"Float32"), field(3, bytes(4))), "has 4 bytes"),
        (value(b"\x08" + b"\xff" * 9 + b"\x01", field(2, b"Float32"), field(3, b"")), "0 bytes"),
        (value(b"\x08\x04", field(2, b"Int4"), field(3, bytes(2))), "holds Int4"),
        (value(b"\x08\x04", field(2, b"str"), field(3, bytes(4))), "holds str"),
        (value(field(2, b"Float32")), "lacks its type or content"),
        (value(b"\x08\x01", field(2, b"Float32"), field(3, b"1234"), name=b"\xff"), "utf-8"),
        (field(1, field(1, b"a") + field(3, b"")), "no tensor"),
        (b"\x0d1234", "kind 5"),
    ],
)
def test_malformed_ckpt(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    assert expected in error_of(path)


def test_slices_of_a_large_tensor_are_joined(tmp_path: Path) -> None:
    def part(data: bytes, name: bytes = b"a") -> bytes:
        return value(b"\x08\x03", field(2, b"Int16"), field(3, data), name=name)

    path = tmp_path / "file.ckpt"
    path.write_bytes(part(b"12") + part(b"34") + part(b"56") + part(b"abcdef", b"b"))
    assert read_tensors(path)["a"].data.tobytes() == b"123456"
    path.write_bytes(part(b"12") + part(b"abcdef", b"b") + part(b"3456"))
    assert "'a' is there twice" in error_of(path)


def test_large_tensors_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_convert.formats._SLICE", 10)
    content = write(tmp_path / "file.ckpt", EXAMPLE)
    assert content.count(b"model.weight") == 3
    found = read_tensors(tmp_path / "file.ckpt")
    assert all(same(found[name], EXAMPLE[name]) for name in EXAMPLE)


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False])
def test_pickled_objects_are_refused_and_not_run(tmp_path: Path, new: bool) -> None:
    path, trace = tmp_path / "file.pt", tmp_path / "trace"
    torch.save({"a": Trap(trace)}, path, _use_new_zipfile_serialization=new)
    error_of(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the trap works"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": torch.ones(2), "epoch": 3}, "'epoch', a int"),
        ({"a": {"b": [torch.ones(2)]}}, "'a.b', a list"),
        ({3: torch.ones(2)}, "the key 3"),
        (torch.ones(2), "no dictionary"),
        ([torch.ones(2)], "no dictionary"),
        ({"a": torch.eye(3).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "holds complex64"),
        ({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}, "'a.b' is there twice"),
    ],
)
def test_torch_files_hold_named_tensors_alone(
    tmp_path: Path, content: object, expected: str
) -> None:
    torch.save(content, tmp_path / "file.pt")
    assert expected in error_of(tmp_path / "file.pt")


# Full disks


def test_full_disk(tmp_path: Path) -> None:
    """A real refusal by the system, in a process that may write no more than 10,000 bytes."""
    script = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from ckpt_convert.formats import FLOAT32, Tensor, write_tensors
from common.errors import UserError
from common.files import atomic_path
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tensors = {"model.a": Tensor(FLOAT32, (5000,), np.zeros(20_000, np.uint8))}
for suffix in (".safetensors", ".ckpt", ".pt"):
    try:
        with atomic_path(Path(sys.argv[1]) / f"file{suffix}") as path:
            write_tensors(path, tensors)
    except UserError as error:
        print(error)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("cannot write") and "File too large" in line for line in lines)
    assert not list(tmp_path.iterdir())
