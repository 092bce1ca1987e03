"""Settings of a language model's run: ``configs/glm4_*.yaml``."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from common.config import AnyRunConfig, Optimisation, PropertyName, Settings
from common.language.mindformers_sections import FILLED, OF_THE_BASE, unheeded
from common.language.tokenizer import SymmetryTokenizer


class GlmConfig(Settings):
    """GLM-4: what both transformers' GlmForCausalLM and MindFormers' ChatGLM2 can be.

    Rotary positions turn half of every head, queries, keys and values have a bias, the
    feed-forward part is gated, and the head has weights of its own, as in GLM-4-9B.
    """

    layers: int = Field(4, ge=1, description="Blocks.")
    width: int = Field(256, ge=8, description="Width of a token.")
    heads: int = Field(8, ge=1, description="Attention heads.")
    groups: int = Field(2, ge=1, description="Heads of keys and values, shared by the others.")
    feed_forward: int = Field(688, ge=1, description="Width of the feed-forward part.")
    positions: int = Field(512, ge=64, description="Tokens of question and answer, at most.")
    norm_eps: float = Field(1.5625e-7, gt=0, description="In RMSNorm.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % (4 * self.heads):
            raise ValueError("width must be a multiple of 4 * heads, for half of a head turns")
        if self.heads % self.groups:
            raise ValueError("heads must be a multiple of groups")
        return self

    def to_huggingface(self, tokenizer: SymmetryTokenizer) -> dict[str, Any]:
        """Content of config.json, as transformers reads it."""
        return {
            "architectures": ["GlmForCausalLM"],
            "model_type": "glm",
            "vocab_size": tokenizer.head_size,
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.width // self.heads,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "rms_norm_eps": self.norm_eps,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
            "torch_dtype": "float32",
        }


class LanguageTrainConfig(Optimisation):
    """Optimisation of a language model; only answers count in the loss."""

    questions: tuple[Literal["none"] | PropertyName, ...] = Field(
        ("none", "band_gap", "formation_energy"),
        min_length=1,
        description="Target properties; every row is asked about one of them in an epoch.",
    )
    analogues: int = Field(
        0,
        ge=0,
        description="Symmetries of similar compositions in a question; known polymorphs beside.",
    )
    rehearsals: int = Field(
        0,
        ge=0,
        description="Analogues answered after a row's answer; all but their group counts.",
    )
    analogue_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of analogues left out of questions, anew in every epoch.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of zeros in embeddings and in what blocks add to them."
    )
    token_budget: int = Field(3072, ge=64, description="Padded tokens in a batch, at most.")
    gradient_checkpointing: bool = Field(
        False, description="Blocks are computed again for the gradient, which saves memory."
    )
    fsdp: bool = Field(
        False, description="GPUs share out the base's weights among them (torch, with lora)."
    )

    @model_validator(mode="after")
    def _has_analogues(self) -> Self:
        if self.rehearsals and not self.analogues:
            raise ValueError("rehearsals are answers of analogues: give analogues, too")
        if self.analogue_dropout and not self.analogues:
            raise ValueError("analogue_dropout leaves analogues out: give analogues, too")
        return self


class LoraConfig(Settings):
    """Low-rank additions to some products with weights, which are trained in place of these."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, description="Additions are scaled by alpha / rank.")
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj"], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        min_length=1,
        description="Of the attention; the feed-forward part is joined differently elsewhere.",
    )
    base_precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the base's weights in memory; what is trained is float32."
    )

    def to_peft(self, base: str | None, version: str | None) -> dict[str, Any]:
        """Content of adapter_config.json, as peft reads it.

        Args:
            base: folder of what it belongs to.
            version: names the weights there.
        """
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": version,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(self.targets),
            "bias": "none",
            "inference_mode": True,
        }


class LanguageRunConfig(AnyRunConfig):
    """One run: network and training."""

    kind: Literal["language"] = Field(description="Tells these runs from others.")
    model: GlmConfig = GlmConfig()
    lora: LoraConfig | None = Field(
        None, description="Train only these additions to what train.init_from names."
    )
    train: LanguageTrainConfig = LanguageTrainConfig()
    network: dict[str, Any] = Field(
        {}, description="What MindFormers' YAML says of the base's network, and must be true of it."
    )
    mindformers: dict[str, Any] = Field(
        {}, description="Sections of MindFormers' YAML that replace the usual ones (MindSpore)."
    )

    @model_validator(mode="after")
    def _has_base(self) -> Self:
        if self.lora is not None and not self.train.init_from:
            raise ValueError("lora needs train.init_from, the checkpoint that it adds to")
        if self.train.fsdp and self.lora is None:
            raise ValueError("train.fsdp needs lora: it is the base that GPUs share out")
        return self

    @model_validator(mode="after")
    def _says_nothing_twice(self) -> Self:
        if filled := FILLED & self.mindformers.keys():
            names = ", ".join(sorted(filled))
            raise ValueError(f"mindformers.{names}: other settings say it, for every framework")
        return self

    @model_validator(mode="after")
    def _states_what_a_base_has(self) -> Self:
        if unknown := self.network.keys() - OF_THE_BASE:
            names = ", ".join(f"network.{name}" for name in sorted(unknown))
            raise ValueError(f"{names}: only {', '.join(sorted(OF_THE_BASE))} are compared")
        return self

    @model_validator(mode="after")
    def _heeds_all(self) -> Self:
        if lines := unheeded(self.mindformers):
            raise ValueError("; ".join(f"mindformers.{line}" for line in lines[:5]))
        return self
