"""The one noise source: a pure function from a name to numbers, shared by both frameworks.

Every random number drawn while sampling or training is addressed by what it is for, never by
when it is drawn. The address is hashed (BLAKE2b) to the 128-bit key of a counter-based generator,
Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11), and the i-th
number is the i-th 64-bit word of that key's stream. So a sample does not change with the batch it
is in, its padding, the number of devices, or the framework.

Only NumPy's raw Philox words are used, because NumPy promises those stay the same in every
release; its normal and float32 transforms carry no such promise and are therefore done here.
"""

import math
import threading
from hashlib import blake2b
from operator import index
from typing import Literal, get_args

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray
from scipy.special import ndtri

Kind = Literal["normal", "uniform"]

_KINDS = frozenset(get_args(Kind))
_DOMAIN = b"uni-mdm noise 1"  # changing it changes every number the project ever draws
_UNIFORM_BITS = 24  # float32 mantissa: the largest value is 1 - 2^-24, never 1
_NORMAL_BITS = 52  # u = (n + 1/2) 2^-52 is exact in float64 and never 0 or 1: |z| < 8.2
_ZEROS = np.zeros(4, dtype=np.uint64)


class _Streams(threading.local):
    """One reusable generator per thread: re-keying it is six times cheaper than a new one."""

    def __init__(self) -> None:
        self.philox = Philox(key=0)


_streams = _Streams()


def noise(
    seed: int,
    request: int | str,
    sample: int,
    field: str,
    step: int,
    shape: tuple[int, ...],
    kind: Kind = "normal",
) -> NDArray[np.float32]:
    """Return the noise with this address, float32 of the given shape.

    The numbers fill the array in row-major order from the start of the address's stream, so the
    array for shape (3, d) is the head of the one for (5, d): padding rows change nothing.

    Args:
        seed: The user's seed, any integer.
        request: Which request of a run; the integer 1 and the string "1" are different requests.
        sample: Index of the sample within the request.
        field: What is perturbed, e.g. "lattice" or "coords"; fields are independent streams.
        step: Which diffusion step, any integer.
        shape: Shape of the result; it does not enter the address.
        kind: "normal", standard normal by inversion; or "uniform" on [0, 1), a multiple of 2^-24.

    Raises:
        ValueError: for an unknown kind or a negative size.
        TypeError: where an integer is not one.
    """
    if kind not in _KINDS:
        raise ValueError(f"noise kind {kind!r} is not one of {sorted(_KINDS)}")
    words = _words(_key(seed, request, sample, field, step, kind), math.prod(shape))
    values = _uniform(words) if kind == "uniform" else _normal(words)
    return values.reshape(shape)


def _key(
    seed: int, request: int | str, sample: int, field: str, step: int, kind: str
) -> NDArray[np.uint64]:
    """128-bit key of an address. Lengths and the type of `request` are spelled out, so no two
    addresses share a text."""
    name = f"s{request}" if isinstance(request, str) else f"i{index(request)}"
    address = f"{index(seed)},{index(sample)},{index(step)},{kind},{len(field)}:{field}{name}"
    # surrogatepass: file names and command-line text may hold undecodable bytes.
    text = address.encode("utf-8", "surrogatepass")
    return np.frombuffer(blake2b(text, digest_size=16, person=_DOMAIN).digest(), dtype="<u8")


def _words(key: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """The first `count` 64-bit words of the key's Philox4x64-10 stream."""
    philox = _streams.philox
    philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": _ZEROS, "key": key},
        "buffer": _ZEROS,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return philox.random_raw(count)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Top 24 bits of each word as n 2^-24 in [0, 1), exact in float32."""
    bits = words >> np.uint64(64 - _UNIFORM_BITS)
    return bits.astype(np.float32) * np.float32(2.0**-_UNIFORM_BITS)


def _normal(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Top 52 bits of each word through the inverse normal distribution function."""
    bits = words >> np.uint64(64 - _NORMAL_BITS)
    return ndtri((bits.astype(np.float64) + 0.5) * 2.0**-_NORMAL_BITS).astype(np.float32)
