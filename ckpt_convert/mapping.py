"""A file's tensors against the table of what it must hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ckpt_convert.formats import Tensor, Tensors
from common.errors import UserError

Framework = Literal["mindspore", "torch"]

#: Names per kind of mistake in an error's line.
_NAMED = 3
_ADVICE = "give the configuration that these weights were trained with"


@dataclass(frozen=True)
class Row:
    """A tensor that must be there: the part it belongs to, its names on both sides, its shape."""

    part: str
    torch: str
    mindspore: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """A line of the report: what became of one part of a file; `unused` has names of no part."""

    file: str
    part: str
    used: int
    numbers: int
    dtypes: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found and written.

    Attributes:
        counts: what became of the tensors, a line per part of a file.
        notes: what else the user should know.
        files: names of what was written.
    """

    counts: tuple[Count, ...]
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


class MisfitError(UserError):
    """Tensors that are missing, unknown, or not what the destination can hold; see `report`."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, eq=False)
class Match:
    """A file's tensors by the row that each belongs to, and the report's lines."""

    path: Path
    tensors: dict[Row, Tensor]
    counts: tuple[Count, ...]

    def named(self, framework: str) -> dict[str, Tensor]:
        """The tensors by the names of a side, ``torch`` or ``mindspore``, in the table's order."""
        return {getattr(row, framework): tensor for row, tensor in self.tensors.items()}

    def check(self) -> None:
        """Raises UserError, naming them, if keys are missing, unknown or reshaped."""
        check_counts(self.path, self.counts, _ADVICE)


def check_counts(path: Path, counts: Sequence[Count], advice: str) -> None:
    """Raises UserError, naming them, if keys are missing, unknown or reshaped."""
    kinds = {
        "missing": [name for count in counts for name in count.missing],
        "unknown": [name for count in counts for name in count.unused],
        "reshaped": [name for count in counts for name in count.reshaped],
    }
    problems = [f"{kind} {_some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; {advice}")


def match(path: Path, tensors: Tensors, rows: Sequence[Row]) -> Match:
    """Puts every tensor of a file into its row.

    The file has the names of either side, whichever fits better. Only empty tensors may be missing:
    MindSpore does not write them.
    """
    side = max(("torch", "mindspore"), key=lambda s: sum(getattr(r, s) in tensors for r in rows))
    names = {getattr(row, side): row for row in rows}
    found = {row: tensors[name] for name, row in names.items() if name in tensors}
    if found:
        dtype, nothing = next(iter(found.values())).dtype, np.empty(0, np.uint8)
        left_out = [row for row in rows if row not in found and math.prod(row.shape) == 0]
        found |= {row: Tensor(dtype, row.shape, nothing) for row in left_out}
    fitting = {row: found[row] for row in rows if row in found and found[row].shape == row.shape}
    counts = [
        _count(path, part, [row for row in rows if row.part == part], side, found, fitting)
        for part in dict.fromkeys(row.part for row in rows)
    ]
    unknown = tuple(name for name in tensors if name not in names)
    if unknown:
        counts.append(Count(path.name, "unknown", 0, 0, (), unused=unknown))
    return Match(path, fitting, tuple(counts))


def _count(
    path: Path,
    part: str,
    rows: list[Row],
    side: str,
    found: dict[Row, Tensor],
    fitting: dict[Row, Tensor],
) -> Count:
    used = [fitting[row] for row in rows if row in fitting]
    return Count(
        path.name,
        part,
        len(used),
        sum(math.prod(tensor.shape) for tensor in used),
        tuple(sorted({tensor.dtype.name for tensor in used})),
        missing=tuple(getattr(row, side) for row in rows if row not in found),
        reshaped=tuple(
            f"{getattr(row, side)} {found[row].shape} instead of {row.shape}"
            for row in rows
            if row in found and row not in fitting
        ),
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
