"""GLM-4 in both frameworks from the same weights: logits, loss, LoRA's gradients, AdamW's steps."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ckpt_convert.convert import convert
from common.checkpoint import load_checkpoint, shipped_language
from common.composition import parse_formula
from common.errors import UserError
from common.language.config import GlmConfig, LoraConfig
from common.language.examples import IGNORED
from common.language.foreign import read_config, read_json
from common.language.prompt import Question, Symmetry
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
#: Of the gradients, and of what follows from them, at the shipped weights. There gradients of
#: tokens nearly cancel: torch's differ by 9.5e-6 from those in float64, MindSpore's by 1.8e-5.
SHIPPED_LIMIT = 5e-5
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


@dataclass(frozen=True)
class Case:
    """A network and a batch.

    Attributes:
        config, lora: content of config.json and adapter_config.json.
        weight: by a parameter's name in torch, and its shape.
        tokens, targets: [B,T].
        rate: of learning.
    """

    config: dict[str, Any]
    lora: dict[str, Any]
    weight: Callable[[str, tuple[int, ...]], NDArray[np.float32]]
    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    rate: float


BLOCK = Case(CONFIG, LORA, filled, *tokens(), RATE)


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

    def __init__(self, case: Case) -> None:
        self.case = case
        model = torch_glm4.build(case.config)
        for name, parameter in model.named_parameters():
            parameter.data = torch.from_numpy(case.weight(name, tuple(parameter.shape)))
        self.base = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
        adapter = torch_glm4.add_adapter(model, case.lora)
        self.trained = {
            torch_glm4.adapter_name(name): parameter
            for name, parameter in adapter.named_parameters()
            if parameter.requires_grad
        }
        for name, parameter in self.trained.items():
            parameter.data = torch.from_numpy(case.weight(name, tuple(parameter.shape)))
        self.additions = self.values()
        ids, targets = torch.from_numpy(case.tokens).long(), torch.from_numpy(case.targets).long()
        with torch.no_grad():
            self.logits = {"logits": model(input_ids=ids).logits.numpy()}
        self.count = int((targets != IGNORED).sum())
        nats = torch_glm4.answer_loss(model, ids, targets)
        nats.backward()
        self.gradients = {n: p.grad.numpy().copy() for n, p in self.trained.items()}
        self.loss = nats.item()
        self.means, self.after, self.momenta = self.steps(model, ids, targets, {})
        self.others = [self.steps(model, ids, targets, change)[1] for change in CHANGES]

    def steps(
        self, model: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor, change: dict
    ) -> tuple[list[float], Results, Results]:
        """Mean losses, trained weights and their momenta, from the first weights on."""
        settings = OPTIMISER | {"clip": CLIP} | change
        clip = settings.pop("clip")
        for name, parameter in self.trained.items():
            parameter.data = torch.from_numpy(self.additions[name].copy())
        optimizer = torch.optim.AdamW(list(self.trained.values()), lr=self.case.rate, **settings)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            mean = torch_glm4.answer_loss(model, ids, targets) / self.count
            mean.backward()
            torch.nn.utils.clip_grad_norm_(list(self.trained.values()), clip)
            losses.append(mean.item())
            optimizer.step()
        momenta = {n: optimizer.state[p]["exp_avg"].numpy() for n, p in self.trained.items()}
        return losses, self.values(), momenta

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
        case = reference.case
        self.model = glm4.add_adapter(glm4.build(case.config, case.tokens.shape[1]), case.lora)
        self.parameters = self.model.trainable_params()
        self.inputs = ms.Tensor(case.tokens), ms.Tensor(case.targets)
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
        return {"logits": found.asnumpy().reshape(*self.inputs[0].shape, -1)}

    def loss_and_gradients(self) -> tuple[float, Results]:
        loss, gradients = self.step(*self.inputs)
        return float(loss.asnumpy().reshape(-1)[0]), self.named(gradients)

    def steps(self) -> tuple[list[float], Results, Results]:
        """As torch's, through MindFormers' own training step and optimiser."""
        from mindformers.core.optim import AdamW

        rate = self.reference.case.rate
        optimizer = AdamW(self.parameters, learning_rate=rate, **OPTIMISER)
        step = step_class()(self.model, optimizer, use_clip_grad=True, max_grad_norm=CLIP)
        step.set_train()
        losses = [float(step(*self.inputs)[0].asnumpy().reshape(-1)[0]) for _ in range(STEPS)]
        return losses, self.named(self.parameters), self.named(list(optimizer.exp_avg))


@pytest.fixture(scope="module")
def reference() -> Torch:
    return Torch(BLOCK)


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


def read_converted(model: ms.nn.Cell, folders: Sequence[Path]) -> None:
    """Fills a network with what MindSpore itself reads of converted folders, all of it."""
    for parameter in model.get_parameters():
        parameter.set_data(ms.Tensor(np.ones(parameter.shape, np.float32)))
    unfilled = {parameter.name for parameter in model.get_parameters()}
    for folder in folders:
        (path,) = folder.glob("*.safetensors")
        loaded = ms.load_checkpoint(str(path), format="safetensors")
        unfilled -= loaded.keys()
        _, unused = ms.load_param_into_net(model, loaded, strict_load=True)
        assert not unused
    assert all("paged_attention_mgr" in name for name in unfilled)  # what caches when generating


def test_mindspore_reads_converted_files(
    network: MindFormers, reference: Torch, tmp_path: Path
) -> None:
    """Of model and adapter, by itself and with no name left over."""
    sources = {"config.json": CONFIG, "adapter_config.json": LORA}
    files = {"config.json": "model", "adapter_config.json": "adapter_model"}
    weights = {"config.json": reference.base, "adapter_config.json": reference.additions}
    converted = [tmp_path / f"{name}_converted" for name in files.values()]
    for (name, content), there in zip(sources.items(), converted, strict=True):
        folder = tmp_path / files[name]
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        save_file(weights[name], folder / f"{files[name]}.safetensors")
        convert(folder, there, "mindspore")
    read_converted(network.model, converted)
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
    """Every one clips the gradient."""
    losses, after, momenta = network.steps()
    assert losses == pytest.approx(reference.means, rel=LIMIT)
    assert largest(after, reference.after) < LIMIT
    assert largest(momenta, reference.momenta) < LIMIT
    assert largest(after, reference.additions) > 100 * LIMIT
    for other in reference.others:
        assert largest(after, other) > LIMIT


# The shipped model


def shipped(folders: Sequence[Path]) -> Case:
    """An adapter on its base, of these folders, and two questions that it answers."""
    base, adapter = map(load_checkpoint, folders)
    answers = {
        ("NaCl", -2.0): Symmetry.of(225, [(11, "a"), (17, "b")]),
        ("SrTiO3", -3.5): Symmetry.of(221, [(38, "a"), (22, "b"), (8, "c")]),
    }
    pairs = []
    for (formula, energy), answer in answers.items():
        counts = parse_formula(formula).counts
        question = Question.ask(counts, {"formation_energy": energy})
        pairs.append((TOKENIZER.question_ids(question), TOKENIZER.answer_ids(answer)))
    length = max(len(question) + len(answer) for question, answer in pairs) - 1
    ids = np.full((len(pairs), length), TOKENIZER.pad_id, np.int32)
    targets = np.full_like(ids, IGNORED)
    for row, (question, answer) in enumerate(pairs):
        whole = [*question, *answer]
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(question) - 1 : len(whole) - 1] = answer

    def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        source = adapter if "lora_" in name else base
        return np.array(source.model[torch_glm4.adapter_name(name)])

    config, lora = read_config(base.path), read_json(adapter.path / "adapter_config.json")
    return Case(config, lora, weight, ids, targets, 5e-4)


def overall(found: Results, wanted: Results) -> float:
    """Error over the size, by their squares' sums, the worst tensor's."""
    assert found.keys() == wanted.keys()
    return max(
        float(np.linalg.norm(values - wanted[name]) / np.linalg.norm(wanted[name]))
        for name, values in found.items()
    )


def test_shipped_model(tmp_path: Path) -> None:
    """Logits, losses, gradients, whose means the momenta are, and steps.

    MindSpore has the weights that `convert` made of torch's, of which it makes torch's again.

    A weight's step is as large as the rate however small its gradient is, so that a weight whose
    gradient is nearly zero goes where rounding sends it: torch's own weights differ by 8e-5 of the
    largest from those in float64. All of a tensor together do so less.
    """
    ours = [shipped_language()[name] for name in ("glm4_tiny", "glm4_tiny_fm")]
    theirs = [tmp_path / f"{folder.name}_mindspore" for folder in ours]
    for folder, there in zip(ours, theirs, strict=True):
        convert(folder, there, "mindspore")
        convert(there, tmp_path / folder.name, "torch")
        assert load_checkpoint(tmp_path / folder.name).hash == load_checkpoint(folder).hash
    reference = Torch(shipped(ours))
    network = MindFormers(reference)
    read_converted(network.model, theirs)
    assert largest(network.logits(), reference.logits) < LIMIT
    losses, after, momenta = network.steps()
    assert losses == pytest.approx(reference.means, rel=LIMIT)
    assert largest(momenta, reference.momenta) < SHIPPED_LIMIT
    assert overall(after, reference.after) < SHIPPED_LIMIT
    assert overall(after, reference.additions) > 100 * SHIPPED_LIMIT
    for other in reference.others:
        assert overall(after, other) > 2 * SHIPPED_LIMIT


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
