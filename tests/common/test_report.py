"""The report: self-contained, faithful, safe, and what its viewer draws."""

import base64
import json
import re
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from common.crystal.structure import Crystal, Site
from common.crystal.wyckoff import wyckoff_summary
from common.report import render_report
from common.report.page import formula_html, symbol_html
from common.report.scene import MAX_ATOMS, scene

PEROVSKITE = Crystal(221, (Site(38, "a"), Site(22, "b"), Site(8, "c")), 3.905 * np.eye(3))


def results(name: str = "") -> dict:
    row = {
        "file": "01_SrTiO3_221.cif",
        "rank": 1,
        "formula": "SrTiO3",
        "space_group": 221,
        "space_group_symbol": "Pm-3m",
        "sites": PEROVSKITE.sites_string,
        "z": 1,
        "probability": 0.44,
        "symmetry_source": "template",
        "num_atoms": 5,
        "volume": 59.5,
        "lattice_abc": [3.905] * 3,
        "lattice_angles": [90.0] * 3,
        "density": 5.1,
        "min_distance": 1.95,
        "composition_exact": True,
        "found_space_groups": {"spglib": 221, "moyopy": 221},
        "nearest": None,
        "choice": {"sample": 0, "samples": 8, "consensus": 0.01},
        "warnings": ["<b>bold</b>"],
        "crystal": PEROVSKITE.to_dict(),
    }
    query = {
        "name": name,
        "formula": "SrTiO3",
        "asked": None,
        "formula_units": None,
        "band_gap": 1.8,
        "formation_energy": None,
        "space_group": None,
        "sites": None,
        "z": None,
    }
    done = {"index": 0, "status": "done", "error": None, "query": query, "crystals": [row]}
    failed = {"index": 1, "status": "failed", "error": "no <i>", "query": query, "crystals": []}
    return {
        "settings": {"num_samples": 8, "seed": 0, "steps": None},
        "checkpoints": [{"name": "small", "hash": "0123456789ab"}],
        "symmetry_models": [{"name": "glm", "hash": "fedcba987654"}],
        "prior": {"hash": "abc"},
        "created_by": "uni-mdm 0",
        "backend": "torch",
        "device": "cpu",
        "requests_sha256": "f" * 64,
        "attribution": "Materials Project, CC BY 4.0",
        "results": [done, failed],
    }


