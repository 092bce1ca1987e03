"""Training of GLM-4 as MindFormers has it, by MindFormers' own Trainer."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mindspore as ms
import numpy as np
import yaml
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.dataset import GeneratorDataset
from mindspore.train import Callback, RunContext
from numpy.typing import NDArray

from common.checkpoint import Checkpoint
from common.data.store import Record
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.language.examples import IGNORED, TokenBatch, fixed_shape
from common.language.mindformers import sections
from common.language.training import LanguageTrainer
from common.training import Shard, records_of, run_training
from common.weights import MOMENTS, WEIGHT_PREFIX, Arrays
from ms_impl.device import available_precision, say_unheeded, use_device
from ms_impl.distributed import joined, sum_values
from ms_impl.glm4 import (
    AnswerLoss,
    add_adapter,
    build,
    load_adapter,
    load_weights,
    prepare_mindformers,
    torch_arrays,
)
from ms_impl.mindformers_parts import register_parts

#: MindFormers' names of AdamW's moments, in the order of ``MOMENTS``.
_STATES = ("exp_avg", "exp_avg_sq")
_follow = ops.MultitypeFuncGraph("follow")


@_follow.register("Tensor", "Tensor", "Tensor")
def _follow_weight(new: Tensor, average: Tensor, weight: Tensor) -> Tensor:
    return ops.Assign()(average, average + new * (weight.astype(ms.float32) - average))


class Average(nn.Cell):
    """An exponential average of weights, in float32.

    Args:
        parameters: the weights.
    """

    def __init__(self, parameters: list[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(parameters)
        self.values = ParameterTuple(
            Parameter(Tensor(_numbers(p)), name=f"average.{p.name}", requires_grad=False)
            for p in parameters
        )

    def construct(self, new: Tensor) -> Any:
        """Moves by that share towards the weights."""
        return ops.HyperMap()(ops.Partial()(_follow, new), self.values, self.weights)


class Trainer(LanguageTrainer):
    """One training run with MindSpore; see ``common.language.training.LanguageTrainer``."""

    def __init__(
        self,
        config: LanguageRunConfig,
        train_records: list[Record],
        validation_records: list[Record],
        device: str = "cpu",
        shard: Shard = Shard(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(config, train_records, validation_records, shard)
        if not shard.rank:
            say_unheeded(config.train)
        if config.train.precision == "float16":
            raise UserError("train.precision float16: GLM-4 on MindSpore takes bfloat16 or float32")
        self.device = use_device(device)
        prepare_mindformers()
        self.settings = _trainer_settings(config, self.network_config, self.device, shard)
        model = self.model = _network(self.settings, self.network_config)
        load_weights(model, self.first_weights(), str(config.train.init_from))
        if config.lora is not None:
            add_adapter(model, config.lora.to_peft(config.train.init_from, self.base))
            load_adapter(model, self.first_additions(), "initial weights")
        self.parameters = model.trainable_params()
        self.average = Average(self.parameters)
        self.optimizer = _optimizer(self.settings, self.parameters)
        self.network = AnswerLoss(model)
        self.dropouts = [c for _, c in model.cells_and_names() if isinstance(c, nn.Dropout)]
        self.done: tuple[Tensor, ...] = ()

    # Steps

    def run(self, follow: Callable[[dict[str, float]], None]) -> None:
        """Trains to the end; MindFormers' Trainer makes the steps and calls back after each."""
        from mindformers import Trainer as MindFormersTrainer

        remaining = self.config.train.steps - self.step
        if not remaining:
            return
        batches = _Batches(self, remaining)
        data = GeneratorDataset(
            batches,
            ["input_ids", "labels", "share"],
            shuffle=False,
            num_parallel_workers=1,
            python_multiprocessing=False,
        )
        with ExitStack() as beginning:
            beginning.enter_context(redirect_stdout(StringIO()))  # all settings are printed
            trainer = MindFormersTrainer(
                args=self.settings,
                task="text_generation",
                model=self.model,
                train_dataset=data,
                optimizers=self.optimizer,
                callbacks=[_AfterStep(self, batches.waiting, follow, beginning)],
            )
            trainer.finetune()

    def update(self, data: TokenBatch, rate: float, decay: float) -> dict[str, float]:
        """What MindFormers' step, which is done, gave; moves the averages after it."""
        loss, _, _, _, norm = (float(value.asnumpy().reshape(-1)[0]) for value in self.done)
        if math.isfinite(norm):
            self.average(Tensor(1 - decay, ms.float32))
        (nats,) = self.summed([loss * _counted(data)])
        return {
            "loss": nats / data.answer_tokens,
            "answer": nats / data.answers,
            "gradient_norm": norm,
        }

    def loss(self, data: TokenBatch) -> Tensor:
        """Nats of this process's answers, summed, without dropout: MindFormers' step has its own.

        What a graph drops is decided when it is compiled, for each length anew.
        """
        for cell in self.dropouts:
            cell.set_train(False)
        try:
            return self.network(*_tensors(self.fixed(data)))
        finally:
            for cell in self.dropouts:
                cell.set_train(True)

    def losses(self, data: TokenBatch) -> float:
        """Of the current weights, without dropout."""
        return float(self.loss(data).asnumpy().reshape(-1)[0])

    def summed(self, values: list[float]) -> list[float]:
        """Sums over the processes, in float32."""
        if self.shard.count == 1:
            return values
        return sum_values(Tensor(values, ms.float32)).asnumpy().tolist()

    def fixed(self, data: TokenBatch) -> TokenBatch:
        """A batch padded to one of a few shapes, for a graph is compiled for each."""
        train = self.config.train
        rows, length = fixed_shape(
            data.tokens.shape[1],
            train.token_budget,
            self.config.model.positions,
            self.shard.count,
        )
        tokens = np.full((rows, length), self.tokenizer.pad_id, np.int64)
        targets = np.full((rows, length), IGNORED, np.int64)
        own = np.s_[: data.tokens.shape[0], : data.tokens.shape[1]]
        tokens[own], targets[own] = data.tokens, data.targets
        return TokenBatch(tokens, targets, data.answers, data.answer_tokens)

    # Weights

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has its averaged weights."""
        current = [_numbers(parameter) for parameter in self.parameters]
        _fill(self.parameters, [_numbers(value) for value in self.average.values])
        try:
            yield
        finally:
            _fill(self.parameters, current)

    def average_arrays(self) -> Arrays:
        """Averaged weights by name."""
        return self._named("", self.average.values)

    def optimizer_arrays(self) -> Arrays:
        """Current weights and AdamW's moments by prefixed name."""
        arrays = self._named(WEIGHT_PREFIX, self.parameters)
        for moment, state in zip(MOMENTS, _STATES, strict=True):
            arrays |= self._named(f"{moment}.", getattr(self.optimizer, state))
        return arrays

    def restore(self, saved: Checkpoint) -> None:
        """Takes weights, averages and moments from a checkpoint that has all of them."""
        assert saved.optimizer is not None
        assert saved.state is not None
        load = load_weights if self.config.lora is None else load_adapter
        for prefix, targets in (
            ("", self.average.values),
            *((f"{m}.", getattr(self.optimizer, s)) for m, s in zip(MOMENTS, _STATES, strict=True)),
            (WEIGHT_PREFIX, self.parameters),  # last, for the network itself is what is filled
        ):
            arrays = saved.optimizer if prefix else saved.model
            own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            load(self.model, own, str(saved.path))
            _fill(targets, [_numbers(parameter) for parameter in self.parameters])
        self.optimizer.global_step.set_data(Tensor([saved.state["step"]], ms.int32))

    def _named(self, prefix: str, values: Any) -> Arrays:
        """The values that belong to parameters, under the names of transformers and peft."""
        names = [parameter.name for parameter in self.parameters]
        own = {name: _numbers(value) for name, value in zip(names, values, strict=True)}
        return {prefix + name: array for name, array in torch_arrays(self.model, own).items()}


