"""A contest of two tiny networks on textbook crystals: schedules, going on, and the table."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from common.backend import SampleRequest
from common.config import RunConfig
from common.crystal.structure import Crystal
from common.data.store import write_records
from common.diffusion.training import BaseTrainer
from common.errors import UserError
from common.evaluate import contest
from common.evaluate.comparison import notes, paired_tests, to_markdown, write_comparison
from common.evaluate.contest import Machine, Plan, compare, contestants, make_plan, within_budget
from common.evaluate.rows import EvaluationRow
from common.speed import StepCost, sampling_flops
from tests.training import textbook_records, tiny_run
from torch_impl.generator import Generator

MACHINE = Machine("torch", "cpu", 1)
#: Six and three steps in half a minute.
COSTS = [StepCost(5.0, 2e9, 4), StepCost(10.0, 8e9, 2)]
REFERENCES = 6


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """A flow from precedents, and a score of four levels."""
    parquet = tmp_path / "textbook.parquet"
    write_records(textbook_records(), parquet)
    runs = {
        "flow": tiny_run(parquet, {"precedents": True}, {"steps": 2}),
        "score": tiny_run(parquet, {"properties": []}, {"kind": "score", "timesteps": 4}),
    }
    for name, run in runs.items():
        data = run.model_dump(mode="json") | {"name": name}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return [f"{tmp_path / name}.yaml" for name in runs]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other processes, and steps whose cost is known."""
    monkeypatch.setenv("UNI_MDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contest, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(contest, "measure_steps_apart", lambda *_: COSTS)


def hold(folder: Path, texts: list[str], seeds: int = 1) -> tuple[Plan, list[EvaluationRow]]:
    """The whole contest, or the rest of one."""
    plan = make_plan(folder, contestants(texts), 0.5, MACHINE, 1)
    return plan, compare(folder, plan, seeds, REFERENCES, {}, Console(quiet=True), 1)


def counted(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str, stop_at: int | None = None
) -> list[int]:
    """Grows with each call of a method; the one of a number is interrupted."""
    made: list[int] = []
    true: Callable[..., Any] = getattr(kind, name)

    def method(*arguments: Any, **options: Any) -> Any:
        if len(made) == stop_at:
            raise KeyboardInterrupt
        made.append(1)
        return true(*arguments, **options)

    monkeypatch.setattr(kind, name, method)
    return made


# Schedules


@pytest.mark.parametrize("steps", [1, 7, 500, 50_000])
def test_warm_up_and_decay_are_whole(steps: int) -> None:
    run = within_budget(RunConfig(name="x"), steps, seed=3)
    assert (run.train.steps, run.train.seed) == (steps, 3)
    assert run.train.warmup == max(1, min(300, steps // 10))
    assert steps / 20 <= run.train.checkpoint_every <= steps / 20 + 1


def test_steps_fill_the_minutes(texts: list[str], tmp_path: Path) -> None:
    plan = make_plan(tmp_path, contestants(texts), 0.5, MACHINE, 1)
    assert [run.train.steps for run in plan.runs(0)] == [6, 3]
    assert [run.train.steps for run in replace(plan, minutes=20).runs(0)] == [240, 120]
    assert [run.train.steps for run in replace(plan, minutes=1e-6).runs(0)] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("", "name=flow"), "one name"),
        (("train.init_from=a", ""), "flow starts from trained weights"),
        (("", "train.data=other.csv"), "score trains on other rows than flow"),
        (("model.depth=3", ""), "model.depth"),
    ],
)
def test_runs_that_cannot_be_compared(
    texts: list[str], settings: tuple[str, str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        contestants([f"{text} {more}" for text, more in zip(texts, settings, strict=True)])


@pytest.mark.parametrize("text", ["", "  ", "configs/x.yaml name='x"])
def test_texts_that_name_no_contestant(text: str) -> None:
    with pytest.raises(UserError, match="write CONFIG"):
        contestants([text])


@pytest.mark.parametrize("other", [{"minutes": 1.0}, {"machine": Machine("torch", "cpu", 2)}])
def test_another_comparison_in_the_folder(
    texts: list[str], tmp_path: Path, other: dict[str, Any]
) -> None:
    asked = {"minutes": 0.5, "machine": MACHINE, "timed": 1}
    plan = make_plan(tmp_path, contestants(texts), **asked)
    assert make_plan(tmp_path, contestants(texts), **asked) == plan
    with pytest.raises(UserError, match="another comparison"):
        make_plan(tmp_path, contestants(texts), **asked | other)
    with pytest.raises(UserError, match="another comparison"):
        make_plan(tmp_path, contestants(texts[::-1]), **asked)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        make_plan(tmp_path, contestants(texts), **asked)


# The whole contest


def test_contest(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = counted(monkeypatch, BaseTrainer, "train_step")
    plan, rows = hold(tmp_path / "contest", texts)
    controls = ["random draw", "nearest template", "precedent"]
    assert [row.run.name for row in rows] == ["flow", "score", *controls]
    assert len(steps) == 6 + 3
    records = textbook_records()[:REFERENCES]
    for row, run, cost, calls in zip(rows, plan.runs(0), COSTS, (2, 7), strict=False):
        spent = row.run.training
        assert spent is not None
        assert (spent.steps, spent.flops) == (run.train.steps, run.train.steps * cost.flops)
        assert row.run.network_calls == calls
        assert row.run.flops == sampling_flops(run.model, calls, records)
        assert row.run.full_seconds is not None
        assert 0 < row.run.full_seconds < row.run.wall_time
        assert [one.material_id for one in row.outcomes] == [one.material_id for one in records]
    # The precedents are the references themselves.
    assert rows[0].metrics.match_rate.hits == REFERENCES
    assert [row.run.given for row in rows[:2]] == [
        "true symmetry, band_gap, formation_energy (5 of 6 rows)",
        "true symmetry",
    ]
    table = write_comparison(tmp_path, plan, rows, "table")
    written = json.loads(table.with_suffix(".json").read_text())
    assert [row["run"]["name"] for row in written["rows"]] == [row.run.name for row in rows]
    assert len(written["paired_tests"]) == 10
    assert not any("outcomes" in row for row in written["rows"])
    cells = {
        line.split(" | ")[0].lstrip("| "): line.strip("| ").split(" | ")[1:]
        for line in table.read_text().splitlines()
        if line.startswith("|")
    }
    assert cells["network calls"] == ["2", "7", "0", "0", "0"]
    assert cells["training steps"] == ["6", "3", "-", "-", "-"]
    assert cells["training (TFLOP)"] == ["0.0", "0.0", "-", "-", "-"]
    assert cells["match"][0].startswith("100 (")
    for name in ("valid", "tight"):
        assert all(" to " in cell for cell in cells[name])
    assert {"cRMSE", "RMSE", "s / crystal", "free coordinates: 0", "prototype: not seen"} <= set(
        cells
    )
    assert {"flow against score", "flow against nearest template"} <= set(cells)


def test_a_killed_contest_goes_on(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = hold(tmp_path / "whole", texts)
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        counted(patch, BaseTrainer, "train_step", stop_at=6 + 2)
        with pytest.raises(KeyboardInterrupt):
            hold(folder, texts)
    with monkeypatch.context() as patch:
        again = counted(patch, BaseTrainer, "train_step")
        sampled = counted(patch, Generator, "sample", stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            hold(folder, texts)
        assert (len(again), len(sampled)) == (1, 2)  # a checkpoint after every step
    with monkeypatch.context() as patch:
        again = counted(patch, BaseTrainer, "train_step")
        rest = counted(patch, Generator, "sample")
        _, rows = hold(folder, texts)
        sizes = len(list(folder.rglob("samples/*.json")))
        assert (len(again), len(rest)) == (0, sizes - 2)
        assert hold(folder, texts)[1][:2] == rows[:2]
        assert len(rest) == sizes - 2
    assert [row.outcomes for row in rows] == [row.outcomes for row in whole]
    assert [row.run.checkpoint for row in rows] == [row.run.checkpoint for row in whole]


def test_seeds(texts: list[str], tmp_path: Path) -> None:
    """They train and sample differently, and meet only those of the same seed."""
    plan, rows = hold(tmp_path, texts, seeds=2)
    names = [row.run.name for row in rows]
    assert names[:4] == ["flow, seed 0", "score, seed 0", "flow, seed 1", "score, seed 1"]
    assert [row.run.seed for row in rows[:4]] == [0, 0, 1, 1]
    assert len({row.run.checkpoint for row in rows[:4]}) == 4
    tests = {(a.run.name, b.run.name) for a, b, _ in paired_tests(rows)}
    assert ("flow, seed 1", "score, seed 1") in tests
    assert ("flow, seed 0", "score, seed 1") not in tests
    assert len(tests) == 2 + 4 * 3 + 3
    (line,) = [line for line in to_markdown(plan, rows).splitlines() if line.startswith("| flow |")]
    values = [100 * (row.metrics.match_tight.value or 0) for row in (rows[0], rows[2])]
    assert f"{math.fsum(values) / 2:.4f} ({min(values):.4f} to {max(values):.4f})" in line


def test_a_slower_machine_is_told(texts: list[str], tmp_path: Path) -> None:
    plan, rows = hold(tmp_path, texts)
    cost = rows[0].run.training
    assert cost is not None

    def told(seconds: float) -> bool:
        run = replace(rows[0].run, training=replace(cost, seconds=seconds))
        return any("slower or faster" in note for note in notes(plan, [replace(rows[0], run=run)]))

    assert [told(seconds) for seconds in (20.0, 29.0, 32.0, 34.0)] == [True, False, False, True]


def test_other_requests_are_sampled_anew(tmp_path: Path) -> None:
    """Kept samples are those of a checkpoint, a seed, a number of calls and a request."""

    class Counting:
        properties: tuple[str, ...] = ()
        device = device_name = "none"
        config = tiny_run()
        sizes = Generator.sizes
        made = 0

        def call_sizes(self, count: int, shape: tuple[int, int]) -> list[int]:
            return [8]

        def sample(self, requests: Sequence[SampleRequest], *_: Any) -> list[Crystal]:
            self.made += 1
            return [textbook_records()[0].crystal] * len(requests)

    salt = SampleRequest(225, ((11, "a"), (17, "b")), key="salt")
    generator = Counting()
    asked: list[tuple[str, SampleRequest, int, int]] = [
        ("a", salt, 0, 5),
        ("b", salt, 0, 5),
        ("a", replace(salt, key="other"), 0, 5),
        ("a", replace(salt, properties={"band_gap": 1.0}), 0, 5),
        ("a", salt, 1, 5),
        ("a", salt, 0, 6),
    ]
    for number, (checkpoint, request, seed, calls) in enumerate(asked, start=1):
        for _ in range(2):
            kept = contest.KeptSamples(generator, tmp_path, checkpoint)  # type: ignore[arg-type]
            (crystal,) = kept.sample([request], seed, calls)
            assert crystal.to_dict() == textbook_records()[0].crystal.to_dict()
            assert kept.full_seconds == kept.seconds / 8 > 0
        assert generator.made == number
