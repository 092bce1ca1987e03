"""The quick CIF reader gives exactly what pymatgen's parser gives, or leaves the text to it."""

import csv
import gzip
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifParser, CifWriter

from common.data import cif
from common.data.cif import CifError, parse_cif

SYMBOLS = ["H", "He", "Li", "C", "N", "O", "F", "Na", "Cl", "Ti", "Fe", "Sr", "Cs", "Bi", "U", "Pu"]


def pymatgen_reads(text: str) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (structure,) = CifParser.from_str(text).parse_structures(primitive=False, on_error="raise")
    return structure


def assert_identical(left: Structure, right: Structure) -> None:
    """Every bit and the order of atoms."""
    assert np.array_equal(left.lattice.matrix, right.lattice.matrix)
    assert left.species == right.species
    assert np.array_equal(left.frac_coords, right.frac_coords)
    assert left.labels == right.labels


def written(structure: Structure) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(CifWriter(structure))


def rutile() -> Structure:
    return Structure.from_spacegroup(
        136, Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
    )


coordinate = st.floats(-1, 2) | st.sampled_from([0, 1 / 3, 2 / 3, 0.33335, 0.6666, 1, -1 / 3])


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    """Any ordered cell with atoms that are apart."""
    lengths = [draw(st.floats(6, 12)) for _ in range(3)]
    angles = [draw(st.floats(60, 110)) for _ in range(3)]
    lattice = Lattice.from_parameters(*lengths, *angles)
    count = draw(st.integers(1, 6))
    symbols = draw(st.lists(st.sampled_from(SYMBOLS), min_size=count, max_size=count))
    coords = [[draw(coordinate) for _ in range(2)] + [k / count] for k in range(count)]
    return Structure(lattice, symbols, coords)


@settings(deadline=None, max_examples=40)
@given(structures())
def test_quick_path_equals_pymatgen(structure: Structure) -> None:
    text = written(structure)
    if "He" in structure.symbol_set:  # no electronegativity, so pymatgen's order is accidental
        assert cif._parse_p1(text) is None
    else:
        quick = cif._parse_p1(text)
        assert quick is not None
        assert_identical(quick, pymatgen_reads(text))
    assert_identical(parse_cif(text.replace("\n", "\r\n")), pymatgen_reads(text))


def test_quick_path_equals_pymatgen_on_real_rows(data_dir: Path) -> None:
    with gzip.open(data_dir / "mp_20" / "val.csv.gz", "rt", newline="") as file:
        texts = [row["cif"] for row in islice(csv.DictReader(file), 0, None, 200)]
    assert len(texts) > 40
    for text in texts:
        quick = cif._parse_p1(text)
        assert quick is not None
        assert_identical(quick, pymatgen_reads(text))


def mutations(text: str) -> st.SearchStrategy[str]:
    """The text with a few characters or a line replaced."""
    lines = text.splitlines(keepends=True)
    character = st.tuples(
        st.integers(0, len(text) - 1),
        st.sampled_from(list("0123456789.-+eE(?)'_ \n#Oxyz")) | st.just(""),
    ).map(lambda cut: text[: cut[0]] + cut[1] + text[cut[0] + 1 :])
    line = st.tuples(
        st.integers(0, len(lines) - 1),
        st.sampled_from(["", "loop_\n", "  O  O9  1  0.1  0.2  0.3  0.5\n"]),
    ).map(lambda cut: "".join([*lines[: cut[0]], cut[1], *lines[cut[0] + 1 :]]))
    end = st.integers(0, len(text)).map(lambda cut: text[:cut])
    return character | line | end


def quick_or_refused(text: str) -> Structure | CifError | None:
    try:
        return cif._parse_p1(text)
    except CifError as error:
        return error


@settings(deadline=None, max_examples=150)
@given(mutations(written(rutile())))
@example(written(rutile()).replace("  O4", "  'O4"))
@example(written(rutile()).replace("  O4", '  "O4'))
@example(written(rutile()).replace("  O4", "  #O4"))
@example(written(rutile()).replace("  O4", "  _O4"))
@example(written(rutile()).replace("TiO2", "'TiO2"))
def test_mutated_text_is_never_read_differently(text: str) -> None:
    """Where the quick path answers, pymatgen gives the same; elsewhere only CifError comes."""
    quick = quick_or_refused(text)
    if isinstance(quick, Structure):
        assert_identical(quick, pymatgen_reads(text))
    elif quick is None:
        read_or_refuse(text)


def read_or_refuse(text: str) -> Structure | None:
    """Any other exception than CifError fails the test."""
    try:
        return parse_cif(text)
    except CifError as error:
        return None if "\n" not in str(error) else pytest.fail("more than one line")


@settings(deadline=None, max_examples=80)
@given(st.text(max_size=300))
def test_arbitrary_text_is_refused(text: str) -> None:
    assert read_or_refuse(text) is None


