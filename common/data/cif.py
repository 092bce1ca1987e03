"""CIF text to a pymatgen Structure, quickly where the text is what pymatgen itself writes.

MP-20 holds tens of thousands of CIFs of one form: a P1 cell and a list of fully occupied atoms.
`parse_cif` reads that form directly, with the same numbers and order of atoms as pymatgen's parser,
and leaves every other text to pymatgen.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure
from pymatgen.core.periodic_table import DummySpecies
from pymatgen.io.cif import CifParser

from common.composition import parse_formula
from common.elements import formula_text
from common.errors import UserError

# Of pymatgen's parser: coordinates this near (relatively) to 1/3 or 2/3 are set to it, and cells
# thinner than this (A) are refused.
_FRACTION_TOLERANCE = 1e-4
_MIN_THICKNESS = 0.01

# Values that no quote or comment can be hidden in.
_WORD = r"[^\s'\"#;]+"
_NUMBER = r"(-?\d{1,6}(?:\.\d{1,17})?)"
_P1_CIF = re.compile(
    rf"(?:#[^\n]*\n)?data_{_WORD}\n"
    r"_symmetry_space_group_name_H-M +'P 1'\n"
    rf"_cell_length_a +{_NUMBER}\n_cell_length_b +{_NUMBER}\n_cell_length_c +{_NUMBER}\n"
    rf"_cell_angle_alpha +{_NUMBER}\n_cell_angle_beta +{_NUMBER}\n_cell_angle_gamma +{_NUMBER}\n"
    r"_symmetry_Int_Tables_number +1\n"
    rf"_chemical_formula_structural +{_WORD}\n"
    r"_chemical_formula_sum +(?:'((?:[A-Z][a-z]?\d+ ?)+)'|([A-Z][a-z]?\d+))\n"
    rf"_cell_volume +{_WORD}\n_cell_formula_units_Z +\d+\n"
    r"loop_\n _symmetry_equiv_pos_site_id\n _symmetry_equiv_pos_as_xyz\n  1  'x, y, z'\n"
    r"loop_\n _atom_site_type_symbol\n _atom_site_label\n _atom_site_symmetry_multiplicity\n"
    r" _atom_site_fract_x\n _atom_site_fract_y\n _atom_site_fract_z\n _atom_site_occupancy\n"
    r"((?:[^\n]+\n)+)\s*",
    re.ASCII,
)
_ATOM = re.compile(
    rf" *([A-Z][a-z]?) +[A-Za-z][\w.+-]* +1 +{_NUMBER} +{_NUMBER} +{_NUMBER} +1(?:\.0*)? *",
    re.ASCII,
)
_COUNT = re.compile(r"([A-Z][a-z]?)(\d+)", re.ASCII)
#: Where a formula may be stated, the most exact first.
_FORMULAS = tuple(f"_chemical_formula_{kind}" for kind in ("sum", "structural", "moiety"))
#: A part of a formula, ``2(H2 O)`` or ``Na 1+``, without its charge.
_PART = re.compile(r"\s*(\d*)\s*(.+?)(?:\s+\d*[+-])?\s*", re.ASCII)
#: What pymatgen reads as one atom or none, though it is water, OH, NH4, NO3, or not said.
_NO_ATOM = re.compile(r"(?i:wat)|OH|NH|NO3|[^A-Za-z]*$", re.ASCII)


class CifError(ValueError):
    """A CIF text that gives no single structure; the message says why."""


def parse_cif(text: str) -> Structure:
    """The one structure of a CIF, all atoms of the cell, as pymatgen's parser gives it.

    Raises CifError when there is none or more than one, when an atom is no chemical element or is
    several (water), or when the atoms contradict the formula that the text states (as in a
    truncated text).
    """
    structure = _parse_p1(text.replace("\r\n", "\n"))
    return _parse_with_pymatgen(text) if structure is None else structure


def _parse_p1(text: str) -> Structure | None:
    """The structure of a P1 CIF as pymatgen writes it; None for any other text."""
    match = _P1_CIF.fullmatch(text if text.endswith("\n") else text + "\n")
    if match is None:
        return None
    rows = [_ATOM.fullmatch(line) for line in match[9].splitlines()]
    elements = _elements()
    symbols = [row[1] for row in rows if row is not None]
    if len(symbols) < len(rows) or any(symbol not in elements for symbol in symbols):
        return None
    _check_formula(match[7] or match[8], symbols)
    lattice = Lattice.from_parameters(*(float(match[i]) for i in range(1, 7)))
    if _is_thin(lattice.matrix):
        return None
    values = [[float(row[i]) for i in (2, 3, 4)] for row in rows if row is not None]
    frac_coords = _as_pymatgen_rounds(np.array(values))
    order = sorted(range(len(symbols)), key=lambda i: _rank()[symbols[i]])
    species = [elements[symbols[i]] for i in order]
    return Structure(lattice, species, frac_coords[order], labels=_labels(match[9], order))


def _labels(block: str, order: list[int]) -> list[str]:
    labels = [line.split()[1] for line in block.splitlines()]
    return [labels[i] for i in order]


def _check_formula(formula: str, symbols: list[str]) -> None:
    stated = {symbol: int(count) for symbol, count in _COUNT.findall(formula)}
    found = dict(Counter(symbols))
    if stated != found:
        raise CifError(f"formula says {formula}, atoms say {found}: truncated?")


def _as_pymatgen_rounds(frac_coords: NDArray[np.float64]) -> NDArray[np.float64]:
    """Set coordinates near 1/3 and 2/3 to these, then wrap all into [0, 1)."""
    rounded = frac_coords.copy()
    for fraction in (1 / 3, 2 / 3):
        near = np.abs(frac_coords / fraction - 1) <= _FRACTION_TOLERANCE
        rounded[near] = fraction
    return rounded - np.floor(rounded)


def _is_thin(lattice: NDArray[np.float64]) -> bool:
    """Whether two opposite faces of the cell are nearer than pymatgen's parser allows."""
    volume = abs(float(np.linalg.det(lattice)))
    areas = [np.linalg.norm(np.cross(lattice[i - 1], lattice[i - 2])) for i in range(3)]
    # Negated, so that a cell that is not finite counts as thin.
    return not all(volume >= 2 * _MIN_THICKNESS * area for area in areas)


