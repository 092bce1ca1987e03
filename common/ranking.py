"""What ranks the symmetries of a composition: a language model if there is one, and the prior.

The language model answers under a grammar of what the user left open. It is told of the known
polymorphs of a composition and asked for a symmetry beside them. Its probabilities and the template
prior's are averaged, for their errors differ, and sharpened, for such a mean is less sure than it
is right. Known polymorphs keep what the prior gives them. What the model cannot answer, such as
cells larger than it was made for, comes from the prior alone.

Symmetries have the letters that the prior gives them, whoever ranked them, so that the same
symmetry gets the same noise.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.backend import backend_name, load_language_model
from common.checkpoint import (
    ADAPTER,
    FINAL,
    checkpoint_folder,
    is_checkpoint,
    load_checkpoint,
    shipped_language,
)
from common.composition import MAX_PRIMITIVE_ATOMS, Formula, check_sites
from common.crystal.wyckoff import Sites, SymmetryKey, wyckoff_summary
from common.errors import UserError
from common.machine import one_thread

if TYPE_CHECKING:
    from common.language.model import LanguageModel
    from common.language.search import Progress
    from common.pipeline import Query
    from common.prior import SymmetryCandidate, TemplatePrior

#: In place of a folder: no language model, or the shipped one, which is the default.
PRIOR = "prior"
LANGUAGE = "glm4"
PRIOR_NAME = "template prior"
#: Shipped folders by what they were trained to be asked about; the last one is asked about all.
SHIPPED_MODELS = {"band_gap": "glm4_tiny_bg", "formation_energy": "glm4_tiny_fm"}
SHIPPED_BASE = "glm4_tiny"
#: So many are always searched for, lest what is found depend on how many are shown.
_SEARCHED = 20
#: The language model's part of the average, as much as the prior's. Other tenths were no better on
#: 400 validation rows.
MODEL_SHARE = 0.5
#: Exponent of the average. On the first 1,000 validation rows, whose formation energy was told, the
#: likeliest one, which ``evaluate symmetry`` reports as best sharpness, was 1.08.
SHARPNESS = 1.1
#: What a language model needs with torch; with MindSpore the first is enough.
_TORCH_EXTRAS = "language,language-torch"
#: This project's packages: a module of theirs that is absent is no package to be installed.
_OWN = ("common", "torch_impl", "ms_impl", "ckpt_convert")


@dataclass(frozen=True)
class Ranker:
    """What ranks symmetries.

    Attributes:
        prior: ranks by itself, or with the language model.
        model: the language model, if there is one.
        name: of its folder.
        folder: where it is.
        note: why the model that was asked for is not used, in one line; empty if it is.
        share: of the language model's probabilities in the average with the prior's.
        sharpness: exponent of the average.
    """

    prior: "TemplatePrior"
    model: "LanguageModel | None" = None
    name: str = PRIOR_NAME
    folder: Path | None = None
    note: str = ""
    share: float = MODEL_SHARE
    sharpness: float = SHARPNESS

    @property
    def identity(self) -> dict[str, str]:
        """Name and hash of what ranks, of both where probabilities are averaged."""
        if self.model is None:
            return {"name": self.name, "hash": self.prior.hash}
        return {
            "name": f"{self.name} and {PRIOR_NAME}",
            "hash": f"{self.model.name}, {self.prior.hash}",
        }

    def rank(
        self,
        rows: Sequence[tuple[Mapping[int, int], Mapping[str, float]]],
        top: int,
        progress: "Progress | None" = None,
        *,
        only_new: bool = False,
    ) -> list[list["SymmetryCandidate"]]:
        """Rankings of many compositions, nothing else fixed.

        The language model is given many at once, so that the last digits of a probability may
        depend on the others; see ``rank_symmetries`` for one query.

        Args:
            rows: counts by atomic number, and at most one property, of each.
            top: symmetries of each.
            progress: called with the compositions that are done, and all.
            only_new: whether symmetries are wanted that no known polymorph has.
        """
        (rankings,) = self._rank(rows, top, (only_new,), progress)
        return rankings

    def rank_both(
        self,
        rows: Sequence[tuple[Mapping[int, int], Mapping[str, float]]],
        top: int,
        progress: "Progress | None" = None,
    ) -> tuple[list[list["SymmetryCandidate"]], list[list["SymmetryCandidate"]]]:
        """``rank`` with and without `only_new`; the language model is asked once."""
        new, of_any = self._rank(rows, top, (True, False), progress)
        return new, of_any

    def _rank(
        self,
        rows: Sequence[tuple[Mapping[int, int], Mapping[str, float]]],
        top: int,
        kinds: Sequence[bool],
        progress: "Progress | None",
    ) -> list[list[list["SymmetryCandidate"]]]:
        """The rankings with `only_new` true or false, in this order."""
        searched = max(top, _SEARCHED)
        first = self._asked(rows, searched, progress)
        rankings: list[list[list[SymmetryCandidate]]] = [[] for _ in kinds]
        for done, ((counts, properties), found) in enumerate(zip(rows, first, strict=True), 1):
            for only_new, listed in zip(kinds, rankings, strict=True):
                rank = self.prior.rank_new if only_new else self.prior.rank
                others = rank(counts, properties, top=searched)
                polymorphs = () if only_new else self.prior.known_symmetries(counts)
                listed.append(self.combined(found, others, polymorphs)[:top])
            if progress is not None and self.model is None:
                progress(done, len(rows))
        return rankings

    def combined(
        self,
        found: Sequence["SymmetryCandidate"],
        ranked: Sequence["SymmetryCandidate"],
        polymorphs: Collection[SymmetryKey] = (),
    ) -> list["SymmetryCandidate"]:
        """The language model's ranking and the prior's as one.

        Args:
            found: by the language model, if it has one.
            ranked: by the prior.
            polymorphs: symmetries of known ones, if these are wanted as well. They keep what the
                prior gives them, where the model was told of them.
        """
        told = self.model is not None and self.model.analogues
        return beside_known(found, ranked, polymorphs if told else (), self.share, self.sharpness)

    def _asked(
        self,
        rows: Sequence[tuple[Mapping[int, int], Mapping[str, float]]],
        searched: int,
        progress: "Progress | None",
    ) -> list[list["SymmetryCandidate"]]:
        """The language model's rankings; empty ones without it."""
        if self.model is None:
            return [[] for _ in rows]
        from common.language.grammar import AnswerGrammar
        from common.language.model import rank_questions
        from common.language.prompt import Question

        found: list[list[SymmetryCandidate]] = [[] for _ in rows]
        asked: dict[int, tuple[Question, AnswerGrammar]] = {}
        for index, (counts, properties) in enumerate(rows):
            question = Question.ask(counts, properties)
            with suppress(UserError):  # nothing that it could answer; the prior will say so or not
                asked[index] = question, AnswerGrammar(Formula(tuple(sorted(question.formula))))
        if not asked:
            return found
        questions, grammars = zip(*asked.values(), strict=True)
        rankings = rank_questions(
            self.model,
            questions,
            top=searched,
            grammars=grammars,
            known=True,
            prior=self.prior,
            progress=progress,
        )
        for index, ranking in zip(asked, rankings, strict=True):
            found[index] = self.prior.labelled(rows[index][0], ranking.candidates)
        return found


