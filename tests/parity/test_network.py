"""The whole network in both frameworks: velocities, loss, and the gradient of every parameter."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import mindspore as ms
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ms_impl.crystal_dit as ms_dit
import ms_impl.diffusion as ms_diffusion
import torch_impl.crystal_dit as torch_dit
import torch_impl.diffusion as torch_diffusion
from common.config import DiffusionConfig, ModelConfig
from common.data.batch import Batch, collate
from common.diffusion.flow import error_units
from common.diffusion.noisy import LossWeights, NoisyCrystals
from common.diffusion.scaler import Standardizer
from tests.networks import SYSTEMS, fitted, noise_of, random_items, small
from tests.parity.twins import (
    Change,
    DisagreementError,
    Gradient,
    compare,
    fill_mindspore,
    fill_torch,
    mindspore_batch,
    precision,
    torch_batch,
    zeroed,
)

DIFFUSION = DiffusionConfig()
#: Crystals of few atoms: in the conventional cell, all of them are tokens.
FEW_ATOMS = ((2, "aii"), (160, "ab"), (186, "bc"))
CONFIGS = {
    "default": small(properties=("formation_energy",)),
    "two properties, attention off": small(layers=1, attention=False),
    "no property, distances off": small(layers=1, properties=(), distances=False),
    "mean aggregation, frames off": small(layers=1, aggregation="mean", frames=False),
    "no feed-forward, no modulation": small(layers=1, feed_forward=0, modulation=False),
    "precedents": small(layers=1, precedents=True),
    "differences from precedents": small(
        layers=1, precedents=True, target="difference", former_elements=True
    ),
    "conventional cell, precedents": small(layers=1, cell="conventional", precedents=True),
    "conventional cell": small(layers=1, cell="conventional"),
}


@dataclass(frozen=True)
class Example:
    """What a network is shown."""

    batch: Batch
    standardizer: Standardizer
    noisy: NoisyCrystals
    weights: LossWeights


@cache
def example(cell: str) -> Example:
    systems = FEW_ATOMS if cell == "conventional" else SYSTEMS
    items = random_items(systems, precedents=True)
    batch = collate(items, "conventional" if cell == "conventional" else "asymmetric")
    free, lattice, t = noise_of(batch)
    random = np.random.default_rng(1)
    noisy = NoisyCrystals(
        t=t,
        free_params=free,
        lattice=lattice,
        coordinate_target=random.normal(size=free.shape).astype(np.float32),
        lattice_target=random.normal(size=lattice.shape).astype(np.float32),
    )
    units = error_units(batch.precedent_mask, t, "difference")
    bend = np.where(batch.precedent_mask, 0.5, np.inf).astype(np.float32)
    weights = LossWeights.of(batch.free_mask, batch.k_mask).in_units(*units, bend)
    return Example(batch, fitted(items), noisy, weights)


def in_default_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def torch_results(config: ModelConfig, exact: bool) -> dict[str, NDArray]:
    shown = example(config.cell)
    with precision(exact):
        model = torch_dit.CrystalDiT(config)
        fill_torch(model)
        batch = torch_batch(shown.batch, shown.standardizer, config.properties)
        arrays = torch_diffusion.NoisyTensors.from_arrays(shown.noisy, shown.weights)
        values = {f.name: in_default_precision(getattr(arrays, f.name)) for f in fields(arrays)}
        noisy = torch_diffusion.NoisyTensors(**values)
        loss = torch_diffusion.denoising_loss(model, batch, noisy, DIFFUSION)
        loss.total.backward()
        with torch.no_grad():
            velocities = model(batch, noisy.free_params, noisy.lattice, noisy.t)
    results = dict(zip(("coordinates", "lattice"), velocities, strict=True))
    results |= {f"loss.{f.name}": getattr(loss, f.name).detach() for f in fields(loss)}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        results[f"gradient of {name}"] = (
            torch.zeros_like(parameter).detach() if gradient is None else gradient
        )
    return {name: tensor.numpy() for name, tensor in results.items()}


class Evaluation:
    """MindSpore's network, compiled once with its loss and gradients."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.model = model = ms_dit.CrystalDiT(config)
        self.names = [name for name, _ in model.parameters_and_names()]

        def loss(batch: ms_dit.TensorBatch, noisy: ms_diffusion.NoisyTensors) -> tuple:
            velocities = model(batch, noisy["free_params"], noisy["lattice"], noisy["t"])

            def known(*_: object) -> tuple:
                return velocities

            values = ms_diffusion.denoising_loss(known, batch, noisy, DIFFUSION)
            return values[0], (values, velocities)

        self.gradient = Gradient(loss, (), model.trainable_params())

    def __call__(
        self,
        change: Change | None = None,
        batch: dict[str, NDArray] | None = None,
        noisy: dict[str, NDArray] | None = None,
    ) -> dict[str, NDArray]:
        """Results, after changes of parameters, of the batch and of the noisy crystals."""
        shown = example(self.config.cell)
        fill_mindspore(self.model, change)
        tensors = mindspore_batch(shown.batch, shown.standardizer, self.config.properties)
        noise = ms_diffusion.NoisyTensors.from_arrays(shown.noisy, shown.weights)
        for target, changed in ((tensors, batch), (noise, noisy)):
            for name, array in (changed or {}).items():
                target[name] = ms.Tensor(np.ascontiguousarray(array, target[name].asnumpy().dtype))
        (loss, velocities), gradients = self.gradient.results(tensors, noise)
        results = dict(zip(("coordinates", "lattice"), velocities, strict=True))
        fields_of_loss = ms_diffusion.Loss(*loss)._asdict()
        results |= {f"loss.{name}": value for name, value in fields_of_loss.items()}
        named = zip(self.names, gradients, strict=True)
        results |= {f"gradient of {name}": value for name, value in named}
        return {name: tensor.asnumpy() for name, tensor in results.items()}


