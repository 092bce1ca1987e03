"""Adapters as peft describes them: which ones are understood, and how they change a weight."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.language.parameters import ATTENTION, lora_parameters
from common.weights import Arrays

#: Settings of peft under which the additions are something else, and their harmless values.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
}


def check_adapter(config: Mapping[str, Any], where: str) -> None:
    """Makes sure that an adapter is one that MindFormers can have.

    Args:
        config: content of adapter_config.json.
        where: names it in errors.

    Raises:
        UserError: if it is another kind.
    """
    for name, values in _PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise UserError(
                f"{where}: {name} is {config[name]!r}; only plain LoRA can be converted"
            )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not set(targets) <= ATTENTION.keys():
        known = ", ".join(ATTENTION)
        raise UserError(f"{where}: target_modules is {targets!r}; known: a list of {known}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}; give peft's own file")


def with_additions(
    weights: Mapping[str, NDArray[Any]],
    network: Mapping[str, Any],
    config: Mapping[str, Any],
    additions: Arrays,
    where: str,
) -> dict[str, NDArray[Any]]:
    """A base's weights with an adapter's additions worked in: W + alpha / r * B A.

    Args:
        weights: of the base, under transformers' names.
        network: of the base, content of config.json.
        config: content of adapter_config.json.
        additions: under peft's names.
        where: names the adapter in errors.

    Raises:
        UserError: if it is another kind than plain LoRA, or does not fit the base.
    """
    check_adapter(config, where)
    table = {
        p.torch: p.shape
        for p in lora_parameters(network, config["r"], tuple(config["target_modules"]))
    }
    if {name: array.shape for name, array in additions.items()} != table:
        raise UserError(f"{where}: no adapter of this network: other weights, or of other shapes")
    scale = np.float32(config["lora_alpha"] / config["r"])
    changed = dict(weights)
    for name in table:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            base = f"{stem.removeprefix('base_model.model.')}.weight"
            product = additions[f"{stem}.lora_B.weight"] @ additions[name]
            changed[base] = weights[base] + scale * product
    return changed
