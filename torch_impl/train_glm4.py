"""Training of GLM-4 as transformers has it, with peft's LoRA.

The loop is this project's and not transformers' Trainer or TRL's, for MindFormers' run shares it
(``common.training``): with both frameworks batches come in the same order, nats and gradients are
sums over all processes' answers, one kind of log is written, and a run goes on from the other's
checkpoints, with torch's own to the byte.
"""

from pathlib import Path

import torch
from torch import Tensor

from common.data.store import Record
from common.language.config import LanguageRunConfig
from common.language.examples import TokenBatch
from common.language.training import LanguageTrainer
from common.training import Shard, records_of, run_training
from torch_impl.adamw import AUTOCAST, AveragedAdamW
from torch_impl.devices import available_device, compiles
from torch_impl.distributed import joined, share_out, sum_gradients, sum_values
from torch_impl.glm4 import (
    AnswerLoss,
    adapter_name,
    add_adapter,
    add_dropout,
    build,
    load_adapter,
    load_weights,
)


class Trainer(AveragedAdamW, LanguageTrainer):
    """One training run with torch; see ``common.language.training.LanguageTrainer``."""

    def __init__(
        self,
        config: LanguageRunConfig,
        train_records: list[Record],
        validation_records: list[Record],
        device: str = "cpu",
        shard: Shard = Shard(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(config, train_records, validation_records, shard)
        self.device = torch.device(device)
        settings = config.train
        lora = config.lora
        precision = "float32" if lora is None else lora.base_precision
        self.model = build(self.network_config, precision, device)
        load_weights(self.model, self.first_weights(), str(settings.init_from))
        if settings.dropout:
            add_dropout(self.model, settings.dropout)  # before layers are compiled
        if compiles(settings.compile, self.device, tell=not shard.rank):
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora is None:
            self.optimise(self.model, settings)
        else:
            adapter = lora.to_peft(settings.init_from, self.base)
            adapted = add_adapter(self.model, adapter)
            load_adapter(adapted, self.first_additions(), "initial weights")
            self.optimise(adapted, settings)
            self.names = [adapter_name(name) for name in self.names]
        network = AnswerLoss(self.model)
        parts = [*self.model.model.layers, self.model.lm_head]
        self.network = share_out(network, parts) if settings.fsdp else sum_gradients(network)

    def loss(self, data: TokenBatch) -> Tensor:
        """Nats of this process's answers, summed."""
        tokens = torch.from_numpy(data.tokens).to(self.device)
        targets = torch.from_numpy(data.targets).to(self.device)
        narrow = AUTOCAST.get(self.config.train.precision)
        with torch.autocast(self.device.type, narrow, enabled=narrow is not None):
            return self.network(tokens, targets)

    def update(self, data: TokenBatch, rate: float, decay: float) -> dict[str, float]:
        """One step of AdamW; see ``common.training.TrainingRun``."""
        if self.config.train.dropout:
            torch.manual_seed(self.dropout_seed())
        nats = self.loss(data)
        self.backward(nats / data.answer_tokens)
        norm = self.descend(rate, decay)
        total = sum_values(nats.detach()).item()
        return {
            "loss": total / data.answer_tokens,
            "answer": total / data.answers,
            "gradient_norm": norm,
        }

    @torch.no_grad()
    def losses(self, data: TokenBatch) -> float:
        """Of the current weights, without dropout."""
        self.model.eval()
        try:
            return self.loss(data).item()
        finally:
            self.model.train()


def train(
    config: LanguageRunConfig,
    out: Path,
    *,
    resume: bool = False,
    threads: int = 1,
    device: str = "auto",
) -> None:
    """Trains as a configuration says; see ``common.training.run_training``.

    Args:
        config: the run.
        out: the run's folder.
        resume: whether to go on from the latest step in it.
        threads: CPU threads.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: as ``torch_impl.train_dit.train`` does.
    """
    device = available_device(device)
    torch.set_num_threads(threads)
    with joined(device) as shard:
        run_training(Trainer(config, *records_of(config), device, shard), out, resume)
