"""The Materials Project as a source, through its client mp-api.

The ids that match the query are fetched first, then the documents page by page. Every page is kept
on disk, so an interrupted download goes on where it stopped. Pages belong to one release of the
database and are never mixed with another's. GNoME entries, whose licence forbids commercial use,
are left out; the rest is CC-BY 4.0 (Jain et al., APL Mater. 1, 011002 (2013)).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from common.data.sources import RawEntry, file_sha256, printable
from common.errors import UserError
from common.files import write_atomic

ENDPOINT = "https://api.materialsproject.org/"
FIELDS = (
    "material_id",
    "structure",
    "band_gap",
    "formation_energy_per_atom",
    "energy_above_hull",
)
PAGE_SIZE = 500
"""Documents per page; mp-api cuts a page into requests of at most 2,000 characters."""
MAX_ATOMS = 20
"""Largest cell asked for, unless told otherwise: that of MP-20."""


class MaterialsProjectSource:
    """All entries that are not deprecated, with at most `max_atoms` (default 20) in the cell.

    Everything is fetched when the object is made. `cache` is the folder that holds a folder per
    release and query; the key comes from MP_API_KEY unless given, and is not stored.

    Raises UserError without key, without mp-api, or when the server cannot be reached or refuses.
    """

    offers: tuple[str, ...] = ("band_gap", "formation_energy", "e_above_hull")

    def __init__(
        self,
        cache: Path,
        max_atoms: int | None = None,
        page_size: int = PAGE_SIZE,
        endpoint: str | None = None,
        api_key: str | None = None,
        show_progress: bool = False,
    ) -> None:
        self._query = {"deprecated": False, "num_sites": (1, max_atoms or MAX_ATOMS)}
        self._page_size = page_size
        self._show_progress = show_progress
        with _client(endpoint or os.environ.get("MP_API_ENDPOINT") or ENDPOINT, api_key) as client:
            summary = client.materials.summary
            self._release = str(summary.db_version)
            self._folder = cache / "materials-project" / self._folder_name(summary.endpoint)
            self._ids = self._fetch_ids(summary)
            self._pages = self._fetch_pages(summary)

    @cached_property
    def description(self) -> dict[str, str]:
        digest = hashlib.sha256("".join(map(file_sha256, self._pages)).encode())
        return {
            "kind": "materials-project",
            "name": f"Materials Project {self._release}",
            "sha256": digest.hexdigest(),
        }

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[RawEntry]:
        for number, path in enumerate(self._pages):
            documents = {str(d.get("material_id")): d for d in _read_json(path) or []}
            for material_id in self._page_ids(number):
                yield _entry(material_id, documents.get(material_id))

    def _folder_name(self, endpoint: str) -> str:
        """Release and a hash of all that the pages depend on."""
        key = [endpoint, self._release, self._query, FIELDS, self._page_size]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        release = "".join(c if c.isalnum() or c in "._-" else "_" for c in self._release)
        return f"{release}-{digest[:16]}"

    def _page_ids(self, number: int) -> list[str]:
        return self._ids[number * self._page_size : (number + 1) * self._page_size]

    def _fetch_ids(self, summary: Any) -> list[str]:
        path = self._folder / "ids.json"
        ids = _read_json(path)
        if ids is None:
            found = summary.search(
                **self._query, include_gnome=False, all_fields=False, fields=["material_id"]
            )
            ids = sorted({str(document["material_id"]) for document in found})
            write_atomic(path, json.dumps(ids))
        if not ids:
            raise UserError("the Materials Project has no entry for this query; widen it")
        return list(ids)

    def _fetch_pages(self, summary: Any) -> list[Path]:
        count = -(-len(self._ids) // self._page_size)
        numbers = range(count)
        console = Console(stderr=True, quiet=not self._show_progress)
        pages = []
        for number in track(numbers, "Materials Project", console=console, total=count):
            path = self._folder / f"page-{number:05d}.json"
            if _read_json(path) is None:
                write_atomic(path, json.dumps(self._fetch(summary, self._page_ids(number))))
            pages.append(path)
        return pages

    def _fetch(self, summary: Any, ids: list[str]) -> list[dict[str, Any]]:
        """Documents of these ids, in their order, reduced to FIELDS; unknown ids are left out."""
        found = summary.search(
            material_ids=ids,
            all_fields=False,
            fields=list(FIELDS),
            chunk_size=max(1000, len(ids)),
        )
        documents = {str(document["material_id"]): document for document in found}
        return [{name: documents[i].get(name) for name in FIELDS} for i in ids if i in documents]


def _entry(material_id: str, document: dict[str, Any] | None) -> RawEntry:
    origin = f"Materials Project {material_id}"
    if document is None:
        return RawEntry(material_id, None, {}, origin, "the server sent no document")
    properties = {
        "band_gap": document.get("band_gap"),
        "formation_energy": document.get("formation_energy_per_atom"),
        "e_above_hull": document.get("energy_above_hull"),
    }
    return RawEntry(printable(material_id), document.get("structure"), properties, origin)


@contextmanager
def _client(endpoint: str, api_key: str | None) -> Iterator[Any]:
    """An MPRester that gives plain JSON; what it raises becomes a UserError."""
    key = api_key or os.environ.get("MP_API_KEY")
    if not key:
        raise UserError(
            "no key for the Materials Project: set MP_API_KEY "
            "(free from https://materialsproject.org/api)"
        )
    try:
        from mp_api.client import MPRester
        from mp_api.client.core.client import MPRestError
        from requests.exceptions import RequestException
    except ImportError as error:
        raise UserError(
            f"mp-api is not installed ({error}): pip install 'uni-mdm[materials-project]'"
        ) from error
    try:
        with MPRester(
            api_key=key,
            endpoint=endpoint if endpoint.endswith("/") else endpoint + "/",
            use_document_model=False,
            monty_decode=False,
            mute_progress_bars=True,
        ) as client:
            yield client
    except (MPRestError, RequestException, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).replace(key, "<key>").split())[:300]
        raise UserError(
            f"cannot fetch from the Materials Project at {endpoint}: {reason}; "
            "run again to go on with the next page"
        ) from error


def _read_json(path: Path) -> Any:
    """The content of a page, or None when it is missing or damaged (it is then fetched again)."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
