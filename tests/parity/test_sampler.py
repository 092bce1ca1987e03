"""Whole sampling trajectories in both frameworks, from the same noise, compared call by call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import mindspore as ms
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ms_impl.crystal_dit as ms_dit
import ms_impl.sampler as ms_sampler
import torch_impl.crystal_dit as torch_dit
import torch_impl.sampler as torch_sampler
from common.config import DiffusionConfig
from common.data.batch import Batch, collate
from common.diffusion.score import ScoreProcess
from tests.networks import fitted, noise_of, random_items, small
from tests.parity.twins import (
    FACTOR,
    FLOOR,
    DisagreementError,
    check_form,
    fill_mindspore,
    fill_torch,
    mindspore_batch,
    precision,
    torch_batch,
)

CONFIG = small(layers=1)
STEPS, LEVELS = 20, 11
FLOW = DiffusionConfig(velocity_boost=2.0)
SIGMA_MAX = 0.3
SCORE = DiffusionConfig(kind="score")
#: Every call moves a coordinate by more than this, and rounding moves none so far in all of them.
MOVED, ROUNDING = 1e-3, 1e-4
#: Free coordinates, lattice numbers and time shown to the network, one row per call, and the end.
Trajectory = list[tuple[NDArray, NDArray, NDArray]]


def calm(name: str, values: NDArray) -> NDArray:
    """Small outputs: large ones make sampling chaotic, and rounding would decide where it ends."""
    return 0.02 * values if "head" in name else values


@cache
def shown() -> tuple[Batch, NDArray, NDArray]:
    batch = collate(random_items(), "asymmetric")
    free, lattice, _ = noise_of(batch)
    return batch, free, lattice


def normal(field_name: str, level: int) -> NDArray[np.float32]:
    """Noise of a level, in which all fields differ."""
    _, free, lattice = shown()
    seed = [level, *field_name.encode()]
    shape = lattice.shape if field_name == "lattice" else free.shape
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@cache
def torch_trajectory(kind: str, exact: bool) -> Trajectory:
    with precision(exact) as dtype, torch.no_grad():
        model = torch_dit.CrystalDiT(CONFIG)
        fill_torch(model, calm)
        batch, *noise = shown()
        path: Trajectory = []

        def network(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            path.append(tuple(a.numpy().copy() for a in arguments[1:]))
            return model(*arguments)

        def draw(name: str, level: int) -> torch.Tensor:
            return torch.from_numpy(normal(name, level)).to(dtype)

        tensors = torch_batch(batch, fitted(random_items()), CONFIG.properties)
        start = [torch.from_numpy(array).to(dtype) for array in noise]
        if kind == "flow":
            end = torch_sampler.sample_flow(network, tensors, *start, STEPS, FLOW)
        else:
            process = ScoreProcess.of(LEVELS, 0.05, SIGMA_MAX)
            end = torch_sampler.sample_predictor_corrector(
                network, tensors, *start, process, SCORE, draw
            )
    return [*path, (*(tensor.numpy() for tensor in end), path[0][2])]


@cache
def ms_model() -> ms_dit.CrystalDiT:
    model = ms_dit.CrystalDiT(CONFIG)
    fill_mindspore(model, calm)
    return model


@dataclass(frozen=True)
class Run:
    """How MindSpore samples; every field can be broken.

    ``answer`` turns the network's velocities, at the call of that number, into those it is said
    to have given.
    """

    flow: DiffusionConfig = FLOW
    score: DiffusionConfig = SCORE
    sigma_min: float = 0.05
    fields: dict[str, str] = field(default_factory=dict)
    answer: Callable[[int, NDArray, NDArray], tuple[NDArray, NDArray]] | None = None


def ms_trajectory(kind: str, run: Run) -> Trajectory:
    batch, *noise = shown()
    path: Trajectory = []

    def network(*arguments: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        path.append(tuple(a.asnumpy() for a in arguments[1:]))
        found = ms_model()(*arguments)
        if run.answer is None:
            return found
        changed = run.answer(len(path), *(tensor.asnumpy() for tensor in found))
        return tuple(ms.Tensor(np.ascontiguousarray(array)) for array in changed)

    def draw(name: str, level: int) -> ms.Tensor:
        return ms.Tensor(normal(run.fields.get(name, name), level))

    tensors = mindspore_batch(batch, fitted(random_items()), CONFIG.properties)
    start = [ms.Tensor(array) for array in noise]
    if kind == "flow":
        end = ms_sampler.sample_flow(network, tensors, *start, STEPS, run.flow)
    else:
        process = ScoreProcess.of(LEVELS, run.sigma_min, SIGMA_MAX)
        end = ms_sampler.sample_predictor_corrector(
            network, tensors, *start, process, run.score, draw
        )
    return [*path, (*(tensor.asnumpy() for tensor in end), path[0][2])]


def compare(found: Trajectory, single: Trajectory, exact: Trajectory) -> None:
    """Holds MindSpore against torch at every call; the limit follows torch's own error so far."""
    if len(found) != len(exact):
        raise DisagreementError(f"{len(found) - 1} calls, not {len(exact) - 1}")
    own = dict.fromkeys(("free", "lattice", "t"), 0.0)
    for call, states in enumerate(zip(found, single, exact, strict=True)):
        for name, mine, theirs, reference in zip(own, *states, strict=True):
            check_form(f"call {call}, {name}", mine, theirs)
            own[name] = max(own[name], distance(name, theirs, reference))
            limit = FACTOR * max(own[name], FLOOR * float(np.abs(reference).max()))
            error = distance(name, mine, reference)
            if error > limit:
                raise DisagreementError(f"call {call}, {name}: {error:.1e} over {limit:.1e}")


