"""GLM-4 as MindFormers has it: made from a run's settings, filled and given LoRA.

MindFormers is imported where it is needed: that takes ten seconds.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from common.errors import UserError
from common.language.examples import IGNORED
from common.language.mindformers import network_settings
from common.language.parameters import (
    ATTENTION,
    Parameter,
    check_network,
    lora_parameters,
    parameters,
)
from common.weights import Arrays
from ms_impl.mindformers_cpu import make_computable


def prepare_mindformers() -> None:
    """To be called before MindFormers is used; what it writes goes to files in a temporary folder.

    By itself it writes messages and an empty folder where it is started, and all of the messages
    to the terminal as well.

    Raises:
        UserError: if it is not installed.
    """
    if find_spec("mindformers") is None:
        raise UserError(
            "MindFormers is not installed, and GLM-4 on MindSpore needs it; see scripts/install.sh"
        )
    folder = os.path.join(tempfile.gettempdir(), f"uni-mdm-mindformers-{os.getuid()}")
    for variable in ("LOG_MF_PATH", "LOCAL_DEFAULT_PATH"):
        os.environ.setdefault(variable, folder)
    told = StringIO()  # what could not be imported, though nothing needs it
    with redirect_stdout(told):
        import mindformers  # noqa: F401

    names = [n for n in logging.root.manager.loggerDict if n.startswith("mindformers/")]
    for handler in (h for name in names for h in logging.getLogger(name).handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream is told:
            handler.setStream(sys.stdout)
            handler.setLevel(logging.ERROR)


def build(config: dict[str, Any], length: int, **settings: Any) -> nn.Cell:
    """A network with random weights: MindFormers' ChatGLM2ForConditionalGeneration.

    Args:
        config: content of config.json.
        length: of the longest sequence, in tokens.
        settings: replace those of ``common.language.mindformers.network_settings``.

    Raises:
        UserError: if it is not GLM-4's, or MindFormers is missing.
    """
    check_network(config, "config.json")
    prepare_mindformers()
    from mindformers import ChatGLM2Config, ChatGLM2ForConditionalGeneration

    own = network_settings(config, length) | settings
    own["use_flash_attention"] = ms.get_context("device_target") != "CPU"
    network = ChatGLM2Config(**own)
    # As MindFormers' Trainer does it: a network kept as a graph of its own, which several processes
    # would have by default, cannot be compiled here.
    network.disable_lazy_inline = True
    model = ChatGLM2ForConditionalGeneration(config=network)
    model.transformer.freqs_mgr = Angles(model.transformer.freqs_mgr)
    make_computable(model)
    return model


class Angles(nn.Cell):
    """MindFormers' rotary angles for sequences shorter than the longest, too.

    Its own table of them is always as long as the longest.

    Args:
        manager: MindFormers'.
    """

    def __init__(self, manager: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.manager = manager

    def construct(self, length: int, seq_chunk: Any = None) -> tuple[Any, Any, Any]:
        """Cosines and sines for the kernel, and both for the products."""
        cosine, sine, cache = self.manager(length, seq_chunk=seq_chunk)
        return cosine, sine, cache[:length]


class AnswerLoss(nn.Cell):
    """Cross entropy of the targets that count, in nats, summed.

    Padding stands at the end, where no token before it looks, and so needs no mask. The network's
    own loss, which is their mean, is what MindFormers trains with.

    Args:
        model: of ``build``, with or without an adapter.
    """

    def __init__(self, model: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.model = model.set_train()

    def construct(self, tokens: ms.Tensor, targets: ms.Tensor) -> ms.Tensor:
        """Of int32 [B,T], and [B,T], the token that follows, or ``IGNORED``."""
        counted = (targets != IGNORED).astype(ms.float32)
        return self.model(tokens, targets) * counted.sum()


def load_weights(model: nn.Cell, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Puts a checkpoint's weights, under transformers' names, into a network.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    _fill(model, list(parameters(_config_of(model))), arrays, where)


def load_adapter(model: nn.Cell, arrays: Arrays, where: str) -> None:
    """Puts an adapter's weights, under peft's names, into a network of ``add_adapter``.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    _fill(model, _additions(model), arrays, where)


def _fill(
    model: nn.Cell, table: list[Parameter], arrays: Mapping[str, np.ndarray], where: str
) -> None:
    wanted = {parameter.torch: parameter for parameter in table}
    if arrays.keys() != wanted.keys():
        names = sorted(arrays.keys() ^ wanted.keys())
        raise UserError(f"{where}: weights do not belong to this network: {', '.join(names[:5])}")
    own = dict(model.parameters_and_names())  # a step puts more before a parameter's own name
    for name, array in arrays.items():
        parameter = wanted[name]
        if array.shape != parameter.shape:
            line = f"{where}: weight {name} has shape {array.shape}, not {parameter.shape}"
            raise UserError(line)
        parts = np.split(array, len(parameter.mindformers))
        for part, values in zip(parameter.mindformers, parts, strict=True):
            own[part].set_data(ms.Tensor(np.ascontiguousarray(values), own[part].dtype))


def torch_arrays(model: nn.Cell, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights, or what belongs to them, under the names of transformers and peft.

    Args:
        model: the network.
        values: by the names of its parameters, of all that are parts of the same weight.
    """
    table = [*parameters(_config_of(model)), *_additions(model)]
    return {
        p.torch: np.concatenate([values[part] for part in p.mindformers])
        for p in table
        if p.mindformers[0] in values
    }


def add_adapter(model: nn.Cell, config: dict[str, Any]) -> nn.Cell:
    """A network with LoRA, whose parameters alone are trained; ``model`` itself is changed.

    Args:
        model: the base.
        config: content of adapter_config.json.
    """
    prepare_mindformers()
    from mindformers.pet import LoraConfig
    from mindformers.pet.tuners.lora_adapter import LoraAdapter

    settings = LoraConfig(
        lora_rank=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        param_init_type="float32",
        target_modules="|".join(f"{ATTENTION[name]}$" for name in config["target_modules"]),
    )
    model.transformer = LoraAdapter.get_pet_model(model.transformer, settings)
    for parameter in model.get_parameters():
        parameter.requires_grad = "mindpet_delta_lora" in parameter.name
    return model


def _config_of(model: nn.Cell) -> dict[str, Any]:
    """What of config.json decides the parameters."""
    own = model.config
    return {
        "vocab_size": own.vocab_size,
        "hidden_size": own.hidden_size,
        "intermediate_size": own.ffn_hidden_size,
        "num_hidden_layers": own.num_layers,
        "num_attention_heads": own.num_attention_heads,
        "num_key_value_heads": own.multi_query_group_num,
        "head_dim": own.kv_channels,
    }


def _additions(model: nn.Cell) -> list[Parameter]:
    """Of LoRA, as far as the network has them."""
    shapes = {name: p.shape for name, p in model.parameters_and_names()}
    ranks = [shape[0] for name, shape in shapes.items() if name.endswith("_lora_a")]
    if not ranks:
        return []
    table = lora_parameters(_config_of(model), ranks[0], tuple(ATTENTION))
    return [parameter for parameter in table if parameter.mindformers[0] in shapes]