def _parse_with_pymatgen(text: str) -> Structure:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser = CifParser.from_str(text)
            structures = parser.parse_structures(primitive=False, on_error="raise")
            problem = parser.check(structures[0])
            items = next(iter(parser.as_dict().values()))
    # pymatgen's parser lets almost any exception type through on malformed text.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CifError(f"{type(error).__name__}: {reason}") from error
    if len(structures) != 1:
        raise CifError(f"{len(structures)} structures in one CIF")
    if problem and problem.startswith(("Missing elements", "Incorrect stoichiometry")):
        raise CifError(f"atoms contradict the stated formula: {' '.join(problem.split())[:200]}")
    for specie in structures[0].composition:
        if isinstance(specie, DummySpecies):
            raise CifError(f"no chemical element: {specie}")
    _check_sites(items)
    _check_stated(items, structures[0])
    return structures[0]


def _check_sites(items: Mapping[str, Any]) -> None:
    """Refuses sites that are not one atom each."""
    symbols = items.get("_atom_site_type_symbol", items.get("_atom_site_label", ()))
    for symbol in symbols:
        if _NO_ATOM.match(symbol):
            raise CifError(
                f"site {symbol[:20]!r} is no single atom: list its atoms, with their elements in "
                "_atom_site_type_symbol"
            )


def _check_stated(items: Mapping[str, Any], structure: Structure) -> None:
    """Compares the atoms with the formula that is stated, wherever that is.

    pymatgen knows no moieties, and nothing behind a sum that is ``?``. What has decimals, or
    anything else that is no plain formula, is not compared.
    """
    stated = [(name, str(items[name])) for name in _FORMULAS if name in items]
    known = ((name, text) for name, text in stated if text.strip() not in ("", "?", "."))
    name, formula = next(known, ("", ""))
    if not formula or not structure.is_ordered:
        return
    # Elsewhere a comma stands between elements that share a site.
    several = name == "_chemical_formula_moiety"
    parts = [_PART.fullmatch(part) for part in (formula.split(",") if several else [formula])]
    text = "".join(f"({part[2]}){part[1]}" for part in parts if part is not None)
    try:
        counts = parse_formula(text).counts
    except UserError:
        return
    found = Counter(structure.atomic_numbers)
    units = math.gcd(*found.values())
    if counts != {number: count // units for number, count in found.items()}:
        raise CifError(
            f"formula says {' '.join(formula.split())[:100]}, the atoms are "
            f"{formula_text(found)}: are some, such as H, not listed?"
        )


@cache
def _elements() -> dict[str, Element]:
    """Elements by symbol, in pymatgen's order of atoms.

    Without D and T, which pymatgen treats apart, and without elements that have no
    electronegativity, whose order it leaves to chance.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen tells of every element without electronegativity
        elements = (Element.from_Z(z) for z in range(1, 119))
        ordered = sorted(element for element in elements if math.isfinite(element.X))
    return {element.symbol: element for element in ordered}


@cache
def _rank() -> dict[str, int]:
    """Place of each element in the order of atoms."""
    return {symbol: rank for rank, symbol in enumerate(_elements())}
