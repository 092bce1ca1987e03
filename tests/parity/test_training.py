"""Training in both frameworks from the same state: single steps, and whole curves after a change.

The state moves as a checkpoint folder, written by one framework and resumed by the other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ckpt_convert.convert import convert
from common.checkpoint import save_step
from common.diffusion.training import BaseTrainer, TrainingBatch
from common.weights import MODEL_PREFIX, MOMENTS, WEIGHT_PREFIX
from ms_impl.optimizer import AdamW
from ms_impl.train_dit import Trainer as MindSporeTrainer
from tests.networks import fill_value
from tests.parity.twins import DisagreementError, compare, precision, torch_batch
from tests.training import alike_records, tiny_run
from torch_impl.diffusion import Loss, NoisyTensors, denoising_loss
from torch_impl.train_dit import Trainer as TorchTrainer

RECORDS = alike_records()
#: Steps that are compared number by number.
STEPS = 3
#: Steps before a run changes hands, and after.
BEFORE, AFTER = 20, 20
#: Between the curves of two frameworks, relative; 2e-7 was found, after 100 steps and 100 more too.
CURVE = 1e-4
#: Every gradient is clipped, and weights decay by more than rounding.
RUN = tiny_run(
    model={"layers": 1},
    batch_size=12,
    edge_budget=1024,
    learning_rate=1e-3,
    weight_decay=0.1,
    clip_norm=0.1,
    ema=0.6,
    warmup=4,
    steps=BEFORE + AFTER,
)
Results = dict[str, NDArray]
References = tuple[Results, Results]


class ExactTrainer(TorchTrainer):
    """torch's, whose batches and moments have the current precision as well."""

    def loss(self, data: TrainingBatch) -> Loss:
        batch = torch_batch(data.batch, self.standardizer, self.config.model.properties)
        single = vars(NoisyTensors.from_arrays(data.noisy, data.weights))
        dtype = self.parameters[0].dtype
        noisy = NoisyTensors(**{name: tensor.to(dtype) for name, tensor in single.items()})
        return denoising_loss(self.model, batch, noisy, self.config.diffusion)

    def restore(self, saved: Any) -> None:
        super().restore(saved)
        for state in self.optimizer.state.values():
            state |= {moment: state[moment].to(self.parameters[0].dtype) for moment in MOMENTS}


def losses(trainer: BaseTrainer, count: int) -> list[float]:
    """Of so many steps."""
    batches = trainer.batches()
    return [trainer.train_step(next(batches))["loss"] for _ in range(count)]


def after_steps(trainer: BaseTrainer, start: Path) -> Results:
    """Weights, moments and averages after some steps, and the losses of these steps."""
    trainer.resume(start)
    found = losses(trainer, STEPS)
    results = {f"average.{name}": array for name, array in trainer.average_arrays().items()}
    dtype = next(iter(results.values())).dtype
    return results | trainer.optimizer_arrays() | {"loss": np.array(found, dtype)}


@pytest.fixture(scope="module")
def torch_trainer() -> TorchTrainer:
    return TorchTrainer(RUN, RECORDS, RECORDS)