@cache
def references(name: str) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    return torch_results(CONFIGS[name], exact=False), torch_results(CONFIGS[name], exact=True)


@cache
def evaluation(name: str) -> Evaluation:
    return Evaluation(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_network(name: str) -> None:
    compare(evaluation(name)(), *references(name))


def axes_swapped(shown: Example) -> dict:
    return {"batch": {"token_rot": shown.batch.token_rot.swapaxes(-1, -2)}}


def representative_missing(shown: Example) -> dict:
    return {"batch": {"atom_token": np.zeros_like(shown.batch.atom_token)}}


def frames_of_others(shown: Example) -> dict:
    return {"batch": {"frame_inverse": shown.batch.frame_inverse[:, ::-1]}}


def padding_let_in(shown: Example) -> dict:
    return {"batch": {"atom_mask": np.ones_like(shown.batch.atom_mask)}}


def property_dropped(shown: Example) -> dict:
    return {"batch": {"property_mask": np.zeros((shown.batch.size, 1))}}


def cell_not_primitive(shown: Example) -> dict:
    return {"batch": {"to_primitive": np.broadcast_to(np.eye(3), (shown.batch.size, 3, 3))}}


def sites_permuted(shown: Example) -> dict:
    return {"noisy": {"free_params": shown.noisy.free_params[:, ::-1]}}


def lattice_not_centred(shown: Example) -> dict:
    return {"batch": {"lattice_center": np.zeros((shown.batch.size, 6))}}


def attention_zero(shown: Example) -> dict:
    return {"change": zeroed("blocks.1.attention.output")}


def edge_head_zero(shown: Example) -> dict:
    return {"change": zeroed("edge_head.weight")}


def columns_swapped(shown: Example) -> dict:
    """Two columns of a weight in each other's place, far from the output."""

    def change(name: str, values: NDArray) -> NDArray:
        return (
            values[:, [1, 0, *range(2, 16)]] if name == "blocks.0.fusion.weight.weight" else values
        )

    return {"change": change}


BREAKS = (
    axes_swapped,
    representative_missing,
    frames_of_others,
    padding_let_in,
    property_dropped,
    cell_not_primitive,
    sites_permuted,
    lattice_not_centred,
    attention_zero,
    edge_head_zero,
    columns_swapped,
)


def part(results: dict[str, NDArray], prefix: str) -> dict[str, NDArray]:
    return {name: array for name, array in results.items() if name.startswith(prefix)}


def test_precedent_missing_is_noticed() -> None:
    shown = example("asymmetric")
    change = {"precedent_params": np.zeros_like(shown.batch.precedent_params)}
    found = evaluation("precedents")(batch=change)
    single, exact = references("precedents")
    with pytest.raises(DisagreementError):
        compare(part(found, "coordinates"), *(part(x, "coordinates") for x in (single, exact)))


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_network_is_noticed(broken: Callable[[Example], dict]) -> None:
    """In the velocities, in the loss and in the gradients, each by itself."""
    found = evaluation("default")(**broken(example("asymmetric")))
    single, exact = references("default")
    for prefix in ("coordinates", "loss", "gradient"):
        with pytest.raises(DisagreementError):
            compare(part(found, prefix), single, part(exact, prefix))