def distance(name: str, values: NDArray, reference: NDArray) -> float:
    """Largest difference; of coordinates, the short way round the torus."""
    difference = values - reference
    if name == "free":
        difference -= np.round(difference)
    return float(np.abs(difference).max())


@pytest.mark.parametrize("kind", ["flow", "score"])
def test_trajectory(kind: str) -> None:
    exact = torch_trajectory(kind, exact=True)
    single = torch_trajectory(kind, exact=False)
    assert len(exact) - 1 == {"flow": STEPS, "score": 2 * LEVELS - 1}[kind]
    compare(ms_trajectory(kind, Run()), single, exact)
    moved = [distance("free", a[0], b[0]) for a, b in pairwise(exact)]
    assert min(moved) > MOVED, "nothing is compared where nothing moves"
    assert distance("free", single[-1][0], exact[-1][0]) < ROUNDING
    assert distance("lattice", single[-1][1], exact[-1][1]) < ROUNDING


def once(values: NDArray, call: int) -> NDArray:
    return values[..., ::-1] if call == STEPS // 2 else values


def missing(values: NDArray, call: int) -> NDArray:
    return np.full_like(values, np.nan) if call == STEPS // 2 else values


BREAKS = {
    "flow": {
        "no boost": Run(flow=DiffusionConfig()),
        "axes swapped once": Run(answer=lambda call, free, lattice: (once(free, call), lattice)),
        "lattice swapped once": Run(answer=lambda call, free, lattice: (free, once(lattice, call))),
        "not finite once": Run(answer=lambda call, free, lattice: (missing(free, call), lattice)),
    },
    "score": {
        "noise of the other step": Run(fields={"corrector": "predictor", "predictor": "corrector"}),
        "other Langevin step": Run(score=SCORE.model_copy(update={"step_lr": 1.1e-5})),
        "other levels": Run(sigma_min=0.06),
        "lattice swapped once": Run(answer=lambda call, free, lattice: (free, once(lattice, call))),
    },
}


@pytest.mark.parametrize(
    ("kind", "broken"), [(kind, name) for kind, runs in BREAKS.items() for name in runs]
)
def test_broken_trajectory_is_noticed(kind: str, broken: str) -> None:
    found = ms_trajectory(kind, BREAKS[kind][broken])
    with pytest.raises(DisagreementError):
        compare(found, torch_trajectory(kind, exact=False), torch_trajectory(kind, exact=True))
