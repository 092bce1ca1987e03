"""The Materials Project's source against a server on loopback that answers as its API does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pymatgen.core import Lattice, Structure

from common.data.importer import import_dataset
from common.data.store import read_records
from common.errors import UserError

pytest.importorskip("mp_api.client", reason="mp-api is not installed")

from common.data.materials_project import FIELDS, MaterialsProjectSource

KEY = "k" * 32


def rock_salt(a: float) -> Structure:
    half = a / 2
    face_centred = Lattice([[0, half, half], [half, 0, half], [half, half, 0]])
    return Structure(face_centred, ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])


class Api(ThreadingHTTPServer):
    """What the Materials Project serves: /heartbeat and /materials/summary/, with paging."""

    def __init__(self, count: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.release = "2025.09.25"
        self.requests: list[dict[str, str]] = []
        self.failing = False
        self.documents = [document(k) for k in range(count)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def document(k: int) -> dict[str, Any]:
    structure = rock_salt(5 + k / 100)
    return {
        "material_id": f"mp-{100 + k}",
        "structure": structure.as_dict(),
        "band_gap": 5.0 + k,
        "formation_energy_per_atom": -2.0,
        "energy_above_hull": 0.0,
        "nsites": 2 if k != 3 else 44,
        "deprecated": k == 4,
        "density": 2.1,
    }


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/heartbeat":
            self.reply(200, {"version": "0.87.3", "db_version": self.server.release})
        elif url.path != "/materials/summary/":
            self.reply(404, {"detail": f"no {url.path}"})
        elif self.headers.get("x-api-key") != KEY:
            self.reply(401, {"detail": "Invalid authentication credentials"})
        elif self.server.failing and "material_ids" in query:
            self.reply(500, {"detail": "out of order"})
        else:
            self.server.requests.append(query)
            self.reply(200, self.search(query))

    def search(self, query: dict[str, str]) -> dict[str, Any]:
        found = self.server.documents
        if "material_ids" in query:
            found = [d for d in found if d["material_id"] in query["material_ids"].split(",")]
        if "nsites_max" in query:
            low, high = int(query["nsites_min"]), int(query["nsites_max"])
            found = [d for d in found if low <= d["nsites"] <= high]
        if "deprecated" in query:
            wanted = query["deprecated"].lower() == "true"
            found = [d for d in found if d["deprecated"] == wanted]
        skip, limit = int(query.get("_skip", 0)), int(query.get("_limit", 100))
        fields = query["_fields"].split(",")
        page = [{name: d[name] for name in fields} for d in found[skip : skip + limit]]
        meta = {"total_doc": len(found), "api_version": "0.87.3", "time_stamp": "2025-09-25"}
        return {"data": page, "meta": meta}

    def reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api(12)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def source(api: Api, folder: Path, **options: Any) -> MaterialsProjectSource:
    return MaterialsProjectSource(folder, endpoint=api.url, api_key=KEY, page_size=4, **options)


def pages(folder: Path) -> list[Path]:
    return sorted(folder.rglob("page-*.json"))


def test_import_from_the_api(api: Api, tmp_path: Path) -> None:
    opened = source(api, tmp_path)
    assert len(opened) == 10  # 12 less one deprecated and one of 44 atoms
    report = import_dataset(opened, tmp_path / "mp.parquet", workers=1, show_progress=False)
    assert (report.written, report.reasons) == (10, {})
    records = {record.material_id: record for record in read_records(tmp_path / "mp.parquet")}
    assert "mp-103" not in records
    assert records["mp-105"].crystal.space_group == 225
    assert records["mp-105"].properties["band_gap"] == 10.0
    structure = records["mp-105"].structure
    assert structure is not None
    assert structure.lattice.parameters == pytest.approx(rock_salt(5.05).lattice.parameters)


def test_asks_for_named_fields_and_no_more(api: Api, tmp_path: Path) -> None:
    source(api, tmp_path)
    asked = [query for query in api.requests if "material_ids" in query]
    assert asked
    assert all(query["_fields"].split(",") == list(FIELDS) for query in asked)
    assert all("_all_fields" not in query for query in api.requests)
    first = next(query for query in api.requests if "material_ids" not in query)
    assert first["_fields"] == "material_id"
    assert (first["nsites_min"], first["nsites_max"]) == ("1", "20")
    assert first["batch_id_not_eq"] == "gnome_r2scan_statics"


def test_goes_on_after_a_failure(api: Api, tmp_path: Path) -> None:
    whole = source(api, tmp_path / "whole").description
    api.failing = True
    with pytest.raises(UserError, match="out of order"):
        source(api, tmp_path / "broken")
    assert pages(tmp_path / "broken") == []
    api.failing = False
    source(api, tmp_path / "broken")
    last = pages(tmp_path / "broken")[-1]
    last.write_text('[{"material_id": "mp-1')  # as if a disk had lost its tail
    api.requests.clear()
    assert source(api, tmp_path / "broken").description == whole
    ids = {i for query in api.requests for i in query["material_ids"].split(",")}
    assert ids == {"mp-110", "mp-111"}


def test_finished_download_asks_nothing(api: Api, tmp_path: Path) -> None:
    before = source(api, tmp_path).description
    api.requests.clear()
    assert source(api, tmp_path).description == before
    assert api.requests == []
    api.documents[0]["band_gap"] = 1.0
    assert source(api, tmp_path).description == before
    assert source(api, tmp_path / "other").description != before


def test_missing_document_is_quarantined(api: Api, tmp_path: Path) -> None:
    first = source(api, tmp_path)
    pages(tmp_path)[0].unlink()
    gone = next(iter(first)).material_id
    del first
    api.documents = [d for d in api.documents if d["material_id"] != gone]
    report = import_dataset(
        source(api, tmp_path), tmp_path / "mp.parquet", workers=1, show_progress=False
    )
    assert (report.written, report.reasons) == (9, {"malformed_row": 1})


def test_key_is_not_kept_on_disk(api: Api, tmp_path: Path) -> None:
    source(api, tmp_path)
    for path in tmp_path.rglob("*"):
        assert KEY not in str(path)
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def test_refusals_are_user_errors(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MP_API_KEY", raising=False)
    with pytest.raises(UserError, match="MP_API_KEY"):
        MaterialsProjectSource(tmp_path, endpoint=api.url)
    wrong = "w" * 32
    for key in (wrong, "short"):
        with pytest.raises(UserError) as caught:
            MaterialsProjectSource(tmp_path, endpoint=api.url, api_key=key)
        assert "\n" not in str(caught.value)
        assert key not in str(caught.value)
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        MaterialsProjectSource(tmp_path, endpoint=nowhere, api_key=KEY)
    assert pages(tmp_path) == []
