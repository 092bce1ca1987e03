"""Matching against pymatgen's own matcher, and against what a crystallographer would say."""

import signal
import time
from dataclasses import astuple

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from common.evaluate import match
from common.evaluate.match import (
    STANDARD,
    TIGHT,
    CandidateMatch,
    CpuTimeout,
    MatchItem,
    Thresholds,
    match_many,
    pool_by_composition,
)
from common.machine import start_worker
from tests.crystals import textbook

NAMES = (
    "rock salt NaCl",
    "wurtzite ZnS",
    "rutile TiO2",
    "perovskite SrTiO3",
    "orthorhombic perovskite CaTiO3",
    "spinel MgAl2O4",
    "baddeleyite ZrO2",
)


def rock_salt(cation: str = "Na", anion: str = "Cl", a: float = 5.64) -> Structure:
    salt = textbook("rock salt NaCl")
    species = [{"Na": cation, "Cl": anion}[site.specie.symbol] for site in salt]
    return Structure(Lattice.cubic(a), species, salt.frac_coords)


def fluorite_tio2() -> Structure:
    fluorite = textbook("fluorite CaF2")
    fluorite.replace_species({"Ca": "Ti", "F": "O"})
    return fluorite


def distorted(
    structure: Structure, seed: int, shift: float = 0.1, strain: float = 0.02
) -> Structure:
    """A copy with every atom moved by about `shift` A and the cell strained at random."""
    rng = np.random.default_rng(seed)
    stretch = np.eye(3) + strain * rng.normal(size=(3, 3))
    cart_coords = structure.cart_coords + shift * rng.normal(size=(len(structure), 3)) / 3**0.5
    frac_coords = structure.lattice.get_fractional_coords(cart_coords)
    return Structure(
        Lattice(structure.lattice.matrix @ stretch), structure.atomic_numbers, frac_coords
    )


def rms_distance(
    predicted: Structure, reference: Structure, thresholds: Thresholds = STANDARD
) -> float | None:
    ((result,),) = match_many([MatchItem((predicted,), reference)], 1, progress=False)
    return {STANDARD: result.rms, TIGHT: result.tight_rms}[thresholds]


