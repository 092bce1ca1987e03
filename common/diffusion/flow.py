"""Flow matching on the torus of free coordinates, and on the standardised lattice numbers.

A path runs straight from noise at t = 0 (uniform on the torus; normal for the lattice) to a crystal
at t = 1, the short way round the torus; the network learns its velocity (flow matching: Lipman et
al., arXiv:2210.02747; on tori for crystals: FlowMM, arXiv:2406.04713).

One crystal has many descriptions: any atom of an orbit can stand for it, and the origin can move
along the group's normaliser. Each noise is joined to the description nearest to it, so that paths
are short and seldom cross. The noise stays uniform, and every description is a true one.
"""

from collections import defaultdict
from functools import cache

import numpy as np
from numpy.typing import NDArray

from common.config import DiffusionConfig
from common.crystal.normalizer import normalizer_translations
from common.crystal.symmetry import WyckoffPosition, nearest_zero, space_group, wrap
from common.data.batch import LETTERS, Batch
from common.diffusion.noisy import NoisyCrystals
from common.diffusion.scaler import Standardizer

Array = NDArray[np.float32]


#: A uniform difference on the unit torus has variance 1/12: velocities times this have unit size.
VELOCITY_SCALE = float(np.sqrt(12))

#: Paths from a precedent are so much shorter than those from uniform noise.
PRECEDENT_SCALE = 0.35
#: Units in which crystals differ from their precedents: of coordinates (times ``VELOCITY_SCALE``)
#: and of standardised lattice numbers.
DIFFERENCE_SCALES = (0.1, 0.3)
#: Of a path, at least, when its velocity is what a difference leaves to be gone.
MIN_REMAINING = 1e-3


def error_units(known: NDArray[np.bool_], t: Array, target: str) -> tuple[Array, Array]:
    """Units of the errors of velocities: of coordinates and of lattice numbers, [B] each.

    Args:
        known: [B], which crystals start from a precedent.
        t: [B] in [0,1].
        target: what the network says of these, as in ``common.config.ModelConfig``.
    """
    scales: tuple[Array, ...]
    if target == "difference":
        rest = np.maximum(1 - t, np.float32(MIN_REMAINING))
        scales = tuple(np.float32(scale) / rest for scale in DIFFERENCE_SCALES)
    else:
        scales = (np.full_like(t, PRECEDENT_SCALE),) * 2
    coordinate, lattice = (np.where(known, s, np.float32(1)).astype(np.float32) for s in scales)
    return coordinate, lattice


