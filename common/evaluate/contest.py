"""Networks trained for the same time on the same rows, and measured on the same references.

A learning rate falls to its end within a known number of steps. So some steps of every contestant
are timed first, in turn, and those that fill the minutes make its schedule. The plan, the runs,
the samples and the rows of the table are files: a comparison that was killed goes on.
"""

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from common.backend import SampleRequest, load_backend
from common.checkpoint import FINAL, MANIFEST, Checkpoint, latest, load_checkpoint
from common.config import RunConfig, load_config
from common.crystal.structure import Crystal
from common.data.batch import bucket, symmetry_only
from common.data.locations import dataset
from common.diffusion.score import network_calls
from common.errors import UserError
from common.evaluate.rows import EvaluationRow, TrainingCost, read_rows, to_json
from common.evaluate.run import Evaluation, Told
from common.files import write_atomic
from common.machine import apart
from common.sampling import BaseGenerator
from common.speed import StepCost, measure_steps_apart, sampling_flops
from common.weights import MODEL_PREFIX

#: Of the steps, those of the warm-up at most, and those between two checkpoints.
WARMUP_SHARE, CHECKPOINT_SHARE = 10, 20


@dataclass(frozen=True)
class Machine:
    """What trains and samples: a backend, its device, and CPU threads for training."""

    backend: str
    device: str
    threads: int


@dataclass(frozen=True)
class Plan:
    """What a comparison was started with; nothing of it changes when it goes on.

    Attributes:
        minutes: of training that each contestant is given.
        machine: on which its steps were timed.
        configs: settings of the contestants, as they were given.
        costs: of their steps, in this order.
    """

    minutes: float
    machine: Machine
    configs: tuple[dict[str, Any], ...]
    costs: tuple[StepCost, ...]

    def runs(self, seed: int) -> list[RunConfig]:
        """The runs of all contestants, each with a schedule that ends with its minutes."""
        return [
            within_budget(RunConfig.model_validate(config), self.steps(cost), seed)
            for config, cost in zip(self.configs, self.costs, strict=True)
        ]

    def steps(self, cost: StepCost) -> int:
        """Steps of a contestant that fill the minutes."""
        return max(1, round(60 * self.minutes / cost.seconds))


