"""What a network keeps of sequences between calls, and how a call for some more tokens is laid out.

The same in both frameworks: keys and values are arrays or tensors of either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values of a sequence, as a chain: a beginning, which others may share, and more.

    Attributes:
        before: the beginning, or None.
        length: tokens of all.
        states: [2 * layers, groups, tokens, head], keys and values of what came after ``before``.
    """

    before: "Past | None"
    length: int
    states: Any

    def write(self, to: Any) -> None:
        """Fills [2 * layers, groups, length, head]."""
        part: Past | None = self
        while part is not None:
            begin = part.length - part.states.shape[2]
            to[:, :, begin : part.length] = part.states
            part = part.before


@dataclass(frozen=True)
class Call:
    """New tokens of some sequences, after what is known of them.

    Known tokens stand at the first places, padded to the same number D, and W new ones behind.

    Attributes:
        tokens: [B,W], padded at the end.
        positions: [B,W], places in the sequences.
        visible: [B,W,D+W], where a new token looks.
        last: [B], index of each sequence's last token among the new ones.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    visible: NDArray[np.bool_]
    last: NDArray[np.int64]

    @classmethod
    def lay_out(
        cls, new: Sequence[Sequence[int]], known: Sequence[int], width: int, depth: int, pad: int
    ) -> "Call":
        """Some sequences in one call.

        Args:
            new: tokens of each, at most ``width``.
            known: tokens before them, at most ``depth``.
            width, depth: W and D.
            pad: token that fills.
        """
        tokens = np.full((len(new), width), pad, dtype=np.int64)
        for row, ids in zip(tokens, new, strict=True):
            row[: len(ids)] = ids
        past = np.array(known, dtype=np.int64)[:, None]
        place = np.arange(depth + width)
        later = place - depth
        causal = (later >= 0) & (later <= np.arange(width)[:, None])  # [W,D+W]
        visible = (place < past)[:, None] & (later < 0) | causal
        last = np.array([len(ids) - 1 for ids in new], dtype=np.int64)
        return cls(tokens, past + np.arange(width), visible, last)


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of lengths that differ at most by a factor of two, together."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(index)
    return list(groups.values())
