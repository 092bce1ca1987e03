"""Two processes train as one does, notice that they differ, and do not wait for ever."""

import socket
from datetime import timedelta
from multiprocessing.synchronize import Event

import pytest
import torch
import torch.multiprocessing
from torch.distributed import DistBackendError

import torch_impl.distributed as distributed
from common.errors import UserError
from common.training import Shard, check_agreement
from tests.networks import fill_value
from tests.training import textbook_records, tiny_run
from torch_impl.train_dit import Trainer

#: Settings of a run, and of its network, in which other parameters are used.
VARIANTS: list[tuple[dict[str, object], dict[str, object]]] = [
    ({}, {}),
    ({"batch_size": 1}, {}),
    ({}, {"properties": []}),
    ({}, {"attention": False, "modulation": False, "feed_forward": 0, "layers": 1}),
    ({"edge_budget": 2048}, {"cell": "conventional", "frames": False}),
]


def environment(monkeypatch: pytest.MonkeyPatch, rank: int, count: int, port: int) -> None:
    """What torchrun tells a process."""
    values = (rank, count, rank, count, "127.0.0.1", port)
    for name, value in zip(distributed.VARIABLES, values, strict=True):
        monkeypatch.setenv(name, str(value))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def filled(settings: dict[str, object], model: dict[str, object], shard: Shard) -> Trainer:
    """A trainer whose network has no zeros."""
    records = textbook_records()
    run = tiny_run(model=model, learning_rate=1e-4, batch_size=5)
    run = run.model_copy(update={"train": run.train.model_copy(update=settings)})
    trainer = Trainer(run, records, records, shard=shard)
    for name, parameter in trainer.model.named_parameters():
        parameter.data.copy_(torch.from_numpy(fill_value(name, parameter.shape)))
    return trainer


def losses(trainer: Trainer) -> list[dict[str, float]]:
    batches = trainer.batches()
    return [trainer.train_step(next(batches)) for _ in range(3)]


def work(rank: int, port: int, expected: list[list[dict[str, float]]], gave_up: Event) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        environment(patch, rank, 2, port)
        with distributed.joined("cpu") as shard:
            assert shard == Shard(rank, 2)
            check_same_training(shard, expected)
            check_disagreement(rank, shard)
        environment(patch, rank, 2, port + 1)
        patch.setattr(distributed, "TIMEOUT", timedelta(seconds=10))
        with distributed.joined("cpu"):
            check_timeout(rank, gave_up)


def check_same_training(shard: Shard, expected: list[list[dict[str, float]]]) -> None:
    for (settings, model), whole in zip(VARIANTS, expected, strict=True):
        found = losses(filled(settings, model, shard))
        for step, (mine, one) in enumerate(zip(found, whole, strict=True)):
            assert mine == pytest.approx(one, rel=1e-5, abs=1e-7), (settings, model, step)
        norms = torch.tensor([row["gradient_norm"] for row in found], dtype=torch.float64)
        assert torch.equal(distributed.sum_values(norms.clone()), 2 * norms), "the same bits"


def check_disagreement(rank: int, shard: Shard) -> None:
    trainer = filled({}, {}, shard)
    check_agreement(trainer)
    trainer.step = 7 * rank  # as if only one had found a checkpoint
    with pytest.raises(UserError, match="the processes differ"):
        check_agreement(trainer)
    trainer.step = 0
    check_agreement(trainer)
    with pytest.MonkeyPatch.context() as patch:  # as if train.init_from held other weights there
        patch.setattr(type(trainer), "origin", f"weights {rank}")
        with pytest.raises(UserError, match=r"the same CONFIG, data and train\.init_from"):
            check_agreement(trainer)


def check_timeout(rank: int, gave_up: Event) -> None:
    """One process stalls until the other one gives up."""
    if rank:
        assert gave_up.wait(240)
        return
    with pytest.raises((RuntimeError, DistBackendError), match=r"[Tt]imed out"):
        distributed.sum_values(torch.zeros(1))
    gave_up.set()


def test_two_processes() -> None:
    expected = [losses(filled(settings, model, Shard())) for settings, model in VARIANTS]
    gave_up = torch.multiprocessing.get_context("spawn").Event()
    torch.multiprocessing.spawn(work, (free_port(), expected, gave_up), nprocs=2)


def test_alone() -> None:
    model = torch.nn.Linear(2, 1)
    with distributed.joined("cpu") as shard:
        assert shard == Shard()
        assert distributed.sum_gradients(model) is model
        assert distributed.sum_values(torch.tensor([3.0])).tolist() == [3.0]


def test_environment_that_is_not_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without RANK, LOCAL_RANK"), distributed.joined("cpu"):
        pass
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(UserError, match="msrun"), distributed.joined("cpu"):
        pass


def test_fewer_gpus_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, torch.cuda.device_count(), 1 + torch.cuda.device_count(), 1)
    if torch.cuda.device_count() == 0:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="no GPU for local rank"), distributed.joined("cuda"):
        pass
