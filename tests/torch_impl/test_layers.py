"""Layers against closed forms, pymatgen, and loops that follow the paper's equations."""

import math

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice
from torch import Tensor, nn

from common.crystal.lattice import LATTICE_BASIS, k_to_lattice, lattice_to_k
from tests.networks import fill_value
from torch_impl.layers import (
    MLP,
    RADIAL_CENTERS,
    CrystalAttention,
    EdgeEmbedding,
    EdgeFusion,
    fourier_features,
    image_distances,
    lattice_matrix,
    modulate,
    radial_features,
    sinusoidal_embedding,
)

CELLS = {
    "cubic": Lattice.cubic(4.0),
    "hexagonal": Lattice.hexagonal(3.2, 5.2),
    "fcc, primitive": Lattice.from_parameters(3.9, 3.9, 3.9, 60, 60, 60),
    "bcc, primitive": Lattice([[-2, 2, 2], [2, -2, 2], [2, 2, -2]]),
    "monoclinic": Lattice.monoclinic(5.15, 5.21, 5.32, 99.2),
    "triclinic": Lattice.from_parameters(4.1, 5.3, 6.2, 82, 101, 95),
    "long": Lattice.orthorhombic(3.0, 3.5, 14.0),
}


def filled(module: nn.Module) -> nn.Module:
    """The module in float64 with no zero among its parameters."""
    for name, parameter in module.named_parameters():
        parameter.data = torch.tensor(fill_value(name, parameter.shape), dtype=torch.float64)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def random_k(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Lattice numbers of cells between about 8 and 3000 A^3, some of them very oblique."""
    k = 0.4 * normal(size, 6)
    k[:, 5] = torch.linspace(1.2, 4.6, size)
    return k.to(dtype)


# Lattices and positions


def test_lattice_matrix_is_the_matrix_exponential() -> None:
    k, basis = random_k(50), torch.tensor(LATTICE_BASIS)
    expected = torch.matrix_exp(torch.einsum("bk,kij->bij", k, basis))
    torch.testing.assert_close(lattice_matrix(k, basis), expected, rtol=1e-7, atol=1e-7)


def test_lattice_matrix_is_that_of_common() -> None:
    """In float32, as the network runs: within a few 1e-6 of its size."""
    k = random_k(50, torch.float32)
    found = lattice_matrix(k, torch.tensor(LATTICE_BASIS, dtype=torch.float32)).numpy()
    expected = k_to_lattice(k.numpy().astype(float))
    size = np.abs(expected).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found / size, expected / size, atol=1e-5)


def test_lattice_matrix_has_the_lengths_and_angles() -> None:
    k = lattice_to_k(np.array([cell.matrix for cell in CELLS.values()]))
    matrices = lattice_matrix(torch.tensor(k), torch.tensor(LATTICE_BASIS)).numpy()
    for matrix, cell in zip(matrices, CELLS.values(), strict=True):
        np.testing.assert_allclose(Lattice(matrix).parameters, cell.parameters, rtol=1e-6)


def images_by_pymatgen(cell: Lattice, difference: np.ndarray) -> np.ndarray:
    """Distances to all images within reach, in order, without the atom itself."""
    points = cell.get_points_in_sphere([difference], np.zeros(3), r=15.0, zip_results=False)
    distances = np.sort(points[1])
    return distances[distances > 1e-2]


@pytest.mark.parametrize("name", CELLS)
def test_image_distances(name: str) -> None:
    cell = CELLS[name]
    random = np.random.default_rng(0)
    difference = random.uniform(-3, 3, size=(4, 5, 3))
    difference[0, 0] = 0.0  # the atom itself: its own nearest images
    difference[0, 1] = [1.0, -2.0, 0.0]
    difference[1, 0] = [0.5, 0.5, 0.5]
    shifts = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)
    metric = torch.tensor(cell.matrix @ cell.matrix.T, dtype=torch.float32)
    found = image_distances(
        torch.tensor(difference, dtype=torch.float32)[None], metric[None], shifts
    )
    assert found.shape == (1, 4, 5, 2)
    for index in np.ndindex(4, 5):
        expected = images_by_pymatgen(cell, difference[index])[:2]
        np.testing.assert_allclose(found[0][index].numpy(), expected, atol=2e-3)


def test_image_distances_have_the_gradient_of_the_distance() -> None:
    cell = CELLS["triclinic"]
    metric = torch.tensor(cell.matrix @ cell.matrix.T)[None]
    shifts = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 3)
    difference = 0.3 * normal(1, 2, 3, 3)
    difference.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda d: image_distances(d, metric, shifts), (difference,))


def test_fourier_features() -> None:
    difference = normal(4, 5, 3)
    found = fourier_features(difference, 3)
    assert found.shape == (4, 5, 18)
    for index in np.ndindex(4, 5):
        d = difference[index].numpy()
        expected = []
        for axis in range(3):
            expected += [math.sin(2 * math.pi * n * d[axis]) for n in (1, 2, 3)]
            expected += [math.cos(2 * math.pi * n * d[axis]) for n in (1, 2, 3)]
        np.testing.assert_allclose(found[index], expected, atol=1e-12)


def test_fourier_features_have_the_period_of_the_cell() -> None:
    difference = normal(4, 3)
    moved = difference + torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(fourier_features(difference, 8), fourier_features(moved, 8))
    mirrored = fourier_features(-difference, 2).view(4, 3, 2, 2)
    original = fourier_features(difference, 2).view(4, 3, 2, 2)
    torch.testing.assert_close(mirrored[:, :, 0], -original[:, :, 0])
    torch.testing.assert_close(mirrored[:, :, 1], original[:, :, 1])


def test_radial_features() -> None:
    distance = torch.tensor([0.0, 2.0, 6.0, 100.0], dtype=torch.float64)
    found = radial_features(distance)
    assert found.shape == (4, RADIAL_CENTERS)
    centres = np.linspace(0, 6, RADIAL_CENTERS)
    for row, r in zip(found, distance.tolist(), strict=True):
        np.testing.assert_allclose(row, np.exp(-(((r - centres) / 0.4) ** 2)), atol=1e-12)
    assert found.argmax(dim=1)[:3].tolist() == [0, 5, 15]
    assert found[3].sum() == 0


def test_sinusoidal_embedding() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    found = sinusoidal_embedding(t, 8)
    for row, time in zip(found, t.tolist(), strict=True):
        angles = [1000 * time * 1000 ** (-i / 4) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(row, expected, atol=2e-4)  # 1000 rad in float32
    many = sinusoidal_embedding(torch.linspace(0, 1, 1001), 128)
    assert torch.cdist(many, many).fill_diagonal_(1).min() > 1e-2


# Equations 6-9


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    result = torch.stack([(layer.weight[i] * x).sum() for i in range(layer.out_features)])
    return result if layer.bias is None else result + layer.bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def test_edge_embedding_is_phi_h_of_k_and_the_features() -> None:
    layer = filled(EdgeEmbedding(5, 4))
    assert isinstance(layer, EdgeEmbedding)
    features, k = normal(2, 3, 3, 5), normal(2, 6, seed=1)
    found = layer(features, k)
    for b, i, j in np.ndindex(2, 3, 3):
        hidden = linear(layer.geometry, features[b, i, j]) + linear(layer.lattice, k[b])
        expected = silu(linear(layer.output, silu(hidden)))
        torch.testing.assert_close(found[b, i, j], expected)


@pytest.mark.parametrize("aggregation", ["softmax", "mean"])
def test_edge_fusion_is_equations_6_and_7(aggregation: str) -> None:
    """phi_m with its last layer on every edge, then the sum: the folded form gives the same."""
    width, heads = 8, 2
    layer = filled(EdgeFusion(width, 5, heads, aggregation))
    assert isinstance(layer, EdgeFusion)
    nodes, edges = normal(2, 3, width), normal(2, 3, 4, 5, seed=1)
    atom_token = torch.tensor([[0, 0, 1, 2], [1, 0, 2, 0]])
    atom_mask = torch.tensor([[True] * 4, [True, True, True, False]])
    found, messages = layer(nodes, edges, atom_token, atom_mask)
    part = width // heads
    for b, i in np.ndindex(2, 3):
        atoms = [j for j in range(4) if atom_mask[b, j]]
        hidden = []
        for j in atoms:
            sender = nodes[b, atom_token[b, j]]
            # phi_m's first layer on the concatenation [h_i, h_j, edge]
            weight = torch.cat([layer.receiver.weight, layer.sender.weight, layer.edge.weight], 1)
            joined = torch.cat([nodes[b, i], sender, edges[b, i, j]])
            hidden.append(silu(weight @ joined + layer.receiver.bias))
            torch.testing.assert_close(messages[b, i, j], hidden[-1])
        summed = torch.zeros(width, dtype=torch.float64)
        for head in range(heads):
            if layer.weight is None:
                share = torch.full((len(atoms),), 1 / len(atoms), dtype=torch.float64)
            else:
                logits = torch.stack([linear(layer.weight, h)[head] for h in hidden])
                share = logits.exp() / logits.exp().sum()
            columns = slice(head * part, (head + 1) * part)
            for s, h in zip(share, hidden, strict=True):
                message = layer.message.weight[:, columns] @ h[columns] + layer.message.bias / heads
                summed = summed + s * message
        joined = torch.cat([nodes[b, i], summed])
        expected = linear(layer.node.output, silu(linear(layer.node.hidden, joined)))
        torch.testing.assert_close(found[b, i], expected)


def test_crystal_attention_is_equations_8_and_9() -> None:
    width, heads = 8, 2
    layer = filled(CrystalAttention(width, heads))
    assert isinstance(layer, CrystalAttention)
    nodes, prop = normal(2, 4, width), normal(2, width, seed=1)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    found = layer(nodes, prop, mask)
    part = width // heads
    for b in range(2):
        tokens = [j for j in range(4) if mask[b, j]]
        p = linear(layer.property, prop[b])
        keys, values = (
            [linear(fuse, torch.cat([linear(project, nodes[b, j]), p])) for j in tokens]
            for fuse, project in ((layer.fuse_key, layer.key), (layer.fuse_value, layer.value))
        )
        for i in tokens:
            query = linear(layer.query, nodes[b, i])
            heads_out = []
            for head in range(heads):
                c = slice(head * part, (head + 1) * part)
                logits = torch.stack([(query[c] * key[c]).sum() / math.sqrt(part) for key in keys])
                share = logits.exp() / logits.exp().sum()
                heads_out.append(
                    torch.stack([s * v[c] for s, v in zip(share, values, strict=True)]).sum(0)
                )
            torch.testing.assert_close(found[b, i], linear(layer.output, torch.cat(heads_out)))


def test_the_property_enters_keys_and_values() -> None:
    layer = filled(CrystalAttention(8, 2))
    nodes, mask = normal(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    first, second = (layer(nodes, normal(1, 8, seed=seed), mask) for seed in (1, 2))
    assert (first - second).abs().min() > 1e-6
    with torch.no_grad():
        layer.fuse_value.weight[:, 8:] = 0  # type: ignore[index, union-attr]
        by_key = [layer(nodes, normal(1, 8, seed=seed), mask) for seed in (1, 2)]
    # A property alike in every key moves all logits of a query alike, and softmax takes that off:
    # it is through the values that the property acts.
    torch.testing.assert_close(by_key[0], by_key[1])


def test_folded_attention_is_the_same_and_stays() -> None:
    layer = filled(CrystalAttention(8, 2))
    assert isinstance(layer, CrystalAttention)
    given = normal(2, 4, 8), normal(2, 8, seed=1), torch.ones(2, 4, dtype=torch.bool)
    before = layer(*given)
    layer.fold()
    assert torch.equal(layer(*given), before)
    layer(*given).sum().backward()  # what is kept has no graph that a second pass would go through
    layer(*given).sum().backward()
    with torch.no_grad():
        layer.fuse_value.weight.zero_()
    assert torch.equal(layer(*given), before)


@pytest.mark.parametrize("aggregation", ["softmax", "mean"])
def test_what_is_computed_in_place_is_nobody_elses(aggregation: str) -> None:
    """Without a gradient the layers answer the same, and leave what they are given as it is."""
    edges, nodes = normal(2, 3, 5, 6), normal(2, 3, 8, seed=1)
    senders, mask = torch.tensor([[0, 1, 2, 0, 1]] * 2), torch.ones(2, 5, dtype=torch.bool)
    layers = (
        (MLP(8, 4, 8), (nodes,)),
        (EdgeEmbedding(6, 6), (edges, normal(2, 6, seed=2))),
        (EdgeFusion(8, 6, 2, aggregation), (nodes, edges, senders, mask)),
    )
    for layer, given in layers:
        filled(layer)
        copies = [one.clone() for one in given]
        learning = layer(*given)
        with torch.no_grad():
            sampling = layer(*given)
        torch.testing.assert_close(sampling, learning, rtol=0, atol=0)
        assert all(map(torch.equal, given, copies))


def test_mlp_and_modulation() -> None:
    layer = filled(MLP(3, 5, 2))
    assert isinstance(layer, MLP)
    x = normal(3)
    torch.testing.assert_close(layer(x), linear(layer.output, silu(linear(layer.hidden, x))))
    nodes, shift, scale = normal(2, 3, 4), normal(2, 4, seed=1), normal(2, 4, seed=2)
    found = modulate(nodes, shift[:, None], scale[:, None])
    for b, t in np.ndindex(2, 3):
        torch.testing.assert_close(found[b, t], nodes[b, t] * (1 + scale[b]) + shift[b])
