"""Sampling crystals from a checkpoint with torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from common.backend import SampleRequest
from common.checkpoint import load_checkpoint
from common.config import RunConfig, parse_config
from common.crystal.lattice import k_to_lattice
from common.crystal.structure import Crystal, Site
from common.data.batch import Batch, BatchItem, bucket, collate, symmetry_only
from common.diffusion.noise import noise
from common.diffusion.scaler import Standardizer
from common.errors import UserError
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.sampler import sample_flow, sample_predictor_corrector
from torch_impl.tensors import TensorBatch
from torch_impl.train_dit import STANDARDIZER_PREFIX, load_weights, score_process

#: Padded edges in one call of the network. A call always has the same shape for a bucket, whatever
#: is asked for, so that a crystal's bytes do not depend on what is sampled beside it.
EDGES_PER_CALL = 4096
#: Digits kept of a free coordinate.
COORDINATE_DIGITS = 6


def rows_per_call(shape: tuple[int, int]) -> int:
    """Crystals in one call of the network for a bucket (T, A)."""
    return max(1, EDGES_PER_CALL // (shape[0] * shape[1]))


class TorchGenerator:
    """A checkpoint that samples crystals with torch; see ``common.backend.Generator``."""

    def __init__(
        self, config: RunConfig, model: CrystalDiT, standardizer: Standardizer, device: str
    ) -> None:
        self.config = config
        self.model = model.to(device).eval().requires_grad_(False)
        self.standardizer = standardizer
        self.device = device
        self.process = score_process(config.diffusion)

    @property
    def device_name(self) -> str:
        """What samples, in words, for reports."""
        if self.device == "cpu":
            return f"cpu, {torch.get_num_threads()} threads"
        return torch.cuda.get_device_name(self.device)

    @property
    def properties(self) -> tuple[str, ...]:
        """Names of the properties that the checkpoint was trained with."""
        return self.config.model.properties

    def sample(
        self,
        requests: Sequence[SampleRequest],
        seed: int,
        steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Crystal]:
        """One crystal per request; see ``common.backend.Generator.sample``."""
        items = [
            BatchItem(symmetry_only(request.space_group, request.sites), dict(request.properties))
            for request in requests
        ]
        view = self.config.model.cell
        groups: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(bucket(item.crystal, view), []).append(index)
        crystals: dict[int, Crystal] = {}
        for shape, rows in sorted(groups.items()):
            size = rows_per_call(shape)
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                padded = [chunk[i % len(chunk)] for i in range(size)]
                batch = collate([items[i] for i in padded], view, shape)
                sampled = self._sample_batch(batch, [requests[i] for i in padded], seed, steps)
                crystals.update(zip(chunk, sampled, strict=False))
                if progress is not None:
                    progress(len(chunk))
        return [crystals[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _sample_batch(
        self, batch: Batch, requests: Sequence[SampleRequest], seed: int, steps: int | None
    ) -> list[Crystal]:
        sites = batch.free_params.shape[1]

        def draw(field: str, level: int = 0, uniform: bool = False) -> torch.Tensor:
            kind = "uniform" if uniform else "normal"
            shape = (6,) if field == "lattice" else (sites, 3)
            rows = [noise(seed, r.key, r.sample, field, level, shape, kind) for r in requests]
            return torch.from_numpy(np.stack(rows)).to(self.device)

        settings = self.config.diffusion
        tensors = TensorBatch.from_batch(batch, self.standardizer, self.properties, self.device)
        start = draw("free", uniform=True), draw("lattice")
        if self.process is None:
            free, lattice = sample_flow(
                self.model, tensors, *start, steps or settings.steps, settings
            )
        else:
            process = self.process if steps is None else score_process(settings, steps)
            assert process is not None
            free, lattice = sample_predictor_corrector(
                self.model, tensors, *start, process, settings, draw
            )
        scale = self.standardizer.lattice_scales(batch)
        k = self.standardizer.lattice_center(batch) + scale * lattice.numpy(force=True)
        lattices = k_to_lattice(k)
        params = np.where(batch.free_mask, free.numpy(force=True).astype(float), 0.0)
        params = np.mod(np.round(params, COORDINATE_DIGITS), 1.0)
        return [
            Crystal(
                request.space_group,
                tuple(
                    Site(number, letter, tuple(params[row, site].tolist()))
                    for site, (number, letter) in enumerate(request.sites)
                ),
                lattices[row],
            )
            for row, request in enumerate(requests)
        ]


def load(checkpoint: Path, device: str = "auto") -> TorchGenerator:
    """Loads a checkpoint folder.

    Raises:
        UserError: if it is unreadable or damaged, or does not fit the network it names.
    """
    if device == "auto":
        device = devices()[0]
    saved = load_checkpoint(checkpoint)
    config = parse_config(saved.config, f"{checkpoint}/config.yaml")
    model = CrystalDiT(config.model)
    load_weights(model, saved.model, str(checkpoint))
    return TorchGenerator(config, model, _standardizer(saved.model, checkpoint), device)


def devices() -> list[str]:
    """What ``device`` may be here, best first."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def _standardizer(arrays: dict[str, np.ndarray], checkpoint: Path) -> Standardizer:
    names = Standardizer.__dataclass_fields__
    missing = [name for name in names if STANDARDIZER_PREFIX + name not in arrays]
    if missing:
        raise UserError(f"{checkpoint}: statistics are missing: {', '.join(missing)}")
    return Standardizer(**{n: arrays[STANDARDIZER_PREFIX + n].astype(float) for n in names})
