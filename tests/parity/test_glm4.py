"""GLM-4 in both frameworks from the same weights: logits, loss, LoRA's gradients, AdamW's steps."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ckpt_convert.convert import convert
from common.errors import UserError
from common.language.config import GlmConfig, LoraConfig
from common.language.examples import IGNORED
from common.language.tokenizer import compact_tokenizer
from tests.networks import fill_value
from torch_impl import glm4 as torch_glm4

if find_spec("mindformers") is None:
    pytest.skip("MindFormers is not installed: scripts/install.sh", allow_module_level=True)
from ms_impl import glm4
from ms_impl.mindformers_cpu import step_class

TOKENIZER = compact_tokenizer()
CONFIG = GlmConfig(
    layers=1, width=32, heads=4, groups=2, feed_forward=48, positions=64
).to_huggingface(TOKENIZER)
LORA = LoraConfig(rank=4, alpha=12.0).to_peft(None, None)
LENGTH = 24
STEPS = 3
OPTIMISER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
RATE = 1e-2
CLIP = 0.1
#: Of the optimiser, each of which must be noticed.
CHANGES: list[dict[str, object]] = [{"weight_decay": 0.0}, {"betas": (0.9, 0.96)}, {"eps": 1e-4}]
#: Of the largest element.
LIMIT = 1e-5
Results = dict[str, NDArray]


def filled(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Not small, so that attention and additions matter; about one in a norm."""
    values = fill_value(name, shape).astype(np.float32)
    return 1 + 0.1 * values if "norm" in name else values


def tokens() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    random = np.random.default_rng(0)
    ids = random.integers(3, TOKENIZER.head_size, (2, LENGTH)).astype(np.int32)
    targets = np.full_like(ids, IGNORED)
    targets[0, 4:-5], targets[1, 9:-1] = ids[0, 5:-4], ids[1, 10:]
    return ids, targets


TOKENS, TARGETS = tokens()


def largest(found: Results, wanted: Results) -> float:
    """Error over the largest element, the worst tensor's."""
    assert found.keys() == wanted.keys()
    errors = [0.0]
    for name, values in found.items():
        assert values.shape == wanted[name].shape, name
        assert values.dtype == wanted[name].dtype == np.float32, name
        assert np.isfinite(values).all(), name
        assert np.abs(wanted[name]).max() > 0, name
        errors.append(float(np.abs(values - wanted[name]).max() / np.abs(wanted[name]).max()))
    return max(errors)


class Torch:
    """torch's weights and results."""

    def __init__(self) -> None:
        model = torch_glm4.build(CONFIG)
        for name, parameter in model.named_parameters():
            parameter.data = torch.from_numpy(filled(name, tuple(parameter.shape)))
        self.base = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
        adapter = torch_glm4.add_adapter(model, LORA)
        self.trained = {
            torch_glm4.adapter_name(name): parameter
            for name, parameter in adapter.named_parameters()
            if parameter.requires_grad
        }
        for name, parameter in self.trained.items():
            parameter.data = torch.from_numpy(filled(name, tuple(parameter.shape)))
        self.additions = self.values()
        ids, targets = torch.from_numpy(TOKENS).long(), torch.from_numpy(TARGETS).long()
        with torch.no_grad():
            self.logits = {"logits": model(input_ids=ids).logits.numpy()}
        self.count = int((targets != IGNORED).sum())
        nats = torch_glm4.answer_loss(model, ids, targets)
        nats.backward()
        self.gradients = {n: p.grad.numpy().copy() for n, p in self.trained.items()}
        self.loss = nats.item()
        self.means, self.after = self.steps(model, ids, targets, {})
        self.others = [self.steps(model, ids, targets, change)[1] for change in CHANGES]

    def steps(
        self, model: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor, change: dict
    ) -> tuple[list[float], Results]:
        """Mean losses and trained weights, from the first ones on."""
        settings = OPTIMISER | {"clip": CLIP} | change
        clip = settings.pop("clip")
        for name, parameter in self.trained.items():
            parameter.data = torch.from_numpy(self.additions[name].copy())
        optimizer = torch.optim.AdamW(list(self.trained.values()), lr=RATE, **settings)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            mean = torch_glm4.answer_loss(model, ids, targets) / self.count
            mean.backward()
            torch.nn.utils.clip_grad_norm_(list(self.trained.values()), clip)
            losses.append(mean.item())
            optimizer.step()
        return losses, self.values()

    def values(self) -> Results:
        """Of what is trained."""
        return {name: p.detach().numpy().copy() for name, p in self.trained.items()}


