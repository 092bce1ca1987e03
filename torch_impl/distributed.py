"""Processes that train one network together, as torchrun starts them.

Every process holds all data and works on its share of every batch (``common.training.Shard``);
gradients and losses are sums over the processes.
"""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from common.machine import launched_by
from common.training import Shard

#: What torchrun tells every process.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: How long a process waits for the others, the first of which writes checkpoints meanwhile.
TIMEOUT = timedelta(minutes=10)
#: Seconds for gloo's threads to let go of the last collective's tensors. That takes the
#: interpreter's lock, which aborts the process where the interpreter is ending; destroying the
#: group joins the threads only if nothing refers to it any more, and FSDP's caches still do.
LAST_RELEASE = 0.1


@contextmanager
def joined(device: str) -> Iterator[Shard]:
    """Within it this process is one of those that a launcher started, or alone without one.

    Args:
        device: ``cpu``, where gloo connects the processes, or ``cuda``, where NCCL does and each
            has the GPU of its number on its machine.

    Raises:
        UserError: if the environment is not torchrun's, or there are fewer GPUs than processes.
    """
    if launched_by("MS_WORKER_NUM"):
        raise UserError("started by msrun, which is MindSpore's: use scripts/run_gpu.sh")
    if not launched_by("WORLD_SIZE"):
        yield Shard()
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is set without {', '.join(missing)}: use scripts/run_gpu.sh")
    if device == "cuda":
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    yield Shard(dist.get_rank(), dist.get_world_size())
    # Not after an error: the others may be waiting for this process, and their launcher acts.
    dist.destroy_process_group()
    if device == "cpu":
        time.sleep(LAST_RELEASE)


def sum_gradients(model: nn.Module) -> nn.Module:
    """A network whose gradients, once they are there, are sums over the processes."""
    if not dist.is_initialized():
        return model
    for parameter in model.parameters():
        # One without elements never gets the gradient that the reduction would wait for.
        parameter.requires_grad_(parameter.requires_grad and parameter.numel() > 0)
    reduced = DistributedDataParallel(model, forward_sync_buffers=False)
    reduced.register_comm_hook(None, _sum_bucket)
    return reduced


def share_out(model: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    """A network whose frozen weights the processes share out, and whose gradients are sums.

    Each process has its share of them, and all of a part's while that part is computed (FSDP).

    Args:
        model: the network.
        parts: of it, which follow one another.
    """
    if not dist.is_initialized():
        return model
    trained = {p for p in model.parameters() if p.requires_grad}
    for module in (*parts, model):
        fully_shard(module, ignored_params=trained)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(_sum_gradient)
    return model


def _sum_gradient(parameter: Tensor) -> None:
    dist.all_reduce(parameter.grad)


def sum_values(values: Tensor) -> Tensor:
    """Sums over the processes, the same in all of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def problems(device: str, processes: int) -> list[str]:
    """What is missing here to train with so many processes, one line each.

    Args:
        device: ``cpu`` or ``cuda``.
        processes: on this machine.
    """
    if device == "cpu":
        return []
    visible, driver = torch.cuda.device_count(), _driver()
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} is built without CUDA; {driver}"]
    if not visible:
        built = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
        return [f"{built} finds no GPU: mend the driver or CUDA_VISIBLE_DEVICES; {driver}"]
    if processes > visible:
        return [f"{processes} processes, but torch sees {visible} GPUs; {driver}"]
    return []


def _driver() -> str:
    """What nvidia-smi says, in words."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "nvidia-smi is not found"
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    if listed.returncode:
        return f"nvidia-smi fails: {' '.join((listed.stdout + listed.stderr).split())}"
    return f"nvidia-smi lists {listed.stdout.count('GPU ')} GPUs"


def _take_gpu(index: int) -> None:
    if index >= torch.cuda.device_count():
        raise UserError(f"no GPU for local rank {index}: {torch.cuda.device_count()} are visible")
    torch.cuda.set_device(index)


def _sum_bucket(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums where DistributedDataParallel would average; see its ``register_comm_hook``."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
