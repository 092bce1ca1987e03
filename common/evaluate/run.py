"""An evaluation from data and checkpoint to result rows: the model, and the controls beside it."""

import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from pymatgen.core import Structure
from rich.progress import Progress, track

from common.backend import Generator, SampleRequest
from common.crystal.structure import Crystal
from common.data.store import Record
from common.errors import UserError
from common.evaluate.controls import fit_standardizer, random_draw
from common.evaluate.match import CandidateMatch, MatchItem, match_many, pool_by_composition
from common.evaluate.rows import EvaluationRow, Outcome, RunInfo
from common.evaluate.strata import TrainingIndex
from common.evaluate.symmetry import SymmetryLabel, composition_is_exact, symmetry_kept
from common.language.dataset import Reference, overlap
from common.machine import cpu_count, one_thread, worker_pool
from common.precedents import PrecedentIndex
from common.selection import choose_sample

PropertyKind = Literal["true", "shuffled", "null"]

#: Crystals per process below which none is started.
_CHUNK = 16


@dataclass(frozen=True)
class Emitted:
    """A crystal as a user gets it, read back from its CIF.

    Attributes:
        structure: None if the CIF cannot be read.
        symmetry: what became of the requested group.
        composition_exact: whether the cell holds the requested atoms.
    """

    structure: Structure | None
    symmetry: SymmetryLabel
    composition_exact: bool


def read_back(crystal: Crystal) -> Emitted:
    """Writes a crystal's CIF, reads it, and checks what was asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = Structure.from_str(crystal.to_cif(), fmt="cif")
    except ValueError:
        return Emitted(None, SymmetryLabel.LOST, False)
    return Emitted(
        structure,
        symmetry_kept(structure, crystal.space_group),
        composition_is_exact(structure, crystal.formula_counts),
    )


def read_back_many(crystals: Sequence[Crystal], workers: int | None = None) -> list[Emitted]:
    """``read_back`` of many crystals over all processors, in their order."""
    workers = min(workers or cpu_count(), 1 + len(crystals) // (4 * _CHUNK))
    show = partial(track, description="Reading CIFs", total=len(crystals))
    if workers <= 1:
        with one_thread():
            return list(show(map(read_back, crystals)))
    with worker_pool(workers) as pool:
        return list(show(pool.map(read_back, crystals, chunksize=_CHUNK)))


class Evaluation:
    """References, and what is known of the training set.

    Args:
        references: records with their original structures.
        split: their name.
        training: what the model and the controls learned from.
        training_name: its name.
        workers: processes for matching; one per processor without it.
    """

    def __init__(
        self,
        references: Sequence[Record],
        split: str,
        training: Sequence[Record],
        training_name: str,
        workers: int | None = None,
    ) -> None:
        self.references = list(references)
        self.split = split
        self.training = [record.crystal for record in training]
        self._names = [record.material_id for record in training]
        self.training_name = training_name
        self.workers = workers
        self._index = TrainingIndex.of(self.training)
        self._seen = overlap(self.references, Reference.of_records(training_name, training))

    def model(
        self,
        generator: Generator,
        *,
        name: str,
        checkpoint: str,
        k: int,
        seed: int,
        steps: int,
        device: str,
        told: "Told",
    ) -> EvaluationRow:
        """The row of a model that is told the true symmetry.

        With k > 1 the first candidate is the one that ``choose_sample`` picks.

        Args:
            generator: the loaded checkpoint.
            name: of the row.
            checkpoint: its hash.
            k: samples per reference.
            seed: of the noise.
            steps: network calls per sample.
            device: in words.
            told: the properties that the model is told.
        """
        requests = [
            SampleRequest.of(record.crystal, record.material_id, properties, sample)
            for record, properties in zip(self.references, told.values, strict=True)
            for sample in range(k)
        ]
        start = time.perf_counter()
        crystals = sample_all(generator, requests, seed, steps)
        groups = [crystals[i : i + k] for i in range(0, len(crystals), k)]
        with one_thread():
            ranked = [_ranked(group) for group in groups]
        run = self.info(
            name,
            k,
            told.describe("true symmetry"),
            checkpoint=checkpoint,
            sampler=f"{steps} calls",
            calls=steps,
            seed=seed,
            wall_time=time.perf_counter() - start,
            device=device,
            peak_memory=peak_memory(),
        )
        return self._row(run, ranked)

    def controls(self, seed: int) -> list[EvaluationRow]:
        """Random draw, nearest template and precedent, all told the true symmetry.

        The nearest template is the most similar training crystal of the same prototype, its
        elements replaced; the precedent likewise, or an isopointal one where there is none: what
        models start from. Where training has nothing of the kind, the draw stands in.
        """
        crystals = [record.crystal for record in self.references]
        keys = [record.material_id for record in self.references]
        standardizer = fit_standardizer(self.training)
        start = time.perf_counter()
        drawn = random_draw(crystals, keys, standardizer, seed)
        random_info = self.info(
            "random draw",
            1,
            "true symmetry",
            sampler="uniform",
            seed=seed,
            wall_time=time.perf_counter() - start,
        )
        rows = [self._row(random_info, [[crystal] for crystal in drawn])]
        index = PrecedentIndex.of_crystals(self.training, self._names, standardizer.element_volume)
        for name, isopointal in (("nearest template", False), ("precedent", True)):
            start = time.perf_counter()
            found = [index.find(crystal, isopointal=isopointal) for crystal in crystals]
            groups = [
                [known[0].crystal if known else other]
                for known, other in zip(found, drawn, strict=True)
            ]
            seconds = time.perf_counter() - start
            run = self.info(name, 1, "true symmetry", sampler="substitution", wall_time=seconds)
            rows.append(self._row(run, groups))
        return rows

    def info(
        self,
        name: str,
        k: int,
        given: str,
        *,
        sampler: str,
        wall_time: float,
        checkpoint: str | None = None,
        calls: int = 0,
        seed: int | None = None,
        device: str = "cpu",
        peak_memory: float | None = None,
        symmetry_model: str | None = None,
    ) -> RunInfo:
        """How a row on these references was made; see ``RunInfo``."""
        return RunInfo(
            name=name,
            split=self.split,
            k=k,
            given=given,
            relaxed=False,
            training_set=self.training_name,
            training_size=len(self.training),
            checkpoint=checkpoint,
            sampler=sampler,
            network_calls=calls,
            seed=seed,
            wall_time=wall_time,
            device=device,
            peak_memory=peak_memory,
            symmetry_model=symmetry_model,
            seen_ids=self._seen.ids,
            seen_symmetry=self._seen.symmetry,
        )

    def _row(self, run: RunInfo, candidates: Sequence[Sequence[Crystal]]) -> EvaluationRow:
        """Reads the CIFs back, matches them and collects the outcomes."""
        flat = [crystal for group in candidates for crystal in group]
        emitted = iter(read_back_many(flat, self.workers))
        groups = [[next(emitted) for _ in group] for group in candidates]
        rows = zip(self.references, groups, self.match(groups), strict=True)
        return EvaluationRow(
            run,
            tuple(
                self.outcome(record, group, found[: len(group)], found[len(group) :])
                for record, group, found in rows
            ),
        )

    def match(self, groups: Sequence[Sequence[Emitted]]) -> list[tuple[CandidateMatch, ...]]:
        """Compares candidates with their references.

        Args:
            groups: candidates of every reference.

        Returns:
            for every reference its own, and behind them those of the other references of its
            composition, in their order (METRe).
        """
        items = [
            MatchItem(tuple(one.structure for one in group), _structure(record))
            for record, group in zip(self.references, groups, strict=True)
        ]
        return match_many(pool_by_composition(items), self.workers)

    def outcome(
        self,
        record: Record,
        emitted: Sequence[Emitted],
        matches: Sequence[CandidateMatch],
        pooled: Sequence[CandidateMatch],
    ) -> Outcome:
        """What came of a reference: of its own candidates, and of its composition's others."""
        return Outcome(
            material_id=record.material_id,
            formula=record.reduced_formula,
            num_free_coords=record.crystal.num_free_coords,
            candidates=tuple(matches),
            pooled=tuple(pooled),
            symmetry=tuple(one.symmetry for one in emitted),
            composition_exact=tuple(one.composition_exact for one in emitted),
            seen_composition=self._index.has_composition(record.crystal),
            seen_prototype=self._index.has_prototype(record.crystal),
        )