class Step(ms.nn.Cell):
    """Loss and gradients, without a step."""

    def __init__(self, loss: ms.nn.Cell, parameters: list[ms.Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.both = ms.value_and_grad(loss, None, parameters)

    def construct(self, ids: ms.Tensor, targets: ms.Tensor) -> tuple:
        return self.both(ids, targets)


class MindFormers:
    """MindFormers' network and its three graphs, compiled once."""

    def __init__(self, reference: Torch) -> None:
        self.reference = reference
        self.model = glm4.add_adapter(glm4.build(CONFIG, LENGTH), LORA)
        self.parameters = self.model.trainable_params()
        self.inputs = ms.Tensor(TOKENS), ms.Tensor(TARGETS)
        self.step = Step(glm4.AnswerLoss(self.model), self.parameters)
        self.restore()

    def restore(self) -> None:
        """The reference's weights."""
        glm4.load_weights(self.model, self.reference.base, "base")
        glm4.load_adapter(self.model, self.reference.additions, "adapter")

    def named(self, arrays: list[ms.Tensor]) -> Results:
        """Of the parameters that are trained, under peft's names."""
        names = [parameter.name for parameter in self.parameters]
        values = {n: a.asnumpy() for n, a in zip(names, arrays, strict=True)}
        return glm4.torch_arrays(self.model, values)

    def logits(self) -> Results:
        self.model.set_train(False)
        found = self.model(self.inputs[0])
        found = found[0] if isinstance(found, tuple) else found
        self.model.set_train(True)
        return {"logits": found.asnumpy().reshape(*TOKENS.shape, -1)}

    def loss_and_gradients(self) -> tuple[float, Results]:
        loss, gradients = self.step(*self.inputs)
        return float(loss.asnumpy().reshape(-1)[0]), self.named(gradients)


@pytest.fixture(scope="module")
def reference() -> Torch:
    return Torch()


@pytest.fixture(scope="module")
def compiled(reference: Torch) -> MindFormers:
    return MindFormers(reference)


@pytest.fixture
def network(compiled: MindFormers) -> Iterator[MindFormers]:
    """With the reference's weights, which it has again afterwards."""
    compiled.restore()
    yield compiled
    compiled.restore()


def test_logits(network: MindFormers, reference: Torch) -> None:
    assert largest(network.logits(), reference.logits) < LIMIT


def test_loss_and_gradients(network: MindFormers, reference: Torch) -> None:
    loss, gradients = network.loss_and_gradients()
    assert loss == pytest.approx(reference.loss, rel=LIMIT)
    assert largest(gradients, reference.gradients) < LIMIT


@pytest.mark.parametrize("name", ["0.self_attn.k_proj.lora_A", "0.self_attn.o_proj.lora_B"])
def test_spoilt_adapter_is_noticed(network: MindFormers, reference: Torch, name: str) -> None:
    name = f"base_model.model.model.layers.{name}.weight"
    spoilt = reference.additions | {name: 1.01 * reference.additions[name]}
    glm4.load_adapter(network.model, spoilt, "spoilt")
    assert largest(network.loss_and_gradients()[1], reference.gradients) > 10 * LIMIT


def test_mindspore_reads_converted_files(
    network: MindFormers, reference: Torch, tmp_path: Path
) -> None:
    """Of model and adapter, by itself and with no name left over."""
    sources = {"config.json": CONFIG, "adapter_config.json": LORA}
    files = {"config.json": "model", "adapter_config.json": "adapter_model"}
    weights = {"config.json": reference.base, "adapter_config.json": reference.additions}
    for parameter in network.model.get_parameters():
        parameter.set_data(ms.Tensor(np.ones(parameter.shape, np.float32)))
    unfilled = {parameter.name for parameter in network.model.get_parameters()}
    for name, content in sources.items():
        folder, converted = tmp_path / files[name], tmp_path / f"{files[name]}_converted"
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        save_file(weights[name], folder / f"{files[name]}.safetensors")
        convert(folder, converted, "mindspore")
        path = str(converted / f"{files[name]}.safetensors")
        loaded = ms.load_checkpoint(path, format="safetensors")
        unfilled -= loaded.keys()
        _, unused = ms.load_param_into_net(network.model, loaded, strict_load=True)
        assert not unused
    assert all("paged_attention_mgr" in name for name in unfilled)  # what caches when generating
    assert largest(network.loss_and_gradients()[1], reference.gradients) < LIMIT


def swapped_halves(arrays: Results) -> Results:
    """The gate and the rest of the feed-forward part."""
    name = "model.layers.0.mlp.gate_up_proj.weight"
    return arrays | {name: np.roll(arrays[name], len(arrays[name]) // 2, axis=0)}


def swapped_norms(arrays: Results) -> Results:
    names = [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    return arrays | {names[0]: arrays[names[1]], names[1]: arrays[names[0]]}


def swapped_biases(arrays: Results) -> Results:
    names = [f"model.layers.0.self_attn.{name}_proj.bias" for name in ("k", "v")]
    return arrays | {names[0]: arrays[names[1]], names[1]: arrays[names[0]]}


@pytest.mark.parametrize("spoil", [swapped_halves, swapped_norms, swapped_biases])
def test_wrong_map_is_noticed(network: MindFormers, reference: Torch, spoil: object) -> None:
    glm4.load_weights(network.model, spoil(reference.base), "spoilt")
    loss, gradients = network.loss_and_gradients()
    assert abs(loss / reference.loss - 1) > LIMIT
    assert largest(gradients, reference.gradients) > 10 * LIMIT


def test_steps(network: MindFormers, reference: Torch) -> None:
    """Through MindFormers' own training step and optimiser; every step clips its gradient."""
    from mindformers.core.optim import AdamW

    optimizer = AdamW(network.parameters, learning_rate=RATE, **OPTIMISER)
    step = step_class()(network.model, optimizer, use_clip_grad=True, max_grad_norm=CLIP)
    step.set_train()
    losses = [float(step(*network.inputs)[0].asnumpy().reshape(-1)[0]) for _ in range(STEPS)]
    after = network.named(network.parameters)
    assert losses == pytest.approx(reference.means, rel=LIMIT)
    assert largest(after, reference.after) < LIMIT
    assert largest(after, reference.additions) > 100 * LIMIT
    for other in reference.others:
        assert largest(after, other) > LIMIT


# What does not fit


def test_wrong_weights(network: MindFormers, reference: Torch) -> None:
    less = dict(reference.base)
    del less["model.norm.weight"]
    with pytest.raises(UserError, match=r"folder: .*model\.norm\.weight"):
        glm4.load_weights(network.model, less, "folder")
    other = reference.base | {"model.norm.weight": np.ones(31, np.float32)}
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(31,\), not \(32,\)"):
        glm4.load_weights(network.model, other, "folder")
    with pytest.raises(UserError, match="weights do not belong"):
        glm4.load_adapter(network.model, reference.base, "folder")


def test_another_network() -> None:
    with pytest.raises(UserError, match="model_type is not glm"):
        glm4.build(CONFIG | {"model_type": "llama"}, LENGTH)
    with pytest.raises(UserError, match="attention_bias is False"):
        glm4.build(CONFIG | {"attention_bias": False}, LENGTH)
