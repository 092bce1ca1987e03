"""Measures what ranks symmetries: a language model, and the controls that it must beat."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, track

from common.checkpoint import is_checkpoint, load_checkpoint
from common.composition import MAX_PRIMITIVE_ATOMS
from common.crystal.wyckoff import SymmetryKey
from common.data.store import Record
from common.errors import UserError
from common.evaluate.language import rouge
from common.evaluate.run import told_of
from common.evaluate.symmetry_controls import TemplateControls
from common.evaluate.symmetry_prediction import CUTOFFS, first_place, legal_answers, outcome_of
from common.evaluate.symmetry_report import Answers, SymmetryRow, SymmetryRun
from common.language.calibration import (
    answer_nats,
    fit_sharpness,
    fit_temperature,
    true_choices,
)
from common.language.dataset import Reference, overlap
from common.language.model import LanguageModel, rank_questions, write_answers
from common.language.prompt import Question, Symmetry, write_answer
from common.prior import SymmetryCandidate, TemplatePrior
from common.ranking import Ranker, pooled

#: Symmetries that are asked for.
TOP = max(CUTOFFS)

_Ranking = Sequence[SymmetryCandidate]
_Rank = Callable[[Mapping[int, int], Mapping[str, float]], _Ranking]


@dataclass(frozen=True)
class _Timed:
    """Rankings of all rows, and the seconds that they took."""

    name: str
    rankings: list[_Ranking]
    seconds: float


def properties_of(record: Record, target: str) -> dict[str, float]:
    """The property that a question names; none if the row has none, or ``target`` is ``none``."""
    value = None if target == "none" else record.properties[target]
    return {} if value is None else {target: value}


@dataclass(frozen=True)
class History:
    """How a language model was trained, as far as its folder says.

    Attributes:
        data: what it learned from, earlier runs that it goes on from included, and the number of
            rows, the first ones first.
        seed: of its own run.
    """

    data: tuple[tuple[str, int], ...] = ()
    seed: int | None = None

    @classmethod
    def of(cls, folder: Path) -> "History":
        """The history of a model's folder; one without a word where it has no manifest."""
        if not is_checkpoint(folder):
            return cls()
        saved = load_checkpoint(folder)
        return cls(saved.rows_seen, saved.config.get("train", {}).get("seed"))

    @property
    def training(self) -> tuple[str, int]:
        """What it learned from in words, and the rows of the largest set."""
        if not self.data:
            return "unknown", 0
        names = dict.fromkeys(name for name, _ in self.data)
        return ", then ".join(names), max(rows for _, rows in self.data)


