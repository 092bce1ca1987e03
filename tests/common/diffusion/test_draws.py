"""Draws of a training step: their distributions, and what they depend on."""

import numpy as np
import pytest
from scipy import stats

from common.diffusion.draws import TrainingDraws


def of_step(step: int = 0, stream: str = "train", seed: int = 0, size: int = 64) -> TrainingDraws:
    return TrainingDraws.of_step(seed, stream, step, (size, 5), 3)


def test_shapes_and_types() -> None:
    draws = of_step()
    shapes = {name: array.shape for name, array in vars(draws).items()}
    assert shapes == {
        "t": (64,),
        "free": (64, 5, 3),
        "free_normal": (64, 5, 3),
        "lattice": (64, 6),
        "origins": (64, 3, 4),
        "first_atoms": (64, 5),
        "keep_property": (64,),
        "keep_precedent": (64,),
    }
    assert {array.dtype for array in vars(draws).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("size", [1, 2, 7, 256, 1000])
def test_one_time_in_each_interval(size: int) -> None:
    for step in range(20):
        t = of_step(step, size=size).t
        assert (t >= 0).all()
        assert (t < 1).all()
        # Up to the rounding of float32, which may reach the edge of the next interval.
        assert np.abs(t.astype(float) * size - np.arange(size) - 0.5).max() <= 0.5001


def test_distributions() -> None:
    steps = [of_step(step) for step in range(100)]
    for name, law in (
        ("t", "uniform"),
        ("free", "uniform"),
        ("origins", "uniform"),
        ("first_atoms", "uniform"),
        ("keep_property", "uniform"),
        ("free_normal", "norm"),
        ("lattice", "norm"),
    ):
        values = np.concatenate([getattr(draws, name).ravel() for draws in steps])
        if name == "t":  # stratified, more even than random
            assert (
                np.abs(np.sort(values) - (np.arange(len(values)) + 0.5) / len(values)).max() < 0.02
            )
        else:
            assert stats.kstest(values, law).pvalue > 1e-3, name


def test_same_address_same_numbers() -> None:
    first = vars(of_step(7))
    of_step(8)
    for name, array in vars(of_step(7)).items():
        np.testing.assert_array_equal(array, first[name])


@pytest.mark.parametrize("other", [{"step": 8}, {"stream": "validation"}, {"seed": 1}])
def test_other_address_other_numbers(other: dict[str, object]) -> None:
    first, second = vars(of_step(7)), vars(of_step(**({"step": 7} | other)))  # type: ignore[arg-type]
    for name in first:
        assert not np.isin(first[name], second[name]).mean() > 0.05, name


def test_fields_are_independent() -> None:
    draws = of_step(size=2000)
    columns = [
        draws.free[:, 0, 0],
        draws.free_normal[:, 0, 0],
        draws.lattice[:, 0],
        draws.origins[:, 0, 0],
        draws.first_atoms[:, 0],
        draws.keep_property,
        draws.t,
    ]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.1
