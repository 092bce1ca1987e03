"""GLM-4 as transformers has it, read from a folder, as the search asks for it.

The folder is one of this project (with a manifest) or one as transformers writes it (config.json
and safetensors). No code that comes with weights is run, and no pickle is read.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GlmForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from common.checkpoint import ADAPTER, Checkpoint, is_checkpoint, load_checkpoint
from common.errors import UserError
from common.language.foreign import FolderWeights, base_of, read_config, read_json
from common.language.hub import weights_folder
from common.language.pasts import Call, Past, alike
from common.language.tokenizer import SymmetryTokenizer, load_tokenizer
from torch_impl.devices import available_device
from torch_impl.glm4 import add_adapter, build, load_adapter, load_weights
from torch_impl.threads import threads_per_operation

#: Parameters up to which an operation has one thread on a CPU, so that the last bits do not hang on
#: how many there are. A call is slower for it, which a larger network could not afford.
SMALL = 20_000_000


def _attention_by_group(
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
_BY_GROUP = "sdpa_by_group"
AttentionInterface.register(_BY_GROUP, _attention_by_group)
AttentionMaskInterface.register(_BY_GROUP, sdpa_mask)


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


class LanguageModel:
    """A loaded model with its tokenizer; scores sequences for ``common.language.search``.

    Args:
        model: the network.
        tokenizer: its own.
        name: 12 hex digits that name the weights.
        analogues: how many of them questions tell of, as in training.
    """

    def __init__(
        self, model: GlmForCausalLM, tokenizer: SymmetryTokenizer, name: str, analogues: int = 0
    ) -> None:
        self.model = model.eval()
        self.model.set_attn_implementation(_BY_GROUP)
        self.tokenizer = tokenizer
        self.name = name
        self.analogues = analogues
        self._room: Tensor | None = None

    @cached_property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def _is_small(self) -> bool:
        return self._device.type == "cpu" and self.model.num_parameters() <= SMALL

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
        pasts: list[Past | None] = [None] * len(new)
        for rows in alike([len(ids) for ids in new]):
            with threads_per_operation(1) if self._is_small else nullcontext():
                found, states = self._forward(
                    [new[row] for row in rows], [handles[row] for row in rows]
                )
            logits[rows] = found
            for row, own in zip(rows, states, strict=True):
                length = len(new[row])
                pasts[row] = Past(handles[row], known[row] + length, own[:, :, :length].clone())
        return logits, pasts

    def _forward(
        self, new: Sequence[Sequence[int]], handles: Sequence[Past | None]
    ) -> tuple[NDArray[np.floating[Any]], Tensor]:
        """Logits [B,V] behind new tokens, and their keys and values [B,2L,G,W,d]."""
        known = [0 if past is None else past.length for past in handles]
        width, depth = max(map(len, new)), max(known)
        call = Call.lay_out(new, known, width, depth, self.tokenizer.pad_id)
        states = self._states(handles, depth, width)
        layers = [_FilledLayer(*layer, depth) for layer in states.unflatten(0, (-1, 2))]
        visible = torch.from_numpy(call.visible[:, None]).to(self._device)
        output = self.model.model(
            input_ids=torch.from_numpy(call.tokens).to(self._device),
            attention_mask=_additive(visible, self.model.dtype),
            position_ids=torch.from_numpy(call.positions).to(self._device),
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        last = output.last_hidden_state[torch.arange(len(new)), torch.from_numpy(call.last)]
        logits = self.model.lm_head(last).float().numpy(force=True)
        return logits, states[:, :, :, depth:].transpose(0, 1)

    def _states(self, handles: Sequence[Past | None], depth: int, width: int) -> Tensor:
        """[2L,B,G,depth+width,d]: keys and values of what is known, and room behind.

        In memory that every call has again; what is left there from others is finite, and hidden.
        """
        config = self.model.config
        shape = (config.num_key_value_heads, depth + width, config.head_dim)
        size = (2 * config.num_hidden_layers, len(handles), *shape)
        numbers = math.prod(size)
        if self._room is None or len(self._room) < numbers:
            self._room = torch.zeros(numbers, dtype=self.model.dtype, device=self._device)
        states = self._room[:numbers].view(size)
        for row, past in zip(states.transpose(0, 1), handles, strict=True):
            if past is not None:
                past.write(row[:, :, : past.length])
        return states

    @torch.inference_mode()
    def write(self, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
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


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where a token may look, the lowest number elsewhere."""
    lowest = torch.finfo(dtype).min
    return torch.where(visible, 0.0, lowest).to(dtype)


def load_language_model(
    folder: str | os.PathLike[str], device: str = "cpu", base: Path | None = None
) -> LanguageModel:
    """Reads a model's folder, or an adapter's.

    Args:
        folder: of this project or of transformers, or a repository; see ``common.language.hub``.
        device: ``auto`` for the best one here, or what torch calls it.
        base: folder of what an adapter adds to; by default the one that it names.

    Raises:
        UserError: if it is absent, damaged, not GLM-4's, or an adapter of another base, or if the
            device is not here.
    """
    device = available_device(device)
    path = weights_folder(os.fspath(folder))
    analogues = 0
    if is_checkpoint(path):
        saved = load_checkpoint(path)
        name, path = saved.hash, saved.path
        analogues = int(saved.config.get("train", {}).get("analogues", 0))
        if saved.manifest["format"] == ADAPTER.format:
            model = _with_adapter(_base_of(saved, base), saved)
        else:
            model = _network(saved)
    else:
        model, name = _from_huggingface(path), FolderWeights(path).name
    return LanguageModel(model.to(device), load_tokenizer(path), name, analogues)


def _network(saved: Checkpoint) -> GlmForCausalLM:
    model = build(read_config(saved.path))
    load_weights(model, saved.model, str(saved.path))
    return model


def _base_of(adapter: Checkpoint, base: Path | None) -> GlmForCausalLM:
    folder, saved = base_of(adapter, base)
    return _from_huggingface(folder) if saved is None else _network(saved)


def _with_adapter(model: GlmForCausalLM, saved: Checkpoint) -> GlmForCausalLM:
    """A base with an adapter's additions worked into its weights.

    Raises:
        UserError: if the adapter's configuration or its weights do not fit.
    """
    path = saved.path / "adapter_config.json"
    try:
        adapter = add_adapter(model, read_json(path))
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: no adapter of this network: {reason}") from error
    load_adapter(adapter, saved.model, str(saved.path))
    merged = adapter.merge_and_unload()
    assert isinstance(merged, GlmForCausalLM)
    return merged


def _from_huggingface(folder: Path) -> GlmForCausalLM:
    """Weights as transformers writes them, in one or several safetensors."""
    if not folder.is_dir():
        raise UserError(f"no language model at {folder}: give a folder with config.json")
    read_config(folder)
    FolderWeights(folder)  # names a file that is damaged or absent, as transformers does not
    try:
        with _no_bars():
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


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bars, which would stand between our lines."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