def by_pymatgen(predicted: Structure, reference: Structure, thresholds: Thresholds) -> float | None:
    matcher = StructureMatcher(
        stol=thresholds.stol, angle_tol=thresholds.angle_tol, ltol=thresholds.ltol
    )
    found = matcher.get_rms_dist(predicted, reference)
    return None if found is None else float(found[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [0.02, 0.2, 0.6, 1.5])
def test_distance_is_pymatgens(name: str, shift: float) -> None:
    reference = textbook(name)
    for seed in range(1 if name.startswith("spinel") else 3):
        predicted = distorted(reference.get_primitive_structure(), seed, shift, strain=0.06)
        for thresholds in (STANDARD, TIGHT):
            expected = by_pymatgen(predicted, reference, thresholds)
            found = rms_distance(predicted, reference, thresholds)
            assert (found is None) == (expected is None)
            assert found == pytest.approx(expected, abs=1e-6)


def test_distances_cover_matches_and_misses() -> None:
    """The comparison above would be empty if all pairs matched, or none."""
    found = [
        rms_distance(distorted(textbook("rutile TiO2"), seed, shift, 0.06), textbook("rutile TiO2"))
        for seed in range(3)
        for shift in (0.02, 1.5)
    ]
    assert any(value is None for value in found)
    assert any(value is not None for value in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_crystal_matches_itself_in_any_description(name: str) -> None:
    reference = textbook(name)
    moved = reference.copy()
    moved.translate_sites(range(len(moved)), [0.21, 0.32, 0.43])
    skewed = reference.copy()
    skewed.make_supercell([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    larger = reference.copy()
    larger.scale_lattice(reference.volume * 1.7)
    primitive = reference.get_primitive_structure()
    for same in (reference, moved, skewed, larger, primitive):
        assert rms_distance(same, reference, TIGHT) == pytest.approx(0, abs=1e-5)


def test_slightly_wrong_copies_match_and_are_ranked_by_their_error() -> None:
    found = [
        rms_distance(
            distorted(textbook("perovskite SrTiO3"), 1, shift), textbook("perovskite SrTiO3")
        )
        for shift in (0.01, 0.1)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert 0 < found[0] < found[1] < 0.1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (rock_salt("Zn", "S", 5.0), textbook("zinc blende ZnS")),
        (textbook("rutile TiO2"), fluorite_tio2()),
        (textbook("zinc blende ZnS"), textbook("wurtzite ZnS")),
    ],
)
def test_other_prototypes_of_one_composition_do_not_match(
    first: Structure, second: Structure
) -> None:
    assert rms_distance(first, second, TIGHT) is None
    assert rms_distance(second, first, TIGHT) is None


def test_other_compositions_never_match() -> None:
    assert rms_distance(rock_salt("K", "Cl"), rock_salt("Na", "Cl")) is None
    assert rms_distance(rock_salt("Cl", "Na"), rock_salt("Na", "Cl")) is not None, (
        "same by symmetry"
    )


def test_oxidation_states_are_no_difference() -> None:
    charged = rock_salt()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    assert rms_distance(charged, rock_salt()) == pytest.approx(0, abs=1e-6)


def test_tight_is_stricter_than_standard() -> None:
    stretched = Structure(
        Lattice.tetragonal(4.594, 2.959 * 1.4),
        textbook("rutile TiO2").species,
        textbook("rutile TiO2").frac_coords,
    )
    assert rms_distance(stretched, textbook("rutile TiO2"), STANDARD) is not None
    assert rms_distance(stretched, textbook("rutile TiO2"), TIGHT) is None


def _absurd() -> dict[str, Structure]:
    salt = rock_salt()
    nan = salt.frac_coords.copy()
    nan[3, 1] = np.nan
    rng = np.random.default_rng(0)
    return {
        "nan coordinate": Structure(salt.lattice, salt.species, nan),
        "nan lattice": Structure(Lattice(np.full((3, 3), np.nan)), salt.species, salt.frac_coords),
        "infinite": Structure(Lattice.cubic(1e300), salt.species, salt.frac_coords),
        "flat": Structure(
            Lattice([[5, 0, 0], [0, 5, 0], [5, 5, 1e-9]]), salt.species, salt.frac_coords
        ),
        "tiny": Structure(Lattice.cubic(0.2), salt.species, salt.frac_coords),
        "on top": Structure(salt.lattice, salt.species, np.zeros((8, 3))),
        "needle": Structure(Lattice.orthorhombic(0.7, 0.7, 9e3), salt.species, salt.frac_coords),
        "skewed": Structure(
            Lattice([[5, 0, 0], [4000, 5, 0], [3000, 4000, 900]]), salt.species, salt.frac_coords
        ),
        "noise": Structure(Lattice(rng.normal(size=(3, 3)) * 9), salt.species, rng.random((8, 3))),
    }


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("nan coordinate", "broken cell"),
        ("nan lattice", "broken cell"),
        ("infinite", "broken cell"),
        ("flat", "broken cell"),
        ("tiny", "broken cell"),
        ("on top", "overlapping atoms"),
        ("needle", "needle-shaped cell"),
        ("skewed", "needle-shaped cell"),
        ("noise", None),
    ],
)
def test_absurd_predictions_do_not_match(
    name: str, failure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are they reduced, which takes for ever of some."""
    if failure:
        monkeypatch.setattr(match, "reduced_cell", None)
    assert rms_distance(_absurd()[name], rock_salt()) is None
    (result,) = match_many([MatchItem((_absurd()[name],), rock_salt())], 1, progress=False)[0]
    assert result == CandidateMatch(None, None, valid=not failure, failure=failure)


@pytest.mark.parametrize("scale", [0.9, 1.0, 1.1])
def test_the_volume_is_not_in_the_distance_and_told_beside_it(scale: float) -> None:
    """Per atom: the candidate is a supercell, too."""
    candidate = rock_salt() * (2, 1, 1)
    candidate.scale_lattice(2 * rock_salt().volume * scale)
    missed = Structure(rock_salt().lattice, ["Na", "Cl"], [[0, 0, 0], [0.25, 0.25, 0.25]])
    found = match_many([MatchItem((candidate, missed), rock_salt())], 1, progress=False)[0]
    assert found[0].rms == pytest.approx(0.0, abs=1e-6)
    assert found[0].volume_ratio == pytest.approx(scale)
    assert (found[1].rms, found[1].volume_ratio) == (None, None)


def test_a_missing_prediction_is_a_miss() -> None:
    (result,) = match_many([MatchItem((None,), rock_salt())], 1, progress=False)[0]
    assert result == CandidateMatch(None, None, valid=False, failure="nothing predicted")


def test_a_broken_reference_is_a_miss() -> None:
    (result,) = match_many([MatchItem((rock_salt(),), _absurd()["on top"])], 1, progress=False)[0]
    assert result.rms is None
    assert not result.valid


def test_a_slow_pair_is_cut_off_and_says_so() -> None:
    iron = Structure(Lattice.cubic(3), ["Fe"], [[0, 0, 0]]) * (3, 3, 3)
    irregular = distorted(iron, 1, shift=0.4)  # 27 equal atoms: many mappings, about 0.2 s
    items = [MatchItem((distorted(irregular, 0),), irregular)]
    (result,) = match_many(items, 1, progress=False, cpu_seconds=0.001)[0]
    assert result.failure == "timeout"
    assert result.rms is None
    (result,) = match_many(items, 1, progress=False)[0]
    assert result.failure is None
    assert result.rms is not None


@pytest.mark.parametrize("times", [1, 3])
def test_a_timeout_that_was_lost_is_raised_again(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(match, "_AGAIN_AFTER", 0.05)
    lost = 0

    def lose_timeouts() -> None:
        nonlocal lost
        with match._cpu_limit(0.001):
            for _ in range(times):
                try:  # what a destructor does
                    _compute(5)
                except CpuTimeout:
                    lost += 1

    with pytest.raises(CpuTimeout):  # raised once more when the work is done
        lose_timeouts()
    assert lost == times


def _compute(cpu_seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < cpu_seconds:
        pass


def test_validity_asks_both_sides() -> None:
    squeezed = rock_salt().get_primitive_structure()
    squeezed.scale_lattice(0.9**3 / 4)
    results = match_many(
        [
            MatchItem((rock_salt(),), rock_salt()),
            MatchItem((squeezed,), rock_salt()),
            MatchItem((rock_salt(),), squeezed),
        ],
        1,
        progress=False,
    )
    assert [one[0].valid for one in results] == [True, False, False]
    assert all(one[0].rms is not None for one in results), "volume is scaled away"


def _items() -> list[MatchItem]:
    crystals = [
        rock_salt(),
        textbook("zinc blende ZnS"),
        textbook("rutile TiO2"),
        textbook("perovskite SrTiO3"),
        textbook("wurtzite ZnS"),
    ]
    items = [
        MatchItem(tuple(distorted(one, seed + 10 * rank, 0.4) for rank in range(2)), one)
        for seed, one in enumerate(crystal.get_primitive_structure() for crystal in crystals)
    ]
    return [
        *items,
        MatchItem((None, _absurd()["noise"]), rock_salt()),
        MatchItem((), textbook("rutile TiO2")),
    ]


def test_cells_of_other_sizes_are_not_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three atoms of TiO2 cannot be the six of rutile; twice as many can."""
    reduced: list[int] = []
    original = match.reduced_cell

    def counting(structure: Structure, primitive: bool = True) -> match.Cell:
        reduced.append(len(structure))
        return original(structure, primitive)

    monkeypatch.setattr(match, "reduced_cell", counting)
    rutile = textbook("rutile TiO2")
    doubled = rutile * (1, 1, 2)
    three = Structure(Lattice.cubic(4.0), ["Ti", "O", "O"], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0]])
    assert rms_distance(three, rutile) is None
    assert reduced == [6], "the reference alone"
    assert rms_distance(doubled, rutile) == pytest.approx(0, abs=1e-4)
    assert reduced == [6, 6, 12]


