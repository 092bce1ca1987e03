"""Questions and answers of labelled crystals as files that language models are trained on.

Rows are parted so that no reduced formula is in two parts. Rows whose id is in a set that must stay
unseen are left out, on request also those of the same formula and symmetry (mostly the same crystal
under another id), or all of the same formula. The report counts what is shared in the end.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.crystal.wyckoff import SymmetryKey
from common.data.store import Record, fingerprint, reduced_formula, split_by_formula
from common.errors import UserError
from common.files import write_together
from common.language.analogues import AnalogueIndex
from common.language.prompt import INSTRUCTION, Question, Symmetry, write_answer, write_question

PARTS = ("train", "val", "test")


class Form(StrEnum):
    """How files are written.

    jsonl: one object a line, with ``id``, ``instruction``, ``input`` and ``output``.
    mindformers: one JSON list with ``instruction``, ``input`` and ``output``, as MindFormers'
        Alpaca handlers read it.
    """

    jsonl = "jsonl"
    mindformers = "mindformers"


class Drop(StrEnum):
    """Which rows are left out: each of these includes the ones before it."""

    id = "id"
    symmetry = "symmetry"
    formula = "formula"


@dataclass(frozen=True)
class Reference:
    """A set that training must not see.

    Attributes:
        name: in the report.
        ids, formulas: of its rows; reduced formulas.
        symmetries: formula and symmetry of its rows; None if its file does not tell.
    """

    name: str
    ids: frozenset[str]
    formulas: frozenset[str]
    symmetries: frozenset[tuple[str, SymmetryKey]] | None = None

    @classmethod
    def of_records(cls, name: str, records: Iterable[Record]) -> "Reference":
        """A set of labelled crystals."""
        rows = [(record.material_id, _key(record)) for record in records]
        return cls(
            name,
            frozenset(material_id for material_id, _ in rows),
            frozenset(formula for _, (formula, _) in rows),
            frozenset(key for _, key in rows),
        )

    def shares(self, record: Record, drop: Drop) -> bool:
        """Whether a row has its id, or what else is named, in common with this set."""
        if record.material_id in self.ids:
            return True
        if drop is Drop.formula:
            return record.reduced_formula in self.formulas
        return drop is Drop.symmetry and _key(record) in (self.symmetries or ())


def read_ids(path: Path) -> Reference:
    """A set known by its ids: a text file, one id a line, with a formula after a comma if known.

    Raises:
        UserError: if it cannot be read or holds nothing.
    """
    from common.composition import parse_formula

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the ids in {path}: {error}") from error
    rows = [row for row in rows if row and row[0]]
    if not rows:
        raise UserError(f"{path} holds no id: give one a line, with a formula after a comma")
    formulas = {
        reduced_formula(parse_formula(row[1]).counts) for row in rows if len(row) > 1 and row[1]
    }
    return Reference(path.name, frozenset(row[0] for row in rows), frozenset(formulas))


@dataclass(frozen=True)
class Overlap:
    """What one part has in common with a reference; rows of the part.

    ``symmetry`` counts rows whose formula, space group and sites are those of a reference's row;
    None where the reference does not tell.
    """

    ids: int
    formula: int
    symmetry: int | None


@dataclass(frozen=True)
class PromptSet:
    """Parted rows, what was left out for what reason, and what is still shared with references.

    Attributes:
        parts: the rows.
        dropped: rows that share their ``drop`` with a reference.
        drop: see there.
        lacking: rows without the property that questions tell, which are left out before those.
        overlaps: of every part with every reference.
    """

    parts: Mapping[str, list[Record]]
    dropped: int
    drop: Drop
    lacking: int
    overlaps: Mapping[str, Mapping[str, Overlap]]

    def report(self) -> dict[str, Any]:
        """As JSON types; names every part's rows by a fingerprint."""
        return {
            "parts": {
                name: {
                    "rows": len(records),
                    "formulas": len({record.reduced_formula for record in records}),
                    "fingerprint": fingerprint(records),
                }
                for name, records in self.parts.items()
            },
            "left_out": {
                "rows": self.dropped,
                "shared": self.drop.value,
                "without_property": self.lacking,
            },
            "overlaps": {
                name: {part: asdict(found) for part, found in parts.items()}
                for name, parts in self.overlaps.items()
            },
        }


