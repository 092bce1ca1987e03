"""Classes of crystals, by crystals whose class is known."""

import numpy as np
import pytest

from common.crystal.structure import Crystal, Site
from common.evaluate.strata import TrainingIndex, freedom_class, prototype_key


def perovskite(
    a: str = "a", b: str = "b", x: str = "c", elements: tuple[int, int, int] = (38, 22, 8)
) -> Crystal:
    sites = tuple(Site(z, letter) for z, letter in zip(elements, (a, b, x), strict=True))
    return Crystal(221, sites, 3.905 * np.eye(3))


@pytest.mark.parametrize(
    ("free", "label"),
    [
        (0, "0"),
        (1, "1-2"),
        (2, "1-2"),
        (3, "3-5"),
        (5, "3-5"),
        (6, "6-8"),
        (8, "6-8"),
        (9, "9+"),
        (60, "9+"),
    ],
)
def test_class_of_freedom(free: int, label: str) -> None:
    assert freedom_class(free) == label


def test_a_prototype_is_independent_of_elements_and_of_the_origin() -> None:
    key = prototype_key(perovskite())
    assert prototype_key(perovskite(elements=(56, 40, 16))) == key
    assert prototype_key(perovskite("b", "a", "d")) == key, "origin on Ti instead of Sr"


ROCK_SALT = Crystal(225, (Site(11, "a"), Site(17, "b")), 5.64 * np.eye(3))
CSCL_TYPE = Crystal(221, (Site(11, "a"), Site(17, "b")), 3.4 * np.eye(3))


def test_other_sites_or_another_group_are_another_prototype() -> None:
    assert prototype_key(perovskite(x="e")) != prototype_key(perovskite())
    assert prototype_key(ROCK_SALT) != prototype_key(CSCL_TYPE)


def test_antifluorite_is_fluorite_with_the_elements_exchanged() -> None:
    fluorite = Crystal(225, (Site(20, "a"), Site(9, "c")), 5.46 * np.eye(3))
    antifluorite = Crystal(225, (Site(3, "c"), Site(8, "a")), 4.62 * np.eye(3))
    assert prototype_key(fluorite) == prototype_key(antifluorite)


def test_seen_in_training() -> None:
    index = TrainingIndex.of([perovskite(), ROCK_SALT])
    assert index.formulas == {"SrTiO3", "NaCl"}, "the cell's Na4Cl4 is reduced"
    assert index.has_composition(CSCL_TYPE)
    assert not index.has_prototype(CSCL_TYPE)
    assert index.has_prototype(perovskite("b", "a", "d", (56, 40, 16)))
    assert not index.has_composition(perovskite(elements=(56, 40, 16)))