class _Batches:
    """This process's batches as MindSpore's data pipeline takes them, one after the other.

    Attributes:
        waiting: those that the pipeline has taken and no step has used, the oldest first.
    """

    def __init__(self, trainer: Trainer, count: int) -> None:
        self._trainer, self._count = trainer, count
        self._batches = trainer.batches()
        self.waiting: deque[TokenBatch] = deque()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[NDArray[Any], ...]:
        data = next(self._batches)
        self.waiting.append(data)
        share = _counted(data) * self._trainer.shard.count / data.answer_tokens
        fixed = self._trainer.fixed(data)
        narrow = fixed.tokens.astype(np.int32), fixed.targets.astype(np.int32)
        return *narrow, np.array([share], np.float32)


class _AfterStep(Callback):
    """Does what this project does after a step: averages, logs, validation, checkpoints."""

    def __init__(
        self,
        trainer: Trainer,
        waiting: deque[TokenBatch],
        follow: Callable[[dict[str, float]], None],
        beginning: ExitStack,
    ) -> None:
        super().__init__()
        self.trainer, self.waiting, self.follow = trainer, waiting, follow
        self.beginning = beginning
        self.start = 0.0

    def on_train_begin(self, run_context: RunContext) -> None:
        """Called by MindSpore's Model."""
        self.beginning.close()

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Called by MindSpore's Model."""
        self.start = time.perf_counter()

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Called by MindSpore's Model."""
        self.trainer.seconds += time.perf_counter() - self.start
        self.trainer.done = run_context.original_args().net_outputs[:5]
        self.follow(self.trainer.train_step(self.waiting.popleft()))


