"""Where crystals come from: MP-20-style CSV files, folders of CIF files, the Materials Project.

A source gives its rows as they are; judging them is the importer's work. The Materials Project's
source is in `materials_project.py`.
"""

import csv
import gzip
import hashlib
import http.client
import io
import json
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit

from pymatgen.core import Structure

from common.errors import UserError
from common.files import atomic_path, write_atomic

#: Property -> the columns it may come from, first match taken.
PROPERTY_COLUMNS = {
    "band_gap": ("band_gap",),
    "formation_energy": ("formation_energy_per_atom", "formation_energy"),
    "e_above_hull": ("e_above_hull", "energy_above_hull"),
}
FORMATS = ("auto", "csv", "cif", "mp")
PROPERTIES_FILE = "properties.csv"

_CHUNK = 1 << 20
_DOWNLOAD_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class RawEntry:
    """One row of a source, unjudged.

    `content` is CIF text, a Structure, the dict of one (pymatgen's as_dict), or None when the
    source has none. `properties` holds text or numbers under the keys of PROPERTY_COLUMNS, units as
    in `store.PROPERTIES`. `origin` says where the row stands, for the reader of a quarantine file.
    `problem` is not empty when the row itself is broken.
    """

    material_id: str
    content: str | Structure | Mapping[str, Any] | None
    properties: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    problem: str = ""


class Source(Protocol):
    """What the importer needs of a source: iterating gives every row, in a fixed order."""

    @property
    def description(self) -> dict[str, str]:
        """kind, name and sha256 of the content: equal descriptions mean equal rows."""

    @property
    def offers(self) -> tuple[str, ...]:
        """The properties that the source has a value for, in principle."""

    def __len__(self) -> int:
        """Number of rows."""

    def __iter__(self) -> Iterator[RawEntry]: ...


class CsvSource:
    """MP-20-style CSV (.csv or .csv.gz): columns material_id, cif and any of PROPERTY_COLUMNS.

    Raises UserError when the file is missing, is truncated or has no such columns.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no such file: {self.path}")
        with self._rows() as rows:
            self._columns = _header(self.path, rows)
        missing = [name for name in ("material_id", "cif") if name not in self._columns]
        if missing:
            raise UserError(f"{self.path}: no column {' and '.join(missing)} in its first line")
        self._property_columns = _property_columns(self._columns)

    @cached_property
    def description(self) -> dict[str, str]:
        return {"kind": "csv", "name": self.path.name, "sha256": file_sha256(self.path)}

    @property
    def offers(self) -> tuple[str, ...]:
        return tuple(self._property_columns)

    @cached_property
    def _length(self) -> int:
        with self._rows() as rows:
            return sum(1 for row in rows if row) - 1

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[RawEntry]:
        with self._rows() as rows:
            next(rows)
            for number, row in enumerate((row for row in rows if row), start=1):
                yield self._entry(row, f"{self.path.name} row {number}")

    def _entry(self, row: list[str], origin: str) -> RawEntry:
        cells = dict(zip(self._columns, row, strict=False))
        properties = {name: cells.get(column) for name, column in self._property_columns.items()}
        problem = ""
        if len(row) != len(self._columns):
            problem = f"{len(row)} cells instead of {len(self._columns)}: an unbalanced quote?"
        return RawEntry(
            cells.get("material_id", "").strip(),
            cells.get("cif") or None,
            properties,
            origin,
            problem,
        )

    @contextmanager
    def _rows(self) -> Iterator[Iterator[list[str]]]:
        """Rows as lists of text; bytes that are not UTF-8 become replacement characters."""
        with _csv_rows(self.path) as rows:
            yield rows


class CifFolderSource:
    """Every *.cif below a folder, or one CIF file; ids are the names without suffix.

    A `properties.csv` in the folder (material_id and any of PROPERTY_COLUMNS) gives properties.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_file():
            self.folder, self._files = self.path.parent, [self.path]
        elif self.path.is_dir():
            self.folder = self.path
            found = (f for f in self.path.rglob("*") if f.suffix.lower() == ".cif" and f.is_file())
            self._files = sorted(found, key=self._id)
        else:
            raise UserError(f"no such file or folder: {self.path}")
        if not self._files:
            raise UserError(
                f"{self.path}: no .cif file in this folder; of other files, such as POSCAR, make "
                "CIFs: pymatgen's Structure.from_file('POSCAR').to('name.cif')"
            )
        self._offers, self._properties = self._read_properties()

    @cached_property
    def description(self) -> dict[str, str]:
        digest = hashlib.sha256()
        listed = self.folder / PROPERTIES_FILE
        for file in [*self._files, *([listed] if listed.is_file() else [])]:
            digest.update(f"{len(self._id(file))}:{self._id(file)}:{file_sha256(file)}".encode())
        return {"kind": "cif", "name": self.path.resolve().name, "sha256": digest.hexdigest()}

    @property
    def offers(self) -> tuple[str, ...]:
        return self._offers

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[RawEntry]:
        for file in self._files:
            name = self._id(file)
            text = _read(file).decode("utf-8", "replace")
            yield RawEntry(name, text or None, self._properties.get(name, {}), f"{name}.cif")

    def _id(self, file: Path) -> str:
        relative = file.relative_to(self.folder).with_suffix("").as_posix()
        return printable(relative)

    def _read_properties(self) -> tuple[tuple[str, ...], dict[str, dict[str, str | None]]]:
        listed = self.folder / PROPERTIES_FILE
        if not listed.is_file():
            return (), {}
        with _csv_rows(listed) as rows:
            header = _header(listed, rows)
            if "material_id" not in header:
                raise UserError(f"{listed}: no column material_id in its first line")
            columns = _property_columns(header)
            table: dict[str, dict[str, str | None]] = {}
            for row in filter(any, rows):
                cells = dict(zip(header, row, strict=False))
                name = cells.get("material_id", "").strip().removesuffix(".cif")
                if not name:
                    shown = ",".join(row)[:60]
                    raise UserError(f"{listed}: a row without material_id: {shown!r}; name its CIF")
                if name in table:
                    raise UserError(f"{listed}: {name!r} is there twice; keep one")
                table[name] = {key: cells.get(c) for key, c in columns.items()}
        return tuple(columns), table

    @property
    def unmatched(self) -> list[str]:
        """Ids of the `properties.csv` that no file has."""
        return sorted(self._properties.keys() - {self._id(file) for file in self._files})


