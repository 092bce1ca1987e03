"""Elements in formulas, and how alike two are in crystals, by properties in pymatgen's tables."""

import warnings
from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element
from pymatgen.core.composition import reduce_formula

Array = NDArray[np.float64]

#: Rows of a table by atomic number: those of the 118 elements, and of zero, where there is none.
NUM_ELEMENTS = 119
#: What ``pair_differences`` gives per pair of elements, each about 0 to 1.
PAIR_FEATURES = (
    "different",
    "group",
    "period",
    "mendeleev",
    "electronegativity",
    "radius",
    "oxidation_state",
    "block",
)


def element_table() -> Array:
    """[119, 7] by atomic number: group, period, Mendeleev number, electronegativity (Pauling),
    radius (A), usual oxidation state, block; gaps filled with a neighbour's or a typical value."""
    rows = np.zeros((NUM_ELEMENTS, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for z in range(1, NUM_ELEMENTS):
            element = Element.from_Z(z)
            states = element.common_oxidation_states or element.oxidation_states or (0,)
            radius = element.average_ionic_radius or element.atomic_radius or np.nan
            mendeleev = np.nan if element.mendeleev_no is None else element.mendeleev_no
            rows[z] = (
                element.group,
                element.row,
                mendeleev,
                element.X,
                float(radius),
                states[0] if element.X > 2.1 or element.block != "p" else states[-1],
                "spdf".index(element.block),
            )
    typical = np.nanmedian(rows[1:], axis=0)
    return np.where(np.isnan(rows), typical, rows)


@cache
def electronegativity(atomic_number: int) -> float:
    """Pauling's; zero where there is none (noble gases)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(Element.from_Z(atomic_number).X)
    return value if np.isfinite(value) else 0.0


def formula_order(atomic_number: int) -> tuple[float, int]:
    """Sorts elements as formulas are written, the least electronegative first."""
    return electronegativity(atomic_number), atomic_number


def formula_text(counts: Mapping[int, int]) -> str:
    """The least formula of {atomic number: count}, whose units Z counts.

    It is written as by pymatgen, which doubles some that are molecules (O2, Na2O2): here they are
    O and NaO, for a cell need not hold an even number of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # elements without electronegativity
        return str(reduce_formula({Element.from_Z(z).symbol: n for z, n in counts.items()})[0])


def pair_differences(table: Array) -> Array:
    """[119, 119, len(PAIR_FEATURES)], symmetric, zero for an element and itself."""
    difference = np.abs(table[:, None] - table[None])
    group, period, mendeleev, negativity, radius, state, block = np.moveaxis(difference, -1, 0)
    numbers = np.arange(len(table))
    features = (
        numbers[:, None] != numbers,
        group > 0,
        period / 3,
        np.sqrt(mendeleev / 30),
        negativity,
        radius / 0.5,
        np.minimum(state, 4) / 4,
        block > 0,
    )
    return np.stack([np.asarray(feature, dtype=float) for feature in features], axis=-1)
