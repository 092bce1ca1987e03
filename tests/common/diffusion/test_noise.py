"""The noise source against Philox written out in integers, NormalDist and scipy.stats."""

import random
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.diffusion.noise import noise

MASK = 2**64 - 1
ADDRESS = {"seed": 7, "request": "mp-1", "sample": 0, "field": "coords", "step": 10}
CHANGES = [
    {"seed": 8},
    {"seed": -7},
    {"request": "mp-2"},
    {"request": 0},
    {"sample": 1},
    {"field": "lattice"},
    {"step": 11},
    {"step": -10},
]

addresses = st.fixed_dictionaries(
    {
        "seed": st.integers(),
        "request": st.integers() | st.text(),
        "sample": st.integers(0, 10**6),
        "field": st.text(max_size=8),
        "step": st.integers(-2, 10**4),
    }
)
kinds = st.sampled_from(["normal", "uniform"])


def philox_words(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 from the SC11 paper, counter from 1, in plain integers."""
    words: list[int] = []
    block = 0
    while len(words) < count:
        block += 1
        c, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(b >> 64) ^ c[1] ^ k[0], b & MASK, (a >> 64) ^ c[3] ^ k[1], a & MASK]
            k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
        words += c
    return words[:count]


def words_of(text: str, count: int) -> list[int]:
    digest = blake2b(text.encode(), digest_size=16, person=b"uni-mdm noise 1").digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    return philox_words(key, count)


def draw(change: dict[str, Any], shape: tuple[int, ...], **more: Any) -> np.ndarray:
    return noise(**{**ADDRESS, **change}, shape=shape, **more)


def test_values_are_philox_words_through_the_normal_quantile() -> None:
    words = words_of("7,0,10,normal,6:coordssmp-1", 30)
    expected = [NormalDist().inv_cdf(((w >> 12) + 0.5) / 2**52) for w in words]
    np.testing.assert_allclose(draw({}, (10, 3)).ravel(), expected, rtol=2e-7)


def test_uniform_values_are_the_top_bits_of_philox_words() -> None:
    words = words_of("7,0,10,uniform,6:coordsi3", 30)
    expected = np.array([(w >> 40) / 2**24 for w in words])
    np.testing.assert_array_equal(draw({"request": 3}, (30,), kind="uniform"), expected)


def test_golden_values() -> None:
    """Literal numbers: a change here changes every published sample."""
    normal = noise(1, "SrTiO3", 2, "coords", 3, (2, 3))
    uniform = noise(1, 5, 2, "coords", 3, (4,), "uniform")
    assert normal.dtype == uniform.dtype == np.float32
    np.testing.assert_allclose(
        normal,
        [[-0.719878102, 1.39455538, 0.166270921], [0.708033645, 0.902219209, 0.170905116]],
        rtol=2e-7,
    )
    np.testing.assert_array_equal(
        uniform,
        np.float32(
            [0.536807656288147, 0.8027957081794739, 0.028395473957061768, 0.391398549079895]
        ),
    )


@given(addresses, st.integers(0, 6), st.integers(0, 6), st.integers(1, 4), kinds)
@settings(deadline=None)
def test_smaller_shape_is_the_head_of_a_larger_one(address, rows, more, width, kind) -> None:
    short = noise(**address, shape=(rows, width, 2), kind=kind)
    long = noise(**address, shape=(rows + more, width, 2), kind=kind)
    assert short.shape == (rows, width, 2)
    np.testing.assert_array_equal(long[:rows], short)


@given(addresses, addresses, kinds, kinds)
@settings(max_examples=300, deadline=None)
def test_equal_exactly_when_the_address_is(first, second, kind, other) -> None:
    same = first == second and kind == other
    a = noise(**first, shape=(4,), kind=kind)
    np.testing.assert_array_equal(a, noise(**first, shape=(4,), kind=kind))
    assert np.array_equal(a, noise(**second, shape=(4,), kind=other)) == same


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"request": 1}, {"request": "1"}),
        ({"field": "a", "request": "bc"}, {"field": "ab", "request": "c"}),
        ({"field": "a", "request": "2:ab"}, {"field": "a2:a", "request": "b"}),
        ({"sample": 1, "step": 11}, {"sample": 11, "step": 1}),
        ({"seed": 1, "sample": 23}, {"seed": 12, "sample": 3}),
        ({"seed": 0}, {"seed": 2**64}),
        ({"request": ""}, {"request": "\0"}),
    ],
)
def test_lookalike_addresses_differ(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert not np.array_equal(draw(first, (2,)), draw(second, (2,)))


def test_order_and_threads_do_not_matter() -> None:
    tasks = [(s, f, n) for s in range(20) for f in ("lattice", "coords") for n in (1, 3, 7)]

    def one(task: tuple[int, str, int]) -> bytes:
        sample, field, size = task
        return noise(0, 0, sample, field, 1, (size,)).tobytes()

    expected = {task: one(task) for task in tasks}
    shuffled = random.Random(0).sample(tasks, len(tasks)) * 10
    with ThreadPoolExecutor(8) as pool:
        for task, got in zip(shuffled, pool.map(one, shuffled), strict=True):
            assert got == expected[task]


def test_result_is_a_fresh_writable_array() -> None:
    first = draw({}, (3,))
    kept = first.copy()
    first[:] = 0.0
    np.testing.assert_array_equal(draw({}, (3,)), kept)


def test_numpy_integers_address_the_same_noise() -> None:
    change = {"seed": np.int64(7), "sample": np.int32(0), "step": np.uint8(10)}
    np.testing.assert_array_equal(draw(change, (3,)), draw({}, (3,)))


@pytest.mark.parametrize("change", CHANGES)
def test_neighbouring_addresses_are_uncorrelated(change: dict[str, Any]) -> None:
    count = 40_000
    a, b = draw({}, (count,)).astype(float), draw(change, (count,)).astype(float)
    bound = 4.5 / np.sqrt(count)
    for lag in (0, 1, 2, 3, 4):
        assert abs(np.corrcoef(a[lag:], b[: count - lag])[0, 1]) < bound
    assert abs(np.corrcoef(a**2, b**2)[0, 1]) < bound
    assert abs(np.corrcoef(b[1:], b[:-1])[0, 1]) < bound


def test_the_two_kinds_are_uncorrelated() -> None:
    count = 40_000
    r = np.corrcoef(draw({}, (count,)), draw({}, (count,), kind="uniform"))[0, 1]
    assert abs(r) < 4.5 / np.sqrt(count)


@pytest.mark.parametrize("axis", ["within one address", "sample", "step", "seed", "request"])
def test_distribution(axis: str) -> None:
    """Along one stream, and of first values across streams: both must be standard normal."""
    count = 20_000
    if axis == "within one address":
        normal = draw({}, (count,)).astype(float)
        uniform = draw({}, (count,), kind="uniform").astype(float)
    else:
        normal = np.array([draw({axis: i}, ())[()] for i in range(count)], dtype=float)
        uniform = np.array([draw({axis: i}, (), kind="uniform")[()] for i in range(count)], float)
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    # Standard errors of the first four moments of a standard normal: 1, 2, 15 and 96 over n.
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((normal**power).mean() - moment) < 4.5 * np.sqrt(variance / count)
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0


def test_extreme_words_stay_finite_and_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = np.array([0, MASK], dtype=np.uint64)
    monkeypatch.setattr("common.diffusion.noise._words", lambda key, count: extremes)
    limit = -NormalDist().inv_cdf(2.0**-53)
    np.testing.assert_allclose(draw({}, (2,)), [-limit, limit], rtol=1e-6)
    np.testing.assert_array_equal(draw({}, (2,), kind="uniform"), [0.0, 1.0 - 2.0**-24])


def test_misuse_raises() -> None:
    with pytest.raises(ValueError, match="kind 'gauss'"):
        draw({}, (2,), kind="gauss")
    with pytest.raises(ValueError, match="negative"):
        draw({}, (-2,))
    with pytest.raises(TypeError):
        draw({"sample": 0.5}, (2,))
    with pytest.raises(TypeError):
        draw({"request": 0.5}, (2,))
