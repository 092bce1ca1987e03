"""Whose symmetries lead to which matches, with a network that knows the truth or draws blindly."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from common.backend import SampleRequest
from common.crystal.structure import Crystal, Site
from common.crystal.wyckoff import wyckoff_summary
from common.data.batch import symmetry_only
from common.data.store import Record
from common.evaluate.composition import CompositionEvaluation, Method, Network
from common.evaluate.controls import fit_standardizer, random_draw
from common.evaluate.rows import EvaluationRow
from common.evaluate.run import Evaluation, Told
from common.evaluate.statistics import Rate
from common.prior import SymmetryCandidate
from common.prior_fit import fit_prior
from common.ranking import Ranker

SALT = Crystal(225, (Site(19, "a"), Site(35, "b")), np.eye(3) * 6.6)
CHLORIDE = Crystal(221, (Site(19, "a"), Site(35, "b")), np.eye(3) * 3.95)
OXIDE = Crystal(225, (Site(12, "a"), Site(8, "b")), np.eye(3) * 4.21)
REFERENCES = [
    Record(name, crystal, crystal.to_structure(primitive=True), {"formation_energy": energy})
    for name, crystal, energy in (
        ("salt", SALT, -2.0),
        ("chloride", CHLORIDE, -1.9),
        ("oxide", OXIDE, -3.0),
    )
]
STANDARDIZER = fit_standardizer([SALT, CHLORIDE, OXIDE])


class Knowing:
    """Gives the true crystal where its symmetry is asked for, and a random one elsewhere."""

    properties = ("formation_energy",)
    device = device_name = "none"

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []

    def sample(
        self,
        requests: Sequence[SampleRequest],
        seed: int,
        steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Crystal]:
        self.requests += requests
        truth = {
            (c.space_group, frozenset(c.formula_counts.items())): c for c in (SALT, CHLORIDE, OXIDE)
        }
        made = []
        for request in requests:
            empty = symmetry_only(request.space_group, request.sites)
            key = request.space_group, frozenset(empty.formula_counts.items())
            (drawn,) = random_draw([empty], [request.key], STANDARDIZER, seed)
            made.append(truth.get(key, drawn))
        return made


def candidate(group: int, sites: str, z: int = 1) -> SymmetryCandidate:
    """``sites`` as "K a, Br b"."""
    numbers = {"K": 19, "Br": 35, "Mg": 12, "O": 8}
    pairs = tuple((numbers[s.split()[0]], s.split()[1]) for s in sites.split(", "))
    return SymmetryCandidate(group, pairs, z, 0.5, "template")


ROCK = candidate(225, "K a, Br b", 4)
ROCK_FROM_BROMINE = candidate(225, "K b, Br a", 4)
CESIUM = candidate(221, "K a, Br b")
BLENDE = candidate(216, "K a, Br c", 4)
MAGNESIA = candidate(225, "Mg a, O b", 4)


def evaluated(
    *methods: Method, top: int = 2, kind: str = "true"
) -> tuple[list[EvaluationRow], Knowing]:
    evaluation = Evaluation(REFERENCES, "textbook", REFERENCES, "textbook", workers=1)
    told = Told.of(REFERENCES, ("formation_energy",), kind, 0)  # type: ignore[arg-type]
    generator = Knowing()
    network = Network(generator, "knowing", "0123", 10, 5)
    rows = CompositionEvaluation(evaluation, told, top).rows(methods, network)
    return rows, generator


def method(name: str, *rankings: Sequence[SymmetryCandidate]) -> Method:
    return Method(name, f"{name} (hash)", tuple(map(tuple, rankings)), 1.0)


def test_matches_by_place_in_the_ranking() -> None:
    """Of the salt the second candidate is right, of the chloride none, of the oxide the first."""
    (row,), generator = evaluated(
        method("model", [CESIUM, ROCK], [ROCK_FROM_BROMINE, BLENDE], [MAGNESIA])
    )
    assert [o.best_rms(1) is not None for o in row.outcomes] == [False, False, True]
    assert row.metrics.match_at == {1: Rate(1, 3), 2: Rate(2, 3)}
    assert row.metrics.metre == Rate(3, 3), "the salt's first is the chloride"
    assert row.metrics.composition_exact == Rate(5, 5)
    assert len({request.key for request in generator.requests}) == len(generator.requests) == 5
    assert {(r.key.split()[0], r.properties["formation_energy"]) for r in generator.requests} == {
        ("salt", -2.0),
        ("chloride", -1.9),
        ("oxide", -3.0),
    }
    run = row.run
    assert (run.k, run.given, run.symmetry_model) == (
        2,
        "composition, formation_energy",
        "model (hash)",
    )
    assert (run.checkpoint, run.sampler, run.network_calls, run.seed) == (
        "0123",
        "knowing, 10 calls",
        10,
        5,
    )


def test_methods_share_crystals_but_not_candidates() -> None:
    """What one proposes is nobody else's, for the reference and for its composition."""
    first = method("first", [CESIUM, ROCK], [BLENDE], [MAGNESIA])
    second = method("second", [ROCK_FROM_BROMINE], [], [])
    (a, b), generator = evaluated(first, second)
    assert len(generator.requests) == 4, "rock salt of the first method is that of the second"
    assert a.metrics.match_at[2] == Rate(2, 3)
    assert a.metrics.metre == Rate(3, 3)
    assert b.metrics.match_at == {1: Rate(1, 3), 2: Rate(1, 3)}
    assert b.metrics.metre == Rate(1, 3)
    assert b.metrics.crmse == pytest.approx(1 / 3, abs=1e-3), "two of three count as 0.5"
    (alone,), _ = evaluated(second)
    assert alone.outcomes == b.outcomes


def test_property_may_be_hidden() -> None:
    (row,), generator = evaluated(method("model", [ROCK], [CESIUM], []), kind="null")
    assert all(request.properties == {} for request in generator.requests)
    assert row.run.given == "composition"


def test_prior_and_controls() -> None:
    """Each says at most so many, legal ones, and what it is."""
    prior = fit_prior(REFERENCES, {"name": "three"})
    evaluation = Evaluation(REFERENCES, "textbook", REFERENCES, "textbook", workers=1)
    told = Told.of(REFERENCES, ("formation_energy",), "true", 0)
    asked = CompositionEvaluation(evaluation, told, 3)
    methods = [*asked.ask(Ranker(prior)), *asked.controls(REFERENCES, Ranker(prior))]
    assert [m.name for m in methods] == [
        "template prior",
        "template prior, known polymorphs excluded",
        "nearest composition",
    ]
    for one in methods:
        assert [len(ranking) <= 3 for ranking in one.rankings] == [True] * 3
        for record, ranking in zip(REFERENCES, one.rankings, strict=True):
            for found in ranking:
                made = symmetry_only(found.space_group, found.sites).formula_counts
                assert made.keys() == record.crystal.formula_counts.keys()
    plain, excluded, nearest = methods
    own = wyckoff_summary(225).canonical(MAGNESIA.sites)
    groups = [
        [(c.space_group, wyckoff_summary(c.space_group).canonical(c.sites)) for c in m.rankings[2]]
        for m in (plain, excluded, nearest)
    ]
    assert (225, own) not in groups[1], "it is known"
    assert groups[2][0] == (225, own)
    (first, _, last), _ = evaluated(*methods, top=3)
    assert first.run.symmetry_model == f"template prior ({prior.hash})"
    assert last.run.symmetry_model == "3 rows of training, no property"
    assert last.metrics.match_at[3].hits == 3
    assert first.run.wall_time > 0
