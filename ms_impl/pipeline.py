"""Training batches through MindSpore's data pipeline, which prepares the next ones meanwhile."""

from collections.abc import Callable, Iterator
from dataclasses import fields

import numpy as np
from mindspore import dataset

from common.data.batch import Batch
from common.diffusion.noisy import LossWeights, NoisyCrystals
from common.diffusion.training import TrainingBatch

#: Batches that wait for the network, at most.
AHEAD = 2
_PARTS = {"batch": Batch, "noisy": NoisyCrystals, "weights": LossWeights}


def prefetched(batches: Callable[[], Iterator[TrainingBatch]]) -> Iterator[TrainingBatch]:
    """The same batches in the same order, prepared in another thread.

    One worker, for the order of batches is the run's; and a thread, for the data set is in this
    process's memory. MindSpore computes without Python's lock, which leaves it to the thread.

    Args:
        batches: starts them.
    """
    dataset.config.set_prefetch_size(AHEAD)
    columns = [f"{part}.{f.name}" for part, kind in _PARTS.items() for f in fields(kind)]
    source = dataset.GeneratorDataset(
        lambda: map(_arrays, batches()),
        columns,
        shuffle=False,
        num_parallel_workers=1,
        python_multiprocessing=False,
    )
    for row in source.create_tuple_iterator(num_epochs=1, output_numpy=True):
        yield _training_batch(dict(zip(columns, row, strict=True)))


def _arrays(data: TrainingBatch) -> tuple[np.ndarray, ...]:
    return tuple(
        getattr(getattr(data, part), f.name) for part, kind in _PARTS.items() for f in fields(kind)
    )


def _training_batch(arrays: dict[str, np.ndarray]) -> TrainingBatch:
    parts = {
        part: kind(**{f.name: arrays[f"{part}.{f.name}"] for f in fields(kind)})
        for part, kind in _PARTS.items()
    }
    return TrainingBatch(**parts)
