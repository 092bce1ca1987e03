"""GLM-4 as transformers has it: made from a run's settings, filled and given LoRA."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_config, get_peft_model
from torch import Tensor, nn
from transformers import GlmConfig, GlmForCausalLM
from transformers.modeling_utils import no_init_weights

from common.errors import UserError
from common.language.examples import IGNORED
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


def add_dropout(model: GlmForCausalLM, share: float) -> None:
    """Makes a share of the embeddings, and of what blocks add to them, zero in training mode.

    That is what MindFormers' ``hidden_dropout`` does. Masks come from torch's own generator.

    Args:
        model: itself changed; names of parameters stay.
        share: of zeros, the others are divided by what is left.
    """

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return nn.functional.dropout(output, share, module.training)
        values, *rest = output  # an attention's weights follow
        return nn.functional.dropout(values, share, module.training), *rest

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


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
