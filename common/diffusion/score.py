"""DiffCSP++'s two processes: score matching on the torus, and DDPM on the lattice numbers.

Free coordinates take wrapped normal noise, and the network learns its score (paper, eqs. 4 and 5);
lattice numbers are noised by DDPM, and the network learns the noise (eqs. 1-3). Unlike in
DiffCSP++ (arXiv:2402.03992) the variables of the sites themselves are noised, not all coordinates
and then projected, which keeps the noise isotropic on oblique special positions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config import DiffusionConfig
from common.crystal.symmetry import wrap
from common.diffusion.noisy import NoisyCrystals
from common.diffusion.schedule import CosineSchedule, SigmaSchedule
from common.diffusion.wrapped_normal import score

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ScoreProcess:
    """The noise levels t = 1..T of coordinates and lattice."""

    lattice: CosineSchedule
    coordinates: SigmaSchedule

    @classmethod
    def of(cls, timesteps: int, sigma_min: float, sigma_max: float) -> "ScoreProcess":
        """Cosine betas for the lattice, log-spaced sigmas (in cells) for the coordinates."""
        return cls(CosineSchedule(timesteps), SigmaSchedule(timesteps, sigma_min, sigma_max))

    @property
    def timesteps(self) -> int:
        """T."""
        return self.coordinates.num_steps

    def level(self, t: Array) -> NDArray[np.int64]:
        """Noise levels 1..T of times in [0,1)."""
        return np.minimum((t * self.timesteps).astype(np.int64) + 1, self.timesteps)

    def make_noisy(
        self,
        free_params: Array,
        lattice: Array,
        free_noise: Array,
        lattice_noise: Array,
        t: Array,
    ) -> NoisyCrystals:
        """Noises crystals.

        Args:
            free_params, lattice: [B,S,3] and [B,6], the crystals (lattice standardised).
            free_noise, lattice_noise: likewise, standard normal.
            t: [B] in [0,1), which noise levels.
        """
        level = self.level(t)
        sigma = self.coordinates.sigmas[level][:, None, None]
        shift = sigma * free_noise
        target = score(shift, sigma) / np.sqrt(self.coordinates.sigma_norm[level])[:, None, None]
        signal = self.lattice.signal_scale[level][:, None]
        noise = self.lattice.noise_scale[level][:, None]
        return NoisyCrystals(
            t=(level / self.timesteps).astype(np.float32),
            free_params=wrap(free_params + shift).astype(np.float32),
            lattice=(signal * lattice + noise * lattice_noise).astype(np.float32),
            coordinate_target=target.astype(np.float32),
            lattice_target=lattice_noise,
        )


def score_process(config: DiffusionConfig, calls: int | None = None) -> ScoreProcess | None:
    """The noise levels of score matching, or None for flow matching.

    Args:
        config: of the run.
        calls: network calls of the sampler, for fewer levels than were trained: as many as these
            calls are enough for, but two at least; see ``network_calls``.
    """
    if config.kind == "flow":
        return None
    trained = config.timesteps
    levels = trained if calls is None else min(max(2, (calls + 1) // 2), trained)
    # The sigma that training had at t = 1 / levels: a network knows a sigma by its t.
    share = (trained / levels - 1) / (trained - 1)
    lowest = config.sigma_min * (config.sigma_max / config.sigma_min) ** share
    return ScoreProcess.of(levels, lowest, config.sigma_max)


def network_calls(config: DiffusionConfig, calls: int | None = None) -> int:
    """Network calls that the sampler makes per sample.

    Those of score matching are an odd number: two per level, but one at the last, which has no
    corrector. They are 3 at least, and no more than the trained levels need.

    Args:
        config: of the run.
        calls: so many are asked for; the run's own number without it.
    """
    process = score_process(config, calls)
    return calls or config.steps if process is None else 2 * process.timesteps - 1