def load_ranker(
    properties: Sequence[str],
    symmetry_model: str | Path | None = None,
    prior: "TemplatePrior | str | Path | None" = None,
    backend: str = "auto",
    device: str = "auto",
) -> Ranker:
    """What ranks symmetries for a property (or none).

    Args:
        properties: names, at most one.
        symmetry_model: a folder, a shipped model's name, a repository as in
            ``common.language.hub``, ``glm4`` for the shipped model of the property, ``prior`` for
            the prior alone. None is ``glm4``, but ``prior`` beside a prior of one's own or where
            none is shipped.
        prior: or its path; the shipped one without it.
        backend: as in ``common.backend.load_backend``.
        device: where the language model is, as in ``common.backend.load_generator``.

    Raises:
        UserError: if a file is missing or damaged.
    """
    if symmetry_model is None:
        symmetry_model = LANGUAGE if prior is None and shipped_language() else PRIOR
    if prior is None or isinstance(prior, str | Path):
        from common.prior import SHIPPED, load_prior

        prior = load_prior(SHIPPED if prior is None else Path(prior))
    folder = model_folder(next(iter(properties), None), symmetry_model)
    if folder is None:
        return Ranker(prior)
    name = _name(folder)
    try:
        from common.language.hub import weights_folder

        folder = weights_folder(folder)
        model = load_language_model(folder, backend, _shipped_base(folder), device)
        return Ranker(prior, model, name, folder)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if not package or package in _OWN:
            raise
        extras = "language" if backend_name(backend, device) == "mindspore" else _TORCH_EXTRAS
        reason = f"package '{package}' is not installed; pip install 'uni-mdm[{extras}]'"
    note = f"language model {folder} is not used, the template prior ranks: {reason}"
    return Ranker(prior, note=note)


