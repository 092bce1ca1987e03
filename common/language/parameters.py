"""GLM-4's parameters: their names in transformers and in MindFormers, and their shapes.

MindFormers' class is ChatGLM2ForConditionalGeneration with ``qkv_concat`` and ``mlp_concat`` off:
queries, keys and values are apart there as in transformers, so that additions of LoRA fit both, and
what transformers joins in the feed-forward part, the gate above the rest, is apart.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

Shape = tuple[int, ...]

#: Products of the attention that may have additions: transformers' names and MindFormers'.
ATTENTION = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "dense"}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class Parameter:
    """A tensor.

    Attributes:
        torch: transformers' name, or peft's.
        mindformers: MindFormers' names; of several, each has the same share of the rows.
        shape: transformers'.
    """

    torch: str
    mindformers: tuple[str, ...]
    shape: Shape

    @property
    def parts(self) -> dict[str, Shape]:
        """MindFormers' names and shapes."""
        rows = self.shape[0] // len(self.mindformers)
        return dict.fromkeys(self.mindformers, (rows, *self.shape[1:]))


def check_network(config: Mapping[str, Any], where: str) -> None:
    """Makes sure that a network is one that both libraries can be.

    Args:
        config: content of config.json.
        where: names it in errors.

    Raises:
        UserError: if it is another one.
    """
    if config.get("model_type") != "glm":
        raise UserError(f"{where}: model_type is not glm; give a folder of GLM-4")
    for name in _SIZES:
        size = config.get(name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{where}: {name} is {size!r}, not a size; give GLM-4's own file")
    wanted = {
        "attention_bias": True,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.5,
        "hidden_act": "silu",
        "rope_scaling": None,
    }
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UserError(f"{where}: {name} is {config[name]}, not {value} as in GLM-4-9B")


def parameters(config: Mapping[str, Any]) -> Iterator[Parameter]:
    """Of the network.

    Args:
        config: content of config.json.
    """
    d, v, f = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    first = "transformer.embedding.embedding_weight"
    yield Parameter("model.embed_tokens.weight", (first,), (v, d))
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{i}", f"transformer.encoder.layers.{i}"
        for name, (rows, columns) in _attention(config).items():
            here, there = f"{ours}.self_attn.{name}", f"{theirs}.self_attention.{ATTENTION[name]}"
            yield Parameter(f"{here}.weight", (f"{there}.weight",), (rows, columns))
            if name != "o_proj":
                yield Parameter(f"{here}.bias", (f"{there}.bias",), (rows,))
        halves = (f"{theirs}.mlp.dense_left.weight", f"{theirs}.mlp.dense_right.weight")
        yield Parameter(f"{ours}.mlp.gate_up_proj.weight", halves, (2 * f, d))
        down = f"{theirs}.mlp.dense_4h_to_h.weight"
        yield Parameter(f"{ours}.mlp.down_proj.weight", (down,), (d, f))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Parameter(f"{ours}.{norm}.weight", (f"{theirs}.{norm}.weight",), (d,))
    final = "transformer.encoder.final_layernorm.weight"
    yield Parameter("model.norm.weight", (final,), (d,))
    yield Parameter("lm_head.weight", ("transformer.output_layer.weight",), (v, d))


def lora_parameters(
    config: Mapping[str, Any], rank: int, targets: tuple[str, ...]
) -> Iterator[Parameter]:
    """What LoRA adds, A before B.

    Args:
        config: of the base, content of config.json.
        rank: of the additions.
        targets: transformers' names of products of the attention.
    """
    for i in range(config["num_hidden_layers"]):
        for name, (rows, columns) in _attention(config).items():
            if name not in targets:
                continue
            ours = f"base_model.model.model.layers.{i}.self_attn.{name}"
            theirs = f"transformer.encoder.layers.{i}.self_attention.{ATTENTION[name]}"
            a, b = f"{theirs}.mindpet_delta_lora_a", f"{theirs}.mindpet_delta_lora_b"
            yield Parameter(f"{ours}.lora_A.weight", (a,), (rank, columns))
            yield Parameter(f"{ours}.lora_B.weight", (b,), (rows, rank))


def _attention(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Shapes of the products, by transformers' names."""
    d = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    return {
        "q_proj": (queries, d),
        "k_proj": (keys, d),
        "v_proj": (keys, d),
        "o_proj": (d, queries),
    }