def test_symmetrised_cif_goes_to_pymatgen() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = str(CifWriter(rutile(), symprec=0.01))
    assert cif._parse_p1(text) is None
    assert len(parse_cif(text)) == 6
    assert_identical(parse_cif(text), pymatgen_reads(text))


def test_partial_occupancy_stays_visible() -> None:
    alloy = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    assert not parse_cif(written(alloy)).is_ordered
    vacancy = Structure(Lattice.cubic(3), [{"Fe": 0.9}], [[0, 0, 0]])
    assert not parse_cif(written(vacancy)).is_ordered


def test_text_cut_between_atoms_is_refused() -> None:
    """Every atom line missing from the end is noticed, though the rest would parse."""
    lines = written(rutile()).splitlines(keepends=True)
    assert len(parse_cif("".join(lines))) == 6
    for kept in range(1, 6):
        with pytest.raises(CifError):
            parse_cif("".join(lines[: len(lines) - kept]))


def test_two_structures_are_refused() -> None:
    with pytest.raises(CifError, match="2 structures"):
        parse_cif(written(rutile()) + written(rutile().copy()).replace("data_TiO2", "data_b"))


def test_atoms_that_are_no_element_are_refused() -> None:
    text = written(rutile()).replace("  Ti  Ti", "  Xx  Xx").replace("Ti", "Xx")
    with pytest.raises(CifError):
        parse_cif(text)


def atoms(*labels: str, types: tuple[str, ...] = (), head: str = "") -> str:
    """A CIF of a cubic cell with atoms along its diagonal."""
    names = ["_atom_site_label", *["_atom_site_type_symbol"] * bool(types)]
    names += [f"_atom_site_fract_{axis}" for axis in "xyz"]
    rows = [
        " ".join([label, *types[i : i + 1], *[f"{i / len(labels):.4f}"] * 3])
        for i, label in enumerate(labels)
    ]
    lengths = [f"_cell_length_{axis} 9" for axis in "abc"]
    angles = [f"_cell_angle_{name} 90" for name in ("alpha", "beta", "gamma")]
    group = ["_space_group_name_H-M_alt 'P 1'"]
    return "\n".join(["data_x", head, *lengths, *angles, *group, "loop_", *names, *rows, ""])


@pytest.mark.parametrize("kind", ["moiety", "structural", "sum"])
def test_atoms_that_the_stated_formula_has_more_of_are_missed(kind: str) -> None:
    name = f"_chemical_formula_{kind}"
    for formula in ("Li O H", "Li O2", "Li2 O (H2 O)3"):
        with pytest.raises(CifError, match="formula"):
            parse_cif(atoms("Li1", "O1", head=f"{name} '{formula}'"))
    assert len(parse_cif(atoms("Li1", "O1", head=f"{name} 'Li2 O2'"))) == 2


@pytest.mark.parametrize("formula", ["Li O, H2", "Li 1+, O H 1-", "2(H2 O), Li O", "Li +, H2 O"])
def test_hydrogen_of_the_moiety_alone(formula: str) -> None:
    with pytest.raises(CifError, match=r"the atoms are LiO: are some, such as H, not listed\?"):
        parse_cif(atoms("Li1", "O1", head=f"_chemical_formula_moiety '{formula}'"))
    unknown = f"_chemical_formula_sum ?\n_chemical_formula_moiety '{formula}'"
    with pytest.raises(CifError, match="formula says"):
        parse_cif(atoms("Li1", "O1", head=unknown))


@pytest.mark.parametrize("formula", ["?", "Li 1+, O 1-", "2(Li O)", "0.5(Li O)", "x(C H2), Li O"])
def test_moiety_that_agrees_or_is_not_read(formula: str) -> None:
    assert len(parse_cif(atoms("Li1", "O1", head=f"_chemical_formula_moiety '{formula}'"))) == 2


@pytest.mark.parametrize("site", ["Wat1", "WAT", "wat2", "OH1", "NH4", "NO31"])
def test_site_of_several_atoms(site: str) -> None:
    with pytest.raises(CifError, match=f"site '{site}' is no single atom: .* elements"):
        parse_cif(atoms("Li1", site))
    assert len(parse_cif(atoms("Li1", site, types=("Li", "O")))) == 2
    with pytest.raises(CifError):
        parse_cif(atoms("Li1", "X1", types=("Li", site)))


def test_site_without_a_type_is_not_left_out() -> None:
    with pytest.raises(CifError, match=r"site '\?' is no single atom"):
        parse_cif(atoms("Li1", "O1", types=("Li", "?")))


@pytest.mark.parametrize("formula", ["(Na,K)Cl", "Na Cl, K Cl"])
def test_commas_of_a_structural_formula_part_nothing(formula: str) -> None:
    """They stand between elements that share a site in other crystals of the kind."""
    head = f"_chemical_formula_structural '{formula}'"
    assert len(parse_cif(atoms("Na1", "Cl1", head=head))) == 2
