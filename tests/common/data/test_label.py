"""Labels of textbook crystals, of distorted and broken ones, and of real rows."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import DummySpecies, Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from common.crystal.structure import Crystal
from common.crystal.symmetry import NUM_SPACE_GROUPS, space_group
from common.crystal.wyckoff import wyckoff_summary
from common.data.agreement import Outcome, Row, compare, sensitivity, sorted_sites
from common.data.cif import parse_cif
from common.data.importer import Labeller
from common.data.label import (
    LABEL_REASONS,
    MIN_DISTANCE,
    LabelError,
    check_structure,
    label_structure,
    label_structure_reference,
)
from common.data.sources import CsvSource
from common.data.store import Record
from tests.crystals import TEXTBOOK, random_crystal, random_lattice, textbook

matcher = StructureMatcher(ltol=0.02, stol=0.05, angle_tol=1.0)
LABELLERS = (label_structure, label_structure_reference)


def sites(text: str) -> Counter[str]:
    return Counter(text.split())


def canonical(crystal: Crystal) -> object:
    """The sites whatever the origin and axes."""
    return wyckoff_summary(crystal.space_group).canonical(sorted_sites(crystal))


def scrambled(structure: Structure, rng: np.random.Generator, noise: float) -> Structure:
    """The same crystal: other axes, origin, orientation and order, atoms moved by `noise` A."""
    steps = np.triu(rng.integers(-1, 2, size=(3, 3)), k=1) + np.eye(3)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    lattice = steps @ structure.lattice.matrix @ rotation
    moved = structure.cart_coords @ rotation + rng.normal(scale=noise, size=(len(structure), 3))
    coords = moved @ np.linalg.inv(lattice) + rng.random(3)
    order = rng.permutation(len(structure))
    species = [structure.species[atom] for atom in order]
    return Structure(Lattice(lattice), species, coords[order], to_unit_cell=True)


@pytest.mark.parametrize("labeller", LABELLERS)
@pytest.mark.parametrize("name", TEXTBOOK)
def test_textbook(name: str, labeller: Labeller) -> None:
    structure = textbook(name)
    distances = structure.distance_matrix + 9 * np.eye(len(structure))
    assert distances.min() == pytest.approx(TEXTBOOK[name].bond, abs=2e-3)
    crystal = labeller(structure)
    expected = TEXTBOOK[name]
    assert crystal.space_group == expected.group
    assert crystal.formula_counts == Counter(structure.atomic_numbers)
    if crystal.sites_string.split() != expected.sites.split():
        letters = [part.split(":")[1].lstrip("0123456789") for part in expected.sites.split()]
        numbers = [site.atomic_number for site in crystal.sites]
        known = wyckoff_summary(expected.group).canonical(zip(numbers, letters, strict=True))
        assert canonical(crystal) == known


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("name", TEXTBOOK)
def test_axes_origin_order_and_noise_do_not_matter(name: str, noise: float) -> None:
    structure = textbook(name).get_primitive_structure()
    expected = label_structure(structure)
    rng = np.random.default_rng(7)
    crystal = label_structure(scrambled(structure, rng, noise))
    assert crystal.space_group == expected.space_group
    assert canonical(crystal) == canonical(expected)
    assert matcher.fit(crystal.to_structure(primitive=True), expected.to_structure(primitive=True))


@pytest.mark.parametrize("number", range(1, NUM_SPACE_GROUPS + 1, 4))
def test_any_group_comes_back(number: int) -> None:
    rng = np.random.default_rng(number)
    *special, general = space_group(number).wyckoff
    letters = "".join(special[:3]) + general if special else general * 3
    built = random_crystal(number, letters, rng)
    # At a tolerance that random atoms do not come out more symmetric by chance.
    found = label_structure(built.to_structure(primitive=True), symprec=1e-3)
    assert found.space_group == number
    assert canonical(found) == canonical(built)
    assert matcher.fit(found.to_structure(primitive=True), built.to_structure(primitive=True))


def test_a_group_that_hangs_on_the_tolerance_is_spglibs() -> None:
    structure = textbook("perovskite SrTiO3")
    (titanium,) = structure.indices_from_symbol("Ti")
    structure.translate_sites([titanium], [0, 0, 0.06 / 3.905])  # as in a ferroelectric
    assert "it hangs on" in sensitivity(structure)
    assert sensitivity(textbook("perovskite SrTiO3")) == ""
    found = set()
    for symprec in (0.01, 0.1, 0.2):
        expected = SpacegroupAnalyzer(structure, symprec).get_space_group_number()
        assert label_structure(structure, symprec).space_group == expected
        found.add(expected)
    assert len(found) > 1


def test_disorder() -> None:
    structure = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    assert reason(structure) == "disorder"
    vacancy = Structure(Lattice.cubic(3), [{"Fe": 0.9}], [[0, 0, 0]])
    assert reason(vacancy) == "disorder"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad: float) -> None:
    assert reason(Structure(Lattice.cubic(3), ["Fe"], [[bad, 0, 0]])) == "not_finite"
    assert reason(Structure(np.diag([3, 3, bad]), ["Fe"], [[0, 0, 0]])) == "not_finite"


def test_flat_cell() -> None:
    flat = Structure(Lattice([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), ["Fe"], [[0, 0, 0]])
    assert reason(flat) == "not_finite"


def test_overlap() -> None:
    near = Structure(Lattice.cubic(5), ["Na", "Cl"], [[0.95, 0, 0], [0.04, 0, 0]])
    assert reason(near) == "overlap"
    thin = Structure(Lattice.orthorhombic(5, 5, 0.4), ["Na"], [[0, 0, 0]])
    assert reason(thin) == "overlap"


def test_a_cell_in_picometres() -> None:
    salt = Structure.from_spacegroup(225, Lattice.cubic(5.64), ["Na", "Cl"], [[0] * 3, [0.5] * 3])
    large = Structure(Lattice.cubic(31.02), salt.species, salt.frac_coords)  # 3,731 A^3 per atom
    assert label_structure(large).space_group == 225
    salt.scale_lattice(564.0**3)
    assert reason(salt) == "volume"
    with pytest.raises(LabelError, match=r"22,425,768 A\^3 per atom, .* not in picometres$"):
        check_structure(salt)


def reason(structure: Structure) -> str:
    """Why neither way labels a structure."""
    reasons = set()
    for labeller in LABELLERS:
        with pytest.raises(LabelError) as caught:
            labeller(structure)
        reasons.add(caught.value.reason)
    assert len(reasons) == 1
    assert reasons <= set(LABEL_REASONS)
    return reasons.pop()


def test_overlap_is_what_pymatgens_distances_say() -> None:
    """Also in skewed and thin cells, where the nearest image is not the wrapped one."""
    rng = np.random.default_rng(11)
    seen = Counter()
    for _ in range(400):
        lattice = Lattice(random_lattice(1, 10 ** rng.uniform(0, 2), rng))
        skewed = Lattice(
            (np.triu(rng.integers(-3, 4, size=(3, 3)), k=1) + np.eye(3)) @ lattice.matrix
        )
        structure = Structure(skewed, ["H"] * 3, rng.random((3, 3)))
        pairs = structure.distance_matrix[np.triu_indices(3, k=1)]
        nearest = min(pairs.min(), *lattice.get_lll_reduced_lattice().abc)
        try:
            check_structure(structure)
        except LabelError:
            seen["overlap"] += 1
            assert nearest < MIN_DISTANCE
        else:
            seen["fine"] += 1
            assert nearest >= MIN_DISTANCE
    assert min(seen["overlap"], seen["fine"]) > 30


def test_an_atom_that_is_no_element() -> None:
    assert reason(Structure(Lattice.cubic(3), [DummySpecies("X")], [[0, 0, 0]])) == "sites"


def test_real_rows_agree_with_the_reference(data_dir: Path) -> None:
    """One row in 180 of the validation set; all of them: python -m common.data.agreement."""
    outcomes = Counter()
    for index, entry in enumerate(CsvSource(data_dir / "mp_20" / "val.csv.gz")):
        if index % 180:
            continue
        structure = parse_cif(entry.content)
        fast, reference = (
            Record(entry.material_id, labeller(structure), structure) for labeller in LABELLERS
        )
        assert matcher.fit(fast.crystal.to_structure(primitive=True), structure)
        comparison = compare(Row(entry.material_id, fast, reference))
        outcomes[comparison.outcome] += 1
        assert comparison.outcome is not Outcome.UNEXPLAINED, comparison.detail
    assert outcomes.total() == 51
    assert outcomes[Outcome.IDENTICAL] + outcomes[Outcome.RELABELLED] == 51


def record(crystal: Crystal, structure: Structure) -> Record:
    return Record("x", crystal, structure)


def test_comparison_sees_each_kind_of_difference() -> None:
    structure = textbook("rutile TiO2")
    crystal = label_structure(structure)
    here = record(crystal, structure)
    assert compare(Row("x", here, here)).outcome is Outcome.IDENTICAL
    titanium, oxygen = crystal.sites
    moved = Crystal(136, (titanium, type(oxygen)(8, "f", (0.25, 0, 0))), crystal.lattice)
    assert compare(Row("x", here, record(moved, structure))).outcome is Outcome.UNEXPLAINED
    other = label_structure(textbook("wurtzite ZnS"))
    assert compare(Row("x", here, record(other, structure))).outcome is Outcome.UNEXPLAINED
    assert compare(Row("x", "sites: lost", here)).outcome is Outcome.UNEXPLAINED
    assert compare(Row("x", here, "sites: lost")).outcome is Outcome.EXPLAINED
    assert compare(Row("x", "overlap: 0", "overlap: 0")).outcome is Outcome.REFUSED


def test_comparison_knows_another_origin() -> None:
    structure = textbook("rock salt NaCl")
    crystal = label_structure(structure)
    sodium, chlorine = crystal.sites
    exchanged = Crystal(225, (type(sodium)(11, "b"), type(chlorine)(17, "a")), crystal.lattice)
    outcome = compare(Row("x", record(crystal, structure), record(exchanged, structure))).outcome
    assert outcome is Outcome.RELABELLED
