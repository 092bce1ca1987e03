"""What a language model may say next, so that every answer is a legal symmetry of the composition.

``AnswerGrammar`` knows answers as pieces of text: which groups can hold the composition within the
atom limit, with which numbers of formula units, on which positions. Each choice that it offers can
be completed. ``TokenGrammar`` turns it into tokens of any tokenizer: choices of several tokens are
walked through a trie, and whatever is determined is given as tokens to fill in, not to sample.

There is one sequence of tokens for an answer, the tokenizer's own: pieces are tokenized apart,
which is the same as the whole for the text that ``prompt`` writes. General engines (llguidance,
xgrammar) compile one grammar for a whole answer; here it changes with every choice, and is at most
230 short strings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.composition import MAX_PRIMITIVE_ATOMS, Formula, SiteRequest, check_sites
from common.crystal.wyckoff import wyckoff_summary
from common.elements import formula_order
from common.errors import UserError
from common.language import prompt
from common.language.prompt import Symmetry
from common.language.site_solver import Progress, SiteSolver, site_solver
from common.language.tokenizer import SymmetryTokenizer


@dataclass(frozen=True)
class State:
    """What has been chosen so far, as far as it matters for what may follow."""

    space_group: int = 0
    units: int = 0
    progress: Progress | None = None
    done: bool = False


@dataclass(frozen=True)
class Choice:
    """One way to go on.

    Attributes:
        piece: the text that makes the choice.
        filling: the text that is determined by it.
        state: where it leads.
    """

    piece: str
    filling: str
    state: State


class AnswerGrammar:
    """All legal answers for a composition."""

    opening = prompt.SPACE_GROUP

    def __init__(
        self,
        formula: Formula,
        *,
        space_group: int | None = None,
        z: int | None = None,
        sites: Sequence[SiteRequest] | None = None,
        max_atoms: int = MAX_PRIMITIVE_ATOMS,
    ) -> None:
        """Finds the legal groups.

        Args:
            formula: what is to be placed; one with several units fixes those of the primitive or
                the conventional cell.
            space_group: only this one.
            z: only this number of formula units in the conventional cell.
            sites: only these, in any group where they are legal.
            max_atoms: in the primitive cell.

        Raises:
            UserError: if nothing is legal.
        """
        self.formula = formula
        self._elements = tuple(sorted(formula.counts, key=formula_order))
        self._amounts = tuple(formula.counts[n] for n in self._elements)
        self._sites = None if sites is None else tuple(sites)
        self._z = z
        self._max_atoms = max_atoms
        numbers = [space_group] if space_group else range(1, 231)
        self._groups = tuple(n for n in numbers if self._is_possible(n))
        if not self._groups:
            raise UserError(self._nothing_legal(space_group))

    def _nothing_legal(self, space_group: int | None) -> str:
        fixed = [f"space group {space_group}"] if space_group else []
        fixed += [f"z = {self._z}"] if self._z else []
        fixed += [f"sites {' '.join(map(str, self._sites))}"] if self._sites else []
        if self.formula.units > 1:
            fixed += [f"{self.formula.units} formula units per cell"]
        return (
            f"{self.formula.text} cannot be placed with {', '.join([*fixed, 'at most'])} "
            f"{self._max_atoms} atoms in the primitive cell: no Wyckoff positions add up to it; "
            "leave something free"
        )

    @property
    def start(self) -> State:
        """Before the space group."""
        return State()

    def choices(self, state: State) -> Iterator[Choice]:
        """All ways to go on from a state; none at the end."""
        if state.done:
            return iter(())
        if not state.space_group:
            return self._group_choices()
        if not state.units:
            return self._units_choices(state.space_group)
        return self._site_choices(state)

    def _group_choices(self) -> Iterator[Choice]:
        for number in self._groups:
            yield Choice(prompt.group_piece(number), prompt.candidates_piece(number), State(number))

    def _units_choices(self, number: int) -> Iterator[Choice]:
        filling = prompt.SITES + prompt.element_piece(self._elements[0])
        for units in self._units(number):
            state = State(number, units, self._solver(number, units).start)
            yield Choice(prompt.units_piece(units), filling, state)

    def _site_choices(self, state: State) -> Iterator[Choice]:
        before = state.progress
        assert before is not None
        solver = self._solver(state.space_group, state.units)
        names = list(prompt.site_pieces(state.space_group).items())
        letters = solver.choices(before)
        if self._sites is not None:
            letters = (self._given_letter(state),)
        for index in letters:
            after = solver.place(before, index)
            done = solver.is_done(after)
            next_element = after.element != before.element and not done
            filling = prompt.element_piece(self._elements[after.element]) if next_element else ""
            following = State(state.space_group, state.units, after, done)
            yield Choice(names[index][1], filling, following)

    def _solver(self, number: int, units: int) -> SiteSolver:
        return site_solver(number, tuple(amount * units for amount in self._amounts))

    def _is_possible(self, number: int) -> bool:
        return next(self._units(number), None) is not None

    def _units(self, number: int) -> Iterator[int]:
        """Formula units per conventional cell that are legal in a group, ascending."""
        if self._sites is not None:
            units = self._given_units(number)
            legal = () if units is None else (units,)
            return (u for u in self._unit_candidates(number) if u in legal)
        amounts = tuple(sorted(self._amounts))
        return (u for u in self._unit_candidates(number) if _solvable(number, amounts, u))

    def _unit_candidates(self, number: int) -> Sequence[int]:
        """What the composition and the limits leave, sites aside."""
        centering = wyckoff_summary(number).centering
        limit = self._max_atoms * centering // self.formula.num_atoms
        own = self.formula.units
        candidates = range(1, limit + 1) if own == 1 else sorted({own, own * centering})
        return [u for u in candidates if u <= limit and self._z in (None, u)]

    def _given_units(self, number: int) -> int | None:
        """Formula units of the given sites in a group; None where they are illegal."""
        assert self._sites is not None
        try:
            return check_sites(self._sites, number, self.formula)
        except UserError:
            return None

    def _given_letter(self, state: State) -> int:
        """Index of the given letter whose turn it is."""
        assert self._sites is not None
        assert state.progress is not None
        element = self._elements[state.progress.element]
        table = wyckoff_summary(state.space_group).letters
        names = list(table)
        own = sorted(names.index(s.letter) for s in self._sites if s.atomic_number == element)
        placed = self.formula.counts[element] * state.units - state.progress.left
        for index in own:
            if placed == 0:
                return index
            placed -= table[names[index]][0]
        raise AssertionError("more sites are placed than were given")


@lru_cache(maxsize=200_000)
def _solvable(number: int, amounts: tuple[int, ...], units: int) -> bool:
    """Whether so many formula units fit, whatever the elements are, in whatever order."""
    return SiteSolver(number, tuple(amount * units for amount in amounts)).solvable()


@dataclass(frozen=True)
class _Leaf:
    """Where a choice is complete: tokens that follow, and the state."""

    filling: tuple[int, ...]
    state: State


_Node: TypeAlias = "Mapping[int, _Node | _Leaf]"


@dataclass(frozen=True, eq=False)
class Cursor:
    """A place in an answer.

    Attributes:
        forced: tokens that must come next, because nothing else may.
        branches: after these, the tokens to choose among; empty if the answer is then complete.
    """

    forced: tuple[int, ...]
    branches: _Node

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete, its end included."""
        return not self.forced and not self.branches

    @property
    def allowed(self) -> tuple[int, ...]:
        """Tokens that may come next."""
        return self.forced[:1] or tuple(self.branches)

    def filled(self) -> "Cursor":
        """After the forced tokens."""
        return Cursor((), self.branches) if self.forced else self


