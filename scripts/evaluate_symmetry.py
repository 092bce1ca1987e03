"""Measures a symmetry language model, and what it must beat, on the first rows of a data set.

    python scripts/evaluate_symmetry.py MODEL [ROWS] [TARGET] [DATA]

MODEL is a checkpoint, a run's folder, or a folder of GLM-4. TARGET (none, band_gap or
formation_energy) is the property that questions name; DATA is val by default. Prints JSON: rates of
space group and exact assignment among the first 1, 5 and 20, legality, calibration, ROUGE of
unconstrained answers, and McNemar's test of first answers against the template prior's.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, track

from common.backend import load_backend
from common.data.locations import dataset
from common.data.store import Record
from common.evaluate.language import rouge
from common.evaluate.statistics import mcnemar
from common.evaluate.symmetry_controls import TemplateControls
from common.evaluate.symmetry_prediction import (
    CUTOFFS,
    Outcome,
    calibration_error,
    legal_answers,
    outcome_of,
    rates,
)
from common.language.calibration import answer_nats, fit_temperature, true_choices
from common.language.model import LanguageModel, rank_questions, write_answers
from common.language.prompt import Question, Symmetry, write_answer
from common.prior import SymmetryCandidate, TemplatePrior

_TOP = max(CUTOFFS)
_Report = dict[str, Any]


class Measurement:
    """Rows, and what is true of them."""

    def __init__(self, records: Sequence[Record], target: str, console: Console) -> None:
        self.crystals = [record.crystal for record in records]
        self.symmetries = [Symmetry.of_crystal(crystal) for crystal in self.crystals]
        self.properties = [properties_of(record, target) for record in records]
        self.questions = [
            Question.ask(crystal.formula_counts, properties)
            for crystal, properties in zip(self.crystals, self.properties, strict=True)
        ]
        self.prior = TemplatePrior.load()
        known = self.prior.reference
        self.new = [not known.rows_of_formula(c.formula_counts) for c in self.crystals]
        self._console = console

    def control(self, name: str, rank: Callable[..., Sequence[SymmetryCandidate]]) -> _Report:
        """Rates of rankings by composition, and by property where `rank` takes one."""
        start = time.perf_counter()
        rows = list(zip(self.crystals, self.properties, strict=True))
        outcomes = [
            outcome_of(crystal, rank(crystal.formula_counts, properties))
            for crystal, properties in track(rows, name, console=self._console)
        ]
        return self._report(outcomes, time.perf_counter() - start)

    def model(self, model: LanguageModel) -> _Report:
        """Rates of the model's rankings, and what its unconstrained answers are worth."""
        start = time.perf_counter()
        with Progress(console=self._console) as progress:
            task = progress.add_task("language model: ranking")

            def report(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            rankings = rank_questions(model, self.questions, top=_TOP, progress=report)
            seconds = time.perf_counter() - start
            task = progress.add_task("language model: true answers")
            choices = true_choices(model, self.questions, self.symmetries, progress=report)
            task = progress.add_task("language model: answers")
            answers = write_answers(model, self.questions, progress=report)
        outcomes = [
            outcome_of(crystal, ranking.candidates)
            for crystal, ranking in zip(self.crystals, rankings, strict=True)
        ]
        texts = [write_answer(symmetry) for symmetry in self.symmetries]
        return {
            **self._report(outcomes, seconds),
            "name": model.name,
            "scored": sum(ranking.scored for ranking in rankings),
            "nats_of_truth": round(answer_nats(choices), 3),
            "best_temperature": round(fit_temperature(choices), 3),
            "unconstrained": {
                "legal": legal_answers(answers, self.crystals),
                "exact": sum(map(str.__eq__, answers, texts)) / len(texts),
                **rouge(answers, texts),
            },
        }

    def _report(self, outcomes: Sequence[Outcome], seconds: float) -> _Report:
        return {
            **rates(outcomes, self.new),
            "legal": sum(outcome.legal for outcome in outcomes) / len(outcomes),
            "calibration_error": round(calibration_error(outcomes), 4),
            "seconds": round(seconds, 1),
            "right": [outcome.assignment == 0 for outcome in outcomes],
        }


def properties_of(record: Record, target: str) -> dict[str, float]:
    """The property that a question names; none if the row has none."""
    value = None if target == "none" else record.properties[target]
    return {} if value is None else {target: value}


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    folder, *rest = arguments
    rows, target, data = (*rest, *("200", "none", "val")[len(rest) :])
    console = Console(stderr=True)
    records = dataset(data)[: int(rows)]
    model = load_backend().load_language_model(Path(folder))
    measured = Measurement(records, target, console)
    controls = TemplateControls(track(dataset("train"), "training templates", console=console))
    reports = {
        "language model": measured.model(model),
        "template prior": measured.control(
            "template prior", lambda c, p: measured.prior.rank(c, p, top=_TOP)
        ),
        "majority template": measured.control(
            "majority template", lambda c, _: controls.majority(c, _TOP)
        ),
        "nearest composition": measured.control(
            "nearest composition", lambda c, _: controls.nearest(c, _TOP)
        ),
    }
    own = reports["language model"]["right"]
    for name, report in reports.items():
        right = report.pop("right")
        if name != "language model":
            report["p_against_model"] = mcnemar(own, right).p_value
    print(json.dumps({"target": target, "data": data, **reports}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
