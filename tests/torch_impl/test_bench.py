"""What `uni-mdm bench` reports, on two crystals and a tiny network."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.config import ModelConfig, RunConfig, TrainConfig
from common.crystal.structure import Crystal, Site
from common.data.batch import BatchItem, collate
from common.data.store import Record
from common.speed import network_flops
from tests.networks import fitted, noise_of, random_items
from torch_impl.bench import benchmark
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.tensors import TensorBatch

RECORDS = [
    Record("salt", Crystal(225, (Site(11, "a"), Site(17, "b")), np.eye(3) * 5.64)),
    Record("rutile", Crystal(136, (Site(22, "a"), Site(8, "f", (0.305, 0.0, 0.0))), np.eye(3) * 4)),
]


def run(cell: str) -> RunConfig:
    model = ModelConfig(
        cell=cell, frames=cell == "asymmetric", layers=1, width=16, edge_width=16, heads=2
    )
    return RunConfig(name="tiny", model=model, train=TrainConfig(batch_size=4, edge_budget=256))


def test_edges_operations_and_speeds() -> None:
    threads = torch.get_num_threads()
    asymmetric, conventional = (
        benchmark(run(cell), RECORDS, calls=1, threads=1) for cell in ("asymmetric", "conventional")
    )
    torch.set_num_threads(threads)
    # Padded tokens x atoms: salt 2 x 4 and 8 x 8, rutile 2 x 8 and 8 x 8.
    assert asymmetric.edges == (2 * 4 + 2 * 8) / 2
    assert conventional.edges == 8 * 8
    assert asymmetric.parameters > conventional.parameters  # it reads a second frame
    assert conventional.flops_per_call > 2 * asymmetric.flops_per_call
    for speed in (asymmetric, conventional):
        assert speed.training > 0
        assert speed.sampling > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cell": "conventional", "frames": False},
        {"attention": False, "aggregation": "mean", "distances": False, "frames": False},
        {"feed_forward": 0, "modulation": False, "properties": ()},
    ],
)
def test_operations_are_those_that_torch_counts(settings: dict[str, object]) -> None:
    """In a batch so large that what is spent on weights alone does not show."""
    config = ModelConfig.model_validate({"layers": 2, "width": 64, "edge_width": 48} | settings)
    items: list[BatchItem] = random_items([(12, "aij"), (62, "cd")]) * 256
    batch = collate(items, config.cell)
    tensors = TensorBatch.from_batch(batch, fitted(items), config.properties)
    noise = [torch.from_numpy(x) for x in noise_of(batch)]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        CrystalDiT(config)(tensors, *noise)
    counted = counter.get_total_flops() / batch.size
    assert np.isclose(network_flops(config, *batch.shape), counted, rtol=0.01)