class TokenGrammar:
    """An ``AnswerGrammar`` in the tokens of a tokenizer."""

    def __init__(self, grammar: AnswerGrammar, tokenizer: SymmetryTokenizer) -> None:
        self._grammar = grammar
        self._tokenizer = tokenizer
        self._cursors: dict[State, Cursor] = {}
        opening = self._tokenizer.encode_piece(grammar.opening)
        self.start = self._resolve(_Leaf(opening, grammar.start))

    @property
    def head_size(self) -> int:
        """Length of masks."""
        return self._tokenizer.head_size

    def advance(self, cursor: Cursor, token: int) -> Cursor:
        """After one more token.

        Raises:
            ValueError: if it is not allowed.
        """
        if cursor.forced:
            if token != cursor.forced[0]:
                raise ValueError(f"token {token} where only {cursor.forced[0]} may come")
            return Cursor(cursor.forced[1:], cursor.branches)
        if token not in cursor.branches:
            raise ValueError(f"token {token} is not among the {len(cursor.branches)} allowed")
        return self._resolve(cursor.branches[token])

    def cursor(self, tokens: Sequence[int]) -> Cursor:
        """After the tokens of an answer so far.

        Raises:
            ValueError: if one of them is not allowed.
        """
        cursor = self.start
        for token in tokens:
            cursor = self.advance(cursor, int(token))
        return cursor

    def mask(self, cursor: Cursor) -> NDArray[np.bool_]:
        """[head_size], which tokens may come next; none at the end."""
        mask = np.zeros(self.head_size, dtype=bool)
        mask[list(cursor.allowed)] = True
        return mask

    def read(self, tokens: Sequence[int]) -> Symmetry:
        """The symmetry of a complete answer's tokens, as it is written there.

        Raises:
            AnswerError: if they are none.
        """
        return prompt.parse_answer(self._tokenizer.decode(tokens))

    def _resolve(self, node: "_Node | _Leaf") -> Cursor:
        """The next place with a choice, and what is determined until there."""
        forced: tuple[int, ...] = ()
        while True:
            if isinstance(node, _Leaf):
                ahead = self._after(node.state)
                return Cursor(forced + node.filling + ahead.forced, ahead.branches)
            if len(node) > 1:
                return Cursor(forced, node)
            ((token, node),) = node.items()
            forced += (token,)

    def _after(self, state: State) -> Cursor:
        """From a state on; remembered, since many answers pass through it."""
        found = self._cursors.get(state)
        if found is None:
            if state.done:
                found = Cursor((self._tokenizer.end_id,), {})
            else:
                found = self._resolve(self._trie(state))
            self._cursors[state] = found
        return found

    def _trie(self, state: State) -> _Node:
        """The tokens of all choices."""
        encode = self._tokenizer.encode_piece
        trie: dict[int, _Node | _Leaf] = {}
        for choice in self._grammar.choices(state):
            filling = encode(choice.filling)
            # What follows tells "36" from the beginning of "360" where that is two tokens.
            *stem, last = encode(choice.piece) + filling[:1]
            node = trie
            for token in stem:
                inner = node.setdefault(token, {})
                assert isinstance(inner, dict), "a choice is the beginning of another"
                node = inner
            assert last not in node, "a choice is the beginning of another"
            node[last] = _Leaf(filling[1:], choice.state)
        assert trie, "a choice that cannot be completed was offered"
        return trie
