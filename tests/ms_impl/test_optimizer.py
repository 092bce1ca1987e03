"""AdamW over one vector, against torch's over a list of tensors."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter, Tensor
from numpy.typing import NDArray

from ms_impl.optimizer import AdamW, Gradient, Norm

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.99), 1e-4, 0.3
SHAPES = ((3, 5), (7,), (1,), (4, 2, 3))
RATES = (0.01, 0.02, 0.0, 0.03)
SCALES = (1.0, 0.25, 1.0, 2.0)
AVERAGE_DECAYS = (0.1, 0.5, 0.9, 0.7)


def gradients() -> list[list[NDArray[np.float32]]]:
    """Of every step and parameter; some are so small that eps decides."""
    random = np.random.default_rng(1)
    sizes = 10.0 ** random.integers(-6, 1, size=(len(RATES), len(SHAPES)))
    return [
        [
            (size * random.normal(size=shape)).astype(np.float32)
            for size, shape in zip(row, SHAPES, strict=True)
        ]
        for row in sizes
    ]


def starts() -> list[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(np.float32) for shape in SHAPES]


def joined(arrays: list[NDArray]) -> NDArray:
    return np.concatenate([array.ravel() for array in arrays])


def expected() -> dict[str, NDArray]:
    """torch's vectors after all steps, in float64."""
    parameters = [torch.nn.Parameter(torch.from_numpy(x).double()) for x in starts()]
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    average = joined(starts()).astype(float)
    for row, rate, scale, decay in zip(gradients(), RATES, SCALES, AVERAGE_DECAYS, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = torch.from_numpy(gradient).double() * scale
        optimizer.step()
        weight = joined([p.detach().numpy() for p in parameters])
        average = decay * average + (1 - decay) * weight
    moments = {
        name: joined([optimizer.state[p][name].numpy() for p in parameters])
        for name in ("exp_avg", "exp_avg_sq")
    }
    return {"weight": weight, "average": average} | moments


def optimizer_after(**settings: object) -> tuple[AdamW, list[Parameter]]:
    """After all steps, with the parameters that follow it."""
    settings = {"betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY} | settings
    parameters = [Parameter(Tensor(x), name=f"p{i}") for i, x in enumerate(starts())]
    optimizer = AdamW(parameters, **settings)
    steps = zip(gradients(), RATES, SCALES, AVERAGE_DECAYS, strict=True)
    for number, (row, rate, scale, decay) in enumerate(steps, start=1):
        optimizer.step(Tensor(joined(row)), number, rate, decay, scale)
    return optimizer, parameters


def check(optimizer: AdamW) -> None:
    """Holds the vectors against torch's, to a few times the rounding of float32."""
    for name, values in expected().items():
        found = getattr(optimizer, name).asnumpy()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, values, rtol=2e-6, atol=1e-6 * np.abs(values).max())


def test_steps_are_those_of_torch() -> None:
    optimizer, parameters = optimizer_after()
    check(optimizer)

    def shown() -> NDArray:
        return joined([parameter.asnumpy() for parameter in parameters])

    np.testing.assert_array_equal(shown(), optimizer.weight.asnumpy())
    optimizer.put(optimizer.average)
    np.testing.assert_array_equal(shown(), optimizer.average.asnumpy())


@pytest.mark.parametrize(
    "broken", [{"betas": (0.9, 0.999)}, {"eps": 1e-5}, {"weight_decay": 0.0}], ids=str
)
def test_another_optimizer_is_noticed(broken: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        check(optimizer_after(**broken)[0])


def test_gradient_is_one_vector() -> None:
    """In the order of the parameters, times the scale, and each network has its own."""
    for seed in (0, 1):
        random = np.random.default_rng(seed)
        arrays = [random.normal(size=(2, 3)), random.normal(size=(3,))]
        first, second = (
            Parameter(Tensor(array, ms.float32), name=f"p{i}") for i, array in enumerate(arrays)
        )

        def function(scale: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
            value = ((first * first).sum() + (second * x).sum()) * scale  # noqa: B023
            return value, (value,)

        x = Tensor(random.normal(size=(3,)), ms.float32)
        (value,), gradient = Gradient(function, [first, second])(Tensor(2.0, ms.float32), x)
        expected = np.concatenate([4 * arrays[0].ravel(), 2 * x.asnumpy()])
        np.testing.assert_allclose(gradient.asnumpy(), expected, rtol=1e-6)
        total = 2 * ((arrays[0] ** 2).sum() + (arrays[1] * x.asnumpy()).sum())
        np.testing.assert_allclose(value.asnumpy(), total, rtol=1e-5)


def test_norm() -> None:
    """Of as many entries as a network has, and beyond what float32 can square."""
    values = np.random.default_rng(0).normal(size=2_000_003).astype(np.float32)
    norm = Norm()
    exact = np.linalg.norm(values.astype(float))
    assert np.isclose(float(norm(Tensor(values))), exact, rtol=1e-6)
    for value, result in ((np.inf, np.inf), (1e30, np.inf), (np.nan, np.nan)):
        values[17] = value
        np.testing.assert_equal(float(norm(Tensor(values))), result)
