"""The distances behind the choice of a sample, against pymatgen's matcher."""

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from common.crystal.structure import Crystal, Site
from common.evaluate.match import Cell, reduced_cell
from common.selection import _distances, choose_sample


def perovskites(spread: float) -> list[Crystal]:
    """Tilted perovskites (Pnma) whose numbers differ by about as much as `spread`."""
    random = np.random.default_rng(0)
    samples = []
    for _ in range(4):
        x = spread * random.normal(size=8)
        sites = (
            Site(20, "c", (0.036 + x[0], 0.0, 0.993 + x[1])),
            Site(22, "b"),
            Site(8, "c", (0.484 + x[2], 0.0, 0.071 + x[3])),
            Site(8, "d", (0.289 + x[4], 0.037 + x[5], 0.711 + x[6])),
        )
        samples.append(Crystal(62, sites, np.diag([5.44, 7.64, 5.38]) * (1 + x[7])))
    return samples


@pytest.mark.parametrize("spread", [0.005, 0.05, 0.2])
def test_distances_are_pymatgens(spread: float) -> None:
    samples = perovskites(spread)
    matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10, primitive_cell=False)
    structures = [sample.to_structure(primitive=True) for sample in samples]
    found = _distances(samples)
    for i, first in enumerate(structures):
        assert found[i, i] == 0
        for j in range(i):
            match = matcher.get_rms_dist(first, structures[j])
            lengths = abs(np.log(first.volume / structures[j].volume)) / 3
            expected = lengths + (0.5 if match is None else match[0])
            assert found[i, j] == found[j, i] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("place", range(5))
def test_the_sample_nearest_to_all_others_is_chosen(place: int) -> None:
    """Not the one that differs, wherever it stands."""
    alike, (other, *_) = perovskites(0.005), perovskites(0.2)
    samples = [*alike[:place], other, *alike[place:]]
    choice = choose_sample(samples)
    assert choice.samples == 5
    assert choice.sample != place
    sums = _distances(samples).sum(axis=1)
    assert choice.sample == np.argmin(sums)
    assert choice.consensus == pytest.approx(sums.min() / 4)


@pytest.mark.parametrize("lattice", [(1e4, 1e-2, 1e-1), (2e3, 2.0, 4.0)], ids=["absurd", "needle"])
def test_broken_cells_are_not_reduced(
    lattice: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes hours, or all memory; they match nothing, and nothing is like them."""
    alike = perovskites(0.005)
    broken = Crystal(62, alike[0].sites, np.diag(lattice))
    reduced: list[float] = []

    def recorded(structure: Structure, primitive: bool = True) -> Cell:
        assert max(structure.lattice.abc) < 10, "a broken cell is reduced"
        reduced.append(structure.volume)
        return reduced_cell(structure, primitive)

    monkeypatch.setattr("common.evaluate.match.reduced_cell", recorded)
    assert choose_sample([broken, *alike]).sample > 0
    assert len(reduced) == len(alike)
    assert choose_sample([broken, broken]).consensus == 0.5
    lengths = abs(np.log(np.prod(lattice) / np.linalg.det(alike[0].lattice))) / 3
    assert _distances([broken, alike[0]])[0, 1] == pytest.approx(0.5 + lengths)
