"""Files of many requests: CSV with a header, or JSON lines.

Columns or keys: ``formula`` and, each optional, ``id``, ``band_gap`` (eV), ``formation_energy``
(eV/atom), ``space_group`` (number or symbol), ``sites``, ``z``. An empty cell or null is as if it
were not there.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.pipeline import Query, make_query

COLUMNS = ("id", "formula", "band_gap", "formation_energy", "space_group", "sites", "z")
MAX_REQUESTS = 100_000
#: Lines that an error names.
_NAMED = 10
_LONGEST_ID = 100

#: A row of a file, or what is wrong with its line.
_Row = dict[str, Any] | UserError


def read_requests(path: Path) -> list[Query]:
    """All requests of a file, checked.

    Raises:
        UserError: if the file cannot be read, holds nothing, or has lines that are wrong or an id
            twice; names the lines.
    """
    rows = _json_rows if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else _csv_rows
    queries: list[Query] = []
    lines: dict[str, int] = {}  # of an id
    wrong: list[tuple[int, UserError]] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, row in rows(file):
                if len(queries) + len(wrong) == MAX_REQUESTS:
                    raise UserError(f"{path}: more than {MAX_REQUESTS} requests; split the file")
                try:
                    queries.append(_query(row, line, lines))
                except UserError as error:
                    wrong.append((line, error))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    except _BadFile as error:
        raise UserError(f"{path} {error}") from error
    if wrong:
        raise _all_of(path, wrong)
    if not queries:
        raise UserError(f"{path} holds no request: give a header and a row per request")
    return queries


class _BadFile(Exception):
    """What is wrong with the whole file, or what ends its reading."""


def _all_of(path: Path, wrong: list[tuple[int, UserError]]) -> UserError:
    """One error for all wrong lines."""
    if len(wrong) == 1:
        line, error = wrong[0]
        return UserError(f"{path} line {line}: {error}")
    named = "; ".join(f"line {line}: {error}" for line, error in wrong[:_NAMED])
    rest = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    return UserError(f"{path}: {len(wrong)} lines are wrong: {named}{rest}")


def _csv_rows(file: Any) -> Iterator[tuple[int, _Row]]:
    reader = csv.DictReader(file, skipinitialspace=True, strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or [] if name is not None]
        if "formula" not in header:
            named = ", ".join(header)[:80] or "nothing"
            raise _BadFile(
                f"has no column 'formula', its first line names {named!r}; columns known, "
                f"with commas between: {', '.join(COLUMNS)}"
            )
        if len(set(header)) != len(header):
            raise _BadFile("has a column twice")
        if unknown := _unknown(header):
            raise _BadFile(f"line 1: {unknown}")
        reader.fieldnames = header
        for row in reader:
            if None in row:
                number = len(header)
                wrong = f'more cells than the {number} columns: put "..." around what has commas'
                yield reader.line_num, UserError(wrong)
            elif any((value or "").strip() for value in row.values()):
                yield reader.line_num, row
    except csv.Error as error:
        raise _BadFile(f"line {reader.line_num}: not CSV: {error}") from error


def _json_rows(file: Any) -> Iterator[tuple[int, _Row]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            row = UserError('not an object such as {"formula": "SrTiO3"}, one per line')
            if number == 1:  # a list of them, or something else altogether
                raise _BadFile(f"line 1: {row}")
        yield number, row


def _unknown(names: Iterable[str]) -> str | None:
    """What to say of the first name that is no column."""
    for name in names:
        if name not in COLUMNS:
            return f"unknown column {name[:40]!r}; known: {', '.join(COLUMNS)}"
    return None


def _query(row: _Row, line: int, lines: dict[str, int]) -> Query:
    """One request of a row; its id is put down in `lines`."""
    if isinstance(row, UserError):
        raise row
    if unknown := _unknown(row):
        raise UserError(unknown)
    values = {name: value for name, value in row.items() if not _is_empty(value)}
    name = _id(values.get("id"))
    first = lines.setdefault(name, line) if name else line
    if first != line:
        raise UserError(f"id {name!r} is that of line {first} too: give each its own, or none")
    if "formula" not in values:
        raise UserError("no formula: give one such as SrTiO3")
    return make_query(
        str(values["formula"]),
        band_gap=_number("band_gap", values.get("band_gap")),
        formation_energy=_number("formation_energy", values.get("formation_energy")),
        space_group=_space_group(values.get("space_group")),
        z=_integer("z", values.get("z")),
        sites=None if "sites" not in values else str(values["sites"]),
        name=name,
    )


def _id(value: Any) -> str:
    """What the user calls a request; empty if nothing."""
    name = "" if value is None else str(value).strip()
    if len(name) > _LONGEST_ID:
        raise UserError(f"the id has {len(name)} characters: at most {_LONGEST_ID} are kept")
    if not name.isprintable():
        raise UserError(f"id {name!r}: give letters and signs on one line")
    return name


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} is {str(value)[:40]!r}: give a number") from error


def _space_group(value: Any) -> int | str | None:
    return value if isinstance(value, str) else _integer("space_group", value)


def _integer(name: str, value: Any) -> int | None:
    number = _number(name, value)
    if number is None:
        return None
    if not math.isfinite(number) or number != int(number):
        raise UserError(f"{name} is {str(value)[:40]!r}: give a whole number")
    return int(number)