def _trainer_settings(
    config: LanguageRunConfig, network: dict[str, Any], device: str, shard: Shard
) -> Any:
    """MindFormers' own configuration of a run, and its context, which is set up by this."""
    from mindformers import MindFormerConfig
    from mindformers.core.context import build_context
    from mindformers.core.parallel_config import build_parallel_config

    register_parts()
    own = sections(config, network)
    own["model"]["model_config"]["compute_dtype"] = available_precision(
        config.train.precision, device
    )
    if device == "cpu":
        own["model"]["model_config"]["param_init_type"] = "float32"
    own["context"] = {**own["context"], "device_target": ms.get_context("device_target")}
    own["output_dir"] = os.environ["LOG_MF_PATH"]  # nothing that is needed comes there
    own["use_parallel"] = shard.count > 1
    # Checkpoints are this project's, and rows of the validation set are read by it.
    own["callbacks"] = [c for c in own["callbacks"] if c["type"] != "CheckpointMonitor"]
    del own["eval_dataset"]
    # By them the Trainer would pass inputs to the network, but one of them is the step's.
    del own["train_dataset"]["input_columns"]
    with TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")  # only a file's settings are completed by MindFormers
        path.write_text(yaml.safe_dump(own))
        settings = MindFormerConfig(str(path))
    build_context(settings)
    build_parallel_config(settings)
    return settings


def _network(settings: Any, network: dict[str, Any]) -> nn.Cell:
    """What a configuration of MindFormers says, without additions."""
    own = dict(settings.model.model_config)
    length = own.pop("seq_length")
    for name in ("type", "pet_config"):
        own.pop(name, None)
    return build(network, length, parallel_config=settings.parallel_config, **own)


def _optimizer(settings: Any, parameters: list[Parameter]) -> Any:
    """MindFormers' AdamW with the rate of its section ``lr_schedule``."""
    from mindformers.core import build_lr, build_optim

    rate = build_lr(settings.lr_schedule)
    return build_optim(
        settings.optimizer, default_args={"params": parameters, "learning_rate": rate}
    )


def _counted(data: TokenBatch) -> float:
    """Tokens of this process's answers."""
    return float((data.targets != IGNORED).sum())


def _tensors(data: TokenBatch) -> tuple[Tensor, Tensor]:
    return Tensor(data.tokens, ms.int32), Tensor(data.targets, ms.int32)


def _numbers(parameter: Parameter) -> NDArray[np.float32]:
    return parameter.astype(ms.float32).asnumpy().copy()


def _fill(parameters: Any, arrays: list[NDArray[np.float32]]) -> None:
    for parameter, array in zip(parameters, arrays, strict=True):
        parameter.set_data(Tensor(array, parameter.dtype))


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
        threads: CPU threads, which are left to MindSpore.
        device: ``auto``, ``cpu`` or ``ascend``.

    Raises:
        UserError: as ``ms_impl.train_dit.train`` does, or if MindFormers is missing.
    """
    device = use_device(device)
    with joined(device) as shard:
        run_training(Trainer(config, *records_of(config), device, shard), out, resume)