class Page(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_no_network() -> None:
    text = render_report(results("<script>alert(1)</script>"))
    page = Page(text)
    assert {tag for tag, _ in page.tags} >= {"canvas", "table", "article", "footer"}
    for tag, attributes in page.tags:
        assert "src" not in attributes
        if tag == "link":
            pytest.fail("an external style sheet")
        target = attributes.get("href") or ""
        assert target.startswith(("#", "data:")) or not target
    assert not re.search(r"https?://|@import|url\(", text)
    assert "<script>alert" not in text
    assert "<b>bold" not in text
    assert 'title="&lt;b&gt;bold&lt;/b&gt;"' in text, "its row in the table is marked"
    assert "no <i>" not in text
    assert "CC BY 4.0" in text
    assert "it says nothing of\nenergy or stability" in text
    assert "<dt>Probability</dt><dd>44 %</dd>" in text
    assert "<dt>Proposed by</dt><dd>template</dd>" in text


def test_requests_are_told_apart_and_what_they_fixed_is_said() -> None:
    run = results("a&b")
    fixed = {"space_group": 221, "sites": "Sr:1a Ti:1b O:3c", "z": 1, "asked": "TiSrO3"}
    run["results"][0]["query"] = run["results"][0]["query"] | fixed
    text = render_report(run)
    (cell,) = re.findall(r'<th scope="rowgroup".*?</th>', text)
    assert "<br>no. 1, a&amp;b<br>asked as TiSrO3<br>band gap 1.8 eV<br>" in cell
    assert "<br>space group 221, sites Sr:1a Ti:1b O:3c, Z = 1<" in cell
    assert "<dt>Request</dt><dd>1, a&amp;b</dd>" in text
    assert "no. 2, a&amp;b</span>: no &lt;i&gt;" in text
    del run["results"][1]
    alone = render_report(run)
    assert "<dd>space group 221, sites Sr:1a Ti:1b O:3c, Z = 1</dd>" in alone
    assert "<dt>Asked as</dt><dd>TiSrO3</dd>" in alone
    assert "<dt>Request</dt><dd>1, a" not in alone


def test_every_link_inside_the_page_has_its_target() -> None:
    page = Page(render_report(results()))
    ids = {attributes.get("id") for _, attributes in page.tags}
    anchors = [a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")]
    assert anchors
    assert set(anchors) <= ids
    labelled = [a for tag, a in page.tags if tag == "canvas"]
    assert all(a["aria-label"] and a["tabindex"] == "0" for a in labelled)


def test_download_is_the_crystal() -> None:
    text = render_report(results())
    data = re.search(r"data:chemical/x-cif;base64,([A-Za-z0-9+/=]+)", text)
    assert data is not None
    again = Structure.from_str(base64.b64decode(data[1]).decode(), fmt="cif")
    assert again.composition.formula == "Sr1 Ti1 O3"
    assert again.lattice.a == pytest.approx(3.905)


def test_scenes_are_embedded() -> None:
    text = render_report(results())
    data = re.search(r'id="scenes">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == [json.loads(json.dumps(scene(PEROVSKITE.to_structure())))]


def test_perovskite_scene() -> None:
    """Eight corners, one titanium amid six oxygens of the faces, six bonds, an octahedron."""
    drawn = scene(PEROVSKITE.to_structure())
    symbols = [drawn["elements"][atom[0]]["symbol"] for atom in drawn["atoms"]]
    assert {s: symbols.count(s) for s in set(symbols)} == {"Sr": 8, "Ti": 1, "O": 6}
    assert len(drawn["bonds"]) == 6
    for i, j in drawn["bonds"]:
        length = np.linalg.norm(np.subtract(drawn["atoms"][i][1:], drawn["atoms"][j][1:]))
        assert length == pytest.approx(3.905 / 2, abs=2e-3)
    assert len(drawn["faces"]) == 8
    assert np.allclose(drawn["cell"], 3.905 * np.eye(3))


def test_rock_salt_atoms_complete_octahedra() -> None:
    structure = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    drawn = scene(structure)
    sodium = next(i for i, e in enumerate(drawn["elements"]) if e["symbol"] == "Na")
    degree = {i: 0 for i, atom in enumerate(drawn["atoms"]) if atom[0] == sodium}
    assert len(degree) == 14
    for pair in drawn["bonds"]:
        for i in pair:
            if i in degree:
                degree[i] += 1
    assert set(degree.values()) == {6}


def test_large_cells_are_drawn_without_copies() -> None:
    structure = PEROVSKITE.to_structure()
    structure.make_supercell([4, 4, 3])
    assert len(structure) > MAX_ATOMS
    drawn = scene(structure)
    assert len(drawn["atoms"]) == len(structure)
    assert drawn["faces"] == []


def test_large_cells_take_little_memory() -> None:
    """200 atoms in the primitive cell are 800 in a face-centred one."""
    structure = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    structure.make_supercell([4, 4, 4])
    tracemalloc.start()
    scene(structure)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * 2**20


@pytest.mark.parametrize("number", range(1, 231))
def test_symbols_of_all_groups(number: int) -> None:
    text = symbol_html(number)
    assert "_" not in text
    plain = wyckoff_summary(number).symbol
    assert re.sub("<[^>]*>", "", text) == plain.replace("-", ""), "as everywhere else"
    assert text.count('class="bar"') == plain.count("-")


def test_symbol_and_formula_markup() -> None:
    assert symbol_html(194) == '<i class="sg">P6<sub>3</sub>/mmc</i>'
    assert symbol_html(221) == '<i class="sg">Pm<span class="bar">3</span>m</i>'
    assert formula_html("Ca10(PO4)6") == "Ca<sub>10</sub>(PO<sub>4</sub>)<sub>6</sub>"
