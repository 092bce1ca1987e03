"""GLM-4 as transformers has it: made from a run's settings, read from a folder, and scored.

The folder is one of this project (with a manifest) or one as transformers writes it (config.json
and safetensors). No code that comes with weights is run, and no pickle is read.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_config, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GlmConfig, GlmForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import no_init_weights

from common.checkpoint import ADAPTER, LATEST, MANIFEST, Checkpoint, load_checkpoint
from common.errors import UserError
from common.language.examples import IGNORED
from common.language.foreign import FolderWeights, is_foreign
from common.language.tokenizer import SymmetryTokenizer, load_tokenizer
from common.weights import Arrays
from torch_impl.adamw import as_tensor


def build(
    config: dict[str, Any], precision: str = "float32", device: str = "cpu"
) -> GlmForCausalLM:
    """A network whose weights are still to be filled; small ones are random.

    Args:
        config: content of config.json.
        precision: of its weights.
        device: where they are.
    """
    own = {**config, "use_cache": False, "attn_implementation": "sdpa", "torch_dtype": None}
    narrow = precision == "bfloat16"
    with torch.device(device), no_init_weights() if narrow else nullcontext():
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if narrow else torch.float32)
        try:
            return GlmForCausalLM(GlmConfig(**own))
        finally:
            torch.set_default_dtype(usual)


def answer_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the targets that count, in nats, summed.

    The head, which is as wide as the vocabulary, works on their positions alone. Padding stands at
    the end, where no token before it looks, and so needs no mask.

    Args:
        model: GlmForCausalLM.
        tokens: [B,T].
        targets: [B,T], the token that follows, or ``IGNORED``.
    """
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state  # [B,T,D]
    counted = targets != IGNORED  # [B,T]
    logits = model.lm_head(hidden[counted]).float()  # [N,V]
    return nn.functional.cross_entropy(logits, targets[counted], reduction="sum")