def open_source(
    location: str | os.PathLike[str],
    cache: Path,
    kind: str = "auto",
    max_atoms: int | None = None,
    show_progress: bool = False,
) -> Source:
    """The source that `location` names: a CSV file or URL, a CIF file or folder, or "mp".

    Downloads and pages of the Materials Project are kept below the folder `cache`. `max_atoms`
    narrows what the Materials Project is asked for, no other source.

    Raises UserError when there is no such source or it cannot be reached.
    """
    text = os.fspath(location)
    kind = _guess_kind(text) if kind == "auto" else kind
    if kind == "mp":
        from common.data.materials_project import MaterialsProjectSource

        return MaterialsProjectSource(cache, max_atoms=max_atoms, show_progress=show_progress)
    if kind == "cif":
        return CifFolderSource(text)
    if kind == "csv":
        return CsvSource(download(text, cache / "downloads") if is_url(text) else text)
    raise UserError(f"unknown format {kind!r}: give one of {', '.join(FORMATS)}")


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _guess_kind(text: str) -> str:
    if text in ("mp", "materials-project"):
        return "mp"
    if Path(text).is_dir() or (text.lower().endswith(".cif") and not is_url(text)):
        return "cif"
    return "csv"


def download(url: str, folder: Path) -> Path:
    """Fetch a URL into `folder`, or keep the copy there if the server says it is still the same.

    Raises UserError when the server cannot be reached, refuses, or sends less than it announced.
    """
    try:
        name = Path(unquote(urlsplit(url).path)).name or "data.csv"
    except ValueError as error:
        raise UserError(f"cannot download {url}: {error}; check address") from error
    target = folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    validators = target.with_name(target.name + ".http.json")
    request = urllib.request.Request(url, headers=_conditions(target, validators))
    try:
        with (
            urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT) as response,
            atomic_path(target) as temporary,
        ):
            _save(response, temporary, url)
            headers = {key: response.headers.get(key) for key in ("ETag", "Last-Modified")}
    except urllib.error.HTTPError as error:
        if error.code == 304:
            return target
        raise UserError(f"cannot download {url}: the server answers {error.code}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {url}: {reason}; check address and network") from error
    write_atomic(validators, json.dumps(headers))
    return target


def _conditions(target: Path, validators: Path) -> dict[str, str]:
    """Headers that ask for the file only if it changed since the copy at hand."""
    if not (target.is_file() and validators.is_file()):
        return {}
    try:
        known = json.loads(validators.read_text())
        pairs = (("If-None-Match", known["ETag"]), ("If-Modified-Since", known["Last-Modified"]))
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: value for name, value in pairs if value}


def _save(response: Any, path: Path, url: str) -> None:
    received = 0
    with path.open("wb") as file:
        while block := response.read(_CHUNK):
            received += file.write(block)
    announced = response.headers.get("Content-Length")
    if announced is not None and received != int(announced):
        raise UserError(f"cannot download {url}: {received} of {announced} bytes came; try again")


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def printable(text: str) -> str:
    """`text` with whatever UTF-8 cannot hold written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def _csv_rows(path: Path) -> Iterator[Iterator[list[str]]]:
    """Rows of a CSV file, gzipped if its first bytes say so.

    Raises UserError for a truncated or unreadable file, also while the rows are read.
    """
    csv.field_size_limit(2**31 - 1)  # a CIF of a large cell exceeds the default of 128 KiB
    try:
        with _open_plain(path) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace", newline="")
            yield csv.reader(text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"cannot read {path}: truncated or damaged gzip file ({error})") from error
    except csv.Error as error:
        raise UserError(f"cannot read {path}: not a CSV file ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _open_plain(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def _header(path: Path, rows: Iterator[list[str]]) -> list[str]:
    """Names of the columns.

    Raises UserError if one that is read is there twice, for one of them would be left out.
    """
    header = [name.strip() for name in next(rows, [])]
    for name in ("material_id", "cif", *chain(*PROPERTY_COLUMNS.values())):
        if header.count(name) > 1:
            raise UserError(f"{path}: column {name} is there {header.count(name)} times; keep one")
    return header


def _property_columns(header: list[str]) -> dict[str, str]:
    """Property -> the column of `header` that holds it."""
    found = {
        name: next((column for column in columns if column in header), None)
        for name, columns in PROPERTY_COLUMNS.items()
    }
    return {name: column for name, column in found.items() if column is not None}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
