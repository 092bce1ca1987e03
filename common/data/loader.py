"""Batches: crystals by padded shape, for training in an order that the seed decides."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from common.data.batch import Batch, BatchItem, View, bucket, collate
from common.diffusion.flow import Descriptions

Int = NDArray[np.int64]


@dataclass(frozen=True)
class Bucket:
    """All crystals of one padded shape (T, A), and how many of them go into one batch."""

    batch: Batch
    descriptions: Descriptions
    batch_size: int


@dataclass(frozen=True)
class BatchPlan:
    """Which rows of which bucket make one batch.

    Attributes:
        bucket: its index.
        rows: [B].
        first: [B], False for rows that only fill the batch.
    """

    bucket: int
    rows: Int
    first: NDArray[np.bool_]


class BucketedData:
    """A data set in memory, padded once.

    Args:
        items: the crystals.
        view: of the network.
        batch_size: crystals in a batch, at most.
        edge_budget: padded edges in a batch, at most, so that large crystals come in smaller
            batches and memory stays bounded.
    """

    def __init__(
        self, items: Sequence[BatchItem], view: View, batch_size: int, edge_budget: int
    ) -> None:
        groups: dict[tuple[int, int], list[BatchItem]] = {}
        for item in items:
            groups.setdefault(bucket(item.crystal, view), []).append(item)
        self.buckets: list[Bucket] = []
        for shape in sorted(groups):
            batch = collate(groups[shape], view, shape)
            size = min(batch_size, max(1, edge_budget // (shape[0] * shape[1])))
            self.buckets.append(Bucket(batch, Descriptions(batch), size))

    def once(self) -> list[BatchPlan]:
        """Every row once, in full batches: rows are repeated to fill a bucket's last one."""
        plans = []
        for index, group in enumerate(self.buckets):
            count = -(-group.batch.size // group.batch_size)
            for row in np.arange(count * group.batch_size).reshape(count, -1):
                plans.append(BatchPlan(index, row % group.batch.size, row < group.batch.size))
        return plans

    @property
    def epoch(self) -> float:
        """Batches in which every row comes once, on average."""
        return sum(group.batch.size / group.batch_size for group in self.buckets)

    def batches(self, seed: int, step: int) -> Iterator[BatchPlan]:
        """Endless full batches for training, from a step on, in which all rows come equally often.

        A bucket of fewer rows than go into its batches has one in some epochs only, in which a row
        comes several times.
        """
        streams = [
            _Stream((seed, index), group.batch.size, group.batch_size)
            for index, group in enumerate(self.buckets)
        ]

        def begin(epoch: int) -> int:
            return sum(stream.begin(epoch) for stream in streams)

        latest = int((step + len(streams)) / self.epoch) + 2
        epoch = bisect_right(range(latest), step, key=begin) - 1
        skipped = step - begin(epoch)
        while True:
            plans = [
                BatchPlan(index, rows, np.ones(stream.batch_size, bool))
                for index, stream in enumerate(streams)
                for rows in stream.rows(epoch)
            ]
            order = _random(_ORDER, seed, epoch).permutation(len(plans))
            yield from (plans[i] for i in order[skipped:].tolist())
            epoch, skipped = epoch + 1, 0


@dataclass(frozen=True)
class _Stream:
    """The rows of a bucket without end, shuffled anew whenever all have come, in full batches."""

    key: tuple[int, int]
    size: int
    batch_size: int

    @cached_property
    def _phase(self) -> int:
        """Rows of its first batch that are counted as come before, lest buckets keep step."""
        return int(_random(_PHASE, *self.key).integers(self.batch_size))

    def begin(self, epoch: int) -> int:
        """The first batch of an epoch."""
        return (epoch * self.size + self._phase) // self.batch_size

    def rows(self, epoch: int) -> Int:
        """Of the batches of an epoch: [N,B]."""
        first, stop = self.begin(epoch), self.begin(epoch + 1)
        places = np.arange(first * self.batch_size, stop * self.batch_size)
        rounds, within = np.divmod(places, self.size)
        rows = np.empty_like(places)
        for each in np.unique(rounds).tolist():
            order = _random(_ROWS, *self.key, each).permutation(self.size)
            rows[rounds == each] = order[within[rounds == each]]
        return rows.reshape(-1, self.batch_size)


#: What numbers are drawn for: the order of an epoch's batches, and a bucket's phase and rows.
_ORDER, _PHASE, _ROWS = range(3)


def _random(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
