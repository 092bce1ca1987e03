"""Sampling crystals from a checkpoint with MindSpore."""

from pathlib import Path

from mindspore import Tensor

from common.config import RunConfig
from common.data.batch import COARSE
from common.diffusion.scaler import Standardizer
from common.diffusion.score import ScoreProcess
from common.machine import ascend_count, cpu_count
from common.precedents import PrecedentIndex
from common.sampling import Array, BaseGenerator, Call, read_checkpoint
from ms_impl.crystal_dit import CrystalDiT
from ms_impl.device import PerBucket, use_device
from ms_impl.sampler import sample_flow, sample_predictor_corrector
from ms_impl.tensors import TensorBatch
from ms_impl.train_dit import load_weights


class Generator(BaseGenerator):
    """A checkpoint that samples crystals with MindSpore; see ``common.sampling.BaseGenerator``."""

    sizes = COARSE
    edges_per_call = 8192  # starting the kernels takes long: few large calls are faster

    def __init__(
        self,
        config: RunConfig,
        model: CrystalDiT,
        standardizer: Standardizer,
        device: str,
        precedents: PrecedentIndex | None = None,
    ) -> None:
        super().__init__(config, standardizer, precedents)
        self.device = use_device(device)
        self.model = model.set_train(False)
        self.network = PerBucket(self.model)

    @property
    def device_name(self) -> str:
        """What samples, in words, for reports."""
        return f"cpu, {cpu_count()} threads" if self.device == "cpu" else "Ascend NPU"

    def solve(
        self, call: Call, seed: int, steps: int, process: ScoreProcess | None
    ) -> tuple[Array, Array]:
        """Runs the sampler; see ``BaseGenerator``."""

        def draw(field: str, level: int) -> Tensor:
            return Tensor(call.draw(seed, field, level))

        def network(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self.network(call.batch, *inputs)

        settings = self.config.diffusion
        batch = TensorBatch.from_batch(call.batch, self.standardizer, self.properties)
        start = tuple(Tensor(array) for array in self.start(call, seed))
        if process is None:
            free, lattice = sample_flow(network, batch, *start, steps, settings)
        else:
            free, lattice = sample_predictor_corrector(
                network, batch, *start, process, settings, draw
            )
        return free.asnumpy(), lattice.asnumpy()


def load(checkpoint: Path, device: str = "auto") -> Generator:
    """Loads a checkpoint folder.

    Raises:
        UserError: if it is unreadable or damaged, does not fit the network it names, or the device
            is not here.
    """
    config, standardizer, precedents, saved = read_checkpoint(checkpoint)
    device = use_device(device)
    model = CrystalDiT(config.model)
    load_weights(model, saved.model, str(checkpoint))
    return Generator(config, model, standardizer, device, precedents)


def devices() -> list[str]:
    """What ``device`` may be here, best first."""
    return ["ascend", "cpu"] if ascend_count() else ["cpu"]
