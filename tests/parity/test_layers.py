"""Every layer in both frameworks: results, and gradients of all parameters and inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import nn
from numpy.typing import NDArray

import ms_impl.crystal_dit as ms_dit
import ms_impl.layers as ms_layers
import torch_impl.crystal_dit as torch_dit
import torch_impl.layers as torch_layers
from common.crystal.lattice import LATTICE_BASIS
from tests.parity.twins import (
    DisagreementError,
    Gradient,
    compare,
    fill_mindspore,
    fill_torch,
    precision,
)

SIZE, TOKENS, ATOMS, WIDTH, EDGE, HEADS = 3, 4, 6, 16, 12, 4
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> NDArray[np.float32]:
    return RANDOM.normal(size=shape).astype(np.float32)


def lattice_numbers() -> NDArray[np.float32]:
    """Of cells between 8 and 3000 A^3."""
    k = 0.4 * normal(SIZE, 6)
    k[:, 5] = np.linspace(1.2, 4.6, SIZE)
    return k


def metrics() -> NDArray[np.float32]:
    rows = 3 * np.eye(3) + normal(SIZE, 3, 3)
    return (rows @ rows.transpose(0, 2, 1)).astype(np.float32)


NODES, EDGES, MIXED = (
    normal(SIZE, TOKENS, WIDTH),
    normal(SIZE, TOKENS, ATOMS, EDGE),
    normal(SIZE, 6),
)
DIFFERENCES = RANDOM.uniform(-2, 2, size=(SIZE, TOKENS, ATOMS, 3)).astype(np.float32)
DIFFERENCES[0, 0, 0] = 0  # the atom itself
SENDERS = RANDOM.integers(0, TOKENS, size=(SIZE, ATOMS)).astype(np.int32)
ATOM_MASK = np.arange(ATOMS) < np.array([[6], [4], [1]])
TOKEN_MASK = np.arange(TOKENS) < np.array([[4], [2], [1]])
SHIFTS = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3, indexing="ij"), -1).reshape(-1, 3)
PROPERTY = normal(SIZE, WIDTH)
GIVEN = np.array([[True, False], [False, False], [True, True]])


def torch_sum_of_images(d: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    shifts = torch.tensor(SHIFTS, dtype=d.dtype)
    return torch_layers.image_distances(d, g, shifts)


MS_SHIFTS = ms.Tensor(SHIFTS, ms.float32)
MS_BASIS = ms.Tensor(LATTICE_BASIS, ms.float32)


# Graph mode compiles the source of functions: they have to be whole ones.
def ms_images(d: ms.Tensor, g: ms.Tensor) -> ms.Tensor:
    return ms_layers.image_distances(d, g, MS_SHIFTS)


def ms_sinusoidal(t: ms.Tensor) -> ms.Tensor:
    return ms_layers.sinusoidal_embedding(t, 8)


def ms_fourier(d: ms.Tensor) -> ms.Tensor:
    return ms_layers.fourier_features(d, 3)


def ms_radial(r: ms.Tensor) -> ms.Tensor:
    return ms_layers.radial_features(r)


def ms_lattice(k: ms.Tensor) -> ms.Tensor:
    return ms_layers.lattice_matrix(k, MS_BASIS)


def ms_inverse(m: ms.Tensor) -> ms.Tensor:
    return ms_layers.inverse(m)


def ms_modulate(x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor) -> ms.Tensor:
    return ms_layers.modulate(x, shift, scale)


@dataclass(frozen=True)
class Case:
    """A layer in both frameworks, its inputs, and other inputs that break MindSpore's."""

    torch_layer: Callable[[], Callable]
    ms_layer: Callable[[], Callable]
    inputs: dict[str, NDArray]
    broken: dict[str, NDArray]


def fusion(aggregation: str, broken: dict[str, NDArray]) -> Case:
    return Case(
        lambda: torch_layers.EdgeFusion(WIDTH, EDGE, HEADS, aggregation),
        lambda: ms_layers.EdgeFusion(WIDTH, EDGE, HEADS, aggregation),
        {"nodes": NODES, "edges": EDGES, "sender_index": SENDERS, "atom_mask": ATOM_MASK},
        broken,
    )