@pytest.fixture(scope="module")
def newborn(torch_trainer: TorchTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch's first weights: whatever trains asks for them first."""
    return save_step(tmp_path_factory.mktemp("newborn"), 0, **torch_trainer.checkpoint())


@pytest.fixture(scope="module")
def start(
    torch_trainer: TorchTrainer, newborn: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A state in which nothing is zero: filled weights and averages, moments of some gradients."""
    torch_trainer.resume(newborn)
    saved = torch_trainer.checkpoint()
    for name in torch_trainer.names:
        values = fill_value(name, saved["optimizer"][WEIGHT_PREFIX + name].shape)
        saved["optimizer"][WEIGHT_PREFIX + name] = values
        saved["model"][MODEL_PREFIX + name] = 0.9 * values
        for power, moment in enumerate(MOMENTS, start=1):
            gradient = 1e-3 * fill_value(moment + name, values.shape)
            saved["optimizer"][f"{moment}.{name}"] = gradient**power
    saved["state"]["step"] = 2
    return save_step(tmp_path_factory.mktemp("start"), 2, **saved)


@pytest.fixture(scope="module")
def references(torch_trainer: TorchTrainer, start: Path) -> References:
    """torch in float32 and in float64."""
    with precision(exact=True):
        exact = after_steps(ExactTrainer(RUN, RECORDS, RECORDS), start)
    assert {array.dtype for array in exact.values()} == {np.dtype(np.float64)}
    return after_steps(torch_trainer, start), exact


@pytest.fixture(scope="module")
def trainer() -> MindSporeTrainer:
    """Compiled once for all tests."""
    return MindSporeTrainer(RUN, RECORDS, RECORDS)


# Single steps


def test_steps(trainer: MindSporeTrainer, start: Path, references: References) -> None:
    compare(after_steps(trainer, start), *references)


Numbers = dict[str, float]


def without_clipping(numbers: Numbers) -> Numbers:
    return numbers | {"scale": 1.0}


def with_another_rate(numbers: Numbers) -> Numbers:
    return numbers | {"rate": 0.999 * numbers["rate"]}


def one_step_behind(numbers: Numbers) -> Numbers:
    """In the correction of the moments' bias."""
    return numbers | {"number": numbers["number"] - 1}


def with_another_average(numbers: Numbers) -> Numbers:
    return numbers | {"average_decay": 1.001 * numbers["average_decay"]}


@pytest.mark.parametrize(
    ("broken", "part"),
    [
        (without_clipping, "exp_avg."),
        (without_clipping, "exp_avg_sq."),
        (with_another_rate, "weight."),
        (one_step_behind, "weight."),
        (one_step_behind, "loss"),
        (with_another_average, "average."),
    ],
)
def test_broken_step_is_noticed(
    trainer: MindSporeTrainer,
    start: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[Numbers], Numbers],
    part: str,
) -> None:
    step = trainer.optimizer.step

    def broken_step(gradient: Any, *numbers: float) -> None:
        names = ("number", "rate", "average_decay", "scale")
        step(gradient, **broken(dict(zip(names, numbers, strict=True))))

    monkeypatch.setattr(trainer.optimizer, "step", broken_step)
    check_disagreement(trainer, start, references, part)


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ({"weight_decay": 0.0}, "weight."),
        ({"betas": (0.99, 0.9)}, "exp_avg."),
        ({"betas": (0.9, 0.999)}, "exp_avg_sq."),
        ({"eps": 1e-5}, "weight."),
    ],
    ids=str,
)
def test_broken_setting_is_noticed(
    trainer: MindSporeTrainer,
    start: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
    setting: dict[str, Any],
    part: str,
) -> None:
    own = {name: getattr(trainer.optimizer, name) for name in ("betas", "eps", "weight_decay")}
    parameters = [parameter for parameter in trainer.parameters if parameter.size]
    monkeypatch.setattr(trainer, "optimizer", AdamW(parameters, **(own | setting)))
    check_disagreement(trainer, start, references, part)


def check_disagreement(
    trainer: MindSporeTrainer, start: Path, references: References, part: str
) -> None:
    """Makes sure that numbers differ by more than rounding, in this part of the results."""
    found, single, exact = (
        {name: array for name, array in results.items() if name.startswith(part)}
        for results in (after_steps(trainer, start), *references)
    )
    with pytest.raises(DisagreementError, match=r"error .* over"):
        compare(found, single, exact)


# Curves

Saved = dict[str, Any]


def curve(trainer: BaseTrainer) -> list[float]:
    """The averaged weights' loss now, and those of the steps from now on."""
    return [trainer.validate()["loss"], *losses(trainer, AFTER)]


def change_hands(
    first: BaseTrainer,
    second: BaseTrainer,
    newborn: Path,
    folder: Path,
    spoil: Callable[[Saved], None] | None = None,
) -> float:
    """Largest relative difference of two curves: one goes on, the other framework takes over.

    On the way the checkpoint is converted to MindSpore's files and back.

    Args:
        first: begins the run and goes on.
        second: takes over.
        newborn: where the run begins.
        folder: for what is written.
        spoil: what happens to the checkpoint on its way.
    """
    first.resume(newborn)
    losses(first, BEFORE)
    saved = first.checkpoint()
    own = np.array(curve(first))
    if spoil is not None:
        spoil(saved)
    convert(save_step(folder / "run", BEFORE, **saved), folder / "there", "mindspore")
    convert(folder / "there", folder / "back", "torch")
    second.resume(folder / "back")
    assert second.step == BEFORE
    return float(np.abs(np.array(curve(second)) / own - 1).max())


def test_mindspore_goes_on_along_the_curve_of_torch(
    torch_trainer: TorchTrainer, trainer: MindSporeTrainer, newborn: Path, tmp_path: Path
) -> None:
    assert change_hands(torch_trainer, trainer, newborn, tmp_path) < CURVE


def test_torch_goes_on_along_the_curve_of_mindspore(
    torch_trainer: TorchTrainer, trainer: MindSporeTrainer, newborn: Path, tmp_path: Path
) -> None:
    assert change_hands(trainer, torch_trainer, newborn, tmp_path) < CURVE


def moment_lost(saved: Saved) -> None:
    for name, array in saved["optimizer"].items():
        if name.startswith("exp_avg."):
            array[:] = 0


def average_lost(saved: Saved) -> None:
    for name, array in saved["optimizer"].items():
        if name.startswith(WEIGHT_PREFIX):
            saved["model"][MODEL_PREFIX + name.removeprefix(WEIGHT_PREFIX)] = array


@pytest.mark.parametrize("spoil", [moment_lost, average_lost])
def test_lost_state_is_noticed(
    torch_trainer: TorchTrainer, newborn: Path, tmp_path: Path, spoil: Callable[[Saved], None]
) -> None:
    """Without MindSpore, whose rounding might be all that differs."""
    assert change_hands(torch_trainer, torch_trainer, newborn, tmp_path, spoil) > CURVE