def test_results_do_not_depend_on_the_number_of_workers() -> None:
    alone = match_many(_items(), 1, progress=False)
    together = match_many(_items(), 2, progress=False)
    assert alone == together
    assert [len(one) for one in alone] == [2, 2, 2, 2, 2, 2, 0]
    assert all(one[0].rms is not None for one in alone[:5])


def test_nothing_to_match() -> None:
    assert match_many([], progress=False) == []


def test_workers_use_one_thread() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    interrupt = signal.getsignal(signal.SIGINT)
    with threadpool_limits(limits=None):
        start_worker()
        signal.signal(signal.SIGINT, interrupt)
        assert all(library["num_threads"] == 1 for library in threadpool_info())


def test_pooling_adds_candidates_of_the_same_composition_after_the_own_ones() -> None:
    blende, wurtzite = textbook("zinc blende ZnS"), textbook("wurtzite ZnS")
    other = distorted(blende, 0)
    items = [
        MatchItem((blende, None), blende),
        MatchItem((rock_salt(),), rock_salt()),
        MatchItem((other, wurtzite), wurtzite),
    ]
    pooled = pool_by_composition(items)
    assert pooled[0].candidates == (blende, None, other, wurtzite)
    assert pooled[1] == items[1]
    assert pooled[2].candidates == (other, wurtzite, blende, None)
    assert [one.reference for one in pooled] == [one.reference for one in items]


def test_real_predictions_agree_with_pymatgen(data_dir: object) -> None:
    import pandas as pd

    rows = pd.read_csv(f"{data_dir}/mp_20/val.csv.gz", nrows=200)["cif"][::10]
    for seed, text in enumerate(rows):
        reference = Structure.from_str(text, fmt="cif")
        predicted = distorted(reference, seed, 0.3 * (seed % 4), strain=0.04)
        (result,) = match_many([MatchItem((predicted,), reference)], 1, progress=False)[0]
        for found, thresholds in ((result.rms, STANDARD), (result.tight_rms, TIGHT)):
            expected = by_pymatgen(predicted, reference, thresholds)
            assert found == pytest.approx(expected, abs=1e-5), (astuple(thresholds), text)
