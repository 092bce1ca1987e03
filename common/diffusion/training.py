"""Training of the Crystal DiT as far as it needs no gradient: rows, noise, statistics.

A backend's ``Trainer`` adds the network, the optimiser and the moving of arrays.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.checkpoint import Checkpoint, load_checkpoint
from common.config import RunConfig, parse_config
from common.data.batch import Batch, BatchItem, collate
from common.data.loader import BatchPlan, Bucket, BucketedData
from common.data.store import Record, fingerprint, lacking_lines
from common.diffusion.draws import TrainingDraws
from common.diffusion.flow import error_units, make_path, starting_points
from common.diffusion.noisy import LossWeights, NoisyCrystals
from common.diffusion.scaler import Standardizer
from common.diffusion.score import score_process
from common.errors import UserError
from common.precedents import PrecedentIndex, former_rows, precedents_file, training_items, unlike
from common.properties import TARGETS
from common.training import Shard, TrainingRun, records_of
from common.weights import MODEL_PREFIX, STANDARDIZER_PREFIX, Arrays, statistics

#: Atoms in the primitive cell, at most; larger crystals are left out of training.
MAX_ATOMS = 52
NOISE_BINS = 5


@dataclass(frozen=True)
class TrainingBatch:
    """What one process works on in one step."""

    batch: Batch
    noisy: NoisyCrystals
    weights: LossWeights

    def shares(self, count: int) -> list["TrainingBatch"]:
        """Its crystals in as many parts of nearly equal size, or in fewer if they are fewer.

        Losses and gradients of the parts add up to those of the whole.
        """
        size = self.batch.size
        bounds = np.linspace(0, size, min(count, size) + 1).astype(int).tolist()
        shares = []
        for rows in starmap(slice, pairwise(bounds)):
            noisy = {name: array[rows] for name, array in vars(self.noisy).items()}
            weights = {name: array[rows] for name, array in vars(self.weights).items()}
            shares.append(
                TrainingBatch(self.batch.take(rows), NoisyCrystals(**noisy), LossWeights(**weights))
            )
        return shares


@dataclass(frozen=True)
class LossValues:
    """The loss of one batch, in numbers; ``per_crystal`` [B] is the coordinates' mean square."""

    total: float
    coordinate: float
    lattice: float
    per_crystal: NDArray[np.float32]


@dataclass(frozen=True)
class _Sources:
    """Crystals to start from, and what names them."""

    index: PrecedentIndex
    fingerprint: str