def model_folder(wanted: str | None, given: str | Path) -> Path | None:
    """The folder of the language model that ranks for a property; None for the prior.

    Args:
        wanted: the property.
        given: what a user has said, see ``load_ranker``.

    Raises:
        UserError: if the shipped model is wanted, and there is none.
    """
    if str(given) == PRIOR:
        return None
    known = shipped_language()
    if str(given) != LANGUAGE:
        return checkpoint_folder(given, known)
    for name in (SHIPPED_MODELS.get(wanted or ""), SHIPPED_BASE):
        if name in known:
            return known[name]
    raise UserError("no language model is shipped: give the folder of one, or prior")


def _name(folder: Path) -> str:
    """A run's name rather than that of its last folder."""
    path = folder.resolve()
    return path.parent.name if path.name == FINAL else path.name


def _shipped_base(folder: Path) -> Path | None:
    """The shipped weights that an adapter was trained on; None if they are not shipped."""
    if not is_checkpoint(folder):
        return None
    saved = load_checkpoint(folder)
    if saved.manifest["format"] != ADAPTER.format:
        return None
    try:
        text = (saved.path / "adapter_config.json").read_text(encoding="utf-8")
        revision = json.loads(text).get("revision")
    except (OSError, ValueError, AttributeError):
        return None  # whoever loads it says what is wrong
    base = shipped_language().get(SHIPPED_BASE)
    return base if base is not None and load_checkpoint(base).hash == revision else None


def rank_symmetries(query: "Query", ranker: Ranker, top: int) -> list["SymmetryCandidate"]:
    """The likeliest symmetries of a query, whose probabilities depend on nothing beside it.

    Raises:
        UserError: if nothing legal fits what the query fixes.
    """
    from common.prior import SymmetryCandidate
    from common.templates import ordered_sites

    if query.sites is not None and query.space_group is not None:
        units = check_sites(query.sites, query.space_group, query.formula)
        sites = ordered_sites(_plain_sites(query) or (), query.space_group)
        return [SymmetryCandidate(query.space_group, sites, units, 1.0, "given")]
    others = _prior_candidates(query, ranker.prior, max(top, _SEARCHED))
    polymorphs = ranker.prior.known_symmetries(query.formula.counts)
    found = _language_candidates(query, ranker)
    candidates = ranker.combined(found, others, polymorphs)
    if not candidates:
        raise UserError(_nothing_legal(query))
    return candidates[:top]


def pooled(
    first: Sequence["SymmetryCandidate"], others: Sequence["SymmetryCandidate"], share: float
) -> list["SymmetryCandidate"]:
    """Two rankings as one, with the weighted mean of their probabilities (linear opinion pool).

    What one of them does not list has no probability there. An empty one has no say.

    Args:
        first, others: symmetries, each once.
        share: weight of the first, 0 to 1.
    """
    if not first or not others:
        return [*first, *others]
    found: dict[SymmetryKey, SymmetryCandidate] = {}
    for candidates, weight in ((first, share), (others, 1 - share)):
        for c in candidates:
            before = found.get(c.key)
            mass = weight * c.probability
            found[c.key] = (
                replace(c, probability=mass)
                if before is None
                else replace(before, probability=before.probability + mass)
            )
    return sorted(found.values(), key=lambda c: (-c.probability, c.space_group, c.sites))


def sharpened(
    candidates: Sequence["SymmetryCandidate"], exponent: float
) -> list["SymmetryCandidate"]:
    """Probabilities to a power above zero; what they sum to stays as it is.

    A linear pool of calibrated forecasts lacks sharpness, whatever its weights (Ranjan and
    Gneiting, J. R. Stat. Soc. B 72, 71 (2010)).
    """
    total = sum(c.probability for c in candidates)
    powers = [c.probability**exponent for c in candidates]
    scale = total / sum(powers) if total else 0.0
    return [replace(c, probability=scale * p) for c, p in zip(candidates, powers, strict=True)]


