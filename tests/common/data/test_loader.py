"""Training batches: every row, in an order that seed and epoch decide, from any step on."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from common.data.batch import BatchItem, symmetry_only
from common.data.loader import BatchPlan, BucketedData

SIZES = [1, 2, 2, 3, 4, 4, 4, 6, 7, 7, 9, 12, 12, 15, 20, 20, 30]


@pytest.fixture(scope="module")
def data() -> BucketedData:
    """17 crystals of different sizes, four to a batch at most."""
    items = [BatchItem(symmetry_only(1, [(8, "a")] * size), {}) for size in SIZES]
    return BucketedData(items, "asymmetric", batch_size=4, edge_budget=600)


def written(plans: list[BatchPlan]) -> list[tuple[int, list[int]]]:
    return [(plan.bucket, plan.rows.tolist()) for plan in plans]


def test_no_crystal_is_lost(data: BucketedData) -> None:
    found = Counter(
        int(count) for group in data.buckets for count in group.batch.atom_mask.sum(axis=1)
    )
    assert found == Counter(SIZES)


def test_buckets_have_one_shape_each(data: BucketedData) -> None:
    shapes = [group.batch.shape for group in data.buckets]
    assert len(set(shapes)) == len(shapes)
    assert shapes == sorted(shapes)


def test_edge_budget(data: BucketedData) -> None:
    for group in data.buckets:
        tokens, atoms = group.batch.shape
        fits = group.batch_size * tokens * atoms <= 600
        assert fits or group.batch_size == 1
        assert 1 <= group.batch_size <= 4
        one_more = (group.batch_size + 1) * tokens * atoms
        assert group.batch_size == 4 or one_more > 600
    assert {group.batch_size for group in data.buckets} == {1, 2, 4}


def test_epoch_covers_every_row_in_full_batches(data: BucketedData) -> None:
    for epoch in range(3):
        plans = data.epoch(0, epoch)
        rows: dict[int, Counter[int]] = {}
        for plan in plans:
            assert len(plan.rows) == data.buckets[plan.bucket].batch_size
            rows.setdefault(plan.bucket, Counter()).update(plan.rows.tolist())
        for index, group in enumerate(data.buckets):
            counts = rows[index]
            assert set(counts) == set(range(group.batch.size))
            # Repeated rows only fill the last batch.
            assert sum(counts.values()) - group.batch.size < group.batch_size
            assert max(counts.values()) - min(counts.values()) <= 1
            own = [plan for plan in plans if plan.bucket == index]
            first = np.concatenate([plan.rows[plan.first] for plan in own])
            assert sorted(first) == list(range(group.batch.size))


def test_order_is_decided_by_seed_and_epoch(data: BucketedData) -> None:
    first = written(data.epoch(3, 5))
    np.random.seed(1)  # noqa: NPY002 - other generators must have no influence
    data.epoch(9, 9)
    assert written(data.epoch(3, 5)) == first
    assert written(data.epoch(3, 6)) != first
    assert written(data.epoch(5, 3)) != first


def test_buckets_are_mixed(data: BucketedData) -> None:
    order = [plan.bucket for plan in data.epoch(0, 0)]
    assert order != sorted(order)


@pytest.mark.parametrize("step", [0, 1, 4, 11, 12, 13, 40])
def test_goes_on_in_the_middle(data: BucketedData, step: int) -> None:
    whole = list(islice(data.batches(7, 0), step + 30))
    assert written(list(islice(data.batches(7, step), 30))) == written(whole[step:])


def test_batches_are_the_epochs_in_a_row(data: BucketedData) -> None:
    length = len(data.epoch(7, 0))
    found = written(list(islice(data.batches(7, 0), 2 * length)))
    assert found == written(data.epoch(7, 0)) + written(data.epoch(7, 1))


def test_batch_larger_than_the_data() -> None:
    items = [BatchItem(symmetry_only(1, [(8, "a")]), {})] * 3
    (plan,) = BucketedData(items, "asymmetric", 8, 10_000).epoch(0, 0)
    assert sorted(Counter(plan.rows.tolist()).values()) == [2, 3, 3]
