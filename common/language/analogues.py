"""What a question may tell of known crystals: polymorphs of its composition, and analogues.

An analogue is a symmetry that training crystals of the same anonymous formula have, with their
elements replaced. It is weighed as the template prior weighs it (``common.prior``), by how alike
the elements are. Polymorphs of the composition itself are told apart: the answer is then a
symmetry beside them. Who wants any crystal asks so, too, and puts the known ones back
(``common.ranking``).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from common.language.prompt import Analogue, Analogues, Question, Symmetry
from common.prior import TemplatePrior, Vote, load_prior

#: Known polymorphs that a question tells of, at most.
_MAX_KNOWN = 3
#: Elements and sites in all analogues of a question, at most; what bounds its length.
_MAX_WORDS = 120


class AnalogueIndex:
    """Known crystals, to tell questions of.

    Args:
        prior: the crystals, and how alike elements are.
        count: analogues in a question, at most.
    """

    def __init__(self, prior: TemplatePrior, count: int) -> None:
        self._prior = prior
        self._count = count
        self._rows = {prior.reference.material_id(row): row for row in range(len(prior.reference))}

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, prior: TemplatePrior, count: int) -> "AnalogueIndex":
        """The index of a prior's crystals, made once."""
        return cls(prior, count)

    @classmethod
    def shipped(cls, count: int) -> "AnalogueIndex":
        """With the shipped prior's crystals, those of MP-20's training set."""
        return cls.of(load_prior(), count)

    def tell(self, question: Question, *, known: bool, leave_out: str | None = None) -> Question:
        """A question that tells of analogues.

        Args:
            question: without any.
            known: whether it tells of known polymorphs, and so asks for a symmetry beside these.
                Without them their symmetries are analogues only if crystals of other compositions
                have them.
            leave_out: id of a crystal that must stay unknown.
        """
        own = None if leave_out is None else self._rows.get(leave_out)
        polymorphs = self._polymorphs(question, own) if known else ()
        votes = self._prior.votes(question.counts, top=self._count + len(polymorphs))
        found = [
            Analogue(Symmetry.of(vote.space_group, vote.sites), _percent(vote), vote.elements)
            for vote in votes
        ]
        others = [analogue for analogue in found if analogue.symmetry not in polymorphs]
        told = Analogues(polymorphs, _short(others[: self._count]))
        return replace(question, analogues=told)

    def _polymorphs(self, question: Question, own: int | None) -> tuple[Symmetry, ...]:
        """Symmetries of known crystals of the composition, but for one of them."""
        rows = self._prior.reference.rows_of_formula(question.counts)
        found = dict.fromkeys(
            Symmetry.of_crystal(self._prior.reference.crystal(row)) for row in rows if row != own
        )
        return tuple(found)[:_MAX_KNOWN]


def _percent(vote: Vote) -> int:
    return round(100 * vote.share)


def _short(analogues: Sequence[Analogue]) -> tuple[Analogue, ...]:
    """As many of the first as are not too long together."""
    words = 0
    for index, analogue in enumerate(analogues):
        words += len(analogue.symmetry.sites) + 2 * len(analogue.elements)
        if words > _MAX_WORDS:
            return tuple(analogues[:index])
    return tuple(analogues)