@dataclass(frozen=True)
class Told:
    """What is told of the references' properties.

    Attributes:
        values: of every reference.
        kind: ``true``, ``shuffled`` (another reference's) or ``null`` (nothing).
        names: of the properties.
    """

    values: tuple[dict[str, float], ...]
    kind: PropertyKind
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, records: Sequence[Record], names: Sequence[str], kind: PropertyKind, seed: int
    ) -> "Told":
        """The properties of records.

        Args:
            records: in an order that the shuffling depends on.
            names: of the properties.
            kind: see above. Shuffled values are dealt among the rows that have one, none of which
                keeps its own.
            seed: of the shuffling.

        Raises:
            UserError: if there is but one value, which cannot be another reference's.
        """
        values: list[dict[str, float]] = [{} for _ in records]
        for name in names if kind != "null" else ():
            rows = [i for i, record in enumerate(records) if record.properties[name] is not None]
            if kind == "shuffled":
                if len(rows) == 1:
                    raise UserError(f"one row has a {name}: there is no other to shuffle it with")
                rows = np.random.default_rng(seed).permutation(rows).tolist()
            sources = rows[1:] + rows[:1] if kind == "shuffled" else rows
            for row, source in zip(rows, sources, strict=True):
                value = records[source].properties[name]
                assert value is not None
                values[row][name] = value
        return cls(tuple(values), kind, tuple(names))

    def describe(self, beside: str) -> str:
        """In words, behind what else is told; with a count where not all references have it."""
        prefix = "shuffled " if self.kind == "shuffled" else ""
        names = () if self.kind == "null" else self.names
        return ", ".join([beside, *(prefix + told_of(self.values, name) for name in names)])


def told_of(values: Sequence[Mapping[str, float]], name: str) -> str:
    """A property's name, with the number of rows that are told of it if it is not all of them."""
    count = sum(name in own for own in values)
    return name if count == len(values) else f"{name} ({count} of {len(values)} rows)"


def peak_memory() -> float:
    """Of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _structure(record: Record) -> Structure:
    """The structure as its source gave it."""
    return record.structure or record.crystal.to_structure(primitive=True)


def _ranked(samples: Sequence[Crystal]) -> list[Crystal]:
    if len(samples) == 1:
        return list(samples)
    first = choose_sample(samples).sample
    return [samples[first], *samples[:first], *samples[first + 1 :]]


def sample_all(
    generator: Generator, requests: Sequence[SampleRequest], seed: int, steps: int
) -> list[Crystal]:
    """Samples with a progress bar."""
    with Progress() as progress:
        task = progress.add_task("Sampling", total=len(requests))
        advance: Callable[[int], None] = partial(progress.advance, task)
        return generator.sample(requests, seed, steps, advance)
