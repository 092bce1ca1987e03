"""Sampling crystals from a checkpoint with torch."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from common.backend import SampleRequest
from common.config import RunConfig
from common.crystal.structure import Crystal
from common.diffusion.scaler import Standardizer
from common.diffusion.score import ScoreProcess
from common.precedents import PrecedentIndex
from common.sampling import Array, BaseGenerator, Call, read_checkpoint
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.devices import available_device
from torch_impl.sampler import sample_flow, sample_predictor_corrector
from torch_impl.tensors import TensorBatch
from torch_impl.threads import MAX_PARALLEL_CALLS, threads_per_operation
from torch_impl.train_dit import load_weights

#: On a GPU, which a call of few edges keeps busy for too short a time.
CUDA_EDGES_PER_CALL = 65536
#: On a CPU calls have a multiple of so many crystals; fewer rows take other kernels.
ROW_STEP = 4
#: Multiples of it with which ``rows_are_alike`` tries that.
MULTIPLES = (1, 2, 3, 5, 8, 13, 21, 34, 55)


class Generator(BaseGenerator):
    """A checkpoint that samples crystals with torch; see ``common.sampling.BaseGenerator``."""

    def __init__(
        self,
        config: RunConfig,
        model: CrystalDiT,
        standardizer: Standardizer,
        device: str,
        precedents: PrecedentIndex | None = None,
    ) -> None:
        super().__init__(config, standardizer, precedents)
        with threads_per_operation(1):
            self.model = model.to(device).eval().requires_grad_(False).fold()
        self.device = device
        if device == "cpu":
            self.parallel_calls = min(torch.get_num_threads(), MAX_PARALLEL_CALLS)
            with threads_per_operation(1):
                self.row_step = ROW_STEP if rows_are_alike(self.model, ROW_STEP) else None
        else:
            self.edges_per_call = CUDA_EDGES_PER_CALL

    @property
    def device_name(self) -> str:
        """What samples, in words, for reports."""
        if self.device == "cpu":
            return f"cpu, {self.parallel_calls} threads"
        return torch.cuda.get_device_name(self.device)

    def sample(
        self,
        requests: Sequence[SampleRequest],
        seed: int,
        steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Crystal]:
        """See ``BaseGenerator``; on a CPU each call has one thread."""
        with threads_per_operation(1):
            return super().sample(requests, seed, steps, progress)

    @torch.inference_mode()
    def solve(
        self, call: Call, seed: int, steps: int, process: ScoreProcess | None
    ) -> tuple[Array, Array]:
        """Runs the sampler; see ``BaseGenerator``."""

        def draw(field: str, level: int) -> torch.Tensor:
            return torch.from_numpy(call.draw(seed, field, level)).to(self.device)

        settings = self.config.diffusion
        batch = TensorBatch.from_batch(call.batch, self.standardizer, self.properties, self.device)
        start = tuple(torch.from_numpy(array).to(self.device) for array in self.start(call, seed))
        if process is None:
            free, lattice = sample_flow(self.model, batch, *start, steps, settings)
        else:
            free, lattice = sample_predictor_corrector(
                self.model, batch, *start, process, settings, draw
            )
        return free.numpy(force=True), lattice.numpy(force=True)


@torch.inference_mode()
def rows_are_alike(model: CrystalDiT, fewest: int) -> bool:
    """Whether linear maps and SiLU give a row the same bits beside few others as beside many.

    MKL's do on an AMD EPYC with AVX-512, from four rows on, but nobody promises it. What else the
    network computes goes crystal by crystal or row by row.

    Args:
        model: the network, of which only the widths matter.
        fewest: rows in the smallest product.
    """
    width = model.config.width
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)}
    shapes |= {(2 * width, width), (3 * width, width)}  # of attention, folded
    draw = torch.Generator().manual_seed(0)
    for shape in sorted(shapes):
        weight = torch.randn(shape, generator=draw)
        rows = torch.randn(fewest * MULTIPLES[-1], shape[1], generator=draw)
        for bias in (None, weight[:, 0].contiguous()):
            if not _alike(partial(functional.linear, weight=weight, bias=bias), rows, fewest):
                return False
    widths = (width, model.config.edge_width)  # in what SiLU takes; others are multiples
    return all(
        _alike(functional.silu, torch.randn(fewest * MULTIPLES[-1], one, generator=draw), fewest)
        for one in widths
    )


def _alike(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, few: int) -> bool:
    """Whether the last rows come out the same without those before them."""
    whole = function(rows)
    counts = (few * times for times in MULTIPLES)
    return all(torch.equal(function(rows[-count:]), whole[-count:]) for count in counts)


def load(checkpoint: Path, device: str = "auto") -> Generator:
    """Loads a checkpoint folder.

    Raises:
        UserError: if it is unreadable or damaged, does not fit the network it names, or the device
            is not here.
    """
    device = available_device(device)
    config, standardizer, precedents, saved = read_checkpoint(checkpoint)
    model = CrystalDiT(config.model)
    load_weights(model, saved.model, str(checkpoint))
    return Generator(config, model, standardizer, device, precedents)