def starting_points(
    batch: Batch,
    standardizer: Standardizer,
    config: DiffusionConfig,
    uniform: Array,
    normal: Array,
    lattice_normal: Array,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Where paths begin: near the precedent, or at noise where there is none.

    Args:
        batch: B crystals.
        standardizer: of their lattices.
        config: how far from the precedent.
        uniform, normal: [B,S,3], uniform in [0,1) and standard normal.
        lattice_normal: [B,6], standard normal.
        temperature: share of the noise that is added to a precedent.

    Returns:
        Free coordinates [B,S,3] in [0,1) and standardised lattice numbers [B,6].
    """
    known = batch.precedent_mask
    noise = temperature * config.precedent_noise
    lattice_noise = temperature * config.precedent_lattice_noise
    near = wrap(batch.precedent_params + noise * normal)
    near_lattice = standardizer.precedent_lattice(batch) + lattice_noise * lattice_normal
    return (
        np.where(known[:, None, None], near, uniform).astype(np.float32),
        np.where(known[:, None], near_lattice, lattice_normal).astype(np.float32),
    )


def make_path(
    free_params: Array,
    lattice: Array,
    free_noise: Array,
    lattice_noise: Array,
    t: Array,
) -> NoisyCrystals:
    """The points at times t on the paths from noise to crystals; targets are the velocities.

    The coordinates' velocity is in cells per unit time, times ``VELOCITY_SCALE``.

    Args:
        free_params, lattice: [B,S,3] and [B,6], the crystals (lattice standardised).
        free_noise, lattice_noise: likewise, uniform in [0,1) and standard normal.
        t: [B] in [0,1].
    """
    velocity = nearest_zero(free_params - free_noise)
    lattice_velocity = lattice - lattice_noise
    return NoisyCrystals(
        t=t,
        free_params=wrap(free_noise + t[:, None, None] * velocity).astype(np.float32),
        lattice=(lattice_noise + t[:, None] * lattice_velocity).astype(np.float32),
        coordinate_target=(VELOCITY_SCALE * velocity).astype(np.float32),
        lattice_target=lattice_velocity.astype(np.float32),
    )


class Descriptions:
    """The equivalent descriptions of every crystal of a data set, ready for fast look-up.

    Args:
        batch: the crystals.
        max_origins: at most so many discrete origin shifts are kept for a crystal.
    """

    def __init__(self, batch: Batch, max_origins: int = 8) -> None:
        self._free_mask = batch.free_mask
        keys = np.where(batch.site_mask, batch.space_group[:, None] * 64 + batch.letter, 64)
        unique, position = np.unique(keys, return_inverse=True)
        self._position = position.reshape(keys.shape)
        positions = [_position(int(key) // 64, int(key) % 64) for key in unique]
        maps = [p.equivalents for p in positions]
        self._count = np.array([len(linear) for linear, _ in maps])
        self._start = np.concatenate([[0], np.cumsum(self._count)[:-1]])
        self._linear = np.concatenate([linear for linear, _ in maps]).astype(np.float32)
        self._offset = np.concatenate([offset for _, offset in maps]).astype(np.float32)
        self._inverse = np.array([np.linalg.pinv(p.rotations[0]) for p in positions], np.float32)
        groups = [normalizer_translations(int(number)) for number in batch.space_group]
        self._polar = np.array([polar for _, polar in groups], np.float32)
        self._origins = self._all_origins(batch, batch.free_params, max_origins)
        self._precedent_origins = self._origins
        if batch.precedent_mask.any():
            self._precedent_origins = self._all_origins(batch, batch.precedent_params, max_origins)

    def _all_origins(self, batch: Batch, params: Array, max_origins: int) -> Array:
        """Free parameters after every discrete origin shift that keeps all letters: [B,O,S,3].

        Crystals with fewer shifts repeat theirs.
        """
        free = np.where(batch.free_mask, params, 0.0).astype(np.float32)
        result = np.repeat(free[:, None], max_origins, axis=1)
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, (number, mask) in enumerate(zip(batch.space_group, batch.site_mask, strict=True)):
            alike[int(number), *batch.letter[row, mask].tolist()].append(row)
        for (number, *letters), rows in alike.items():
            shifts = _site_shifts(number, tuple(letters))[:max_origins]
            params = free[rows, : len(letters)]
            for k in range(max_origins):
                linear, offset = shifts[k % len(shifts)]
                moved = np.einsum("sij,nsj->nsi", linear, params) + offset
                result[rows, k, : len(letters)] = wrap(moved)
        return result

    def nearest(self, rows: NDArray[np.int64], noise: Array, draws: Array) -> Array:
        """The free parameters, among those of equivalent descriptions, nearest to some noise.

        Args:
            rows: [B], which crystals.
            noise: [B,S,3] in [0,1).
            draws: [B,O,4] uniform in [0,1), each picks one origin to try: a discrete one, and a
                shift along the polar directions.

        Returns:
            [B,S,3] in [0,1), zero where not free.
        """
        position = self._position[rows]
        params = self._moved(self._origins, rows, draws)
        count = self._count[position]
        equivalents = np.arange(count.max(initial=1)) % count[..., None]
        index = self._start[position][..., None] + equivalents
        # [B,O,S,E,3]: every equivalent of every site for every origin
        images = np.einsum("bseij,bosj->bosei", self._linear[index], params, optimize=True)
        images += self._offset[index][:, None]
        mask = self._free_mask[rows]
        difference = nearest_zero(images - noise[:, None, :, None])
        distance = np.where(mask[:, None, :, None], difference**2, 0.0).sum(axis=-1)
        equivalent = distance.argmin(axis=3)
        cost = np.take_along_axis(distance, equivalent[..., None], axis=3)[..., 0].sum(axis=2)
        origin = cost.argmin(axis=1)
        batch_rows, sites = np.arange(len(rows)), np.arange(mask.shape[1])
        chosen = images[batch_rows[:, None], origin[:, None], sites, equivalent[batch_rows, origin]]
        return np.where(mask, wrap(chosen), 0.0).astype(np.float32)

    def anew(
        self, rows: NDArray[np.int64], draws: Array, first_atoms: Array
    ) -> tuple[Array, Array]:
        """Crystals and their precedents in another equivalent description, the same for both.

        What is near in one description is near in all of them.

        Args:
            rows: [B], which crystals.
            draws: [B,4] uniform in [0,1), each picks an origin as in ``nearest``.
            first_atoms: [B,S] uniform in [0,1), each picks the atom of its orbit that comes first.

        Returns:
            The free parameters of crystals and precedents, [B,S,3] in [0,1), zero where not free.
        """
        position, mask = self._position[rows], self._free_mask[rows]
        index = self._start[position] + (first_atoms * self._count[position]).astype(int)
        linear, offset = self._linear[index], self._offset[index]  # [B,S,3,3], [B,S,3]

        def described(origins: Array) -> Array:
            params = self._moved(origins, rows, draws[:, None])[:, 0]
            params = np.einsum("bsij,bsj->bsi", linear, params) + offset
            return np.where(mask, wrap(params), 0.0).astype(np.float32)

        return described(self._origins), described(self._precedent_origins)

    def _moved(self, origins: Array, rows: NDArray[np.int64], draws: Array) -> Array:
        """Free parameters [B,O,S,3] after the origin shifts that draws [B,O,4] pick."""
        picks = (draws[..., 0] * origins.shape[1]).astype(int)
        shifts = np.einsum("boj,bji->boi", draws[..., 1:], self._polar[rows])
        inverse = self._inverse[self._position[rows]]
        moved: Array = origins[rows[:, None], picks] + np.einsum("bsij,boj->bosi", inverse, shifts)
        return moved


@cache
def _position(number: int, letter: int) -> WyckoffPosition:
    return space_group(number).wyckoff[LETTERS[letter]]


@cache
def _site_shifts(number: int, letters: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps [S,3,3], [S,3] of all sites' variables, one per discrete shift that keeps letters."""
    result = []
    for shift in normalizer_translations(number)[0]:
        maps = [_letter_shift(number, letter, tuple(shift.tolist())) for letter in letters]
        if all(step is not None for step in maps):
            kept = [step for step in maps if step is not None]
            result.append((np.stack([m[0] for m in kept]), np.stack([m[1] for m in kept])))
    return result


@cache
def _letter_shift(
    number: int, letter: int, shift: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    linear, offset = _position(number, letter).equivalents_after(np.array(shift))
    return (linear[0], offset[0]) if len(linear) else None