CASES = {
    "sinusoidal_embedding": Case(
        lambda: lambda t: torch_layers.sinusoidal_embedding(t, 8),
        lambda: ms_sinusoidal,
        {"t": np.array([0.0, 0.31, 1.0], np.float32)},
        {"t": np.array([0.0, 0.33, 1.0], np.float32)},
    ),
    "fourier_features": Case(
        lambda: lambda d: torch_layers.fourier_features(d, 3),
        lambda: ms_fourier,
        {"difference": DIFFERENCES},
        {"difference": DIFFERENCES[..., ::-1]},
    ),
    "radial_features": Case(
        lambda: torch_layers.radial_features,
        lambda: ms_radial,
        {"distance": np.abs(4 * MIXED)},
        {"distance": np.abs(4 * MIXED) + np.float32(1e-3)},
    ),
    "lattice_matrix": Case(
        lambda: (
            lambda k: torch_layers.lattice_matrix(k, torch.tensor(LATTICE_BASIS, dtype=k.dtype))
        ),
        lambda: ms_lattice,
        {"k": (numbers := lattice_numbers())},
        {"k": numbers[:, [1, 0, 2, 3, 4, 5]]},
    ),
    "inverse": Case(
        lambda: torch.linalg.inv,
        lambda: ms_inverse,
        {"matrix": (frames := np.eye(3, dtype=np.float32) + 0.3 * normal(SIZE, 3, 3))},
        {"matrix": frames.transpose(0, 2, 1)},
    ),
    "image_distances": Case(
        lambda: torch_sum_of_images,
        lambda: ms_images,
        {"difference": DIFFERENCES, "metric": (metric := metrics())},
        {"metric": metric[[1, 0, 2]]},
    ),
    "MLP": Case(
        lambda: torch_layers.MLP(WIDTH, 8, 6),
        lambda: ms_layers.MLP(WIDTH, 8, 6),
        {"x": NODES},
        {"x": NODES[..., ::-1]},
    ),
    "EdgeEmbedding": Case(
        lambda: torch_layers.EdgeEmbedding(EDGE, 8),
        lambda: ms_layers.EdgeEmbedding(EDGE, 8),
        {"features": EDGES, "k": MIXED},
        {"k": MIXED[[1, 0, 2]]},
    ),
    "EdgeFusion, softmax": fusion("softmax", {"sender_index": np.zeros_like(SENDERS)}),
    "EdgeFusion, mean": fusion("mean", {"atom_mask": np.ones_like(ATOM_MASK)}),
    "CrystalAttention": Case(
        lambda: torch_layers.CrystalAttention(WIDTH, HEADS),
        lambda: ms_layers.CrystalAttention(WIDTH, HEADS),
        {"nodes": NODES, "prop": PROPERTY, "mask": TOKEN_MASK},
        {"mask": np.ones_like(TOKEN_MASK)},
    ),
    "modulate": Case(
        lambda: torch_layers.modulate,
        lambda: ms_modulate,
        {"x": NODES, "shift": PROPERTY[:, None], "scale": 2 * PROPERTY[:, None]},
        {"shift": 2 * PROPERTY[:, None], "scale": PROPERTY[:, None]},
    ),
    "PropertyEmbedding": Case(
        lambda: torch_dit.PropertyEmbedding(2, WIDTH),
        lambda: ms_dit.PropertyEmbedding(2, WIDTH),
        {"values": MIXED[:, :2], "mask": GIVEN},
        {"mask": GIVEN[:, ::-1]},
    ),
}


def torch_results(case: Case, exact: bool) -> dict[str, NDArray]:
    """Outputs, and gradients of a fixed linear function of them."""
    with precision(exact) as dtype:
        layer = case.torch_layer()
        parameters = {}
        if isinstance(layer, torch.nn.Module):
            fill_torch(layer)
            parameters = dict(layer.named_parameters())
        inputs = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in case.inputs.items()}
        for name, tensor in inputs.items():
            if tensor.is_floating_point():
                inputs[name] = tensor.to(dtype).requires_grad_(True)
        found = layer(*inputs.values())
        outputs = found if isinstance(found, tuple) else (found,)
        weights = [torch.from_numpy(w).to(dtype) for w in cotangents(o.shape for o in outputs)]
        total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        wanted = {n: t for n, t in (inputs | parameters).items() if t.requires_grad}
        gradients = torch.autograd.grad(total, list(wanted.values()))
    results = {f"output {i}": o.detach().numpy() for i, o in enumerate(outputs)}
    names = (f"gradient of {name}" for name in wanted)
    return results | {n: g.numpy() for n, g in zip(names, gradients, strict=True)}


def cotangents(shapes: object) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(7)
    return [random.normal(size=tuple(shape)).astype(np.float32) for shape in shapes]


class Evaluation:
    """MindSpore's layer, compiled once with its gradients."""

    def __init__(self, case: Case, shapes: list[tuple[int, ...]]) -> None:
        layer = case.ms_layer()
        self.case = case
        weights = [ms.Tensor(w) for w in cotangents(shapes)]
        self.names = [n for n, a in case.inputs.items() if a.dtype == np.float32]
        parameters = []
        if isinstance(layer, nn.Cell):
            fill_mindspore(layer)
            parameters = layer.trainable_params()
            self.names += [name for name, _ in layer.parameters_and_names()]
        single = len(weights) == 1

        def total(*inputs: ms.Tensor) -> tuple:
            outputs = layer(*inputs)
            if single:
                outputs = (outputs,)
            value = (outputs[0] * weights[0]).sum()
            for index in range(1, len(weights)):
                value = value + (outputs[index] * weights[index]).sum()
            return value, outputs

        positions = tuple(i for i, a in enumerate(case.inputs.values()) if a.dtype == np.float32)
        self.gradient = Gradient(total, positions, parameters)

    def __call__(self, **changed: NDArray) -> dict[str, NDArray]:
        arrays = (self.case.inputs | changed).values()
        inputs = [ms.Tensor(np.ascontiguousarray(a)) for a in arrays]
        outputs, gradients = self.gradient.results(*inputs)
        results = {f"output {i}": o.asnumpy() for i, o in enumerate(outputs)}
        names = (f"gradient of {name}" for name in self.names)
        return results | {n: g.asnumpy() for n, g in zip(names, gradients, strict=True)}


@cache
def references(name: str) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    return torch_results(CASES[name], exact=False), torch_results(CASES[name], exact=True)


@cache
def evaluation(name: str) -> Evaluation:
    shapes = [a.shape for key, a in references(name)[1].items() if key.startswith("output")]
    return Evaluation(CASES[name], shapes)


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    compare(evaluation(name)(), *references(name))


@pytest.mark.parametrize("name", CASES)
def test_broken_layer_is_noticed(name: str) -> None:
    with pytest.raises(DisagreementError):
        compare(evaluation(name)(**CASES[name].broken), *references(name))
