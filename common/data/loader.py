"""Training batches: crystals by padded shape, in an order that seed and epoch decide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        first: [B], False for the rows that the epoch repeats to fill the batch.
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

    def epoch(self, seed: int, epoch: int) -> list[BatchPlan]:
        """The batches of one epoch in their order.

        Every batch of a bucket is full, so that its shape is always the same; rows are repeated to
        fill the last one. In training the repeats count: crystals of a rare shape come more often.
        """
        random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        plans = []
        for index, group in enumerate(self.buckets):
            order = random.permutation(group.batch.size)
            count = -(-len(order) // group.batch_size)
            rows = np.resize(order, count * group.batch_size).reshape(count, -1)
            first = (np.arange(rows.size) < len(order)).reshape(rows.shape)
            plans += [BatchPlan(index, *batch) for batch in zip(rows, first, strict=True)]
        return [plans[i] for i in random.permutation(len(plans))]

    def batches(self, seed: int, step: int) -> Iterator[BatchPlan]:
        """Endless batches, from a step on."""
        length = len(self.epoch(seed, 0))
        epoch, position = divmod(step, length)
        while True:
            yield from self.epoch(seed, epoch)[position:]
            epoch, position = epoch + 1, 0
