"""Result rows whose figures are known, for the tests of evaluation."""

from dataclasses import replace

from common.evaluate.match import CandidateMatch
from common.evaluate.rows import EvaluationRow, Outcome, RunInfo
from common.evaluate.symmetry import SymmetryLabel

EXACT, HIGHER, LOST = SymmetryLabel.EXACT, SymmetryLabel.HIGHER, SymmetryLabel.LOST
MISS = CandidateMatch(None, None, valid=True)
FAILED = CandidateMatch(None, None, valid=False, failure="broken cell")


def hit(rms: float, tight: bool = True, valid: bool = True) -> CandidateMatch:
    return CandidateMatch(rms, rms if tight else None, valid)


def run(name: str = "model", k: int = 2, **changes: object) -> RunInfo:
    info = RunInfo(
        name=name,
        split="val",
        k=k,
        given="true symmetry",
        relaxed=False,
        training_set="mp_20/train",
        training_size=25505,
        checkpoint="0123abcd",
        sampler="few-step",
        network_calls=20,
        seed=1,
        wall_time=24.0,
        device="2 CPU cores",
        peak_memory=812.3,
    )
    return replace(info, **changes)  # type: ignore[arg-type]


def five() -> tuple[Outcome, ...]:
    """Two polymorphs of AB (m-1 found only by a candidate made for m-2), and three more."""
    return (
        Outcome(
            "m-1",
            "AB",
            0,
            (MISS, MISS),
            (hit(0.1), hit(0.4)),
            (EXACT, EXACT),
            (True, True),
            True,
            True,
        ),
        Outcome(
            "m-2",
            "AB",
            2,
            (hit(0.1), hit(0.4)),
            (MISS, MISS),
            (EXACT, HIGHER),
            (True, True),
            True,
            False,
        ),
        Outcome(
            "m-3",
            "CD",
            3,
            (hit(0.3, tight=False), hit(0.2)),
            (),
            (EXACT, EXACT),
            (True, True),
            False,
            False,
        ),
        Outcome(
            "m-4",
            "EF",
            8,
            (hit(0.02, valid=False), MISS),
            (),
            (EXACT, LOST),
            (True, False),
            False,
            False,
        ),
        Outcome(
            "m-5",
            "GH",
            9,
            (FAILED, hit(0.45, tight=False)),
            (),
            (EXACT, EXACT),
            (True, True),
            False,
            False,
        ),
    )


def control() -> EvaluationRow:
    """Misses everything but m-1, in another order."""
    outcomes = [replace(one, candidates=(MISS,), pooled=()) for one in reversed(five())]
    outcomes[-1] = replace(outcomes[-1], candidates=(hit(0.05),))
    info = run("random | draw", k=1, checkpoint=None, network_calls=0, peak_memory=None)
    return EvaluationRow(info, tuple(outcomes))