def averaged(
    found: Sequence["SymmetryCandidate"],
    ranked: Sequence["SymmetryCandidate"],
    share: float,
    sharpness: float,
) -> list["SymmetryCandidate"]:
    """``pooled`` and ``sharpened``; an empty ranking leaves the other one as it is."""
    pool = pooled(found, ranked, share)
    return sharpened(pool, sharpness) if found and ranked else pool


def beside_known(
    found: Sequence["SymmetryCandidate"],
    ranked: Sequence["SymmetryCandidate"],
    known: Collection[SymmetryKey],
    share: float,
    sharpness: float,
) -> list["SymmetryCandidate"]:
    """``averaged``, but known polymorphs keep at least the probability that the prior gives them.

    Args:
        found: by the language model, which was asked for symmetries beside the known ones.
        ranked: by the prior, known ones included.
        known: symmetries of the composition's known crystals.
        share, sharpness: of ``found``, and of the average, in what is left.
    """
    mass = sum(c.probability for c in ranked if c.key in known)
    if not (found and 0 < mass < 1):
        return averaged(found, ranked, share, sharpness)
    kept = [replace(c, probability=c.probability / mass) for c in ranked if c.key in known]
    rest = [
        replace(c, probability=c.probability / (1 - mass)) for c in ranked if c.key not in known
    ]
    return pooled(kept, averaged(found, rest, share, sharpness), mass)


def _language_candidates(query: "Query", ranker: Ranker) -> list["SymmetryCandidate"]:
    """What the language model answers, given what is fixed; nothing where it cannot."""
    if ranker.model is None:
        return []
    from common.language.grammar import AnswerGrammar
    from common.language.model import rank_questions
    from common.language.prompt import Question
    from common.templates import ordered_sites

    question = Question.ask(query.formula.counts, query.properties)
    try:
        grammar = AnswerGrammar(
            query.formula, space_group=query.space_group, z=query.z, sites=query.sites
        )
    except UserError:  # the cell is too large for it, or nothing is legal, as the prior will find
        return []
    # Alone and in one thread: other rows or threads would change the last digits.
    with one_thread():
        (ranking,) = rank_questions(
            ranker.model,
            [question],
            top=_SEARCHED,
            grammars=[grammar],
            known=True,
            prior=ranker.prior,
        )
    given = _plain_sites(query)
    if given is not None:
        return [replace(c, sites=ordered_sites(given, c.space_group)) for c in ranking.candidates]
    return ranker.prior.labelled(query.formula.counts, ranking.candidates)


def _prior_candidates(
    query: "Query", prior: "TemplatePrior", top: int
) -> list["SymmetryCandidate"]:
    candidates = prior.rank(
        query.formula.counts,
        query.properties,
        space_group=query.space_group,
        z=query.z,
        units=query.formula.units if query.formula.units > 1 else None,
        sites=_plain_sites(query),
        top=230 if query.sites else top,
    )
    return candidates if query.sites is None else _with_multiplicities(query, candidates)[:top]


def _with_multiplicities(
    query: "Query", candidates: Sequence["SymmetryCandidate"]
) -> list["SymmetryCandidate"]:
    """Candidates in whose groups the user's letters have the user's multiplicities."""
    kept = []
    for candidate in candidates:
        table = wyckoff_summary(candidate.space_group).letters
        assert query.sites is not None
        if all(s.multiplicity in (None, table[s.letter][0]) for s in query.sites):
            kept.append(candidate)
    total = sum(candidate.probability for candidate in kept)
    return [replace(c, probability=c.probability / total) for c in kept]


def _plain_sites(query: "Query") -> Sites | None:
    if query.sites is None:
        return None
    return tuple((s.atomic_number, s.letter) for s in query.sites)


def _nothing_legal(query: "Query") -> str:
    """One line that says what cannot be done."""
    fixed = [f"z = {query.z}"] if query.z else []
    fixed += [f"sites {' '.join(map(str, query.sites))}"] if query.sites else []
    if query.formula.units > 1:
        fixed += [f"{query.formula.units} formula units per cell"]
    if not fixed:
        fixed = [f"at most {MAX_PRIMITIVE_ATOMS} atoms in the primitive cell"]
    if query.space_group:
        fixed = [f"space group {query.space_group}", *fixed]
    return (
        f"{query.formula.text} cannot be placed with {', '.join(fixed)}: "
        "no Wyckoff positions add up to it; leave something free"
    )
