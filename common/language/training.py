"""Training of a language model as far as it needs no gradient."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import ADAPTER, Checkpoint, latest, load_checkpoint
from common.data.store import Record, lacking_lines
from common.errors import UserError
from common.language.analogues import AnalogueIndex
from common.language.config import LanguageRunConfig
from common.language.examples import Examples, Int, TokenBatch, Told, rows_asked
from common.language.foreign import (
    FolderWeights,
    check_base,
    is_foreign,
    network_config,
    read_json,
    refuse_adapter,
)
from common.language.initial import initial_weights
from common.language.mindformers import check_stated
from common.language.parameters import lora_parameters, parameters
from common.language.tokenizer import SymmetryTokenizer, compact_tokenizer, load_tokenizer
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
        start_path: their folder.
    """

    config: LanguageRunConfig

    def __init__(
        self,
        config: LanguageRunConfig,
        train_records: list[Record],
        validation_records: list[Record],
        shard: Shard,
    ) -> None:
        settings = config.train
        if not train_records:
            raise UserError(f"{settings.data}: no crystal to train on")
        asked = _rows_asked(settings.data, train_records, settings.questions)
        super().__init__(config, train_records, len(asked), shard)
        self.remarks += lacking_lines(
            settings.data,
            train_records,
            [name for name in settings.questions if name != "none"],
            "left out of questions about it",
        )
        self.base: str | None = None
        self.start: Mapping[str, Any] | None = None
        self.start_path: Path | None = None
        if self.start_folder is not None:
            self._begin_with(self.start_folder)
        self.tokenizer, self.network_config = network_of(config, self.start_folder)
        if not validation_records:
            raise UserError(f"{settings.validation}: no crystal to watch")
        watched = validation_records[: settings.validation_rows]
        watched = _rows_asked(settings.validation, watched, settings.questions)
        self.data = self._examples(asked, settings.rehearsals)
        self.validation = self._examples(watched, 0)
        for name, rows, data in (
            (settings.data, asked, self.data),
            (settings.validation, watched, self.validation),
        ):
            row, tokens = data.longest
            if tokens > config.model.positions:
                raise UserError(
                    f"{name}: question and answer of {rows[row].material_id} take {tokens} tokens, "
                    f"but model.positions is {config.model.positions}: give as many, or leave the "
                    "row out"
                )

    def _begin_with(self, folder: Path) -> None:
        """Takes weights."""
        if is_foreign(folder):
            weights = FolderWeights(folder)
            self.base, self.start, self.start_path = weights.name, weights, folder
            return
        refuse_adapter(folder)
        saved = load_checkpoint(folder)
        self.base, self.start, self.start_path = saved.hash, saved.model, saved.path

    def _check(self, saved: Checkpoint, folder: Path) -> None:
        """An adapter of another base does not fit."""
        if self.config.lora is not None:
            assert self.start_path is not None
            content = read_json(saved.path / "adapter_config.json")
            known = None if isinstance(self.start, FolderWeights) else self.base
            check_base(folder, content, self.start_path, known=known, advice=self.advice)

    def _examples(self, records: list[Record], rehearsals: int) -> Examples:
        settings = self.config.train
        return Examples(
            records,
            self.tokenizer,
            settings.questions,
            settings.token_budget,
            AnalogueIndex.shipped(settings.analogues) if settings.analogues else None,
            rehearsals,
            self.config.model.positions,
        )

    def dropout_seed(self) -> int:
        """What the current step's masks come from: 31 bits, others in every step and process.

        With torch. MindFormers' masks come from MindSpore's own generator, which knows no step, so
        that a run with dropout is not repeated to the byte there.
        """
        settings = self.config.train
        state = f"dropout {settings.seed} {self.step} {self.shard.rank}"
        return int.from_bytes(sha256(state.encode()).digest()[:4], "little") >> 1

    def first_weights(self) -> Mapping[str, Any]:
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
        """Nats of the answers of this process's share, summed.

        With the current weights, and without dropout.
        """

    @abstractmethod
    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network has its averaged weights."""

    def batches(self) -> Iterator[TokenBatch]:
        """The training batches from the current step on."""
        train = self.config.train
        for batch in self.data.batches(train.seed, self.step, train.analogue_dropout):
            yield self.prepare(self.data, *batch)

    def prepare(self, data: Examples, rows: Int, forms: Int, told: Told = None) -> TokenBatch:
        """This process's share of a batch."""
        return data.collate(rows, forms, *self.shard.rows(len(rows)), told)

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

    @property
    def description(self) -> str:
        """See ``TrainingRun``."""
        lora = self.config.lora
        kind = f"LoRA of rank {lora.rank} on a symmetry" if lora else "Symmetry"
        return f"{kind} language model: names space groups and Wyckoff sites."

    @property
    def origin(self) -> str:
        """See ``TrainingRun``."""
        return self.base or ""

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


def network_of(
    run: LanguageRunConfig, folder: Path | None
) -> tuple[SymmetryTokenizer, dict[str, Any]]:
    """A run's tokenizer, and content of its network's config.json.

    Of a folder of transformers both are its own, otherwise those of this version.

    Args:
        run: the run.
        folder: what it starts from, if it does not start at random.

    Raises:
        UserError: if the network is another one than the run's, or if a checkpoint was trained
            with other tokens.
    """
    if folder is not None and is_foreign(folder):
        tokenizer = load_tokenizer(folder)
        network = network_config(folder, run.model) | {"pad_token_id": tokenizer.pad_id}
    else:
        tokenizer = compact_tokenizer()
        network = run.model.to_huggingface(tokenizer)
        tokens = folder and (latest(folder) or folder) / "tokenizer.json"
        if tokens and tokens.is_file() and tokens.read_text() != tokenizer.files()[tokens.name]:
            raise UserError(
                f"{folder}: was trained with other tokens than this version's; train it anew"
            )
    check_stated(run, network, str(folder or "this version's network"))
    return tokenizer, network


def _rows_asked(where: str, records: list[Record], questions: Sequence[str]) -> list[Record]:
    """Those that can be asked something.

    Raises:
        UserError: if there are none.
    """
    asked = rows_asked(records, questions)
    if not asked:
        names = " or ".join(questions)
        raise UserError(f"{where}: no row has a {names}; change train.questions or the data")
    return asked