class BaseTrainer(TrainingRun[TrainingBatch]):
    """One training run of the Crystal DiT.

    Args:
        config: of the run.
        train_records: what to learn from.
        validation_records: whose loss is watched.
        shard: this process's share of every batch.

    Attributes:
        start: the checkpoint whose weights it starts from, if any.
        standardizer: statistics of the training rows, or where those of the start differ, these,
            for its weights were learned with them.
    """

    config: RunConfig

    def __init__(
        self,
        config: RunConfig,
        train_records: list[Record],
        validation_records: list[Record],
        shard: Shard,
    ) -> None:
        settings = config.train
        known = small_enough(train_records)
        if not known:
            raise UserError(f"{settings.data}: no crystal of at most {MAX_ATOMS} atoms to train on")
        super().__init__(config, train_records, len(known), shard)
        self.remarks += lacking_lines(
            settings.data, known, config.model.properties, "learned without it"
        )
        self.start = load_checkpoint(self.start_folder) if self.start_folder else None
        self.standardizer = self._statistics(known)
        watched = small_enough(validation_records[: settings.validation_rows])
        if not watched:
            what = f"no crystal of at most {MAX_ATOMS} atoms to watch"
            raise UserError(f"{settings.validation}: {what}")
        self._companions: dict[str, bytes] = {}
        sources = shown = None
        if config.model.precedents:
            former = self._former(train_records)
            sources = self._sources(train_records, former)
            self._companions = precedents_file(
                [*train_records, *former], sources.fingerprint, self.fingerprint
            )
            # What a row is watched with is not to be the row itself, under another name.
            others = unlike(watched, former)
            shown = self._sources(train_records, others) if len(others) < len(former) else sources
        self.data = self._bucketed(known, sources, settings.precedents)
        self.validation = self._bucketed(watched, shown, 1)
        batches = [group.batch for group in self.validation.buckets]
        self._watched = LossWeights.of_crystals((b.free_mask, b.k_mask) for b in batches)
        self.score_process = score_process(config.diffusion)

    def _statistics(self, known: list[Record]) -> Standardizer:
        """Of the rows, or what the weights that it starts from are used to, if that is another."""
        own = Standardizer.fit(collate(batch_items(known), "asymmetric"))
        if self.start is None:
            return own
        learned = parse_config(self.start.config, str(self.start.path)).model.properties
        former = own.of_former(statistics(self.start.model, self.start.path), learned)
        return own if own.agrees(former) else former

    def _former(self, records: list[Record]) -> list[Record]:
        """What the weights that it starts from start their samples from, beside some rows."""
        if self.start is None:
            return []
        return unlike(records, former_rows(self.start.path, self.start.fingerprint))

    def _sources(self, records: list[Record], former: list[Record]) -> "_Sources":
        rows = [*records, *former]
        index = PrecedentIndex.of_crystals(
            [record.crystal for record in rows],
            [record.material_id for record in rows],
            self.standardizer.element_volume,
        )
        return _Sources(index, fingerprint(rows) if former else self.fingerprint)

    @property
    def description(self) -> str:
        """See ``TrainingRun``."""
        told = [f"{name} ({TARGETS[name][0]})" for name in self.config.model.properties]
        given = ", ".join(["space group", "Wyckoff sites", *told])
        return f"Crystal DiT: samples free coordinates and lattices, told {given}."

    @property
    def origin(self) -> str:
        """See ``TrainingRun``."""
        return self.start.hash if self.start else ""

    def _check(self, saved: Checkpoint, folder: Path) -> None:
        """Steps made with other statistics, as ``init_from`` had them then, do not fit."""
        if not self.standardizer.agrees(statistics(saved.model, folder)):
            start = self.config.train.init_from
            raise UserError(
                f"{folder}: made with other scales of lattices and properties than "
                f"{start or 'the rows'} gives now; {self.advice}"
            )

    def _bucketed(
        self, records: list[Record], sources: "_Sources | None", precedents: int
    ) -> BucketedData:
        settings = self.config.train
        items = batch_items(records)
        if sources is not None:
            items = training_items(records, sources.index, sources.fingerprint, precedents)
        return BucketedData(
            items, self.config.model.cell, settings.batch_size, settings.edge_budget
        )

    def companions(self) -> dict[str, bytes]:
        """The precedents, if there are any that are not in the shipped table."""
        return self._companions

    # What a framework adds

    @abstractmethod
    def losses(self, data: TrainingBatch) -> LossValues:
        """Of the current weights."""

    @abstractmethod
    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network has its averaged weights."""

    # Data

    def batches(self) -> Iterator[TrainingBatch]:
        """The training batches from the current step on."""
        step = self.step
        for plan in self.data.batches(self.config.train.seed, step):
            yield self.prepare(plan, step)
            step += 1

    def prepare(self, plan: BatchPlan, step: int) -> TrainingBatch:
        """This process's share of a training batch, with the noise of a step."""
        settings = self.config.train
        group = self.data.buckets[plan.bucket]
        share, real = self.shard.rows(len(plan.rows))
        rows = plan.rows[share]
        draws = self._draws("train", step, group, len(plan.rows)).take(share)
        masks = group.batch.free_mask[plan.rows], group.batch.k_mask[plan.rows]
        batch = group.batch.take(rows)
        if settings.descriptions == "random":
            anew = group.descriptions.anew(rows, draws.origins[:, 0], draws.first_atoms)
            known = batch.precedent_mask[:, None, None]
            batch = batch.replace(
                free_params=np.where(known, anew[0], batch.free_params),
                precedent_params=np.where(known, anew[1], batch.precedent_params),
            )
        keep = draws.keep_property >= settings.property_dropout
        keep_precedent = draws.keep_precedent >= settings.precedent_dropout
        batch = batch.replace(
            property_mask=batch.property_mask & keep[:, None],
            precedent_mask=batch.precedent_mask & keep_precedent,
        )
        weights = LossWeights.of(*masks).take(share, real)
        return self._noisy(group, batch, rows, draws, weights)

    def prepare_validation(self, plan: BatchPlan) -> TrainingBatch:
        """This process's share of a validation batch.

        A row has its noise and its weight whatever else is in the batch; repeats weigh nothing.
        """
        group = self.validation.buckets[plan.bucket]
        share, real = self.shard.rows(len(plan.rows))
        rows = plan.rows[share]
        draws = self._draws("validation", plan.bucket, group, group.batch.size).take(rows)
        weights = self._watched[plan.bucket].take(rows, real & plan.first[share])
        return self._noisy(group, group.batch.take(rows), rows, draws, weights)

    def _draws(self, stream: str, step: int, group: Bucket, size: int) -> TrainingDraws:
        shape = size, group.batch.site_mask.shape[1]
        tries = self.config.diffusion.origin_tries
        return TrainingDraws.of_step(self.config.train.seed, stream, step, shape, tries)

    def _noisy(
        self,
        group: Bucket,
        batch: Batch,
        rows: NDArray[np.int64],
        draws: TrainingDraws,
        weights: LossWeights,
    ) -> TrainingBatch:
        """Crystals with noise, the weights of whose squared errors are given."""
        settings, diffusion = self.config.train, self.config.diffusion
        known = batch.precedent_mask
        later = (draws.t - settings.at_precedent) / (1 - settings.at_precedent)
        draws = replace(draws, t=np.where(known, later.clip(0), draws.t).astype(np.float32))
        bend = np.where(known, diffusion.precedent_bend or np.inf, np.inf).astype(np.float32)
        units = error_units(known, draws.t, self.config.model.target)
        noisy = self._add_noise(group, batch, rows, draws)
        return TrainingBatch(batch, noisy, weights.in_units(*units, bend))

    def _add_noise(
        self, group: Bucket, batch: Batch, rows: NDArray[np.int64], draws: TrainingDraws
    ) -> NoisyCrystals:
        diffusion, lattice = self.config.diffusion, self.standardizer.lattice(batch)
        if self.score_process is not None:
            return self.score_process.make_noisy(
                batch.free_params, lattice, draws.free_normal, draws.lattice, draws.t
            )
        start = starting_points(
            batch, self.standardizer, diffusion, draws.free, draws.free_normal, draws.lattice
        )
        free = batch.free_params.copy()  # with a precedent already as near to it as can be
        rest = np.flatnonzero(~batch.precedent_mask)
        free[rest] = group.descriptions.nearest(rows[rest], draws.free[rest], draws.origins[rest])
        return make_path(free, lattice, *start, draws.t)

    def validate(self) -> dict[str, float]:
        """Losses of the averaged weights, the coordinate's also per noise level.

        They are means over the rows, those without a free coordinate left out of the coordinate's.
        Every process takes its share, and all of them get the whole.
        """
        sums = np.zeros(3)
        levels = np.zeros((NOISE_BINS, 2))
        with self.averaged():
            for plan in self.validation.once():
                data = self.prepare_validation(plan)
                found = self.losses(data)
                sums += found.total, found.coordinate, found.lattice
                bins = (data.noisy.t * NOISE_BINS).astype(int).clip(max=NOISE_BINS - 1)
                counted = data.weights.coordinate.any(axis=(1, 2))  # once, if any is free
                for column, values in enumerate((found.per_crystal * counted, counted)):
                    levels[:, column] += np.bincount(bins, values, NOISE_BINS)
        total = self.summed([*sums.tolist(), *levels.ravel().tolist()])
        means = dict(zip(("loss", "coordinate", "lattice"), total, strict=False))
        for index, (value, count) in enumerate(np.reshape(total[3:], levels.shape).tolist()):
            means[f"coordinate_t{index / NOISE_BINS:.1f}"] = value / max(count, 1)
        return means

    # Checkpoints

    def model_arrays(self) -> Arrays:
        """Averaged weights and statistics, as a checkpoint keeps them."""
        arrays = {MODEL_PREFIX + name: array for name, array in self.average_arrays().items()}
        for name, array in self.standardizer.to_arrays().items():
            arrays[STANDARDIZER_PREFIX + name] = array.astype(np.float32)
        return arrays


def small_enough(records: list[Record]) -> list[Record]:
    """Records without those too large to train on."""
    return [record for record in records if record.crystal.num_primitive_atoms <= MAX_ATOMS]


def batch_items(records: list[Record]) -> list[BatchItem]:
    """Records as a network sees them."""
    return [BatchItem(record.crystal, record.properties) for record in records]


def checked_records(config: RunConfig) -> tuple[list[Record], list[Record]]:
    """Training and validation rows that a run names.

    Raises:
        UserError: if they cannot be read, or do not tell a property that the network is to learn:
            it would not learn it, and have no scale for it, but samples can be asked for it.
    """
    known, watched = records_of(config)
    rows = small_enough(known)
    for name in config.model.properties:
        if rows and len({record.properties[name] for record in rows} - {None}) < 2:
            raise UserError(
                f"{config.train.data}: no row has a {name}, or all have the same, so that nothing "
                "is learned of it; leave it out of model.properties"
            )
    return known, watched
