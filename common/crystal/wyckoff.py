"""What is known of the 230 groups without building their operations: a table, read in milliseconds.

``python -m common.crystal.wyckoff`` writes the table from ``symmetry`` and ``normalizer``.
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TABLE = Path(__file__).resolve().parent.parent / "assets" / "wyckoff.json.gz"

#: Multiplicity and number of free coordinates of every Wyckoff letter of one group.
WyckoffTable = Mapping[str, tuple[int, int]]
#: Sites of a crystal: atomic number and letter of every orbit.
Sites = tuple[tuple[int, str], ...]
#: A space group and its sites, the same for all descriptions of them; see ``symmetry_key``.
SymmetryKey = tuple[int, Sites]


@dataclass(frozen=True)
class WyckoffSummary:
    """Letters of one space group.

    Attributes:
        number, symbol: International number and short symbol.
        centering: lattice points in the conventional cell.
        letters: multiplicity (conventional cell) and free coordinates of each, ``a`` first.
        permutations: relabellings by the affine normaliser, see ``letter_permutations``.
    """

    number: int
    symbol: str
    centering: int
    letters: dict[str, tuple[int, int]]
    permutations: tuple[str, ...]

    @cached_property
    def _sources(self) -> NDArray[np.int64]:
        """[P,L]: for each relabelling, the index of the letter that becomes each letter."""
        index = {letter: i for i, letter in enumerate(self.letters)}
        targets = np.array([[index[letter] for letter in p] for p in self.permutations])
        return np.argsort(targets, axis=1)

    def canonical(self, sites: Iterable[tuple[int, str]]) -> Sites:
        """One and the same description for all equivalent ones of some sites."""
        elements: dict[str, list[int]] = {letter: [] for letter in self.letters}
        for atomic_number, letter in sites:
            elements[letter].append(atomic_number)
        occupants = [tuple(sorted(elements[letter])) for letter in self.letters]
        # Most elements first, so that the canonical sites tend to be on the first letters.
        kinds = sorted(set(occupants), key=lambda kind: (-len(kind), kind))
        ranks = np.array([kinds.index(kind) for kind in occupants])
        rows = ranks[self._sources]
        for column in range(rows.shape[1]):
            rows = rows[rows[:, column] == rows[:, column].min()]
            if len(rows) == 1:
                break
        return tuple(
            (atomic_number, letter)
            for letter, rank in zip(self.letters, rows[0].tolist(), strict=True)
            for atomic_number in kinds[rank]
        )


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(gzip.decompress(TABLE.read_bytes()))
    return table


@cache
def wyckoff_summary(number: int) -> WyckoffSummary:
    """The letters of a space group.

    Raises:
        ValueError: if the number is not in 1-230.
    """
    if not 1 <= number <= 230:
        raise ValueError(f"space group {number} is not in 1-230")
    row = _table()[str(number)]
    return WyckoffSummary(
        number,
        row["symbol"],
        row["centering"],
        {letter: (multiplicity, dof) for letter, multiplicity, dof in row["letters"]},
        tuple(row["permutations"]),
    )


def symmetry_key(space_group: int, sites: Iterable[tuple[int, str]]) -> SymmetryKey:
    """A symmetry as one and the same key for all its descriptions."""
    return space_group, wyckoff_summary(space_group).canonical(sites)


def derive(number: int) -> dict[str, Any]:
    """The table's row of a space group, from its operations."""
    from common.crystal.normalizer import letter_permutations
    from common.crystal.symmetry import space_group

    group = space_group(number)
    return {
        "symbol": group.symbol,
        "centering": len(group.centering),
        "letters": [[p.letter, p.multiplicity, p.dof] for p in group.wyckoff.values()],
        "permutations": list(letter_permutations(number)),
    }


def main() -> None:
    """Writes the table of all groups (some minutes)."""
    from rich.progress import track

    from common.files import write_atomic

    rows = {str(n): derive(n) for n in track(range(1, 231), "Wyckoff tables")}
    text = json.dumps(rows, separators=(",", ":"))
    write_atomic(TABLE, gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
