"""The template prior: exact compositions, sensible ranks, faithful files, and a correct fit."""

import csv
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure
from scipy.optimize import check_grad

from common.composition import Formula, SiteRequest, check_sites, parse_formula
from common.crystal.structure import Crystal, Site
from common.crystal.wyckoff import wyckoff_summary
from common.data.cif import parse_cif
from common.data.label import label_structure
from common.data.sources import CsvSource
from common.data.store import Record, fingerprint
from common.errors import UserError
from common.evaluate.symmetry_prediction import evaluate_prior
from common.language.analogues import AnalogueIndex
from common.legal_sites import SiteStatistics, enumerate_sites
from common.precedents import load_precedents
from common.prior import SHIPPED, SymmetryCandidate, TemplatePrior, load_prior
from common.prior_fit import Comparison, _log_likelihood, fit_prior
from common.reference import MAX_COMPARED
from common.templates import (
    MAX_PERMUTATIONS,
    assign,
    cheapest_automorphism,
    permutes_all,
    role_permutations,
)

STATISTICS = SiteStatistics({}, {}, {})


def cubic(number: int, a: float, *sites: tuple[int, str]) -> Crystal:
    return Crystal(number, tuple(Site(z, x) for z, x in sites), a * np.eye(3))


def textbook() -> list[Record]:
    """Rock salts, CsCl, zincblende, perovskites (lattice constants in A) and one rutile."""
    rows = []
    for a, b, size in [
        (11, 17, 5.64), (19, 17, 6.29), (3, 9, 4.03), (12, 8, 4.21), (20, 8, 4.81), (37, 35, 6.89)
    ]:  # fmt: skip
        rows.append(cubic(225, size, (a, "a"), (b, "b")))
    for a, b, size in [(55, 17, 4.12), (55, 35, 4.29), (81, 17, 3.83)]:
        rows.append(cubic(221, size, (a, "a"), (b, "b")))
    for a, b, size in [(30, 16, 5.41), (31, 33, 5.65), (48, 52, 6.48)]:
        rows.append(cubic(216, size, (a, "a"), (b, "c")))
    for a, b, size in [(38, 22, 3.905), (56, 22, 4.0), (19, 73, 3.99), (20, 22, 3.84)]:
        rows.append(cubic(221, size, (a, "a"), (b, "b"), (8, "c")))
    rutile = Site(8, "f", (0.305, 0.0, 0.0))
    rows.append(Crystal(136, (Site(22, "a"), rutile), np.diag([4.594, 4.594, 2.959])))
    return [
        Record(f"x-{i:02d}", c, None, {"band_gap": 0.5 * i, "formation_energy": -1.0})
        for i, c in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def prior() -> TemplatePrior:
    return fit_prior(textbook(), {"name": "textbook"})


@pytest.fixture(scope="module")
def shipped() -> TemplatePrior:
    return TemplatePrior.load(SHIPPED)


def assert_legal(candidates: list[SymmetryCandidate], counts: dict[int, int]) -> None:
    formula = Formula(tuple(sorted(counts.items())))
    assert candidates
    for c in candidates:
        requests = [SiteRequest(z, letter) for z, letter in c.sites]
        assert check_sites(requests, c.space_group, formula) == c.z
    probabilities = [c.probability for c in candidates]
    assert probabilities == sorted(probabilities, reverse=True)
    assert min(probabilities) > 0
    assert sum(probabilities) <= 1 + 1e-9
    assert len(
        {(c.space_group, wyckoff_summary(c.space_group).canonical(c.sites)) for c in candidates}
    ) == len(candidates)


@pytest.mark.parametrize(
    ("formula", "group"),
    [("NaBr", 225), ("MgO", 225), ("CsI", 221), ("ZnSe", 216), ("BaHfO3", 221)],
)
def test_alike_elements_give_the_template(prior: TemplatePrior, formula: str, group: int) -> None:
    counts = parse_formula(formula).counts
    candidates = prior.rank(counts)
    assert_legal(candidates, counts)
    assert candidates[0].space_group == group
    assert candidates[0].source == "template"


def test_cations_take_the_right_roles(prior: TemplatePrior) -> None:
    """Sr and Ti are not interchangeable: the large cation is the one amid twelve oxygens."""
    best = prior.rank(parse_formula("SrZrO3").counts)[0]
    summary = wyckoff_summary(221)
    assert best.space_group == 221
    assert summary.canonical(best.sites) == summary.canonical([(38, "a"), (40, "b"), (8, "c")])


def test_unseen_stoichiometry_is_enumerated(prior: TemplatePrior) -> None:
    counts = parse_formula("Ca3Al2Si3O12").counts
    candidates = prior.rank(counts, top=10)
    assert_legal(candidates, counts)
    assert len(candidates) == 10
    assert {c.source for c in candidates} == {"enumeration"}
    assert sum(c.probability for c in candidates) <= 1


@pytest.mark.parametrize(
    ("fixed", "check"),
    [
        ({"space_group": 47}, lambda c: c.space_group == 47),
        ({"z": 3}, lambda c: c.z == 3),
        ({"space_group": 225, "z": 4}, lambda c: (c.space_group, c.z) == (225, 4)),
        ({"units": 2}, lambda c: 2 in (c.z, c.z / wyckoff_summary(c.space_group).centering)),
        ({"sites": ((11, "a"), (17, "b"))}, lambda c: sorted(c.sites) == [(11, "a"), (17, "b")]),
    ],
)
def test_what_is_fixed_is_kept(prior: TemplatePrior, fixed, check) -> None:
    counts = {11: 1, 17: 1}
    candidates = prior.rank(counts, top=8, **fixed)
    assert_legal(candidates, counts)
    assert all(check(c) for c in candidates)


@pytest.mark.parametrize("formula", ["SrTiO3", "Zr3NbAl12", "U4Be2C5", "H19C7N5O2"])
def test_fewer_are_the_first_of_more(shipped: TemplatePrior, formula: str) -> None:
    counts = parse_formula(formula).counts
    for rank in (shipped.rank, shipped.rank_new):
        for top in (1, 5):
            assert rank(counts, top=top) == rank(counts, top=20)[:top]


def test_impossible_gives_nothing(prior: TemplatePrior) -> None:
    assert prior.rank({11: 1, 17: 1}, space_group=227, z=3) == []


def test_property_helps(shipped: TemplatePrior) -> None:
    """Told the property, the prior explains the training structures better than untold."""
    weights = shipped.metadata["weights"]
    untold = weights["none"]["mean_log_likelihood"]
    for name, low, high in (("band_gap", 0.0, 5.0), ("formation_energy", -3.5, -0.5)):
        assert weights[name]["mean_log_likelihood"] > untold
        first, second = (shipped.rank({38: 1, 22: 1, 8: 3}, {name: x}) for x in (low, high))
        assert [c.probability for c in first] != [c.probability for c in second]


def brute_force(counts: dict[int, int], number: int, units: int) -> set:
    """Every legal assignment, by trying all numbers of sites on all letters for all elements."""
    summary = wyckoff_summary(number)
    per_element = []
    for z, n in counts.items():
        ranges = [
            range(min(n * units // m, 1 if dof == 0 else 99) + 1)
            for m, dof in summary.letters.values()
        ]
        fits = [
            ((z, x),)
            for x in itertools.product(*ranges)
            if sum(k * m for k, (m, _) in zip(x, summary.letters.values(), strict=True))
            == n * units
        ]
        per_element.append(fits)
    found = set()
    for combination in itertools.product(*per_element):
        used = Counter()
        sites = []
        for ((z, numbers),) in combination:
            for letter, k in zip(summary.letters, numbers, strict=True):
                used[letter] += k
                sites += [(z, letter)] * k
        if all(k <= 1 for x, k in used.items() if summary.letters[x][1] == 0):
            found.add(summary.canonical(sites))
    return found


@pytest.mark.parametrize(
    ("formula", "number", "units"),
    [("NaCl", 225, 4), ("SrTiO3", 221, 1), ("CaF2", 136, 2), ("FeS2", 205, 4), ("SiO2", 152, 3)],
)
def test_enumeration_is_complete(formula: str, number: int, units: int) -> None:
    counts = parse_formula(formula).counts
    legal = enumerate_sites(counts, STATISTICS, space_group=number, units=units, top=1000)
    found = {wyckoff_summary(number).canonical(x.sites) for x in legal if x.units == units}
    expected = brute_force(counts, number, units)
    assert expected
    assert found == expected


def test_as_many_as_are_asked_for_with_the_formula_units_given() -> None:
    """Cells of as many formula units per lattice point are not looked for and left out later."""
    prior, counts = TemplatePrior.load(), parse_formula("SrTiO3").counts
    assert [c.z for c in prior.rank(counts, z=1)] == [1] * 20
    for number, z, units in ((5, 4, None), (5, 4, 2), (5, 4, 4)):
        ranked = prior.rank(parse_formula("SiO2").counts, space_group=number, z=z, units=units)
        assert [c.z for c in ranked] == [z] * 20
    assert prior.rank(counts, z=4, units=3) == []


@pytest.mark.parametrize(("formula", "number", "units"), [("NaCl", 227, 3), ("SrTiO3", 230, 1)])
def test_nothing_legal_is_seen(formula: str, number: int, units: int) -> None:
    counts = parse_formula(formula).counts
    assert brute_force(counts, number, units) == set()
    legal = enumerate_sites(counts, STATISTICS, space_group=number, units=units)
    assert [x for x in legal if x.units == units] == []


@pytest.mark.parametrize(
    ("formula", "number", "atoms"), [("SrTiO3", 230, 40), ("SrTiO3", 169, 30), ("Al2O3", 178, 30)]
)
def test_groups_of_large_cells_only_are_found(
    prior: TemplatePrior, formula: str, number: int, atoms: int
) -> None:
    """Nothing is legal there within 20 atoms, which is as far as is looked elsewhere."""
    counts = parse_formula(formula).counts
    candidates = prior.rank(counts, space_group=number)
    assert_legal(candidates, counts)
    centering = wyckoff_summary(number).centering
    assert min(c.z for c in candidates) * sum(counts.values()) == atoms * centering


@settings(
    max_examples=30,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(st.dictionaries(st.integers(1, 100), st.integers(1, 8), min_size=1, max_size=6))
def test_every_formula_gets_an_answer(counts: dict[int, int]) -> None:
    divisor = np.gcd.reduce(list(counts.values()))
    formula = {z: n // int(divisor) for z, n in counts.items()}
    assert_legal(load_prior().rank(formula, top=5), formula)


def test_file_is_faithful_and_order_free(prior: TemplatePrior, tmp_path: Path) -> None:
    again = fit_prior(reversed(textbook()), {"name": "textbook"})
    for name, each in (("a", prior), ("b", again)):
        each.save(tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    loaded = TemplatePrior.load(tmp_path / "a.parquet")
    assert loaded.hash == prior.hash
    for counts in ({11: 1, 35: 1}, {38: 1, 40: 1, 8: 3}, {14: 1}):
        assert loaded.rank(counts) == prior.rank(counts)


def test_every_polymorph_is_known_again() -> None:
    """Of SiO2 there are more than of any other formula."""
    prior = TemplatePrior.load()
    rows = prior.reference.rows_of_formula(parse_formula("SiO2").counts)
    assert len(rows) > 2 * MAX_COMPARED
    for row in rows:
        nearest = prior.nearest(prior.reference.crystal(row))
        assert nearest is not None
        assert (nearest.material_id, nearest.kind) == (
            prior.reference.material_id(row),
            "same composition",
        )


def test_hash_names_what_was_learned(prior: TemplatePrior) -> None:
    """Not what the rows were called."""
    rows = textbook()
    assert fit_prior(rows, {"name": "other"}).hash == prior.hash
    assert fit_prior(rows[1:], {"name": "textbook"}).hash != prior.hash


def test_hash_tells_elements_coordinates_and_properties(tmp_path: Path) -> None:
    """Of priors with the same weights, too."""
    known = [cubic(225, edge, (z, "a"), (8, "b")) for edge, z in ((4.2, 12), (4.2, 20), (4.3, 12))]
    records = [Record("x", crystal) for crystal in known]
    records.append(Record("x", known[0], properties={"band_gap": 4.8, "formation_energy": None}))
    priors = [fit_prior([record]) for record in records]
    assert all(prior.metadata["weights"] == priors[0].metadata["weights"] for prior in priors)
    assert len({prior.hash for prior in priors}) == 4
    for prior in priors:
        prior.save(tmp_path / "prior.parquet")
        assert TemplatePrior.load(tmp_path / "prior.parquet").hash == prior.hash


def without_gap(record: Record) -> Record:
    properties = {**record.properties, "band_gap": None}
    return Record(record.material_id, record.crystal, None, properties)


def test_rows_without_a_property_are_no_queries_of_its_fit(prior: TemplatePrior) -> None:
    """Only as many as there are of those that have it; the other fits are as ever."""
    rows = [without_gap(record) if index % 3 else record for index, record in enumerate(textbook())]
    weights = fit_prior(rows).metadata["weights"]
    whole = prior.metadata["weights"]
    assert np.isfinite(weights["band_gap"]["mean_log_likelihood"])
    assert weights["band_gap"]["features"] != [*weights["none"]["features"], 0.5, 0.5]
    assert weights["none"] == whole["none"]
    assert weights["formation_energy"] == whole["formation_energy"]


def test_a_property_that_no_row_has_changes_nothing() -> None:
    prior = fit_prior(map(without_gap, textbook()))
    for formula in ("NaBr", "BaHfO3", "Ca3Al2Si3O12"):
        counts = parse_formula(formula).counts
        assert prior.rank(counts, {"band_gap": 2.0}) == prior.rank(counts)


@pytest.mark.parametrize("rows", [1, len(textbook())])
def test_metadata_are_json(rows: int, tmp_path: Path) -> None:
    """Which knows no infinity; of a single row, too, of which no likelihood is known."""
    prior = fit_prior(map(without_gap, textbook()[:rows]))
    prior.save(tmp_path / "p.parquet")
    (text,) = pq.read_schema(tmp_path / "p.parquet").metadata.values()
    weights = json.loads(text, parse_constant=pytest.fail)["weights"]
    assert (weights["none"]["mean_log_likelihood"] is None) == (rows == 1)
    assert weights["band_gap"]["mean_log_likelihood"] is None


def test_a_prior_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "prior.parquet"
    rows = textbook()
    fit_prior(rows[:4]).save(path)
    first = load_prior(path)
    assert load_prior(path) is first
    fit_prior(rows[4:]).save(path)
    assert load_prior(path).hash == TemplatePrior.load(path).hash != first.hash


def test_the_shipped_prior_is_read_once(tmp_path: Path) -> None:
    """For questions and for precedents, too."""
    shipped = load_prior()
    assert AnalogueIndex.shipped(17)._prior is shipped
    trained_on = shipped.metadata["source"]["fingerprint"]
    assert load_precedents(tmp_path, trained_on, np.ones(119))._known is shipped.reference


def test_damage_is_reported(prior: TemplatePrior, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    prior.save(path)
    data = bytearray(path.read_bytes())
    for damaged in (data[: len(data) // 2], b"", b"PAR1" * 8, _flipped(data)):
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError) as error:
            TemplatePrior.load(path)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError):
        TemplatePrior.load(tmp_path / "absent")


def _flipped(data: bytearray) -> bytearray:
    """With one bit of the first column's data changed."""
    copy = bytearray(data)
    copy[60] ^= 4
    return copy


def test_gradient_of_the_fit() -> None:
    generator = np.random.default_rng(3)
    correct = generator.random((5, 40)) < 0.2
    correct[0] = False
    comparison = Comparison(
        generator.random((5, 40, 3)).astype(np.float32),
        generator.random((5, 40)) < 0.8,
        correct,
        1.0,
    )
    point = np.array([0.7, 1.3, 0.2, -3.0, 0.5])
    error = check_grad(
        lambda x: _log_likelihood(x, comparison)[0],
        lambda x: _log_likelihood(x, comparison)[1],
        point,
        epsilon=1e-3,
    )
    assert error < 2e-2


def test_likelihood_against_the_formula() -> None:
    """One query, two matchings, one correct: ln((k1 + e) / (c + k1 + k2 + 2 e))."""
    comparison = Comparison(
        np.array([[[1.0], [2.0]]], dtype=np.float32),
        np.ones((1, 2), dtype=bool),
        np.array([[True, False]]),
        1.0,
    )
    k1, k2, e, c = np.exp(-0.5), np.exp(-1.0), np.exp(-2.0), np.exp(0.3)
    value, _ = _log_likelihood(np.array([0.5, -2.0, 0.3]), comparison)
    assert value == pytest.approx(np.log((k1 + e) / (c + k1 + k2 + 2 * e)), abs=1e-6)


def test_equivalent_crystals_share_a_template() -> None:
    a = assign(cubic(221, 4.0, (38, "a"), (22, "b"), (8, "c")))
    b = assign(cubic(221, 4.0, (22, "a"), (38, "b"), (8, "d")))
    assert a.template == b.template
    assert a.roles == b.roles
    rock_salt = assign(cubic(225, 5.0, (11, "a"), (17, "b"))).template
    assert set(rock_salt.automorphisms) == {(0, 1), (1, 0)}
    assert set(a.template.automorphisms) == {(0, 1, 2)}


def test_role_permutations_keep_counts() -> None:
    assert set(role_permutations((1, 1, 3))) == {(0, 1, 2), (1, 0, 2)}
    assert len(role_permutations((1, 1, 1, 2, 2))) == 12
    assert permutes_all((1,) * 6)


@pytest.mark.parametrize("stoichiometry", [(1,) * 12, (1,) * 7 + (2,) * 8 + (3,)])
def test_role_permutations_of_many_equal_roles_are_a_small_group(
    stoichiometry: tuple[int, ...],
) -> None:
    assert not permutes_all(stoichiometry)
    group = role_permutations(stoichiometry)
    assert group[0] == tuple(range(len(stoichiometry)))
    assert 100 < len(set(group)) == len(group) <= MAX_PERMUTATIONS
    assert all(tuple(stoichiometry[role] for role in each) == stoichiometry for each in group)
    products = {tuple(a[role] for role in b) for a in group[::7] for b in group[::7]}
    assert products <= set(group)


@pytest.mark.parametrize(
    ("number", "letters"), [(1, "aaaaa"), (2, "abcdef"), (2, "iiabi"), (216, "abcd"), (225, "abc")]
)
def test_cheapest_automorphism(number: int, letters: str) -> None:
    """Against all of them, one after the other."""
    template = assign(cubic(number, 5.0, *enumerate(letters, start=1))).template
    assert len(template.automorphisms) > 1
    for seed in range(20):
        costs = np.random.default_rng(seed).random((len(letters),) * 2)
        sums = {
            each: sum(costs[pair] for pair in enumerate(each)) for each in template.automorphisms
        }
        assert cheapest_automorphism(template, costs) == min(sums, key=sums.__getitem__)


def test_nearest_has_the_formula_that_z_counts() -> None:
    oxygen = cubic(221, 3.0, (8, "a"))
    nearest = fit_prior([Record("x", oxygen)]).nearest(oxygen)
    assert nearest is not None
    assert nearest.formula == "O"


def test_prior_of_crystals_with_many_equal_roles() -> None:
    """Of 12 elements there are 479 million permutations."""
    known, wanted = (
        Crystal(1, tuple(Site(z, "a", (z / 40, 0.1, 0.2)) for z in zs), 8 * np.eye(3))
        for zs in (range(20, 32), range(21, 33))
    )
    prior = fit_prior([Record("x", known)])
    first = prior.rank(wanted.formula_counts)[0]
    assert (first.source, first.key) == ("template", wanted.symmetry_key)
    nearest = prior.nearest(known)
    assert nearest is not None
    assert nearest.material_id == "x"


def test_reference_crystals_are_exact_enough(prior: TemplatePrior) -> None:
    by_id = {record.material_id: record.crystal for record in textbook()}
    matcher = StructureMatcher()
    for row in range(len(prior.reference)):
        original = by_id[prior.reference.material_id(row)]
        kept = prior.reference.crystal(row)
        rms, _ = matcher.get_rms_dist(original.to_structure(), kept.to_structure())
        assert rms < 1e-4
        assert np.allclose(np.linalg.det(original.lattice), np.linalg.det(kept.lattice), rtol=1e-5)


def test_nearest_is_itself_its_prototype_or_nothing(prior: TemplatePrior) -> None:
    itself = prior.nearest(cubic(221, 4.1, (38, "a"), (22, "b"), (8, "c")))
    assert itself is not None
    assert (itself.formula, itself.kind) == ("SrTiO3", "same composition")
    assert itself.distance < 1e-4
    prototype = prior.nearest(cubic(225, 5.9, (11, "b"), (35, "a")))
    assert prototype is not None
    assert (prototype.space_group, prototype.kind) == (225, "same prototype")
    far = Crystal(1, tuple(Site(z, "a", (0.1 * z, 0.3, 0.2)) for z in (3, 5, 7)), 9 * np.eye(3))
    assert prior.nearest(far) is None


def test_distance_is_that_of_structure_matcher(prior: TemplatePrior) -> None:
    """Of crystals whose atoms and cell are moved a little at random."""
    matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10, primitive_cell=False)
    generator = np.random.default_rng(0)
    for row in range(len(prior.reference)):
        known = prior.reference.crystal(row)
        original = known.to_structure(primitive=True)
        moved = Structure(
            original.lattice.matrix @ (np.eye(3) + generator.normal(0, 0.01, (3, 3))),
            original.species,
            original.frac_coords + generator.normal(0, 0.01, (len(original), 3)),
        )
        found = prior.reference.closest(moved, [row], [{z: z for z in known.formula_counts}])
        expected = matcher.get_rms_dist(moved, original)
        assert found is not None
        assert expected is not None
        assert found == (row, pytest.approx(expected[0], rel=1e-6, abs=1e-9))
        assert len(original) == 1 or found[1] > 1e-3


NEEDLES = np.diag([1e-4, 1e-4, 1e6]), np.diag([1.0, 2e3, 3.0])


@pytest.mark.parametrize("lattice", NEEDLES, ids=["absurd", "needle"])
@pytest.mark.parametrize("formula", ["Sr1Ti1O3", "Li1Pm1Re1"], ids=["known", "unknown"])
def test_a_cell_that_no_crystal_has_is_not_reduced(
    prior: TemplatePrior, monkeypatch: pytest.MonkeyPatch, lattice: np.ndarray, formula: str
) -> None:
    """Which takes for ever, or all memory, where it is as thin as an untrained network makes it."""

    def reduced(*_: object, **__: object) -> None:
        raise AssertionError("a cell of which nothing can come is reduced")

    monkeypatch.setattr("common.reference.reduced_cell", reduced)
    counts = parse_formula(formula).counts
    atoms = [z for z, n in counts.items() for _ in range(n)]
    sites = tuple(Site(z, "a", (0.1, 0.2, i / 7)) for i, z in enumerate(atoms))
    known = bool(prior.reference.rows_of_formula(counts))
    assert known == (formula == "Sr1Ti1O3")
    assert prior.nearest(Crystal(1, sites, lattice)) is None


def test_of_equally_near_crystals_the_first_is_named() -> None:
    """Which are the most alike in their elements, not those that rounding favours."""
    salts = [(11, 17), (19, 35), (12, 8), (3, 9), (20, 34)]
    known = [cubic(225, 4 + 0.3 * i, (a, "a"), (b, "b")) for i, (a, b) in enumerate(salts)]
    prior = fit_prior([Record(str(i), crystal) for i, crystal in enumerate(known)])
    asked = cubic(225, 5.9, (11, "a"), (35, "b")).to_structure(primitive=True)
    for rows in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4]):
        replace = [{salts[row][0]: 11, salts[row][1]: 35} for row in rows]
        found = prior.reference.closest(asked, rows, replace)
        assert found is not None
        assert found[0] == rows[0]


def tetragonal(share: float) -> Crystal:
    """SrTiO3 at 4.2 K, octahedra turned by 2.1 degrees (Unoki & Sakudo, JPSJ 23, 546 (1967)).

    With a share of 0 they are not turned, as in the cubic crystal.
    """
    x = 0.25 * (1 - share * np.tan(np.radians(2.1)))
    sites = Site(38, "b"), Site(22, "c"), Site(8, "a"), Site(8, "h", (x, 0.0, 0.0))
    return Crystal(140, sites, np.diag([5.5225, 5.5225, 7.816]))


def orthorhombic(share: float) -> Crystal:
    """CaTiO3 (Sasaki et al., Acta Cryst. C43, 1668 (1987)), or a share of its displacements."""
    ideal = np.array([[0.0, 0.25, 0.0], [0.5, 0.25, 0.0], [0.25, 0.0, 0.75]])
    found = [[0.036, 0.25, -0.0068], [0.4838, 0.25, 0.0714], [0.2888, 0.0371, 0.7108]]
    calcium, first, second = np.mod(ideal + share * (np.array(found) - ideal), 1.0).tolist()
    sites = (
        Site(20, "c", (calcium[0], 0.0, calcium[2])),
        Site(22, "b"),
        Site(8, "c", (first[0], 0.0, first[2])),
        Site(8, "d", tuple(second)),
    )
    return Crystal(62, sites, np.diag([5.4423, 7.6401, 5.3796]))


@pytest.mark.parametrize("distorted", [tetragonal, orthorhombic])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_nearest_sees_distortions_in_larger_cells(prior: TemplatePrior, distorted, share) -> None:
    """The distance to the cubic crystal is that of the atoms from where it has them."""
    crystal, ideal = (distorted(x).to_structure() for x in (share, 0.0))
    moved = crystal.frac_coords - ideal.frac_coords
    moved -= np.round(moved)
    moved = (moved - moved.mean(axis=0)) @ crystal.lattice.matrix
    expected = np.sqrt((moved**2).sum(axis=1).mean()) / (crystal.volume / len(crystal)) ** (1 / 3)
    nearest = prior.nearest(distorted(share))
    assert nearest is not None
    assert (nearest.space_group, nearest.kind) == (221, "same composition")
    assert nearest.distance == pytest.approx(expected, rel=5e-3, abs=1e-6)
    assert (nearest.distance > 0.001) == (share > 0)
    itself = fit_prior([Record("x", distorted(share))]).nearest(distorted(share))
    assert itself is not None
    assert itself.distance < 1e-4


@pytest.mark.parametrize("scaling", [(2, 1, 1), (2, 2, 1), (1, 1, 3)])
def test_nearest_of_a_larger_cell_of_the_same_crystal(
    prior: TemplatePrior, scaling: tuple[int, int, int]
) -> None:
    cubic_cell = cubic(221, 3.905, (38, "a"), (22, "b"), (8, "c")).to_structure()
    large = cubic_cell * scaling
    sites = [Site(atom.specie.Z, "a", tuple(atom.frac_coords.tolist())) for atom in large]
    crystal = Crystal(1, tuple(sites), large.lattice.matrix)
    for known, query in ((prior, crystal), (fit_prior([Record("x", crystal)]), cubic_cell)):
        asked = query if isinstance(query, Crystal) else label_structure(query)
        nearest = known.nearest(asked)
        assert nearest is not None
        assert nearest.formula == "SrTiO3"
        assert nearest.distance < 1e-4


def test_shipped_prior_is_small_and_knows_textbooks(
    shipped: TemplatePrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose formulas need no enumeration of legal sites, which takes its time."""
    monkeypatch.setattr("common.prior.enumerate_sites", lambda *_, **__: pytest.fail("needed"))
    assert SHIPPED.stat().st_size < 3_000_000
    assert "CC BY 4.0" in shipped.metadata["attribution"]
    for formula, group in (("SrTiO3", 221), ("NaCl", 225), ("GaN", 186), ("CsCl", 221)):
        assert shipped.rank(parse_formula(formula).counts)[0].space_group == group
    for formula in ("SrTiO3", "NaCl", "LiFePO4", "Si", "MgAl2O4"):
        assert len(shipped.rank(parse_formula(formula).counts, {"band_gap": 1.0})) == 20


def test_shipped_prior_names_its_rows(shipped: TemplatePrior, data_dir: Path) -> None:
    """By structures that are read here, whatever the processor; of labels, only what is whole."""
    reference, entries = shipped.reference, CsvSource(data_dir / "mp_20" / "train.csv.gz")
    rows = {reference.material_id(row): row for row in range(len(reference))}
    records = [
        Record(
            entry.material_id,
            reference.crystal(rows[entry.material_id]),
            parse_cif(str(entry.content)),
            {name: float(value) for name, value in entry.properties.items() if value},
        )
        for entry in entries
    ]
    assert fingerprint(records) == shipped.metadata["source"]["fingerprint"]


@pytest.mark.filterwarnings("ignore:Issues encountered while parsing CIF")
def test_shipped_prior_on_validation_rows(shipped: TemplatePrior, data_dir: Path) -> None:
    with gzip.open(data_dir / "mp_20" / "val.csv.gz", "rt") as file:
        rows = list(itertools.islice(csv.DictReader(file), 0, None, 220))
    records = [
        Record(r["material_id"], label_structure(Structure.from_str(r["cif"], fmt="cif")))
        for r in rows
    ]
    result = evaluate_prior(shipped, records)
    assert result["rows"] == len(rows) > 40
    assert result["assignment"][1] > 0.4
    assert result["space_group"][20] > 0.8
