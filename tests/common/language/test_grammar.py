"""The grammar against a naive enumeration, and under models that want to break it."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import chain, combinations_with_replacement, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.composition import Formula, SiteRequest, check_sites, parse_formula, parse_sites
from common.crystal.wyckoff import Sites, wyckoff_summary
from common.elements import formula_order
from common.errors import UserError
from common.language.grammar import AnswerGrammar, TokenGrammar
from common.language.prompt import Symmetry, answer_pieces, parse_answer, write_answer
from common.language.site_solver import SiteSolver
from common.language.tokenizer import SymmetryTokenizer, compact_tokenizer
from common.templates import ordered_sites
from tests.symmetries import formula_of, placements

COMPACT = compact_tokenizer()

# Naive enumeration: all multisets of letters of every element, checked by common.composition.


def multisets(atoms: int, table: Mapping[str, tuple[int, int]]) -> list[tuple[str, ...]]:
    """All ways to make a number of atoms, by trying every number of letters."""
    smallest = min(m for m, _ in table.values())
    sizes = range(1, atoms // smallest + 1)
    tries = chain.from_iterable(combinations_with_replacement(table, size) for size in sizes)
    return [letters for letters in tries if sum(table[x][0] for x in letters) == atoms]


def all_legal(formula: Formula, number: int, max_atoms: int) -> set[Symmetry]:
    """Every legal symmetry of a formula in a group, in the order of the text."""
    summary = wyckoff_summary(number)
    found = set()
    for units in range(1, max_atoms * summary.centering // formula.num_atoms + 1):
        options = [
            [tuple((z, x) for x in letters) for letters in multisets(n * units, summary.letters)]
            for z, n in formula.reduced
        ]
        for parts in product(*options):
            sites = tuple(chain.from_iterable(parts))
            if is_legal(formula, number, sites):
                found.add(Symmetry(number, units, ordered_sites(sites, number)))
    return found


def is_legal(formula: Formula, number: int, sites: Sites) -> bool:
    requests = [SiteRequest(z, letter) for z, letter in sites]
    try:
        check_sites(requests, number, formula)
    except UserError:
        return False
    return True


def all_answers(grammar: AnswerGrammar) -> Iterator[str]:
    """Every answer of a grammar."""

    def walk(state, text: str) -> Iterator[str]:
        if state.done:
            yield text
        for choice in grammar.choices(state):
            yield from walk(choice.state, text + choice.piece + choice.filling)

    return walk(grammar.start, grammar.opening)


@pytest.mark.parametrize(
    ("text", "number", "max_atoms"),
    [
        ("Si", 2, 5),
        ("NaCl", 2, 4),
        ("CaF2", 2, 3),
        ("NaCl", 10, 4),
        ("NaCl", 5, 6),
        ("CaF2", 47, 3),
        ("SrTiO3", 62, 20),
        ("LiF", 99, 6),
        ("SrTiO3", 166, 5),
        ("NaCl", 216, 8),
        ("SrTiO3", 221, 10),
        ("Al2O3", 225, 15),
        ("MgAl2O4", 227, 14),
        ("Si", 230, 60),
        ("HLiBeB", 216, 4),
    ],
)
def test_grammar_has_exactly_the_legal_answers(text: str, number: int, max_atoms: int) -> None:
    formula = parse_formula(text)
    expected = all_legal(formula, number, max_atoms)
    try:
        grammar = AnswerGrammar(formula, space_group=number, max_atoms=max_atoms)
    except UserError:
        assert not expected
        return
    answers = list(all_answers(grammar))
    assert len(answers) == len(set(answers))
    assert {parse_answer(answer) for answer in answers} == expected
    assert expected, "a case that tests nothing"


def test_groups_without_a_legal_answer_are_left_out() -> None:
    formula = parse_formula("NaCl3")
    grammar = AnswerGrammar(formula, max_atoms=4)
    offered = {choice.state.space_group for choice in grammar.choices(grammar.start)}
    assert offered == {n for n in range(1, 231) if all_legal(formula, n, 4)}
    assert 0 < len(offered) < 230


@given(st.integers(1, 230), st.lists(st.integers(1, 6), min_size=1, max_size=3))
@settings(max_examples=150)
def test_solver_finds_sites_where_there_are_some(number: int, needed: list[int]) -> None:
    table = wyckoff_summary(number).letters
    solver = SiteSolver(number, needed)
    assert solver.solvable() == naively_solvable(number, tuple(needed), frozenset())
    if solver.solvable():
        assert solver.choices(solver.start)
        assert max(solver.choices(solver.start)) < len(table)


def naively_solvable(number: int, needed: tuple[int, ...], used: frozenset[str]) -> bool:
    """Letter by letter, whatever the order; remembers nothing but whole states."""
    return _naive(number, tuple(sorted(n for n in needed if n)), used)


@cache
def _naive(number: int, needed: tuple[int, ...], used: frozenset[str]) -> bool:
    if not needed:
        return True
    return any(
        naively_solvable(number, (needed[0] - m, *needed[1:]), used if freedom else used | {letter})
        for letter, (m, freedom) in wyckoff_summary(number).letters.items()
        if m <= needed[0] and letter not in used
    )


@given(placements())
@settings(max_examples=150)
def test_every_legal_answer_is_accepted(placement: tuple[int, Sites]) -> None:
    number, sites = placement
    symmetry = Symmetry.of(number, sites)
    as_given = Symmetry(number, symmetry.units, ordered_sites(sites, number))
    formula = formula_of(symmetry)
    for fixed in (number, None):
        grammar = TokenGrammar(AnswerGrammar(formula, space_group=fixed), COMPACT)
        for form in (symmetry, as_given):
            ids = COMPACT.encode("".join(answer_pieces(form)))
            assert grammar.cursor([*ids, COMPACT.end_id]).is_done


# Decoding against the model's will

Chooser = Callable[[NDArray[np.bool_], np.random.Generator], int]


def highest_logit(mask: NDArray[np.bool_], rng: np.random.Generator) -> int:
    return int(np.argmax(np.where(mask, rng.normal(size=len(mask)), -np.inf)))


def last_token(mask: NDArray[np.bool_], rng: np.random.Generator) -> int:
    return int(np.flatnonzero(mask)[-1])


def first_or_last(mask: NDArray[np.bool_], rng: np.random.Generator) -> int:
    return int(np.flatnonzero(mask)[-int(rng.integers(2))])


def decode(grammar: TokenGrammar, choose: Chooser, rng: np.random.Generator) -> list[int]:
    cursor, tokens = grammar.start, []
    while not cursor.is_done:
        if cursor.forced:
            tokens += cursor.forced
            cursor = cursor.filled()
        else:
            tokens.append(choose(grammar.mask(cursor), rng))
            cursor = grammar.advance(cursor, tokens[-1])
    return tokens


def check(
    tokens: list[int], tokenizer: SymmetryTokenizer, formula: Formula, max_atoms: int
) -> Symmetry:
    """Everything that must hold of an answer."""
    *body, end = tokens
    assert end == tokenizer.end_id
    text = tokenizer.decode(body)
    assert tokenizer.encode(text) == body
    symmetry = parse_answer(text)
    number = symmetry.space_group
    summary = wyckoff_summary(number)
    requests = [SiteRequest(z, letter) for z, letter in symmetry.sites]
    assert check_sites(requests, number, formula) == symmetry.units
    assert symmetry.sites == ordered_sites(symmetry.sites, number)
    assert symmetry.units * formula.num_atoms <= max_atoms * summary.centering
    return symmetry


def hard_formulas(rng: np.random.Generator) -> Iterator[tuple[Formula, int]]:
    """Random compositions and atom limits, many elements and awkward counts among them."""
    fixed = ["Fe", "O2", "SrTiO3", "Ca10(PO4)6(OH)2", "HHeLiBeBCNOFNeNaMgAlSiPSClArK", "C59H61"]
    for text in fixed:
        yield parse_formula(text), 120
    while True:
        elements = rng.choice(np.arange(1, 119), size=int(rng.integers(1, 9)), replace=False)
        largest = int(rng.choice([1, 2, 4, 12]))
        counts = {int(z): int(rng.integers(1, largest + 1)) for z in elements}
        divisor = int(np.gcd.reduce(list(counts.values())))
        reduced = tuple(sorted((z, n // divisor) for z, n in counts.items()))
        formula = Formula(reduced)
        yield formula, int(rng.integers(formula.num_atoms, 121))


@pytest.mark.parametrize("choose", [highest_logit, last_token, first_or_last])
def test_ten_thousand_decodes_are_legal(choose: Chooser) -> None:
    """3,400 of each kind; 20 on every composition, half of them in one group."""
    rng = np.random.default_rng(sum(choose.__name__.encode()))
    formulas = hard_formulas(rng)
    groups = set()
    for _ in range(170):
        formula, max_atoms = next(formulas)
        grammar = AnswerGrammar(formula, max_atoms=max_atoms)
        offered = [choice.state.space_group for choice in grammar.choices(grammar.start)]
        one_group = AnswerGrammar(
            formula, space_group=int(rng.choice(offered)), max_atoms=max_atoms
        )
        for own in (grammar, one_group):
            tokens = TokenGrammar(own, COMPACT)
            for _ in range(10):
                symmetry = check(decode(tokens, choose, rng), COMPACT, formula, max_atoms)
                groups.add(symmetry.space_group)
    assert len(groups) > 50


def test_glm4_decodes_are_legal(glm4: SymmetryTokenizer) -> None:
    rng = np.random.default_rng(4)
    formulas = hard_formulas(rng)
    for _ in range(20):
        formula, max_atoms = next(formulas)
        grammar = TokenGrammar(AnswerGrammar(formula, max_atoms=max_atoms), glm4)
        assert grammar.mask(grammar.start).shape == (151_552,)
        for _ in range(10):
            check(decode(grammar, first_or_last, rng), glm4, formula, max_atoms)


def test_check_finds_illegal_answers() -> None:
    formula = parse_formula("SrTiO3")
    good = COMPACT.answer_ids(Symmetry.of(221, [(38, "a"), (22, "b"), (8, "c")]))
    check(good, COMPACT, formula, 5)
    with pytest.raises(AssertionError):
        check(good, COMPACT, formula, 4)
    with pytest.raises(UserError):
        check(good, COMPACT, parse_formula("SrTiO2"), 5)
    twice = COMPACT.encode(write_answer(Symmetry(221, 1, ((38, "a"), (22, "a"), (8, "c")))))
    with pytest.raises(UserError):
        check([*twice, COMPACT.end_id], COMPACT, formula, 5)


# Tokens


@pytest.mark.parametrize("name", ["compact", "glm4"])
def test_training_answers_are_accepted(name: str, training_rows, request) -> None:
    tokenizer: SymmetryTokenizer = request.getfixturevalue(name)
    for crystal, _ in training_rows[::3]:
        symmetry = Symmetry.of_crystal(crystal)
        grammar = TokenGrammar(AnswerGrammar(formula_of(symmetry), max_atoms=20), tokenizer)
        assert grammar.cursor(tokenizer.answer_ids(symmetry)).is_done


@pytest.mark.parametrize("name", ["compact", "glm4"])
def test_what_is_determined_is_filled_in(name: str, request) -> None:
    tokenizer: SymmetryTokenizer = request.getfixturevalue(name)
    symmetry = Symmetry.of(221, [(38, "a"), (22, "b"), (8, "c")])
    grammar = TokenGrammar(AnswerGrammar(parse_formula("SrTiO3"), max_atoms=20), tokenizer)
    ids = tokenizer.answer_ids(symmetry)
    cursor, chosen, filled, position = grammar.start, [], 0, 0
    while not cursor.is_done:
        if cursor.forced:
            assert tuple(ids[position : position + len(cursor.forced)]) == cursor.forced
            filled += len(cursor.forced)
            position += len(cursor.forced)
            cursor = cursor.filled()
            continue
        assert len(cursor.branches) > 1
        assert grammar.mask(cursor).sum() == len(cursor.branches)
        chosen.append(tokenizer.decode([ids[position]]).strip())
        cursor = grammar.advance(cursor, ids[position])
        position += 1
    assert position == len(ids) == filled + len(chosen)
    if name == "compact":
        assert chosen == ["221 Pm-3m", "1", "1a", "3c"]
    else:
        assert chosen == ["2", "21", "1", "a", "c"]


def test_only_allowed_tokens_are_taken() -> None:
    grammar = TokenGrammar(AnswerGrammar(parse_formula("NaCl"), space_group=225), COMPACT)
    with pytest.raises(ValueError, match="only"):
        grammar.advance(grammar.start, COMPACT.end_id)
    with pytest.raises(ValueError, match="not among"):
        grammar.advance(grammar.start.filled(), COMPACT.end_id)
    done = grammar.cursor(COMPACT.answer_ids(Symmetry.of(225, [(11, "a"), (17, "b")])))
    assert done.is_done
    assert not grammar.mask(done).any()
    with pytest.raises(ValueError, match="among the 0"):
        grammar.advance(done, COMPACT.end_id)


# What a user fixes


def answers(text: str, **fixed) -> set[Symmetry]:
    return {
        parse_answer(answer) for answer in all_answers(AnswerGrammar(parse_formula(text), **fixed))
    }


def test_fixed_symmetry() -> None:
    assert {s.units for s in answers("NaCl", space_group=225, z=4)} == {4}
    assert {s.space_group for s in answers("NaCl", space_group=225, max_atoms=4)} == {225}
    # Four formula units in the primitive or in the conventional cell.
    assert {s.units for s in answers("Na4Cl4", space_group=139, max_atoms=8)} == {4, 8}
    assert {s.units for s in answers("Na4Cl4", space_group=221, max_atoms=8)} == {4}


def test_fixed_sites() -> None:
    sites = parse_sites("O:c Sr:b Ti:a")
    found = answers("SrTiO3", sites=sites)
    assert {s.sites for s in found} == {((38, "b"), (22, "a"), (8, "c"))}
    expected = {n for n in range(1, 231) if is_legal_request(sites, n)}
    assert {s.space_group for s in found} == expected
    assert 221 in expected
    only = answers("SrTiO3", sites=parse_sites("O:3c Sr:1b Ti:1a"))
    assert {s.space_group for s in only} < expected
    (repeated,) = answers("CaF2", sites=parse_sites("F:i Ca:a F:i F:i Ca:i"), space_group=2)
    assert [letter for _, letter in repeated.sites] == ["a", "i", "i", "i", "i"]


def is_legal_request(sites: tuple[SiteRequest, ...], number: int) -> bool:
    return is_legal(
        parse_formula("SrTiO3"), number, tuple((s.atomic_number, s.letter) for s in sites)
    )


@pytest.mark.parametrize(
    ("text", "fixed", "part"),
    [
        ("NaCl", {"max_atoms": 1}, "at most 1 atoms"),
        ("NaCl", {"space_group": 230, "max_atoms": 10}, "space group 230"),
        ("NaCl", {"space_group": 225, "z": 1}, "z = 1"),
        ("NaCl", {"sites": parse_sites("Na:a")}, "sites Na:a"),
        ("Ca10(PO4)6(OH)2", {"max_atoms": 20}, "2 formula units per cell"),
    ],
)
def test_nothing_legal_is_a_user_error(text: str, fixed, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        AnswerGrammar(parse_formula(text), **fixed)
    assert "\n" not in str(caught.value)


def test_elements_stand_as_in_the_question() -> None:
    for symmetry in answers("SrTiO3", space_group=221, max_atoms=5):
        order = list(dict.fromkeys(z for z, _ in symmetry.sites))
        assert order == sorted(order, key=formula_order)
