"""What the cost of sampling is fitted to, how memory is measured, and the plot."""

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from common.data.batch import symmetry_only
from common.size_cost import (
    MANY_ATOMS,
    Law,
    PeakMemory,
    SizeCost,
    in_flight,
    laws_of,
    memories,
    requests_by_size,
    to_png,
)

MIB = 2**20


def costs() -> list[SizeCost]:
    """Of three groups and two sizes each, in proportion to size."""
    return [
        SizeCost(group, sites, sites * factor, 1, 1, 1e-3 * size, 100.0 * size)
        for group, factor in ((1, 1), (2, 2), (10, 4))
        for sites in (4, 8)
        for size in (sites * sites * factor,)
    ]


def test_a_line_is_found_whatever_its_slope() -> None:
    sizes = [4, 16, 100, 2704]
    law = Law.fit(sizes, [0.5 + 0.25 * size for size in sizes])
    assert law.constant == pytest.approx(0.5)
    assert law.slope == pytest.approx(0.25)
    np.testing.assert_allclose(law.at(np.array([0.0, 8.0])), [0.5, 2.5])
    assert 0 < law.exponent < 1  # of a line with a constant


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_exponent_of_a_power(exponent: float) -> None:
    sizes = np.array([4.0, 30.0, 500.0])
    law = Law.fit(sizes.tolist(), (3 * sizes**exponent).tolist())
    assert law.exponent == pytest.approx(exponent)


def test_small_sizes_weigh_as_much_as_large_ones() -> None:
    """One cost is a tenth too high: the line's share of that error is relative."""
    sizes = [1.0, 1000.0]
    law = Law.fit([*sizes, *sizes], [1.0, 1000.0, 1.1, 1100.0])
    assert law.at(np.array(sizes))[0] == pytest.approx(1.045, abs=0.01)
    assert law.at(np.array(sizes))[1] == pytest.approx(1045, abs=10)


def test_sizes_reach_cells_of_52_atoms() -> None:
    crystals = [symmetry_only(r.space_group, r.sites) for r in requests_by_size("asymmetric")]
    sizes = [len(crystal.sites) * crystal.num_primitive_atoms for crystal in crystals]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (4, 52 * 52)
    shares = {crystal.num_primitive_atoms / len(crystal.sites) for crystal in crystals}
    assert shares == {1, 2, 4}
    assert all(
        max(c.num_primitive_atoms for c in crystals if c.space_group == group) == 52
        for group in (1, 2, 10)
    )


def test_large_crystals_have_as_many_atoms_as_is_said() -> None:
    made = requests_by_size("asymmetric", (MANY_ATOMS,))
    crystals = [symmetry_only(request.space_group, request.sites) for request in made]
    assert [crystal.num_primitive_atoms for crystal in crystals] == [200, 200, 200]
    assert [len(crystal.sites) for crystal in crystals] == [50, 100, 200]


def test_lines_leave_large_crystals_out() -> None:
    """They may cost whatever they do, and be off the line."""
    known = costs()
    large = SizeCost(1, 200, 200, 2, 43264, 77.0, 7e9)
    assert large.is_large
    assert not SizeCost(1, 52, 52, 2, 4096, 1.0, None).is_large
    laws = laws_of([*known, large])
    assert laws == laws_of(known)
    assert laws["seconds"].slope == pytest.approx(1e-3)
    assert laws["bytes"].slope == pytest.approx(100)
    assert laws["seconds"].exponent == pytest.approx(1)
    assert set(laws_of([*known, replace(large, memory=None)])) == {"seconds"}
    assert large.seconds > 1.5 * laws["seconds"].at(large.size)


def test_memory_at_once_is_that_of_all_crystals_in_flight() -> None:
    one, two = SizeCost(1, 4, 4, 8, 1, 1.0, 100.0), SizeCost(1, 8, 8, 2, 1, 1.0, 300.0)
    assert in_flight([one, two]) == 800
    assert in_flight([one, replace(two, memory=None)]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and resets the peak")
def test_memory_is_what_the_block_took_at_most() -> None:
    np.ones(200 * MIB // 8).sum()  # an earlier peak, which must not count
    with PeakMemory() as nothing:
        pass
    with PeakMemory() as much:
        block = np.ones(100 * MIB // 8)
        del block
        np.ones(60 * MIB // 8).sum()
    assert nothing.grown is not None
    assert much.grown is not None
    assert nothing.grown < 10 * MIB
    assert 95 * MIB < much.grown < 120 * MIB


def test_memory_counts_only_where_all_is_known() -> None:
    known = costs()
    assert memories(known) == [100.0 * cost.size for cost in known]
    assert memories([*known, replace(known[0], memory=None)]) == []


def test_plot_has_a_panel_for_memory_if_it_is_known() -> None:
    both = imread(io.BytesIO(to_png(costs(), "title")))
    time_alone = imread(
        io.BytesIO(to_png([replace(cost, memory=None) for cost in costs()], "title"))
    )
    assert both.shape[1] == 2 * time_alone.shape[1]
    assert np.unique(both.reshape(-1, both.shape[-1]), axis=0).shape[0] > 50  # something is drawn


def test_plot_shows_large_crystals_without_moving_the_line() -> None:
    large = SizeCost(1, 200, 200, 2, 43264, 40.0, 4e6)
    without, beside = (to_png([*costs(), *more], "title") for more in ([], [large]))
    assert imread(io.BytesIO(without)).shape == imread(io.BytesIO(beside)).shape
    assert without != beside