def within_budget(run: RunConfig, steps: int, seed: int) -> RunConfig:
    """A run of so many steps: warm-up and decay are whole, and it can be killed at any time."""
    settings = {
        "steps": steps,
        "warmup": min(run.train.warmup, max(1, steps // WARMUP_SHARE)),
        "validation_every": steps,
        "checkpoint_every": -(-steps // CHECKPOINT_SHARE),
        "seed": seed,
    }
    return run.model_copy(update={"train": run.train.model_copy(update=settings)})


def contestants(texts: Sequence[str]) -> list[RunConfig]:
    """Runs from texts as ``configs/x.yaml model.layers=3 name=y``.

    Raises:
        UserError: for a setting that is wrong, and for runs that cannot be compared.
    """
    runs = [_contestant(text) for text in texts]
    if len({run.name for run in runs}) < len(runs):
        raise UserError("two contestants have one name: add name=ANOTHER to the settings of one")
    for run in runs:
        if run.train.init_from is not None:
            raise UserError(f"{run.name} starts from trained weights: add train.init_from=null")
        if run.train.data != runs[0].train.data:
            raise UserError(f"{run.name} trains on other rows than {runs[0].name}: same train.data")
    return runs


def _contestant(text: str) -> RunConfig:
    try:
        path, *settings = shlex.split(text)
    except ValueError as error:  # nothing, or a quotation mark that is alone
        raise UserError(f"contestant {text!r}: write CONFIG [KEY=VALUE ...]") from error
    return load_config(Path(path), tuple(settings))


def make_plan(
    folder: Path, runs: Sequence[RunConfig], minutes: float, machine: Machine, timed: int
) -> Plan:
    """The plan in a folder, or a new one, for which steps are timed.

    Args:
        folder: of the comparison.
        runs: the contestants.
        minutes: of training, each.
        machine: which trains them.
        timed: steps of each that are timed.

    Raises:
        UserError: if the folder's plan is another one, or cannot be read.
    """
    configs = tuple(run.model_dump(mode="json") for run in runs)
    path = folder / "plan.json"
    if path.exists():
        plan = _read_plan(path)
        if plan != replace(plan, minutes=minutes, machine=machine, configs=configs):
            raise UserError(f"{path} is of another comparison: give another --out")
        return plan
    costs = measure_steps_apart(machine.backend, list(runs), timed, machine.threads, machine.device)
    plan = Plan(minutes, machine, configs, tuple(costs))
    write_atomic(path, json.dumps(asdict(plan), indent=1) + "\n")
    return plan


def _read_plan(path: Path) -> Plan:
    try:
        return TypeAdapter(Plan).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} cannot be read: give another --out") from error


def train_within(folder: Path, run: RunConfig, machine: Machine) -> Path:
    """Trains a run to its end, in a process of its own; returns its finished checkpoint."""
    finished = folder / FINAL
    if not (finished / MANIFEST).is_file():
        apart(_train, folder, run, machine)
    return finished


def _train(folder: Path, run: RunConfig, machine: Machine) -> None:
    train = load_backend(machine.backend, machine.device).train
    resume = latest(folder) is not None
    train(run, folder, resume=resume, threads=machine.threads, device=machine.device)


class KeptSamples:
    """A generator whose crystals are kept in files, one for each padded size.

    Args:
        generator: the loaded checkpoint.
        folder: for the files.
        checkpoint: its hash.
    """

    def __init__(self, generator: BaseGenerator, folder: Path, checkpoint: str) -> None:
        self.properties = generator.properties
        self.device = generator.device
        self.device_name = generator.device_name
        self.seconds = 0.0
        """Of sampling, by whatever process."""
        self.full_seconds = 0.0
        """Of these, without the share of rows that only fill a call of the network."""
        self._generator = generator
        self._folder = folder
        self._checkpoint = checkpoint

    def sample(
        self,
        requests: Sequence[SampleRequest],
        seed: int,
        steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Crystal]:
        """See ``common.backend.Generator``."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._size(request), []).append(index)
        crystals: dict[int, Crystal] = {}
        for size, rows in sorted(groups.items()):
            seconds, made = self._part([requests[row] for row in rows], seed, steps)
            crystals.update(zip(rows, made, strict=True))
            self.seconds += seconds
            in_calls = sum(self._generator.call_sizes(len(rows), size))
            self.full_seconds += seconds * len(rows) / in_calls
            if progress is not None:
                progress(len(rows))
        return [crystals[index] for index in range(len(requests))]

    def _size(self, request: SampleRequest) -> tuple[int, int]:
        crystal = symmetry_only(request.space_group, request.sites)
        return bucket(crystal, self._generator.config.model.cell, self._generator.sizes)

    def _part(
        self, requests: list[SampleRequest], seed: int, steps: int | None
    ) -> tuple[float, list[Crystal]]:
        """Seconds and crystals of requests of one size."""
        asked = [self._checkpoint, seed, steps, [asdict(one) for one in requests]]
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
        path = self._folder / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            made = self._generator.sample(requests, seed, steps)
            seconds = time.perf_counter() - start
            found = {"seconds": seconds, "crystals": [crystal.to_dict() for crystal in made]}
            write_atomic(path, json.dumps(found) + "\n")
        found = json.loads(path.read_bytes())
        return found["seconds"], [Crystal.from_dict(crystal) for crystal in found["crystals"]]


def measure(
    folder: Path,
    name: str,
    evaluation: Evaluation,
    machine: Machine,
    flops: float,
    calls: int | None,
) -> EvaluationRow:
    """The row of a trained contestant, one sample per reference; the seed is its run's.

    Args:
        folder: of its run.
        name: of the row.
        evaluation: the references.
        machine: which samples.
        flops: of one of its training steps.
        calls: network calls per sample; the run's own number without it.
    """
    saved = load_checkpoint(folder / FINAL)
    run = RunConfig.model_validate(saved.config)
    calls = network_calls(run.diffusion, calls)
    path = folder / f"evaluation-{len(evaluation.references)}-{calls}.json"
    if path.exists():
        (row,) = read_rows(path)
        return replace(row, run=replace(row.run, name=name))
    backend = load_backend(machine.backend, machine.device)
    generator = backend.load(folder / FINAL, machine.device)
    kept = KeptSamples(generator, folder / "samples", saved.hash)
    row = evaluation.model(
        kept,
        name=name,
        checkpoint=saved.hash,
        k=1,
        seed=run.train.seed,
        steps=calls,
        device=kept.device_name,
        told=Told.of(evaluation.references, kept.properties, "true", run.train.seed),
    )
    spent = sampling_flops(run.model, calls, evaluation.references)
    info = replace(
        row.run,
        wall_time=kept.seconds,
        full_seconds=kept.full_seconds,
        peak_memory=None,  # of this process, which others have sampled in as well
        training=_training_cost(saved, run, flops),
        flops=spent,
    )
    row = replace(row, run=info)
    write_atomic(path, to_json([row]))
    return row


def _training_cost(saved: Checkpoint, run: RunConfig, flops: float) -> TrainingCost:
    """``flops`` are those of one step."""
    return TrainingCost(
        seconds=float(saved.manifest["extra"]["training_seconds"]),
        steps=run.train.steps,
        flops=flops * run.train.steps,
        parameters=sum(
            array.size for name, array in saved.model.items() if name.startswith(MODEL_PREFIX)
        ),
    )


def compare(
    folder: Path,
    plan: Plan,
    seeds: int,
    references: int,
    calls: dict[str, int],
    console: Console,
    workers: int | None = None,
) -> list[EvaluationRow]:
    """Trains what is not trained yet, measures what is not measured yet; controls come last.

    Args:
        folder: of the comparison.
        plan: of the same.
        seeds: runs of each contestant, of the seeds 0, 1, ...
        references: the first rows of the validation set.
        calls: network calls per sample by contestant, where not the run's own.
        console: is told what is done.
        workers: processes for matching; one per processor without it.
    """
    entries = [
        (
            run.name if seeds == 1 else f"{run.name}, seed {seed}",
            folder / run.name / f"seed_{seed}",
            run,
            cost,
        )
        for seed in range(seeds)
        for run, cost in zip(plan.runs(seed), plan.costs, strict=True)
    ]
    for name, place, run, _ in entries:
        console.print(f"{name}: {run.train.steps} steps", highlight=False)
        train_within(place, run, plan.machine)
    settings = entries[0][2].train
    evaluation = Evaluation(
        dataset(settings.validation)[:references],
        settings.validation,
        dataset(settings.data),
        settings.data,
        workers,
    )
    rows = []
    for name, place, run, cost in entries:
        console.print(f"{name}: {references} references", highlight=False)
        asked = calls.get(run.name)
        rows.append(measure(place, name, evaluation, plan.machine, cost.flops, asked))
    return rows + evaluation.controls(0)
