"""What a model must beat: crystals made without one, from the same symmetry.

Both controls are told the true space group and sites, as the model is, and guess the volume from
the composition with the training set's element volumes.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

from common.crystal.lattice import k_to_lattice
from common.crystal.normalizer import letter_permutations
from common.crystal.structure import Crystal, Site
from common.data.batch import Batch, BatchItem, collate
from common.diffusion.noise import noise
from common.diffusion.scaler import Standardizer
from common.elements import element_table, pair_differences

Array = NDArray[np.float64]

#: Orders of elements on alike sites that are tried at most.
_MAX_ORDERS = 720


def random_draw(
    crystals: Sequence[Crystal],
    keys: Sequence[str],
    standardizer: Standardizer,
    seed: int,
    sample: int = 0,
) -> list[Crystal]:
    """Free coordinates uniform, lattice shape as in the crystal system, volume guessed.

    Args:
        crystals: of which only the symmetry is used.
        keys: name each of them in the noise.
        standardizer: fitted on the training set.
        seed, sample: of the noise.
    """
    batch = collate([BatchItem(crystal, {}) for crystal in crystals], "asymmetric")
    z = np.stack([noise(seed, key, sample, "control lattice", 0, (6,)) for key in keys])
    z[:, 5] = 0.0  # the volume is the guess itself
    k = standardizer.lattice_center(batch) + standardizer.lattice_scales(batch) * z
    return [
        Crystal(
            crystal.space_group,
            _with_params(
                crystal,
                noise(seed, key, sample, "control free", 0, (len(crystal.sites), 3), "uniform"),
            ),
            lattice,
        )
        for crystal, key, lattice in zip(crystals, keys, k_to_lattice(k), strict=True)
    ]


def _with_params(crystal: Crystal, params: NDArray[np.float32]) -> tuple[Site, ...]:
    masked = [
        np.where(position.free_mask, row.astype(float), 0.0)
        for position, row in zip(crystal.positions, params, strict=True)
    ]
    return tuple(
        Site(site.atomic_number, site.letter, (float(x), float(y), float(z)))
        for site, (x, y, z) in zip(crystal.sites, masked, strict=True)
    )


class NearestTemplate:
    """The training crystal with the same prototype and the most similar elements, substituted.

    Args:
        training: crystals to choose from.
        standardizer: fitted on them.
    """

    def __init__(self, training: Sequence[Crystal], standardizer: Standardizer) -> None:
        self._standardizer = standardizer
        self._difference = pair_differences(element_table()).mean(axis=-1)
        self._templates: dict[str, list[tuple[Crystal, tuple[int, ...]]]] = defaultdict(list)
        for crystal in training:
            key, roles = roles_of(crystal)
            self._templates[key].append((crystal, roles))

    def __call__(self, crystal: Crystal) -> Crystal | None:
        """The substituted template, or None if training has no crystal of this prototype."""
        key, roles = roles_of(crystal)
        best: tuple[float, Crystal, dict[int, int]] | None = None
        for template, filled in self._templates.get(key, []):
            for order in _orders(key, roles):
                cost = float(self._difference[list(filled), list(order)].sum())
                if best is None or cost < best[0]:
                    best = cost, template, dict(zip(filled, order, strict=True))
        return None if best is None else self._substitute(best[1], best[2])

    def _substitute(self, template: Crystal, elements: dict[int, int]) -> Crystal:
        """Other elements, and the lattice scaled by the ratio of the guessed volumes."""
        sites = tuple(
            Site(elements[site.atomic_number], site.letter, site.free_params)
            for site in template.sites
        )
        result = Crystal(template.space_group, sites, template.lattice)
        volume = [self._guess(crystal) for crystal in (result, template)]
        scale = (volume[0] / volume[1]) ** (1 / 3)
        return Crystal(template.space_group, sites, template.lattice * scale)

    def _guess(self, crystal: Crystal) -> float:
        table = self._standardizer.element_volume
        return float(sum(table[z] * count for z, count in crystal.formula_counts.items()))


def roles_of(crystal: Crystal) -> tuple[str, tuple[int, ...]]:
    """The prototype of a crystal, and its elements in the order of the prototype's roles.

    A role is the set of Wyckoff letters that one element occupies; letters are those of the
    description, among those of the group's normaliser, that sorts first.
    """
    letters = list(crystal.group.wyckoff)
    best: tuple[list[str], tuple[int, ...]] | None = None
    for permutation in letter_permutations(crystal.space_group):
        table = dict(zip(letters, permutation, strict=True))
        occupied: dict[int, list[str]] = defaultdict(list)
        for site in crystal.sites:
            occupied[site.atomic_number].append(table[site.letter])
        pairs = sorted(("".join(sorted(role)), z) for z, role in occupied.items())
        roles = [role for role, _ in pairs]
        if best is None or roles < best[0]:
            best = roles, tuple(z for _, z in pairs)
    assert best is not None
    return f"{crystal.space_group} {' '.join(best[0])}", best[1]


def _orders(key: str, elements: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The ways to give elements to roles: those on alike roles can be exchanged."""
    roles = key.split(" ")[1:]
    groups: dict[str, list[int]] = defaultdict(list)
    for role, element in zip(roles, elements, strict=True):
        groups[role].append(element)
    choices = product(*(permutations(group) for group in groups.values()))
    # Roles are sorted, so groups follow one another.
    orders = (tuple(z for group in choice for z in group) for choice in choices)
    return [order for order, _ in zip(orders, range(_MAX_ORDERS), strict=False)]


def fit_standardizer(crystals: Sequence[Crystal]) -> Standardizer:
    """The statistics of training crystals without properties."""
    batch: Batch = collate([BatchItem(crystal, {}) for crystal in crystals], "asymmetric")
    return Standardizer.fit(batch)
