"""GLM-4 as MindFormers has it: made from a run's settings, filled and given LoRA.

MindFormers is imported where it is needed: that takes ten seconds.
"""

import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from common.errors import UserError
from common.language.examples import IGNORED
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
    """To be called before MindFormers is imported, which by itself writes logs where it is started.

    Raises:
        UserError: if it is not installed.
    """
    if find_spec("mindformers") is None:
        raise UserError(
            "MindFormers is not installed, and GLM-4 on MindSpore needs it; see scripts/install.sh"
        )
    folder = os.path.join(tempfile.gettempdir(), f"uni-mdm-mindformers-{os.getuid()}")
    os.environ.setdefault("LOG_MF_PATH", folder)


def network_settings(
    config: dict[str, Any], length: int, precision: str = "float32"
) -> dict[str, Any]:
    """Arguments of MindFormers' ChatGLM2Config: its YAML's ``model_config``.

    Args:
        config: content of config.json.
        length: tokens of every sequence: the network takes no others.
        precision: of weights and products.
    """
    return {
        "num_layers": config["num_hidden_layers"],
        "padded_vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "kv_channels": config["head_dim"],
        "num_attention_heads": config["num_attention_heads"],
        "multi_query_group_num": config["num_key_value_heads"],
        "seq_length": length,
        "layernorm_epsilon": config["rms_norm_eps"],
        "rope_ratio": config["rope_theta"] / 10000.0,
        "pad_token_id": config["pad_token_id"],
        "eos_token_id": config["eos_token_id"],
        "hidden_dropout": 0.0,
        "attention_dropout": config["attention_dropout"],
        "param_init_type": precision,
        "compute_dtype": precision,
        "layernorm_compute_type": "float32",
        "rotary_dtype": "float32",
        "use_past": False,
        "use_flash_attention": ms.get_context("device_target") != "CPU",
        "qkv_concat": False,
        "mlp_concat": False,
    }


def build(config: dict[str, Any], length: int) -> nn.Cell:
    """A network with random weights: MindFormers' ChatGLM2ForConditionalGeneration.

    Args:
        config: content of config.json.
        length: tokens of every sequence: the network takes no others.

    Raises:
        UserError: if it is not GLM-4's, or MindFormers is missing.
    """
    check_network(config, "config.json")
    prepare_mindformers()
    from mindformers import ChatGLM2Config, ChatGLM2ForConditionalGeneration

    model = ChatGLM2ForConditionalGeneration(ChatGLM2Config(**network_settings(config, length)))
    make_computable(model)
    return model


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


def load_weights(model: nn.Cell, arrays: Arrays, where: str) -> None:
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


def _fill(model: nn.Cell, table: list[Parameter], arrays: Arrays, where: str) -> None:
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
