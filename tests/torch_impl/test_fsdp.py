"""Two processes train LoRA as one does, whether they share out its base or each has all of it."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch.distributed.tensor import DTensor

import torch_impl.distributed as distributed
from common.checkpoint import save_checkpoint
from common.language.config import LanguageRunConfig
from common.training import Shard
from tests.torch_impl.test_distributed import environment, free_port
from tests.training import textbook_records
from torch_impl.train_glm4 import Trainer

STEPS = 3


def run(base: Path | None, **settings: object) -> LanguageRunConfig:
    """Of two blocks."""
    train: dict[str, object] = {
        "steps": STEPS,
        "token_budget": 400,
        "warmup": 1,
        "learning_rate": 1e-2,
        "init_from": str(base) if base else None,
    }
    model = {"layers": 2, "width": 32, "heads": 4, "groups": 2, "feed_forward": 48}
    lora = {"rank": 4} if base else None
    data = {"name": "tiny", "kind": "language", "model": model, "lora": lora}
    return LanguageRunConfig.model_validate(data | {"train": train | settings})


def losses(trainer: Trainer) -> list[dict[str, float]]:
    return [trainer.train_step(data) for data in islice(trainer.batches(), STEPS)]


def work(rank: int, port: int, base: Path, expected: list[dict[str, float]]) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    records = textbook_records()
    with pytest.MonkeyPatch.context() as patch:
        environment(patch, rank, 2, port)
        with distributed.joined("cpu") as shard:
            config = run(base, fsdp=True, gradient_checkpointing=True)
            trainer = Trainer(config, records, records, shard=shard)
            check_same_training(trainer, expected)
            frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
            assert all(isinstance(p, DTensor) for p in frozen)
            own = sum(p.to_local().numel() for p in frozen)
            assert own < 0.6 * sum(p.numel() for p in frozen)
            assert not any(isinstance(p, DTensor) for p in trainer.parameters)
            assert trainer.validate()["loss"] > 0
            # The same bits everywhere.
            total = torch.cat([p.detach().flatten() for p in trainer.parameters]).double()
            assert torch.equal(distributed.sum_values(total.clone()), 2 * total)
            check_whole_base(Trainer(run(base), records, records, shard=shard), expected)


def check_same_training(trainer: Trainer, expected: list[dict[str, float]]) -> None:
    for mine, one in zip(losses(trainer), expected, strict=True):
        assert mine == pytest.approx(one, rel=1e-4, abs=1e-6)


def check_whole_base(trainer: Trainer, expected: list[dict[str, float]]) -> None:
    """The base gets no gradient, which the processes would sum in every step."""
    check_same_training(trainer, expected)
    for parameter in trainer.model.parameters():
        trained = any(parameter is one for one in trainer.parameters)
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None) == trained


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    records = textbook_records()
    start = Trainer(run(None), records, records)
    save_checkpoint(tmp_path / "base", config={}, model=start.average_arrays())
    expected = losses(Trainer(run(tmp_path / "base"), records, records, shard=Shard()))
    arguments = (free_port(), tmp_path / "base", expected)
    torch.multiprocessing.spawn(work, arguments, nprocs=2)


def test_a_base_is_needed() -> None:
    with pytest.raises(ValueError, match=r"train\.fsdp needs lora"):
        run(None, fsdp=True)


def test_one_process_shares_nothing() -> None:
    network = torch.nn.Linear(2, 2)
    assert distributed.share_out(network, []) is network
