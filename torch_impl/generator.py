"""Sampling crystals from a checkpoint with torch."""

from pathlib import Path

import torch

from common.config import RunConfig
from common.diffusion.scaler import Standardizer
from common.diffusion.score import ScoreProcess
from common.sampling import Array, BaseGenerator, Call, read_checkpoint
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.sampler import sample_flow, sample_predictor_corrector
from torch_impl.tensors import TensorBatch
from torch_impl.train_dit import load_weights


class Generator(BaseGenerator):
    """A checkpoint that samples crystals with torch; see ``common.sampling.BaseGenerator``."""

    def __init__(
        self, config: RunConfig, model: CrystalDiT, standardizer: Standardizer, device: str
    ) -> None:
        super().__init__(config, standardizer)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device

    @property
    def device_name(self) -> str:
        """What samples, in words, for reports."""
        if self.device == "cpu":
            return f"cpu, {torch.get_num_threads()} threads"
        return torch.cuda.get_device_name(self.device)

    @torch.inference_mode()
    def solve(
        self, call: Call, seed: int, steps: int, process: ScoreProcess | None
    ) -> tuple[Array, Array]:
        """Runs the sampler; see ``BaseGenerator``."""

        def draw(field: str, level: int = 0, uniform: bool = False) -> torch.Tensor:
            return torch.from_numpy(call.draw(seed, field, level, uniform)).to(self.device)

        settings = self.config.diffusion
        batch = TensorBatch.from_batch(call.batch, self.standardizer, self.properties, self.device)
        start = draw("free", uniform=True), draw("lattice")
        if process is None:
            free, lattice = sample_flow(self.model, batch, *start, steps, settings)
        else:
            free, lattice = sample_predictor_corrector(
                self.model, batch, *start, process, settings, draw
            )
        return free.numpy(force=True), lattice.numpy(force=True)


def load(checkpoint: Path, device: str = "auto") -> Generator:
    """Loads a checkpoint folder.

    Raises:
        UserError: if it is unreadable or damaged, or does not fit the network it names.
    """
    config, standardizer, saved = read_checkpoint(checkpoint)
    model = CrystalDiT(config.model)
    load_weights(model, saved.model, str(checkpoint))
    return Generator(config, model, standardizer, devices()[0] if device == "auto" else device)


def devices() -> list[str]:
    """What ``device`` may be here, best first."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