class SymmetryEvaluation:
    """Rows whose symmetry is asked for, and what is true of them.

    Args:
        references: the rows.
        split: their name.
        target: ``band_gap``, ``formation_energy`` or ``none``: what questions name.
        training: rows that the controls learn from.
        training_name: their name.
        prior: the template prior.
        console: where progress is shown.
    """

    def __init__(
        self,
        references: Sequence[Record],
        split: str,
        target: str,
        training: Sequence[Record],
        training_name: str,
        prior: TemplatePrior,
        console: Console | None = None,
    ) -> None:
        self._references = list(references)
        self._crystals = [record.crystal for record in references]
        self._properties = [properties_of(record, target) for record in references]
        self._symmetries = [Symmetry.of_crystal(crystal) for crystal in self._crystals]
        self._texts = [write_answer(symmetry) for symmetry in self._symmetries]
        self._split = split
        self._target = target if target == "none" else told_of(self._properties, target)
        self._training = list(training)
        self._training_name = training_name
        self._seen = overlap(references, Reference.of_records(training_name, training))
        self._prior = prior
        formulas = {record.reduced_formula for record in training}
        self._new = tuple(record.reduced_formula not in formulas for record in references)
        polymorphs: dict[str, set[SymmetryKey]] = {}
        asked = {record.reduced_formula for record in references}
        for record in (*references, *training):
            if record.reduced_formula in asked:
                own = polymorphs.setdefault(record.reduced_formula, set())
                own.add(record.crystal.symmetry_key)
        self._polymorphs = [polymorphs[record.reduced_formula] for record in references]
        self._console = console or Console(stderr=True)

    def model(self, model: LanguageModel, name: str, history: History) -> list[SymmetryRow]:
        """The rows of a language model, and of its average with the prior.

        The model is told of known polymorphs if it was trained so, and asked for others.

        Args:
            model: asked about every row.
            name: of the row.
            history: how it was trained.

        Raises:
            UserError: for a row whose cell is larger than the model can answer.
        """
        self._check_sizes()
        questions = [
            Question.ask(crystal.formula_counts, properties)
            for crystal, properties in zip(self._crystals, self._properties, strict=True)
        ]
        start = time.perf_counter()
        with Progress(console=self._console, transient=True) as bars:
            show = partial(_progress, bars)
            rankings = rank_questions(
                model, questions, top=TOP, known=True, progress=show(f"{name}: ranking")
            )
            seconds = time.perf_counter() - start
            choices = true_choices(
                model,
                questions,
                self._symmetries,
                known=True,
                progress=show(f"{name}: true answers"),
            )
            answers = write_answers(model, questions, known=True, progress=show(f"{name}: answers"))
        found = [ranking.candidates for ranking in rankings]
        row = self._row(
            name,
            found,
            seconds,
            self._answers(answers, "without constraint"),
            model=model.name,
            seed=history.seed,
            training=history.training,
            figures={
                "sequences_scored": sum(ranking.scored for ranking in rankings),
                "nats_of_truth": answer_nats(choices),
                "best_temperature": fit_temperature(choices),
            },
        )
        return [row, self._averaged(row, found, Ranker(self._prior, model))]

    def _check_sizes(self) -> None:
        for record in self._references:
            atoms = record.crystal.num_primitive_atoms
            if atoms > MAX_PRIMITIVE_ATOMS:
                raise UserError(
                    f"{record.material_id} has {atoms} atoms in its primitive cell, a language "
                    f"model's answers at most {MAX_PRIMITIVE_ATOMS}: leave it out of the data"
                )

    def _averaged(self, row: SymmetryRow, found: Sequence[_Ranking], ranker: Ranker) -> SymmetryRow:
        """The row of a language model's rankings averaged with the prior's."""
        new, plain = self._new_by_prior, self._by_prior
        pairs = list(zip(found, new.rankings, strict=True))
        rankings = [ranker.combined(own, others)[:TOP] for own, others in pairs]
        any_polymorph = [
            ranker.combined(own, others, self._prior.known_symmetries(crystal.formula_counts))
            for own, others, crystal in zip(found, plain.rankings, self._crystals, strict=True)
        ]
        pools = (pooled(own, others, ranker.share) for own, others in pairs)
        places = [
            ([c.probability for c in pool], first_place(pool, {crystal.symmetry_key}))
            for pool, crystal in zip(pools, self._crystals, strict=True)
        ]
        firsts = [_first_answer(ranking) for ranking in rankings]
        return self._row(
            f"{row.run.name} and template prior",
            rankings,
            row.run.seconds + new.seconds,
            self._answers(firsts, "first of the ranking"),
            model=f"{row.run.model}, {self._prior.hash}",
            seed=row.run.seed,
            training=(row.run.training_set, row.run.training_size),
            plain=any_polymorph,
            figures={"sharpness": ranker.sharpness, "best_sharpness": fit_sharpness(places)},
        )

    def controls(self) -> list[SymmetryRow]:
        """The prior with and without known polymorphs, and templates by count and likeness."""
        learned = track(self._training, "Training templates", console=self._console, transient=True)
        templates = TemplateControls(learned)
        source = self._prior.metadata
        fitted = str(source["source"].get("name", "unknown")), int(source["rows"])
        counted = self._training_name, len(self._training)
        majority = self._timed("majority template", lambda c, _: templates.majority(c, TOP))
        nearest = self._timed("nearest composition", lambda c, _: templates.nearest(c, TOP))
        return [
            self._control(self._by_prior, fitted, self._prior.hash),
            self._control(self._new_by_prior, fitted, self._prior.hash, leaves_out_known=True),
            self._control(majority, counted),
            self._control(nearest, counted),
        ]

    @cached_property
    def _by_prior(self) -> _Timed:
        return self._timed("template prior", partial(self._prior.rank, top=TOP))

    @cached_property
    def _new_by_prior(self) -> _Timed:
        name = "template prior, known polymorphs excluded"
        return self._timed(name, partial(self._prior.rank_new, top=TOP))

    def _timed(self, name: str, rank: _Rank) -> _Timed:
        start = time.perf_counter()
        rows = list(zip(self._crystals, self._properties, strict=True))
        shown = track(rows, name, console=self._console, transient=True)
        rankings = [rank(crystal.formula_counts, properties) for crystal, properties in shown]
        return _Timed(name, rankings, time.perf_counter() - start)

    def _control(
        self,
        made: _Timed,
        training: tuple[str, int],
        model: str | None = None,
        *,
        leaves_out_known: bool = False,
    ) -> SymmetryRow:
        firsts = [_first_answer(ranking) for ranking in made.rankings]
        return self._row(
            made.name,
            made.rankings,
            made.seconds,
            self._answers(firsts, "first of the ranking"),
            model=model,
            training=training,
            plain=None if leaves_out_known else made.rankings,
        )

    def _answers(self, texts: Sequence[str], kind: str) -> Answers:
        return Answers(
            kind,
            legal_answers(texts, self._crystals),
            sum(map(str.__eq__, texts, self._texts)) / len(texts),
            rouge(texts, self._texts),
        )

    def _row(
        self,
        name: str,
        rankings: Sequence[_Ranking],
        seconds: float,
        answers: Answers,
        *,
        training: tuple[str, int],
        model: str | None = None,
        seed: int | None = None,
        figures: Mapping[str, float] | None = None,
        plain: Sequence[_Ranking] | None = None,
    ) -> SymmetryRow:
        run = SymmetryRun(
            name,
            self._split,
            self._target,
            *training,
            model,
            seed,
            seconds,
            seen_ids=self._seen.ids,
            seen_symmetry=self._seen.symmetry,
            seen_in=self._training_name,
        )
        outcomes = tuple(map(outcome_of, self._crystals, rankings))
        ids = tuple(record.material_id for record in self._references)
        row = SymmetryRow(run, ids, outcomes, self._new, answers, dict(figures or {}))
        if plain is None:
            return row
        return replace(
            row,
            polymorphs=tuple(map(first_place, plain, self._polymorphs)),
            plain=tuple(map(outcome_of, self._crystals, plain)),
        )


def _first_answer(ranking: _Ranking) -> str:
    """What a ranking would answer; nothing if it is empty."""
    return write_answer(Symmetry.of(ranking[0].space_group, ranking[0].sites)) if ranking else ""


def _progress(bars: Progress, description: str) -> Callable[[int, int], None]:
    task = bars.add_task(description, total=None)

    def report(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total)

    return report
