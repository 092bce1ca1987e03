"""GLM-4 in MindSpore, read from a folder, as the search asks for it.

A network of its own with keys and values of what is known, so that questions are read once;
MindFormers', which trains, works on whole sequences. Its graph is compiled once, for all numbers of
sequences and tokens. Folders are those of ``torch_impl.language_model``.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from common.checkpoint import ADAPTER, Checkpoint, is_checkpoint, load_checkpoint
from common.errors import UserError
from common.language.adapters import with_additions
from common.language.foreign import FolderWeights, base_of, read_config, read_json
from common.language.hub import weights_folder
from common.language.parameters import check_network, parameters
from common.language.pasts import Call, Past, alike
from common.language.tokenizer import SymmetryTokenizer, load_tokenizer
from ms_impl.device import chosen_device, use_device

#: What is added to the score of a token that must not be seen.
_HIDDEN = -1e9


class _Block(nn.Cell):
    """One block of GLM-4: attention by groups of heads, then the gated part.

    Args:
        weights: of the network, under transformers' names.
        index: of the block.
        config: content of config.json.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]], index: int, config: dict[str, Any]):
        super().__init__()
        stem = f"model.layers.{index}"
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.head = config["head_dim"]
        self.eps = config["rms_norm_eps"]
        self.inner = config["intermediate_size"]
        self.scale = self.head**-0.5
        names = {
            "first_norm": "input_layernorm.weight",
            "second_norm": "post_attention_layernorm.weight",
            "output": "self_attn.o_proj.weight",
            "gate_up": "mlp.gate_up_proj.weight",
            "down": "mlp.down_proj.weight",
        }
        for name, theirs in names.items():
            setattr(self, name, _parameter(weights[f"{stem}.{theirs}"], f"{index}.{name}"))
        attention = [f"{stem}.self_attn.{part}_proj" for part in "qkv"]
        products = np.concatenate([weights[f"{name}.weight"] for name in attention])
        biases = np.concatenate([weights[f"{name}.bias"] for name in attention])
        self.inputs = _parameter(products, f"{index}.inputs")
        self.input_biases = _parameter(biases, f"{index}.input_biases")

    def construct(
        self, x: Tensor, cosine: Tensor, sine: Tensor, hidden: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One more representation of new tokens, and their keys and values.

        Args:
            x: [B,W,C].
            cosine, sine: [B,1,W,d/4], of the rotary angles.
            hidden: [B,1,R*W,D+W], added to the scores, where R heads share keys.
            keys, values: [B,G,D,d], of known tokens.

        Returns:
            [B,W,C], and [B,G,W,d] twice.
        """
        batch, width = cosine.shape[0], cosine.shape[2]
        own = ops.matmul(_normed(x, self.first_norm, self.eps), self.inputs.T) + self.input_biases
        own = own.reshape(batch, width, self.heads + 2 * self.groups, self.head).swapaxes(1, 2)
        query = _turned(own[:, : self.heads], cosine, sine, self.head // 2)
        key = _turned(own[:, self.heads : self.heads + self.groups], cosine, sine, self.head // 2)
        value = own[:, self.heads + self.groups :]
        # Heads that share keys stand one after the other, as if they were more tokens.
        query = query.reshape(batch, self.groups, -1, self.head) * self.scale
        all_keys = ops.concat((keys, key), 2)
        all_values = ops.concat((values, value), 2)
        scores = ops.matmul(query, all_keys.swapaxes(2, 3)) + hidden
        found = ops.matmul(ops.softmax(scores, -1), all_values)
        found = found.reshape(batch, self.heads, width, self.head).swapaxes(1, 2)
        x = x + ops.matmul(found.reshape(batch, width, -1), self.output.T)
        both = ops.matmul(_normed(x, self.second_norm, self.eps), self.gate_up.T)
        gate, up = both[..., : self.inner], both[..., self.inner :]
        return x + ops.matmul(up * gate * ops.sigmoid(gate), self.down.T), key, value


class _Network(nn.Cell):
    """GLM-4 for calls as ``common.language.pasts.Call`` lays them out.

    Args:
        weights: under transformers' names, in float32.
        config: content of config.json.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]], config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.eps = config["rms_norm_eps"]
        self.embedding = _parameter(weights["model.embed_tokens.weight"], "embedding")
        self.norm = _parameter(weights["model.norm.weight"], "norm")
        self.lm_head = _parameter(weights["lm_head.weight"], "lm_head")
        layers = range(config["num_hidden_layers"])
        self.blocks = nn.CellList([_Block(weights, index, config) for index in layers])
        head, groups = config["head_dim"], config["num_key_value_heads"]
        shapes = [
            [None, 1, None],
            [None, 1, None, head // 4],
            [None, 1, None, head // 4],
            [None, 1, None, None],
            [2 * len(layers), None, groups, None, head],
        ]
        numbers = (Tensor(shape=shape, dtype=ms.float32) for shape in shapes)
        self.set_inputs(Tensor(shape=[None, None], dtype=ms.int32), *numbers)

    def construct(
        self,
        tokens: Tensor,
        last: Tensor,
        cosine: Tensor,
        sine: Tensor,
        hidden: Tensor,
        past: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits behind the new tokens, and keys and values of these.

        Args:
            tokens: [B,W].
            last: [B,1,W], one at the last token, else zero.
            cosine, sine, hidden: see ``_Block``.
            past: [2L,B,G,D,d], keys and values of known tokens, layer by layer.

        Returns:
            [B,V] and [2L,B,G,W,d].
        """
        x = ops.gather(self.embedding, tokens, 0)
        states = ()
        for index, block in enumerate(self.blocks):
            x, key, value = block(x, cosine, sine, hidden, past[2 * index], past[2 * index + 1])
            states += (key, value)
        chosen = ops.matmul(last, _normed(x, self.norm, self.eps))[:, 0]
        return ops.matmul(chosen, self.lm_head.T), ops.stack(states)


class LanguageModel:
    """A loaded model with its tokenizer; scores sequences for ``common.language.search``.

    Args:
        model: the network.
        tokenizer: its own.
        name: 12 hex digits that name the weights.
        analogues: how many of them questions tell of, as in training.
    """

    def __init__(
        self, model: _Network, tokenizer: SymmetryTokenizer, name: str, analogues: int = 0
    ) -> None:
        self.model = model.set_train(False)
        self.tokenizer = tokenizer
        self.name = name
        self.analogues = analogues
        config = model.config
        self._shared = config["num_attention_heads"] // config["num_key_value_heads"]
        turning = config["head_dim"] // 2
        powers = np.arange(0, turning, 2) / turning
        self._frequencies = config["rope_theta"] ** -powers  # [d/4]

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
        logits = np.empty((len(new), self.model.config["vocab_size"]), dtype=np.float32)
        pasts: list[Past | None] = [None] * len(new)
        for rows in alike([len(ids) for ids in new]):
            found, states = self._forward(
                [new[row] for row in rows], [handles[row] for row in rows]
            )
            logits[rows] = found
            for index, row in enumerate(rows):
                length = len(new[row])
                own = states[:, index, :, :length].copy()
                pasts[row] = Past(handles[row], known[row] + length, own)
        return logits, pasts

    def _forward(
        self, new: Sequence[Sequence[int]], handles: Sequence[Past | None]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits [B,V] behind new tokens, and their keys and values [2L,B,G,W,d]."""
        known = [0 if past is None else past.length for past in handles]
        width, depth = max(map(len, new)), max(*known, 1)
        call = Call.lay_out(new, known, width, depth, self.tokenizer.pad_id)
        config = self.model.config
        shape = (config["num_key_value_heads"], depth, config["head_dim"])
        size = (2 * config["num_hidden_layers"], len(call.tokens), *shape)
        past = np.zeros(size, dtype=np.float32)
        for index, one in enumerate(handles):
            if one is not None:
                one.write(past[:, index, :, : one.length])
        angles = call.positions[:, None, :, None] * self._frequencies  # [B,1,W,d/4]
        hidden = np.where(call.visible, 0.0, _HIDDEN)[:, None]  # [B,1,W,D+W]
        inputs = (
            np.arange(width) == call.last[:, None, None],  # [B,1,W]
            np.cos(angles),
            np.sin(angles),
            np.tile(hidden, (1, 1, self._shared, 1)),
            past,
        )
        tokens = Tensor(call.tokens.astype(np.int32))
        logits, states = self.model(tokens, *(Tensor(i.astype(np.float32)) for i in inputs))
        return logits.asnumpy(), states.asnumpy()

    def write(self, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        """Answers without any constraint, always the likeliest token; without the end's token.

        Args:
            prompts: tokens of questions.
            limit: tokens of an answer, at most.
        """
        ends = {self.tokenizer.end_id, self.tokenizer.pad_id}
        answers: list[list[int]] = [[] for _ in prompts]
        pasts: list[Any] = [None] * len(prompts)
        going = list(range(len(prompts)))
        for _ in range(limit):
            sequences = [[*prompts[row], *answers[row]] for row in going]
            logits, found = self(sequences, [pasts[row] for row in going])
            chosen = logits.argmax(axis=1).tolist()
            for row, token, past in zip(going, chosen, found, strict=True):
                answers[row].append(token)
                pasts[row] = past
            going = [row for row in going if answers[row][-1] not in ends]
            if not going:
                break
        return [answer[:-1] if answer[-1] in ends else answer for answer in answers]


def load_language_model(
    folder: str | os.PathLike[str], device: str = "cpu", base: Path | None = None
) -> LanguageModel:
    """Reads a model's folder, or an adapter's.

    Args:
        folder: of this project or of transformers, or a repository; see ``common.language.hub``.
        device: ``auto``, ``cpu`` or ``ascend``, unless this process has chosen one before.
        base: folder of what an adapter adds to; by default the one that it names.

    Raises:
        UserError: if it is absent, damaged, not GLM-4's, or an adapter of another base.
    """
    use_device(chosen_device(device))
    path = weights_folder(os.fspath(folder))
    analogues = 0
    if is_checkpoint(path):
        saved = load_checkpoint(path)
        name, path = saved.hash, saved.path
        analogues = int(saved.config.get("train", {}).get("analogues", 0))
        weights, config = _weights(saved, base)
    elif path.is_dir():
        config = read_config(path)
        weights = FolderWeights(path)
        name = weights.name
    else:
        raise UserError(f"no language model at {path}: give a folder with config.json")
    tokenizer = load_tokenizer(path)
    return LanguageModel(_network(weights, config, str(path)), tokenizer, name, analogues)


def _weights(
    saved: Checkpoint, base: Path | None
) -> tuple[Mapping[str, NDArray[Any]], dict[str, Any]]:
    """A checkpoint's weights, an adapter's worked into its base's, and config.json's content."""
    if saved.manifest["format"] != ADAPTER.format:
        return saved.model, read_config(saved.path)
    folder, own = base_of(saved, base)
    weights = FolderWeights(folder) if own is None else own.model
    config = read_config(folder if own is None else own.path)
    adapter = read_json(saved.path / "adapter_config.json")
    where = str(saved.path)
    return with_additions(weights, config, adapter, saved.model, where), config


def _network(weights: Mapping[str, NDArray[Any]], config: dict[str, Any], where: str) -> _Network:
    check_network(config, where)
    wanted = {parameter.torch: parameter.shape for parameter in parameters(config)}
    if weights.keys() != wanted.keys():
        names = sorted(weights.keys() ^ wanted.keys())
        raise UserError(f"{where}: weights do not belong to this network: {', '.join(names[:5])}")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise UserError(f"{where}: weight {name} has shape {weights[name].shape}, not {shape}")
    return _Network(weights, config)


def _parameter(values: NDArray[Any], name: str) -> Parameter:
    return Parameter(Tensor(np.ascontiguousarray(values), ms.float32), name, requires_grad=False)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis."""
    return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + eps) * weight


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, half: int) -> Tensor:
    """The first half of every head [B,N,W,d] turned, pair by pair; angles are [B,1,W,d/4]."""
    first, second = x[..., 0:half:2], x[..., 1:half:2]
    turned = ops.stack((first * cosine - second * sine, second * cosine + first * sine), -1)
    return ops.concat((ops.flatten(turned, start_dim=3), x[..., half:]), -1)
