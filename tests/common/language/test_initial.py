"""Random weights that depend on names and the seed alone."""

import numpy as np
import pytest

from common.language.config import GlmConfig
from common.language.initial import initial_weights
from common.language.parameters import lora_parameters, parameters
from common.language.tokenizer import SymmetryTokenizer


@pytest.fixture(scope="module")
def network(compact: SymmetryTokenizer) -> dict:
    config = GlmConfig(layers=2, width=64, heads=4, groups=2, feed_forward=96)
    return config.to_huggingface(compact)


def test_weights(network: dict) -> None:
    found = initial_weights(parameters(network), 3)
    assert {name: array.shape for name, array in found.items()} == {
        parameter.torch: parameter.shape for parameter in parameters(network)
    }
    for name, array in found.items():
        assert array.dtype == np.float32
        if name.endswith("bias"):
            assert not array.any()
        elif array.ndim == 1:
            assert (array == 1).all()
        else:
            assert array.std() == pytest.approx(0.02, rel=0.05), name


def test_they_depend_on_seed_and_name_alone(network: dict) -> None:
    table = list(parameters(network))
    first, backwards = initial_weights(table, 3), initial_weights(table[::-1], 3)
    assert all((first[name] == backwards[name]).all() for name in first)
    layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert (first[layers[0]] != first[layers[1]]).all()
    assert (first[layers[0]] != initial_weights(table, 4)[layers[0]]).all()


def test_additions_begin_with_nothing(network: dict) -> None:
    found = initial_weights(lora_parameters(network, 4, ("q_proj", "v_proj")), 0)
    assert len(found) == 8
    for name, array in found.items():
        if "lora_B" in name:
            assert not array.any()
        else:
            assert 0.9 / 8 < np.abs(array).max() <= 1 / 8
