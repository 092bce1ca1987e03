"""End to end: told only compositions, rank symmetries, sample a crystal for each, and compare.

All methods are asked for their symmetries first. What several of them propose for a reference is
sampled, read back and compared once: they share the network, and differ in their symmetries alone.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich.progress import Progress, track

from common.backend import Generator, SampleRequest
from common.crystal.structure import Crystal
from common.crystal.wyckoff import Sites, SymmetryKey
from common.data.store import Record
from common.evaluate.match import CandidateMatch
from common.evaluate.rows import EvaluationRow, Outcome
from common.evaluate.run import Emitted, Evaluation, Told, peak_memory, read_back_many, sample_all
from common.evaluate.symmetry_controls import TemplateControls
from common.prior import SymmetryCandidate
from common.ranking import PRIOR_NAME, Ranker

#: Crystals sampled at a time; what bounds memory.
_CHUNK = 8192


@dataclass(frozen=True)
class Method:
    """One way to rank symmetries, and what it said.

    Attributes:
        name: of the row.
        model: name and hash of what ranked.
        rankings: of every reference, at most as many as are wanted.
        seconds: for all of them.
        told: whether it was told the property, not only the network behind it.
    """

    name: str
    model: str
    rankings: tuple[tuple[SymmetryCandidate, ...], ...]
    seconds: float
    told: bool = True


@dataclass(frozen=True)
class Network:
    """What makes the crystals.

    Attributes:
        generator: the loaded checkpoint.
        name: of the checkpoint.
        checkpoint: its hash.
        steps: network calls per crystal.
        seed: of the noise.
    """

    generator: Generator
    name: str
    checkpoint: str
    steps: int
    seed: int


class CompositionEvaluation:
    """References of which composition and property are told.

    Args:
        evaluation: the references, and what is known of training.
        told: the property of each.
        top: symmetries of each.
    """

    def __init__(self, evaluation: Evaluation, told: Told, top: int) -> None:
        self._evaluation = evaluation
        self._told = told
        self._top = top
        self._counts = [record.crystal.formula_counts for record in evaluation.references]
        self._members: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(evaluation.references):
            self._members[record.reduced_formula].append(index)

    def ask(self, ranker: Ranker) -> list[Method]:
        """The rankings of the prior, or of a language model and the prior.

        The latter is two methods: asked for symmetries that no known polymorph has, which is what
        rows of another split are, and for any, which is what ``uni-mdm generate`` does.
        """
        rows = list(zip(self._counts, self._told.values, strict=True))
        start = time.perf_counter()
        with Progress() as bars:
            task = bars.add_task(f"{ranker.name}: ranking", total=len(rows))

            def report(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            if ranker.model is None:
                found = {"": ranker.rank(rows, self._top, report)}
            else:
                new, of_any = ranker.rank_both(rows, self._top, report)
                found = {"": new, ", as generate ranks": of_any}
        seconds = time.perf_counter() - start
        identity = ranker.identity
        model = f"{identity['name']} ({identity['hash']})"
        return [
            Method(f"{identity['name']}{kind}", model, tuple(map(tuple, rankings)), seconds)
            for kind, rankings in found.items()
        ]

    def controls(self, training: Sequence[Record], ranker: Ranker) -> list[Method]:
        """The prior with and without known polymorphs, and the nearest training composition.

        Args:
            training: rows in which the nearest are looked for.
            ranker: whose prior is asked; left out by itself if it is what ranks there.
        """
        prior = ranker.prior
        methods = [] if ranker.model is None else self.ask(Ranker(prior))
        excluded = partial(prior.rank_new, top=self._top)
        name = f"{PRIOR_NAME}, known polymorphs excluded"
        methods.append(self._control(name, f"{PRIOR_NAME} ({prior.hash})", excluded))
        shown = track(training, "Training templates", transient=True)
        templates = TemplateControls(shown)

        def nearest(
            counts: Mapping[int, int], _: Mapping[str, float]
        ) -> Sequence[SymmetryCandidate]:
            return prior.labelled(counts, templates.nearest(counts, self._top))

        rows = f"{len(training)} rows of training"
        methods.append(self._control("nearest composition", rows, nearest, told=False))
        return methods

    def _control(
        self,
        name: str,
        model: str,
        rank: Callable[[Mapping[int, int], Mapping[str, float]], Sequence[SymmetryCandidate]],
        told: bool = True,
    ) -> Method:
        start = time.perf_counter()
        rows = list(zip(self._counts, self._told.values, strict=True))
        rankings = [tuple(rank(*row)) for row in track(rows, f"{name}: ranking")]
        return Method(name, model, tuple(rankings), time.perf_counter() - start, told)

    def rows(self, methods: Sequence[Method], network: Network) -> list[EvaluationRow]:
        """Samples, compares, and gives the row of every method.

        Wall time is that of ranking and, for its share of the crystals, of sampling.
        """
        union = [_union(rankings) for rankings in zip(*(m.rankings for m in methods), strict=True)]
        start = time.perf_counter()
        crystals = self._sample(union, network)
        seconds = (time.perf_counter() - start) / max(len(crystals), 1)
        emitted = iter(read_back_many(crystals, self._evaluation.workers))
        groups = [[next(emitted) for _ in symmetries] for symmetries in union]
        matches = self._evaluation.match(groups)
        places = [{key: place for place, key in enumerate(symmetries)} for symmetries in union]
        judged = _Judged(self._evaluation, self._members, places, groups, matches)
        return [self._row(method, network, judged, seconds) for method in methods]

    def _sample(
        self, union: Sequence[Mapping[SymmetryKey, Sites]], network: Network
    ) -> list[Crystal]:
        requests = [
            SampleRequest(number, sites, properties, f"{record.material_id} {number} {sites}")
            for record, symmetries, properties in zip(
                self._evaluation.references, union, self._told.values, strict=True
            )
            for (number, _), sites in symmetries.items()
        ]
        chunks = (requests[begin : begin + _CHUNK] for begin in range(0, len(requests), _CHUNK))
        return [
            crystal
            for chunk in chunks
            for crystal in sample_all(network.generator, chunk, network.seed, network.steps)
        ]

    def _row(
        self, method: Method, network: Network, judged: "_Judged", seconds: float
    ) -> EvaluationRow:
        keys = [[candidate.key for candidate in ranking] for ranking in method.rankings]
        made = sum(map(len, keys))
        run = self._evaluation.info(
            method.name,
            self._top,
            self._told.describe("composition"),
            sampler=f"{network.name}, {network.steps} calls",
            wall_time=method.seconds + made * seconds,
            checkpoint=network.checkpoint,
            calls=network.steps,
            seed=network.seed,
            device=network.generator.device_name,
            peak_memory=peak_memory(),
            symmetry_model=method.model if method.told else f"{method.model}, no property",
        )
        return EvaluationRow(run, judged.outcomes(keys))


@dataclass(frozen=True)
class _Judged:
    """What became of all crystals.

    Attributes:
        evaluation: the references.
        members: of every composition.
        places: of a symmetry among a reference's crystals.
        groups: the crystals of every reference.
        matches: of these, then of its composition's other members' crystals.
    """

    evaluation: Evaluation
    members: Mapping[str, Sequence[int]]
    places: Sequence[Mapping[SymmetryKey, int]]
    groups: Sequence[Sequence[Emitted]]
    matches: Sequence[Sequence[CandidateMatch]]

    def outcomes(self, keys: Sequence[Sequence[SymmetryKey]]) -> tuple[Outcome, ...]:
        """Of a method that has proposed these symmetries."""
        return tuple(
            self.evaluation.outcome(
                record,
                [self.groups[index][place] for place in self._own(index, keys)],
                [self.matches[index][place] for place in self._own(index, keys)],
                self._pooled(index, keys, self.members[record.reduced_formula]),
            )
            for index, record in enumerate(self.evaluation.references)
        )

    def _own(self, index: int, keys: Sequence[Sequence[SymmetryKey]]) -> list[int]:
        return [self.places[index][key] for key in keys[index]]

    def _pooled(
        self, index: int, keys: Sequence[Sequence[SymmetryKey]], members: Sequence[int]
    ) -> list[CandidateMatch]:
        """What it has proposed for the other members, compared with this one."""
        found = []
        begin = len(self.groups[index])
        for other in members:
            if other != index:
                found += [self.matches[index][begin + p] for p in self._own(other, keys)]
                begin += len(self.groups[other])
        return found


def _union(rankings: Sequence[Sequence[SymmetryCandidate]]) -> dict[SymmetryKey, Sites]:
    """All symmetries of a reference, each with the sites of whoever proposed it first."""
    found: dict[SymmetryKey, Sites] = {}
    for ranking in rankings:
        for candidate in ranking:
            found.setdefault(candidate.key, candidate.sites)
    return found
