"""What replaces operations of MindFormers on a CPU, and that nothing else is touched."""

from importlib.util import find_spec

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from common.language.config import GlmConfig
from common.language.mindformers import network_settings
from common.language.tokenizer import compact_tokenizer
from ms_impl import mindformers_cpu
from ms_impl.glm4 import prepare_mindformers
from ms_impl.mindformers_cpu import MaskProduct, RmsNorm, make_computable, step_class

if find_spec("mindformers") is None:
    pytest.skip("MindFormers is not installed: scripts/install.sh", allow_module_level=True)

CONFIG = GlmConfig(layers=1, width=32, heads=4, groups=2, feed_forward=48, positions=64)


@pytest.fixture
def stock() -> nn.Cell:
    """MindFormers' network as it is."""
    prepare_mindformers()
    from mindformers import ChatGLM2Config, ChatGLM2ForConditionalGeneration

    settings = network_settings(CONFIG.to_huggingface(compact_tokenizer()), 16)
    settings["use_flash_attention"] = False
    return ChatGLM2ForConditionalGeneration(ChatGLM2Config(**settings))


def cells(network: nn.Cell) -> dict[str, str]:
    """Kinds by names."""
    found = {name: type(cell).__name__ for name, cell in network.cells_and_names()}
    for name, cell in network.cells_and_names():
        if hasattr(cell, "mul_mask"):
            found[f"{name}.mul_mask"] = type(cell.mul_mask).__name__
    return found


def test_only_norms_and_the_mask_are_replaced(stock: nn.Cell) -> None:
    before, parameters = cells(stock), dict(stock.parameters_and_names())
    make_computable(stock)
    after = cells(stock)
    assert before.keys() == after.keys()
    changes = {(before[name], after[name]) for name in before if before[name] != after[name]}
    assert changes == {("ChatGLM2RMSNorm", "RmsNorm"), ("Mul", "MaskProduct")}
    assert "ChatGLM2RMSNorm" not in after.values()
    now = dict(stock.parameters_and_names())
    assert list(now) == list(parameters)
    assert all(now[name] is parameter for name, parameter in parameters.items())


def test_nothing_is_replaced_on_ascend(stock: nn.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindformers.wrapper import MFTrainOneStepCell

    monkeypatch.setattr(mindformers_cpu.ms, "get_context", {"device_target": "Ascend"}.get)
    before = cells(stock)
    make_computable(stock)
    assert cells(stock) == before
    assert step_class() is MFTrainOneStepCell
    monkeypatch.undo()
    assert step_class() is not MFTrainOneStepCell


def test_rms_norm(stock: nn.Cell) -> None:
    norm = stock.transformer.encoder.final_layernorm
    random = np.random.default_rng(0)
    weight, x = random.normal(size=32), 1e-3 * random.normal(size=(2, 3, 32))
    norm.weight.set_data(ms.Tensor(weight.astype(np.float32)))
    found = RmsNorm(norm)(ms.Tensor(x.astype(np.float32))).asnumpy()
    eps = CONFIG.norm_eps
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    without = x / np.sqrt((x**2).mean(-1, keepdims=True)) * weight
    assert np.abs(found - without).max() > 1e-2


class Product(nn.Cell):
    """As MindFormers has it."""

    def construct(self, mask: ms.Tensor, number: float) -> ms.Tensor:
        return ops.mul(mask, number)


def test_mask() -> None:
    """And that MindFormers' own product is still wrong: if not, it needs no replacement."""
    mask = ms.Tensor(np.array([0, 1], np.uint8))
    assert MaskProduct(ms.float32)(mask, -10000).asnumpy().tolist() == [0.0, -10000.0]
    assert Product()(mask, -10000).asnumpy().tolist() == [0, 240]


@pytest.mark.parametrize(("value", "overflow"), [(1.0, False), (np.inf, True), (np.nan, True)])
def test_overflow(value: float, overflow: bool) -> None:
    gradients = [ms.Tensor(np.ones(2, np.float32)), ms.Tensor(np.array([0, value], np.float32))]
    found = step_class().get_overflow_status(None, None, gradients)
    assert bool(found.asnumpy()) == overflow
