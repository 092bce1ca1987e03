"""Adapters: what LoRA adds to GLM-4, between peft's names and MindFormers', and worked into it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_convert.stream import CHUNK, Shard, Stored
from common.errors import UserError
from common.language.parameters import Parameter, lora_parameters

CONFIG = "adapter_config.json"


def table(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> list[Parameter]:
    """What an adapter must hold, as far as it says so itself: widths are those of layer 0.

    Args:
        config: content of adapter_config.json.
        stored: its tensors.
    """
    sizes = {"hidden_size": 0, "num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": 1}
    sizes["num_hidden_layers"] = 1
    targets = tuple(config["target_modules"])
    first = list(lora_parameters(sizes, config["r"], targets))
    known = {p.torch: p for p in first} | {p.mindformers[0]: p for p in first}
    widths = {known[name].torch: tensor.shape for name, tensor in stored.items() if name in known}
    while _layer(sizes, config, targets) & stored.keys():
        sizes["num_hidden_layers"] += 1
    sizes["num_hidden_layers"] = max(1, sizes["num_hidden_layers"] - 1)
    found = []
    for parameter in lora_parameters(sizes, config["r"], targets):
        name = parameter.torch.split(".")
        alike = widths.get(".".join([*name[:4], "0", *name[5:]]), parameter.shape)
        rank_first = name[-2] == "lora_A"
        shape = (config["r"], *alike[1:]) if rank_first else (*alike[:1], config["r"])
        found.append(replace(parameter, shape=shape))
    return found


def _layer(
    sizes: Mapping[str, int], config: Mapping[str, Any], targets: tuple[str, ...]
) -> set[str]:
    """Names, of both sides, of what the last layer of a network has."""
    last = list(lora_parameters(sizes, config["r"], targets))[-2 * len(targets) :]
    return {name for p in last for name in (p.torch, *p.mindformers)}


@dataclass(frozen=True)
class Merged:
    """A product's weight with its addition worked in, computed when it is written.

    Attributes:
        weight: [rows, columns].
        a, b: [rank, columns] and [rows, rank].
        scale: of the addition.
    """

    weight: Stored
    a: Stored
    b: Stored
    scale: float

    @property
    def size(self) -> int:
        """Bytes."""
        return self.weight.size

    def chunks(self) -> Iterator[bytes]:
        """The sum, some rows at a time, computed in float32 and rounded to the weight's type."""
        a, b = _values(self.a), _values(self.b)
        count = max(1, CHUNK // a[0].nbytes)
        for begin in range(0, len(b), count):
            end = min(begin + count, len(b))
            addition = np.float32(self.scale) * (b[begin:end] @ a)
            yield _bytes(_values(self.weight.rows(begin, end)) + addition, self.weight.dtype)


def merge(
    path: Path, config: Mapping[str, Any], additions: list[Shard], base: list[Shard]
) -> list[Shard]:
    """A base's files of weights with an adapter's additions worked in.

    Args:
        path: of the adapter, for errors.
        config: content of its adapter_config.json.
        additions: its files, under peft's names.
        base: the model's files, under transformers' names.

    Raises:
        UserError: if the adapter belongs to another network.
    """
    parts = {name: t for shard in additions for name, t in shard.tensors.items()}
    stored = {name: t for shard in base for name, t in shard.tensors.items()}
    scale = config["lora_alpha"] / config["r"]
    merged = {}
    for name, a in parts.items():
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        b, target = (
            parts[f"{stem}.lora_B.weight"],
            f"{stem.removeprefix('base_model.model.')}.weight",
        )
        weight = stored.get(target)
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            shape = "no such weight" if weight is None else f"shape {weight.shape}"
            wanted = (b.shape[0], a.shape[1])
            raise UserError(
                f"{path}: adds {wanted} to {target}, of which the base has {shape}; "
                "give the adapter's own base"
            )
        merged[target] = replace(weight, pieces=(Merged(weight, a, b, scale),))
    last = max(int(name.split(".")[2]) for name in stored if name.startswith("model.layers."))
    if not any(name.startswith(f"model.layers.{last}.") for name in merged):
        raise UserError(f"{path}: has fewer layers than the base; give the adapter's own base")
    return [
        replace(shard, tensors={n: merged.get(n, t) for n, t in shard.tensors.items()})
        for shard in base
    ]


def _values(tensor: Stored) -> NDArray[np.float32]:
    data = b"".join(chunk for piece in tensor.pieces for chunk in piece.chunks())
    if tensor.dtype == "BF16":
        high = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return high.view(np.float32).reshape(tensor.shape)
    types = {"F16": "<f2", "F32": "<f4"}
    if tensor.dtype not in types:
        raise UserError(f"cannot work additions into numbers of type {tensor.dtype}")
    return np.frombuffer(data, types[tensor.dtype]).astype(np.float32).reshape(tensor.shape)


def _bytes(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "BF16":  # to the nearest, of two as near to the even one
        bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded >> np.uint32(16)).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