class AnswerLoss(nn.Module):
    """``answer_loss`` as a network, for what wraps networks."""

    def __init__(self, model: GlmForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """See ``answer_loss``."""
        return answer_loss(self.model, tokens, targets)


def load_weights(model: nn.Module, arrays: Mapping[str, NDArray[Any]], where: str) -> None:
    """Puts a checkpoint's weights into a network.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    _fill(dict(model.named_parameters()), arrays, where)


def load_adapter(model: PeftModel, arrays: Arrays, where: str) -> None:
    """Puts an adapter's weights, under peft's names, into a network of ``add_adapter``.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    trained = {adapter_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    _fill(trained, arrays, where)


def _fill(
    parameters: Mapping[str, nn.Parameter], arrays: Mapping[str, NDArray[Any]], where: str
) -> None:
    if arrays.keys() != parameters.keys():
        names = sorted(arrays.keys() ^ parameters.keys())
        raise UserError(f"{where}: weights do not belong to this network: {', '.join(names[:5])}")
    for name, array in arrays.items():
        wanted = tuple(parameters[name].shape)
        if array.shape != wanted:
            raise UserError(f"{where}: weight {name} has shape {array.shape}, not {wanted}")
        parameters[name].data.copy_(as_tensor(array))


def add_adapter(model: GlmForCausalLM, config: dict[str, Any]) -> PeftModel:
    """A network with LoRA, whose parameters alone are trained; ``model`` itself is changed.

    Args:
        model: the base.
        config: content of adapter_config.json.
    """
    # A base without a name is what it is here: a network, not a folder.
    own = config | {"inference_mode": False, "base_model_name_or_path": None}
    adapter = get_peft_model(model, get_peft_config(own))
    assert isinstance(adapter, PeftModel)
    return adapter


def adapter_name(name: str) -> str:
    """A parameter's name in peft's files."""
    return name.replace(".default.", ".")


def with_adapter(model: GlmForCausalLM, saved: Checkpoint) -> GlmForCausalLM:
    """A base with an adapter's additions worked into its weights.

    Raises:
        UserError: if the adapter's configuration or its weights do not fit.
    """
    path = saved.path / "adapter_config.json"
    try:
        adapter = add_adapter(model, _read_json(path))
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: no adapter of this network: {reason}") from error
    load_adapter(adapter, saved.model, str(saved.path))
    merged = adapter.merge_and_unload()
    assert isinstance(merged, GlmForCausalLM)
    return merged


def attention_by_group(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA as transformers has it, where there is a mask without a copy of keys for every head.

    Heads that share keys stand one after the other, as if they were more tokens.

    Args:
        module: the layer, for the number of such heads.
        query: [B,H,T,d].
        key, value: [B,G,S,d].
        attention_mask: [B,1,T,S], added to the scores, or None.
        scaling: of the scores.
        options: others of transformers.

    Returns:
        [B,T,H,d], and no weights.
    """
    if attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    batch, heads, length, width = query.shape
    shared = heads // key.shape[1]
    found = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], shared * length, width),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, shared, 1),
        scale=scaling,
    )
    return found.reshape(batch, heads, length, width).transpose(1, 2).contiguous(), None


#: Name of it among transformers' kinds of attention.
BY_GROUP = "sdpa_by_group"
AttentionInterface.register(BY_GROUP, attention_by_group)
AttentionMaskInterface.register(BY_GROUP, sdpa_mask)


class _FilledLayer(DynamicLayer):
    """Keys and values of a layer, in memory that has room for one more call.

    Args:
        keys, values: [B,G,S,d], the known ones first.
        known: of S.
    """

    def __init__(self, keys: Tensor, values: Tensor, known: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self._known = known
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Puts the new ones behind the known ones."""
        self.keys[:, :, self._known :] = key_states
        self.values[:, :, self._known :] = value_states
        return self.keys, self.values


@dataclass(frozen=True, eq=False)
class _Past:
    """Keys and values of a sequence, as a chain: a beginning, which others may share, and more.

    Attributes:
        before: the beginning, or None.
        length: tokens of all.
        states: [2 * layers, groups, tokens, head], keys and values of what came after ``before``.
    """

    before: "_Past | None"
    length: int
    states: Tensor

    def write(self, to: Tensor) -> None:
        """Fills [2 * layers, groups, length, head]."""
        part: _Past | None = self
        while part is not None:
            begin = part.length - part.states.shape[2]
            to[:, :, begin : part.length] = part.states
            part = part.before


class LanguageModel:
    """A loaded model with its tokenizer; scores sequences for ``common.language.search``.

    Args:
        model: the network.
        tokenizer: its own.
        name: 12 hex digits that name the weights, or the folder's name.
        analogues: how many of them questions tell of, as in training.
    """

    def __init__(
        self, model: GlmForCausalLM, tokenizer: SymmetryTokenizer, name: str, analogues: int = 0
    ) -> None:
        self.model = model.eval()
        self.model.set_attn_implementation(BY_GROUP)
        self.tokenizer = tokenizer
        self.name = name
        self.analogues = analogues

    @cached_property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def __call__(
        self, sequences: Sequence[Sequence[int]], handles: Sequence[Any]
    ) -> tuple[NDArray[np.floating[Any]], Sequence[Any]]:
        """Logits after each sequence, and keys and values; see ``common.language.search.Scorer``.

        Args:
            sequences: tokens from the first on.
            handles: of their beginnings, or None.
        """
        known = [0 if past is None else past.length for past in handles]
        new = [list(s[n:]) for s, n in zip(sequences, known, strict=True)]
        logits = np.empty((len(new), self.model.config.vocab_size), dtype=np.float32)
        pasts: list[_Past | None] = [None] * len(new)
        for rows in _alike([len(ids) for ids in new]):
            found, states = self._forward(
                [new[row] for row in rows], [handles[row] for row in rows]
            )
            logits[rows] = found
            for row, own in zip(rows, states, strict=True):
                length = len(new[row])
                part = own[:, :, :length].clone()
                pasts[row] = _Past(handles[row], known[row] + length, part)
        return logits, pasts

    def _forward(
        self, new: Sequence[Sequence[int]], handles: Sequence[_Past | None]
    ) -> tuple[NDArray[np.floating[Any]], Tensor]:
        """Logits [B,V] behind new tokens, and their keys and values [B,2L,G,width,d]."""
        known = [0 if past is None else past.length for past in handles]
        width, depth = max(map(len, new)), max(known)
        tokens = torch.full((len(new), width), self.tokenizer.pad_id)
        for row, ids in zip(tokens, new, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        lengths = torch.tensor([len(ids) for ids in new])
        past = torch.tensor(known)
        # Known tokens stand at 0..known of `depth` places, new ones behind these.
        place = torch.arange(depth + width)
        visible = place[None, None, :] < past[:, None, None]
        later = place - depth
        visible = visible | ((later >= 0) & (later <= torch.arange(width)[:, None]))[None]
        states = self._states(handles, depth, width)
        layers = [_FilledLayer(*layer, depth) for layer in states.unflatten(0, (-1, 2))]
        output = self.model.model(
            input_ids=tokens.to(self._device),
            attention_mask=_additive(visible[:, None], self.model.dtype).to(self._device),
            position_ids=(past[:, None] + torch.arange(width)).to(self._device),
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        last = output.last_hidden_state[torch.arange(len(new)), lengths - 1]
        logits = self.model.lm_head(last).float().numpy(force=True)
        return logits, states[:, :, :, depth:].transpose(0, 1)

    def _states(self, handles: Sequence[_Past | None], depth: int, width: int) -> Tensor:
        """[2L,B,G,depth+width,d]: keys and values of what is known, and room behind."""
        config = self.model.config
        shape = (config.num_key_value_heads, depth + width, config.head_dim)
        size = (2 * config.num_hidden_layers, len(handles), *shape)
        states = torch.zeros(size, dtype=self.model.dtype, device=self._device)
        for row, past in zip(states.transpose(0, 1), handles, strict=True):
            if past is not None:
                past.write(row[:, :, : past.length])
        return states

    @torch.inference_mode()
    def write(self, prompts: Sequence[Sequence[int]], limit: int = 128) -> list[list[int]]:
        """Answers without any constraint, always the likeliest token; without the end's token.

        Args:
            prompts: tokens of questions.
            limit: tokens of an answer, at most.
        """
        length = max(map(len, prompts))
        tokens = torch.full((len(prompts), length), self.tokenizer.pad_id)
        mask = torch.zeros_like(tokens)
        for row, present, ids in zip(tokens, mask, prompts, strict=True):
            row[length - len(ids) :] = torch.tensor(ids)
            present[length - len(ids) :] = 1
        found = self.model.generate(
            tokens.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=limit,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.tokenizer.end_id,
            pad_token_id=self.tokenizer.pad_id,
        )
        ends = {self.tokenizer.end_id, self.tokenizer.pad_id}
        answers = []
        for row in found[:, length:].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:end])
        return answers


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of lengths that differ at most by a factor of two, together."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(index)
    return list(groups.values())


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where a token may look, the lowest number elsewhere."""
    lowest = torch.finfo(dtype).min
    return torch.where(visible, 0.0, lowest).to(dtype)


def load_language_model(
    folder: str | os.PathLike[str], device: str = "cpu", base: Path | None = None
) -> LanguageModel:
    """Reads a model's folder, or an adapter's.

    Args:
        folder: of this project or of transformers.
        device: where to.
        base: folder of what an adapter adds to; by default the one that it names.

    Raises:
        UserError: if it is absent, damaged, not GLM-4's, or an adapter of another base.
    """
    path = Path(folder)
    analogues = 0
    if (path / LATEST).is_file() or (path / MANIFEST).is_file():
        saved = load_checkpoint(path)
        name, path = saved.hash, saved.path
        analogues = int(saved.config.get("train", {}).get("analogues", 0))
        if saved.manifest["format"] == ADAPTER.format:
            model = with_adapter(_base_of(saved, base), saved)
        else:
            model = _network(saved)
    else:
        model = _from_huggingface(path)
        name = path.name
    return LanguageModel(model.to(device), load_tokenizer(path), name, analogues)


def _network(saved: Checkpoint) -> GlmForCausalLM:
    model = build(_read_config(saved.path))
    load_weights(model, saved.model, str(saved.path))
    return model


def _base_of(adapter: Checkpoint, base: Path | None) -> GlmForCausalLM:
    """What an adapter was trained on."""
    config = _read_json(adapter.path / "adapter_config.json")
    folder = base or Path(str(config.get("base_model_name_or_path")))
    saved = None if is_foreign(folder) else load_checkpoint(folder)
    name = FolderWeights(folder).name if saved is None else saved.hash
    if name != config.get("revision"):
        raise UserError(
            f"adapter {adapter.path} belongs to weights {config.get('revision')}, but "
            f"{folder} holds {name}: give its own base"
        )
    return _from_huggingface(folder) if saved is None else _network(saved)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = _read_json(path)
    if config.get("model_type") != "glm":
        raise UserError(f"{path}: model_type is not glm; give a folder of GLM-4")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error)[:120]}; give GLM-4's folder") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: a JSON object is expected")
    return content


def _from_huggingface(folder: Path) -> GlmForCausalLM:
    """Weights as transformers writes them, in one or several safetensors."""
    if not folder.is_dir():
        raise UserError(f"no language model at {folder}: give a folder with config.json")
    _read_config(folder)
    try:
        model, report = GlmForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            dtype="auto",
            output_loading_info=True,
        )
    except Exception as error:  # the library raises anything, from OSError to its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read the language model in {folder}: {reason}") from error
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UserError(f"{folder}: weights do not belong to this network: {wrong[:5]}")
    return model
