"""Rows come out of CSV files, folders and URLs as they are; unusable sources are user errors."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.data.sources import CifFolderSource, CsvSource, download, open_source
from common.errors import UserError

TABLE = 'material_id,band_gap,cif\nmp-1,1.5,"line 1\nline 2"\n\nmp-2,,x\n'


def test_csv_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TABLE)
    source = CsvSource(tmp_path / "a.csv")
    first, second = source
    assert (first.material_id, first.content) == ("mp-1", "line 1\nline 2")
    assert first.properties == {"band_gap": "1.5"}
    assert (second.properties, second.origin) == ({"band_gap": ""}, "a.csv row 2")
    assert source.offers == ("band_gap",)
    assert len(source) == 2


def test_gzip_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "plain.csv").write_text(TABLE)
    (tmp_path / "marked.csv").write_text("\ufeff" + TABLE, encoding="utf-8")
    (tmp_path / "packed").write_bytes(gzip.compress(TABLE.encode()))  # told by its bytes
    rows = [
        [e.content for e in CsvSource(tmp_path / n)] for n in ("plain.csv", "marked.csv", "packed")
    ]
    assert rows[0] == rows[1] == rows[2]


def test_description_is_that_of_the_content(tmp_path: Path) -> None:
    for folder, content in (("a", TABLE), ("b", TABLE), ("c", TABLE + "mp-3,1,y\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.csv").write_text(content)
    a, b, c = (CsvSource(tmp_path / folder / "x.csv").description for folder in "abc")
    assert a == b != c
    assert str(tmp_path) not in str(a)


def test_row_with_too_many_cells_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("material_id,cif\nmp-1,x,y\nmp-2\nmp-3,z\n")
    entries = list(CsvSource(tmp_path / "a.csv"))
    assert [bool(entry.problem) for entry in entries] == [True, True, False]
    assert "3 cells instead of 2" in entries[0].problem


def test_cell_larger_than_the_csv_modules_default_limit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("material_id,cif\nmp-1," + "x" * 200_000 + "\n")
    (entry,) = CsvSource(tmp_path / "a.csv")
    assert isinstance(entry.content, str)
    assert len(entry.content) == 200_000


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\x00\xff\xfe\n", b"material_id\n"])
def test_file_without_the_columns(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match="no column"):
        CsvSource(tmp_path / "a.csv")


@pytest.mark.parametrize("header", ["material_id,cif,band_gap,band_gap", "cif,material_id, cif"])
def test_no_column_is_left_out_silently(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(header + "\n")
    with pytest.raises(UserError, match="2 times"):
        CsvSource(tmp_path / "a.csv")
    (tmp_path / "a.cif").write_text("A")
    (tmp_path / "properties.csv").write_text(header + "\n")
    with pytest.raises(UserError, match="2 times"):
        CifFolderSource(tmp_path)


def test_truncated_gzip_is_not_taken_for_a_short_file(tmp_path: Path) -> None:
    rows = "".join(f"mp-{i},{hash(i) ** 3 % 10**9},x\n" for i in range(20_000))
    packed = gzip.compress(("material_id,band_gap,cif\n" + rows).encode())
    (tmp_path / "a.csv.gz").write_bytes(packed[: len(packed) // 2])
    source = CsvSource(tmp_path / "a.csv.gz")
    with pytest.raises(UserError, match="truncated"):
        list(source)
    (tmp_path / "b.csv.gz").write_bytes(packed[:5])
    with pytest.raises(UserError, match="truncated"):
        CsvSource(tmp_path / "b.csv.gz")


def test_cif_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.cif").write_text("B")
    (tmp_path / "a.CIF").write_text("A")
    (tmp_path / "sub" / "c.cif").write_text("C")
    (tmp_path / "notes.txt").write_text("-")
    (tmp_path / "properties.csv").write_text("material_id,band_gap\nb.cif,2\nsub/c,3\n")
    source = CifFolderSource(tmp_path)
    found = [(e.material_id, e.content, e.properties.get("band_gap")) for e in source]
    assert found == [("a", "A", None), ("b", "B", "2"), ("sub/c", "C", "3")]
    assert (len(source), source.offers) == (3, ("band_gap",))
    before = source.description
    (tmp_path / "properties.csv").write_text("material_id,band_gap\nb.cif,2\nsub/c,4\n")
    assert CifFolderSource(tmp_path).description != before
    (single,) = CifFolderSource(tmp_path / "b.cif")
    assert single.material_id == "b"


def test_folder_says_what_fits_not(tmp_path: Path) -> None:
    (tmp_path / "POSCAR").write_text("Si")
    with pytest.raises(UserError, match=r"no \.cif file in this folder; of other files"):
        CifFolderSource(tmp_path)
    (tmp_path / "a.cif").write_text("A")
    listed = tmp_path / "properties.csv"
    listed.write_text("material_id,band_gap\na,1\n\nc,2\nb.cif,3\n")
    assert CifFolderSource(tmp_path).unmatched == ["b", "c"]
    listed.write_text("material_id,band_gap\na,1\na.cif,2\n")
    with pytest.raises(UserError, match="'a' is there twice"):
        CifFolderSource(tmp_path)
    for rows in ("a,1\n,2\n", ",2\n,3\n", " ,2\n", ".cif,2\n"):
        listed.write_text(f"material_id,band_gap\n{rows}")
        with pytest.raises(UserError, match=r"properties\.csv: a row without material_id: '.*,2'"):
            CifFolderSource(tmp_path)
    listed.write_text("material_id,band_gap\na,1\n,\n")
    assert CifFolderSource(tmp_path).unmatched == []


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.cif").write_text("A")
    (entry,) = CifFolderSource(tmp_path)
    entry.material_id.encode("utf-8")
    assert CifFolderSource(tmp_path).description["kind"] == "cif"


@pytest.mark.parametrize(
    "name", ["missing.csv", "missing.cif", "empty", "https://", "https://[a/b.csv"]
)
def test_sources_that_do_not_exist(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    location = name if "://" in name else str(tmp_path / name)
    with pytest.raises(UserError) as caught:
        open_source(location, tmp_path / "cache")
    assert "\n" not in str(caught.value)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, FileServer)
        server.log.append(self.headers.get("If-None-Match"))
        if self.path != "/data/a%20b.csv":
            self.send_error(404)
        elif self.headers.get("If-None-Match") == server.tag:
            self.send_response(304)
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("ETag", server.tag)
            self.send_header("Content-Length", str(len(server.content) + server.missing))
            self.end_headers()
            self.wfile.write(server.content)

    def log_message(self, *_: object) -> None:
        pass


class FileServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.missing = TABLE.encode(), '"1"', 0
        self.log: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data/a%20b.csv"


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_url_is_fetched_once_and_again_when_it_changes(server: FileServer, tmp_path: Path) -> None:
    source = open_source(server.url, tmp_path)
    assert [entry.material_id for entry in source] == ["mp-1", "mp-2"]
    assert source.description["name"] == "a b.csv"
    open_source(server.url, tmp_path)
    assert server.log == [None, '"1"']
    server.content, server.tag = TABLE.encode() + b"mp-3,1,y\n", '"2"'
    assert len(open_source(server.url, tmp_path)) == 3


def test_incomplete_download_is_not_kept(server: FileServer, tmp_path: Path) -> None:
    server.missing = 10
    with pytest.raises(UserError, match="cannot download"):
        download(server.url, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(UserError, match="cannot download"):
        download("http://localhost:port/rows.csv", tmp_path)
    with pytest.raises(UserError, match="404"):
        download(server.url + "x", tmp_path)
