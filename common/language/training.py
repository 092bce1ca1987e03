"""Training of a language model as far as it needs no gradient."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import ADAPTER, load_checkpoint
from common.data.store import Record
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.language.examples import Examples, Int, TokenBatch
from common.language.initial import initial_weights
from common.language.parameters import lora_parameters, parameters
from common.language.tokenizer import compact_tokenizer
from common.training import Shard, TrainingRun
from common.weights import Arrays


class LanguageTrainer(TrainingRun[TokenBatch]):
    """One training run of a language model.

    Args:
        config: of the run.
        train_records: what to learn from.
        validation_records: whose loss is watched.
        shard: this process's share of every batch.

    Attributes:
        base: names the weights that the run starts from, if any.
        start: these.
    """

    config: LanguageRunConfig

    def __init__(
        self,
        config: LanguageRunConfig,
        train_records: list[Record],
        validation_records: list[Record],
        shard: Shard,
    ) -> None:
        super().__init__(config, train_records, len(train_records), shard)
        settings = config.train
        if not train_records:
            raise UserError(f"{settings.data}: no crystal to train on")
        self.base: str | None = None
        self.start: Arrays | None = None
        if settings.init_from:
            saved = load_checkpoint(Path(settings.init_from))
            self.base, self.start = saved.hash, saved.model
        self.tokenizer = compact_tokenizer()
        self.network_config = config.model.to_huggingface(self.tokenizer)
        self.data = self._examples(train_records)
        self.validation = self._examples(validation_records[: settings.validation_rows])

    def _examples(self, records: list[Record]) -> Examples:
        settings = self.config.train
        return Examples(records, self.tokenizer, settings.questions, settings.token_budget)

    def first_weights(self) -> Arrays:
        """Of the network: those that the run starts from, or random ones."""
        if self.start is not None:
            return self.start
        return initial_weights(parameters(self.network_config), self.config.train.seed)

    def first_additions(self) -> Arrays:
        """Of LoRA: random ones."""
        lora, network = self.config.lora, self.network_config
        assert lora is not None
        table = lora_parameters(network, lora.rank, lora.targets)
        return initial_weights(table, self.config.train.seed)

    @abstractmethod
    def losses(self, data: TokenBatch) -> float:
        """Nats of the answers of this process's share with the current weights, summed."""

    @abstractmethod
    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network has its averaged weights."""

    def batches(self) -> Iterator[TokenBatch]:
        """The training batches from the current step on."""
        for rows, forms in self.data.batches(self.config.train.seed, self.step):
            yield self.prepare(self.data, rows, forms)

    def prepare(self, data: Examples, rows: Int, forms: Int) -> TokenBatch:
        """This process's share of a batch."""
        return data.collate(rows, forms, *self.shard.rows(len(rows)))

    def validate(self) -> dict[str, float]:
        """``loss``, nats per token of an answer, and ``answer``, nats per answer."""
        nats, counts = 0.0, np.zeros(2)
        with self.averaged():
            for rows, forms in self.validation.in_order():
                data = self.prepare(self.validation, rows, forms)
                nats += self.losses(data)
                counts += data.answer_tokens, data.answers
        (total,) = self.summed([nats])
        return {"loss": total / counts[0], "answer": total / counts[1]}

    def companions(self) -> dict[str, bytes]:
        """What transformers or peft needs beside the weights."""
        if self.config.lora is None:
            name, content = "config.json", self.network_config
        else:
            name = "adapter_config.json"
            content = self.config.lora.to_peft(self.config.train.init_from, self.base)
        files = {name: json.dumps(content, indent=2) + "\n", **self.tokenizer.files()}
        return {name: text.encode() for name, text in files.items()}

    def final(self) -> dict[str, Any]:
        """Arguments of ``common.checkpoint.save_checkpoint`` that every checkpoint has."""
        return super().final() | ({"layout": ADAPTER} if self.config.lora else {})
