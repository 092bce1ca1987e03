"""The literal tables say what the network has, whatever is switched on."""

from pathlib import Path

import pytest

from ckpt_convert.crystal_dit import STANDARDIZER, model_rows, optimizer_rows, parameters
from common.checkpoint import load_checkpoint
from common.config import parse_config
from tests.networks import fitted, random_items, small
from torch_impl.crystal_dit import CrystalDiT

SETTINGS: dict[str, dict[str, object]] = {
    "all": {},
    "paper": {"layers": 3, "width": 24, "edge_width": 20, "heads": 2, "frequencies": 5},
    "no attention": {"attention": False},
    "conventional": {"cell": "conventional"},
    "no frames": {"frames": False},
    "no distances": {"distances": False},
    "mean": {"aggregation": "mean"},
    "wide": {"feed_forward": 4},
    "precedents": {"precedents": True},
    "former elements": {"precedents": True, "former_elements": True, "target": "difference"},
    "no feed-forward": {"feed_forward": 0},
    "no modulation": {"modulation": False},
    "one property": {"properties": ["formation_energy"]},
    "no property": {"properties": []},
    "bare": {
        "attention": False,
        "feed_forward": 0,
        "modulation": False,
        "frames": False,
        "distances": False,
        "aggregation": "mean",
        "layers": 1,
        "properties": [],
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_table_is_the_network(settings: dict[str, object]) -> None:
    config = small(**settings)
    network = CrystalDiT(config).named_parameters()
    assert list(parameters(config)) == [(name, tuple(p.shape)) for name, p in network]


def test_statistics_are_the_standardizer() -> None:
    arrays = fitted(random_items()).to_arrays()
    shapes = {f"standardizer.{name}": array.shape for name, array in arrays.items()}
    assert shapes == STANDARDIZER


def test_rows_are_what_training_saves(step_folder: Path) -> None:
    saved = load_checkpoint(step_folder, optimizer=True)
    config = parse_config(saved.config, "config").model
    assert saved.optimizer is not None
    for rows, arrays in ((model_rows, saved.model), (optimizer_rows, saved.optimizer)):
        table = {row.torch: row.shape for row in rows(config)}
        assert table == {name: array.shape for name, array in arrays.items()}


def test_every_name_is_there_once() -> None:
    for rows in (model_rows(small()), optimizer_rows(small())):
        assert len({row.torch for row in rows}) == len({row.mindspore for row in rows}) == len(rows)