def make_prompt_set(
    records: Iterable[Record],
    references: Sequence[Reference],
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    drop: Drop = Drop.id,
    target: str | None = None,
) -> PromptSet:
    """Leaves out what lacks the property or is in the references, and parts the other rows.

    Args:
        records: the rows.
        references: sets that must stay unseen.
        fractions: of the rows in train, val and test.
        seed: of the parting.
        drop: what rows may not share with a reference.
        target: the property that questions tell, if any.

    Raises:
        UserError: if nothing is left, or for fractions that are not positive or do not sum to 1.
    """
    given = list(records)
    rows = [r for r in given if target is None or r.properties[target] is not None]
    if not rows:
        raise UserError(f"no row has a {target}: give another --target, or none")
    kept = [r for r in rows if not any(ref.shares(r, drop) for ref in references)]
    if not kept:
        raise UserError(f"no row is left: each has its {drop} in a set that must stay unseen")
    parts = dict(zip(PARTS, split_by_formula(kept, fractions, seed), strict=True))
    overlaps = {
        reference.name: {part: overlap(own, reference) for part, own in parts.items()}
        for reference in references
    }
    return PromptSet(parts, len(rows) - len(kept), drop, len(given) - len(rows), overlaps)


def overlap(records: Sequence[Record], reference: Reference) -> Overlap:
    """How many of the records have their id, formula or symmetry in common with a reference."""
    same = None
    if reference.symmetries is not None:
        same = sum(_key(record) in reference.symmetries for record in records)
    return Overlap(
        sum(record.material_id in reference.ids for record in records),
        sum(record.reduced_formula in reference.formulas for record in records),
        same,
    )


def _key(record: Record) -> tuple[str, SymmetryKey]:
    """Reduced formula, and the symmetry up to relabelling."""
    return record.reduced_formula, record.crystal.symmetry_key


def prompt_rows(
    records: Iterable[Record], target: str | None, analogues: AnalogueIndex | None = None
) -> Iterator[dict[str, str]]:
    """Question and answer of every record.

    Args:
        records: all have the target.
        target: ``band_gap``, ``formation_energy`` or None.
        analogues: what questions tell of; every second one tells of known polymorphs, too.
    """
    for index, record in enumerate(records):
        properties = {}
        if target is not None:
            value = record.properties[target]
            assert value is not None
            properties = {target: value}
        question = Question.ask(record.crystal.formula_counts, properties)
        if analogues is not None:
            known = index % 2 == 1
            question = analogues.tell(question, known=known, leave_out=record.material_id)
        yield {
            "id": record.material_id,
            "instruction": INSTRUCTION,
            "input": write_question(question),
            "output": write_answer(Symmetry.of_crystal(record.crystal)),
        }


def write_prompts(
    prompts: PromptSet,
    rows: Mapping[str, Sequence[Mapping[str, str]]],
    folder: Path,
    target: str | None,
    form: Form,
) -> list[Path]:
    """Writes a file per part, and ``report.json``.

    Args:
        prompts: what the rows were made of.
        rows: of ``prompt_rows``, by part.
        folder: is made if missing.
        target: of the rows, for the report.
        form: of the files.

    Returns:
        the files, the report last.

    Raises:
        UserError: if the folder is not writable.
    """
    suffix = ".jsonl" if form is Form.jsonl else ".json"
    files: dict[Path, bytes | str] = {
        folder / f"{name}{suffix}": _text(own, form) for name, own in rows.items()
    }
    report = {"target": target, "form": form.value, **prompts.report()}
    files[folder / "report.json"] = json.dumps(report, indent=1) + "\n"
    write_together(files)
    return list(files)


def _text(rows: Iterable[Mapping[str, str]], form: Form) -> str:
    if form is Form.jsonl:
        return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    plain = [{key: row[key] for key in ("instruction", "input", "output")} for row in rows]
    return json.dumps(plain, ensure_ascii=False, indent=1) + "\n"
