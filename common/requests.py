"""Files of many requests: CSV with a header, or JSON lines.

Columns or keys: ``formula`` and, each optional, ``id``, ``band_gap`` (eV), ``formation_energy``
(eV/atom), ``space_group``, ``sites``, ``z``. An empty cell or null is as if it were not there.
"""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.pipeline import Query, make_query

COLUMNS = ("id", "formula", "band_gap", "formation_energy", "space_group", "sites", "z")
MAX_REQUESTS = 100_000


def read_requests(path: Path) -> list[Query]:
    """All requests of a file, checked.

    Raises:
        UserError: if the file cannot be read or holds nothing; names the first line that is wrong.
    """
    rows = _json_rows if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else _csv_rows
    queries = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, row in rows(file):
                queries.append(_query(row, f"{path} line {line}"))
                if len(queries) > MAX_REQUESTS:
                    raise UserError(f"{path}: more than {MAX_REQUESTS} requests; split the file")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    except _BadLine as error:
        raise UserError(f"{path} {error}") from error
    if not queries:
        raise UserError(f"{path} holds no request: give a header and a row per request")
    return queries


class _BadLine(Exception):
    """A line that is not of the file's format."""


def _csv_rows(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, skipinitialspace=True, strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or [] if name is not None]
        if "formula" not in header:
            raise _BadLine(f"has no column 'formula'; columns known: {', '.join(COLUMNS)}")
        if len(set(header)) != len(header):
            raise _BadLine("has a column twice")
        reader.fieldnames = header
        for row in reader:
            if None in row:
                raise _BadLine(f"line {reader.line_num}: more cells than columns")
            if any((value or "").strip() for value in row.values()):
                yield reader.line_num, row
    except csv.Error as error:
        raise _BadLine(f"line {reader.line_num}: not CSV: {error}") from error


def _json_rows(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadLine(f"line {number}: not JSON, one object per line is expected") from error
        if not isinstance(row, dict):
            raise _BadLine(f"line {number}: an object with 'formula' is expected")
        yield number, row


def _query(row: dict[str, Any], where: str) -> Query:
    """One request of a row; errors name the line."""
    unknown = [name for name in row if name not in COLUMNS]
    if unknown:
        known = ", ".join(COLUMNS)
        raise UserError(f"{where}: unknown column {str(unknown[0])[:40]!r}; known: {known}")
    values = {name: value for name, value in row.items() if not _is_empty(value)}
    if "formula" not in values:
        raise UserError(f"{where}: no formula")
    try:
        return make_query(
            str(values["formula"]),
            band_gap=_number("band_gap", values.get("band_gap")),
            formation_energy=_number("formation_energy", values.get("formation_energy")),
            space_group=_integer("space_group", values.get("space_group")),
            z=_integer("z", values.get("z")),
            sites=None if "sites" not in values else str(values["sites"]),
            name=str(values.get("id", ""))[:100],
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


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


def _integer(name: str, value: Any) -> int | None:
    number = _number(name, value)
    if number is None:
        return None
    if not math.isfinite(number) or number != int(number):
        raise UserError(f"{name} is {str(value)[:40]!r}: give a whole number")
    return int(number)
