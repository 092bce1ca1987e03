"""Formulas and sites as typed: agreement with pymatgen, and one clear line for everything else."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition, Element

from common.composition import (
    Formula,
    SiteRequest,
    check_positions,
    check_sites,
    parse_formula,
    parse_sites,
)
from common.crystal.wyckoff import wyckoff_summary
from common.errors import UserError

FAST = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
SYMBOLS = [e.symbol for e in Element if e.symbol not in ("D", "T")]


@pytest.mark.parametrize(
    "text",
    ["SrTiO3", "Sr2Ti2O6", "Ca10(PO4)6(OH)2", "K2[PtCl6]", "Si", "Si8", "Mg(Al(OH)4)2", "HoHO"],
)
def test_counts_agree_with_pymatgen(text: str) -> None:
    parsed = parse_formula(text)
    expected = Composition(text.replace("[", "(").replace("]", ")"))
    whole = {z: n * parsed.units for z, n in parsed.reduced}
    assert whole == {element.Z: n for element, n in expected.items()}


@pytest.mark.parametrize(
    ("text", "units", "name"),
    [
        ("SrTiO3", 1, "SrTiO3"),
        ("Sr2Ti2O6", 2, "SrTiO3"),
        ("O2", 1, "O"),
        ("N2", 1, "N"),
        ("I2", 1, "I"),
        ("Na2O2", 1, "NaO"),
        ("H2O2", 1, "HO"),
        ("O4", 4, "O"),
        ("Na4O4", 4, "NaO"),
        ("Mg2O2", 2, "MgO"),
        ("S8", 8, "S"),
        ("C2", 2, "C"),
        (" Sr Ti O₃ ", 1, "SrTiO3"),
    ],
)
def test_units_are_what_the_text_counts(text: str, units: int, name: str) -> None:
    parsed = parse_formula(text)
    assert (parsed.units, parsed.text) == (units, name)


@pytest.mark.parametrize(
    "dot", [*"·*•⋅∙‧･", "\N{ASTERISK OPERATOR}", "\N{MULTIPLICATION SIGN}", " · ", "\t·\t"]
)
def test_hydrates_have_dots(dot: str) -> None:
    assert parse_formula(f"CuSO4{dot}5H2O") == parse_formula("CuSO4(H2O)5")
    assert parse_formula(f"Ca2(SO4)2{dot}H2O") == parse_formula("Ca2S2O8H2O")
    assert parse_formula(f"Na2CO3{dot}NaHCO3{dot}2(H2O)") == parse_formula("Na3C2O8H5")


def test_iodine_in_brackets_is_iodine() -> None:
    assert parse_formula("Pb(I)2") == parse_formula("Pb[ I ]2") == parse_formula("PbI2")
    assert parse_formula("Ca(VI)2").text == "Ca(VI)2"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("Xx2O3", "unknown element 'Xx'"),
        ("srtio3", "capital letter"),
        ("NACL", "unknown element 'A'"),
        ("Fe3+", "charges"),
        ("SO4^2-", "charges"),
        ("SO4²⁻", "cannot read"),
        ("Na-1Cl", "charges"),
        ("Na0Cl", "zero"),
        ("Fe0.5O", "whole numbers"),
        ("Fe1/2O", "whole numbers"),
        ("D2O", "isotopes"),
        ("T2O", "isotopes"),
        ("2NaCl", "must follow"),
        ("CuSO4.5H2O", "a hydrate has * or ·"),
        ("CaSO4·0.5H2O", "whole numbers"),
        ("CaSO4·0H2O", "zero"),
        ("CaSO4·", "nothing stands on one side"),
        ("CaSO4·2", "nothing stands on one side"),
        ("·2H2O", "nothing stands on one side"),
        ("CaSO4··2H2O", "nothing stands on one side"),
        ("2CaSO4·H2O", "must follow"),
        ("K(CaO·SiO2)2", "never closed"),
        ("Fe(II)O", "oxidation states are not part of it; leave (II) out"),
        ("V(V)OCl3", "leave (V) out"),
        ("Fe(III)2O3", "leave (III) out"),
        ("Fe[III]2O3", "leave [III] out"),
        ("Fe(II)3O4", "leave (II) out"),
        ("V(IV)₂O4", "leave (IV) out"),
        ("Mn(VII)2O7", "leave (VII) out"),
        ("Pb( II )O", "leave ( II ) out"),
        ("Cu[I]Cl", "leave [I] out"),
        ("Pb(I) 2", "must follow"),
        ("Ca(OH", "never closed"),
        ("Ca)OH", "closes nothing"),
        ("Ca()2", "closes nothing"),
        ("Ca(OH]2", "closes nothing"),
        ("C500", "at most"),
        ("Na99999999999Cl", "too large"),
        ("Na" * 300, "characters"),
        ("Na\nCl", "cannot read"),
        ("CuSO4\n·5H2O", "cannot read '\\n'"),
        ("CuSO4·\x1c5H2O", "cannot read '\\x1c5H2O'"),
        ("Na٣", "cannot read"),
    ],
)
def test_mistakes_are_named(text: str, part: str) -> None:
    with pytest.raises(UserError, match=r".") as error:
        parse_formula(text)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


@FAST
@given(
    st.one_of(
        st.text(max_size=30),
        st.text(alphabet="SrTiONaClHFeDT()[]0123456789+-^.,·₂ ", max_size=24),
        st.lists(st.tuples(st.sampled_from(SYMBOLS), st.integers(-1, 30)), max_size=6).map(
            lambda parts: "".join(f"{s}{n}" for s, n in parts)
        ),
    )
)
@example("(" * 399)
@example("(((((H)9)9)9)9)9")
def test_any_text_is_a_formula_or_a_line(text: str) -> None:
    try:
        parsed = parse_formula(text)
    except UserError:
        return
    assert all(n > 0 for _, n in parsed.reduced)
    assert parsed.units >= 1
    assert parse_formula(parsed.text).counts == parsed.counts


@FAST
@given(
    st.one_of(
        st.text(max_size=30),
        st.lists(
            st.tuples(
                st.sampled_from(["Sr", "Ti", "O", "Xx", "sr", ""]),
                st.integers(-1, 200),
                st.sampled_from("abcdefzA0 "),
            ),
            max_size=6,
        ).map(lambda parts: " ".join(f"{s}:{n}{x}" for s, n, x in parts)),
    ),
    st.integers(1, 230),
)
def test_any_sites_are_legal_or_a_line(text: str, number: int) -> None:
    formula = parse_formula("SrTiO3")
    try:
        sites = parse_sites(text)
        units = check_sites(sites, number, formula)
    except UserError:
        return
    table = wyckoff_summary(number).letters
    assert sum(table[site.letter][0] for site in sites) == 5 * units


def test_sites_of_perovskite() -> None:
    sites = parse_sites("Sr:1a, Ti:1b O:c")
    assert sites == (SiteRequest(38, "a", 1), SiteRequest(22, "b", 1), SiteRequest(8, "c"))
    assert check_sites(sites, 221, parse_formula("SrTiO3")) == 1


@pytest.mark.parametrize(
    ("text", "number", "part"),
    [
        ("Sr:1a Ti:1b O:3z", 221, "no Wyckoff letter 'z'; the group has 1a 1b 3c 3d 6e 6f 8g 12h"),
        ("Sr:2a Ti:1b O:3c", 221, "multiplicity 1; the group has 1a 1b 3c 3d 6e 6f 8g 12h"),
        ("Sr:1a Ti:1b O:3B", 221, "letter (a to z, or A)"),
        ("Sr:1a Ti:1a O:3c", 221, "only once"),
        ("Sr:1a O:1b Ti:3c", 221, "no multiple of SrTiO3"),
        ("Sr:1a Ti:1b", 221, "no multiple"),
        ("Sr=1a", 221, "write element"),
        ("Qq:1a", 221, "unknown element"),
        ("", 221, "empty"),
    ],
)
def test_wrong_sites_are_named(text: str, number: int, part: str) -> None:
    with pytest.raises(UserError) as error:
        check_sites(parse_sites(text), number, parse_formula("SrTiO3"))
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Sr:1a Ti:1b O:3q", "site O:3q: no space group has a position 3q; q has multiplicity 2, "),
        ("Sr:1a Ti:1b O:5c", "site O:5c: no space group has a position 5c; c has multiplicity 1, "),
        ("Sr:1A", "no space group has a position 1A; A has multiplicity 8"),
        ("Sr:A Ti:1b O:3c O:3c", "no space group has the positions A 1b 3c together"),
    ],
)
def test_positions_of_no_group_are_named(text: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        check_positions(parse_sites(text))
    assert part in str(error.value)


def test_positions_of_every_group_are_left_alone() -> None:
    for number in range(1, 231):
        letters = wyckoff_summary(number).letters
        sites = [SiteRequest(8, letter, count) for letter, (count, _) in letters.items()]
        check_positions(sites)
        check_positions([SiteRequest(8, letter) for letter in letters])


def test_general_position_can_be_used_again() -> None:
    sites = parse_sites("Na:1a Cl:1a Na:1a Cl:1a")
    assert check_sites(sites, 1, Formula(((11, 1), (17, 1)))) == 2
