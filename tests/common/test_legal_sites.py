"""The enumeration of legal sites against a plainer one, which is slow."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import pytest

from common import legal_sites
from common.composition import parse_formula
from common.crystal.wyckoff import Sites, WyckoffTable, wyckoff_summary
from common.prior import load_prior

#: None of them has the stoichiometry of a training structure.
UNSEEN = ["K7Sr3Ti5O20", "Na5Fe7O13", "Mg5Al7Si3", "Cs4Pb9I22", "H19C7N5O2"]


def partitions(
    atoms: int, letters: Sequence[str], table: WyckoffTable
) -> Iterator[legal_sites.LetterCounts]:
    """Multisets of letters whose multiplicities add up: every first letter, then all the rest."""
    if atoms == 0:
        yield ()
    for index, letter in enumerate(letters):
        multiplicity, freedom = table[letter]
        most = atoms // multiplicity
        for count in range(most if freedom else min(1, most), 0, -1):
            left = atoms - count * multiplicity
            for others in partitions(left, letters[index + 1 :], table):
                yield ((letter, count), *others)


def assignments(
    needed: Mapping[int, int], table: WyckoffTable, log_letters: Mapping[str, float]
) -> list[tuple[float, Sites]]:
    """What ``legal_sites._assignments`` does, with every pair of the beam written out."""
    largest_first = sorted(table, key=lambda letter: (-table[letter][0], letter))
    fixed = {letter for letter, (_, freedom) in table.items() if freedom == 0}
    beam: list[tuple[float, Sites]] = [(0.0, ())]
    for z, atoms in sorted(needed.items(), key=lambda item: (item[1], item[0])):
        some = islice(partitions(atoms, largest_first, table), legal_sites._MAX_OPTIONS)
        weighed = [(sum(n * log_letters[x] for x, n in letters), letters) for letters in some]
        options = heapq.nsmallest(legal_sites._BEAM, weighed, key=lambda x: (-x[0], x[1]))
        following = [
            (weight + more, sites + tuple((z, x) for x, n in letters for _ in range(n)))
            for weight, sites in beam
            for more, letters in options
            if fixed.isdisjoint({x for _, x in sites} & {x for x, _ in letters})
        ]
        beam = heapq.nsmallest(legal_sites._BEAM, following, key=lambda x: (-x[0], x[1]))
    if not beam:
        legal = legal_sites._first_legal(sorted(needed.items()), table, {})
        beam = [] if legal is None else [(sum(log_letters[x] for _, x in legal), legal)]
    order = {letter: index for index, letter in enumerate(table)}
    ranked = [(w, tuple(sorted(s, key=lambda site: (order[site[1]], site[0])))) for w, s in beam]
    return sorted(ranked, key=lambda entry: (-entry[0], entry[1]))


@pytest.mark.parametrize("number", [1, 14, 47, 62, 166, 194, 221, 225, 227])
def test_assignments_are_those_of_the_plain_search(number: int) -> None:
    table = wyckoff_summary(number).letters
    log_letters = load_prior()._statistics.log_letters(number, table)
    found = 0
    for formula in ("SrTiO3", "MgAl2O4", "Mg5Al7Si3", "H19C7N5O2"):
        for units in (1, 2, 3, 8):
            needed = {z: n * units for z, n in parse_formula(formula).counts.items()}
            result = legal_sites._assignments(needed, table, log_letters)
            assert result == assignments(needed, table, log_letters)
            found += len(result)
    assert found > 0


@pytest.mark.parametrize("formula", UNSEEN)
def test_probabilities_are_those_of_the_plain_search(
    formula: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, counts = load_prior(), parse_formula(formula).counts
    candidates = prior.rank(counts, top=5)
    assert {candidate.source for candidate in candidates} == {"enumeration"}
    monkeypatch.setattr(legal_sites, "_assignments", assignments)
    assert prior.rank(counts, top=5) == candidates
