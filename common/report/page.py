"""The page: text, tables, one viewer per crystal, everything embedded."""

import base64
import json
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pymatgen.core import Structure
from pymatgen.symmetry.groups import sg_symbol_from_int_number

from common.crystal.structure import Crystal
from common.reference import volume_text
from common.report.scene import scene

_HERE = Path(__file__).resolve().parent
#: Crystals drawn in one page; the tables list all.
MAX_DRAWN = 200

_PROPERTY_TEXT = {
    "band_gap": ("band gap", "eV"),
    "formation_energy": ("formation energy", "eV/atom"),
}


def render_report(results: Mapping[str, Any]) -> str:
    """The page of a run.

    Args:
        results: content of ``results.json``.
    """
    entries = results["results"]
    crystals = [row for entry in entries for row in entry["crystals"]]
    scenes: list[dict[str, Any]] = []
    cards: list[str] = []
    for entry in entries:
        for row in entry["crystals"][: max(0, MAX_DRAWN - len(scenes))]:
            crystal = Crystal.from_dict(row["crystal"])
            scenes.append(scene(crystal.to_structure()))
            cards.append(_card(len(scenes) - 1, row, crystal, entry if len(entries) > 1 else None))
    page = Template((_HERE / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(_title(entries)),
        style=(_HERE / "style.css").read_text(encoding="utf-8"),
        script=(_HERE / "viewer.js").read_text(encoding="utf-8"),
        scenes=json.dumps(scenes, separators=(",", ":")).replace("<", "\\u003c"),
        heading=_heading(entries),
        request=_request(entries, results),
        table=_table(entries, len(scenes)),
        failures=_failures(entries),
        cards="\n".join(cards),
        omitted=_omitted(len(crystals) - len(scenes)),
        provenance=_provenance(results),
    )


def _title(entries: list[dict[str, Any]]) -> str:
    if len(entries) == 1:
        return f"{entries[0]['query']['formula']} - generated crystals"
    return f"{len(entries)} requests - generated crystals"


def _heading(entries: list[dict[str, Any]]) -> str:
    if len(entries) == 1:
        return formula_html(entries[0]["query"]["formula"])
    return f"{len(entries)} requests"


def formula_html(formula: str) -> str:
    """A formula with its counts as subscripts."""
    out, digits = [], False
    for character in formula:
        if character.isdigit() != digits:
            digits = not digits
            out.append("<sub>" if digits else "</sub>")
        out.append(escape(character))
    return "".join(out) + ("</sub>" if digits else "")


def symbol_html(number: int) -> str:
    """The symbol of a space group with overlined and subscripted digits."""
    symbol = sg_symbol_from_int_number(number, hexagonal=False)
    if 3 <= number <= 15:  # monoclinic, in full: P12_1/c1
        symbol = symbol[0] + symbol[2:-1]
    out, index = [], 0
    while index < len(symbol):
        character, following = symbol[index], symbol[index + 1 : index + 2]
        if character == "-" and following:
            out.append(f'<span class="bar">{escape(following)}</span>')
            index += 2
        elif character == "_" and following:
            out.append(f"<sub>{escape(following)}</sub>")
            index += 2
        else:
            out.append(escape(character))
            index += 1
    return f'<i class="sg">{"".join(out)}</i>'


def _wanted(query: Mapping[str, Any]) -> str:
    """The property asked for, as text."""
    for name, (label, unit) in _PROPERTY_TEXT.items():
        if query[name] is not None:
            return f"{label} {query[name]:g} {unit}"
    return "no property"


def _fixed(query: Mapping[str, Any]) -> str:
    """What was fixed of the symmetry, as text; empty if nothing was."""
    parts = []
    if query["space_group"]:
        parts.append(f"space group {query['space_group']}")
    if query["sites"]:
        parts.append(f"sites {query['sites']}")
    if query["z"]:
        parts.append(f"Z = {query['z']}")
    if query["formula_units"]:
        parts.append(f"{query['formula_units']} formula units per cell")
    return ", ".join(parts)


def _request_name(entry: Mapping[str, Any]) -> str:
    """Number of a request, and what the user calls it."""
    name = entry["query"]["name"]
    return f"{entry['index'] + 1}, {name}" if name else str(entry["index"] + 1)


def _request(entries: list[dict[str, Any]], results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    pairs = []
    if len(entries) == 1:
        query = entries[0]["query"]
        pairs = [("Target", _wanted(query)), ("Symmetry", _fixed(query) or "left to the model")]
        pairs += [("Asked as", query["asked"])] if query["asked"] else []
    pairs += [
        ("Samples per symmetry", str(settings["num_samples"])),
        ("Seed", str(settings["seed"])),
        ("Network calls", str(settings["steps"] or "checkpoint's own")),
    ]
    return "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)


def _nearest_html(row: Mapping[str, Any]) -> str:
    nearest = row["nearest"]
    if nearest is None:
        return '<span class="muted">none within tolerance</span>'
    kind = "" if nearest["kind"] == "same composition" else f" ({formula_html(nearest['formula'])})"
    return (
        f"{escape(nearest['material_id'])}{kind} "
        f'<span class="muted num">rms {nearest["distance"]:.3f}{_volume(nearest)}</span>'
    )


def _sites_html(sites: str) -> str:
    return " ".join(
        f'<span class="site">{escape(site)}{f" x{count}" if count > 1 else ""}</span>'
        for site, count in Counter(sites.split()).items()
    )


def _percent(probability: float) -> str:
    if probability >= 0.0995:
        return f"{100 * probability:.0f} %"
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "< 0.1 %"


def _table(entries: list[dict[str, Any]], drawn: int) -> str:
    many = len(entries) > 1
    head = ["Rank", "Space group", "Wyckoff sites", "Probability", "Density", "Nearest known"]
    if many:
        head = ["Request", *head]
    body, number = [], 0
    for entry in entries:
        for place, row in enumerate(entry["crystals"]):
            cells = _table_cells(row, number if number < drawn else None)
            if many and place == 0:
                cells = _request_cell(entry) + cells
            body.append(f"<tr>{cells}</tr>")
            number += 1
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    return f"<thead><tr>{titles}</tr></thead><tbody>{''.join(body)}</tbody>"


def _table_cells(row: Mapping[str, Any], number: int | None) -> str:
    rank = str(row["rank"]) if number is None else f'<a href="#c{number}">{row["rank"]}</a>'
    width = max(2.0, 100 * row["probability"])
    warned = escape("; ".join(row["warnings"]))
    mark = f' <span class="warn" title="{warned}">\N{WARNING SIGN}\ufe0e</span>' if warned else ""
    cells = [
        f'<td class="num">{rank}{mark}</td>',
        f'<td class="group">{symbol_html(row["space_group"])} '
        f'<span class="muted">{row["space_group"]}</span></td>',
        f"<td>{_sites_html(row['sites'])}</td>",
        f'<td class="num"><span class="meter"><i style="width:{width:.0f}%"></i></span>'
        f"{_percent(row['probability'])}</td>",
        f'<td class="num">{row["density"]:.2f}</td>',
        f"<td>{_nearest_html(row)}</td>",
    ]
    return "".join(cells)


def _request_cell(entry: Mapping[str, Any]) -> str:
    """Formula, name, target and constraints of a request, beside all its candidates."""
    query = entry["query"]
    asked = f"asked as {query['asked']}" if query["asked"] else ""
    told = [f"no. {_request_name(entry)}", asked, _wanted(query), _fixed(query)]
    listed = "".join(f"<br>{escape(text)}" for text in told if text)
    return (
        f'<th scope="rowgroup" rowspan="{len(entry["crystals"])}">'
        f'{formula_html(query["formula"])}<small class="muted">{listed}</small></th>'
    )


def _failures(entries: list[dict[str, Any]]) -> str:
    failed = [entry for entry in entries if entry["status"] != "done"]
    if not failed:
        return ""
    items = "".join(
        f"<li>{formula_html(entry['query']['formula'])} "
        f'<span class="muted">no. {escape(_request_name(entry))}</span>: '
        f"{escape(entry['error'])}</li>"
        for entry in failed
    )
    return f'<section class="notes"><h2>Not answered</h2><ul>{items}</ul></section>'


def _card(
    number: int, row: Mapping[str, Any], crystal: Crystal, entry: Mapping[str, Any] | None
) -> str:
    """A crystal in full, with its request's entry if there are several."""
    name = Path(row["file"]).stem
    cif = base64.b64encode(crystal.to_cif(name).encode()).decode()
    a, b, c = row["lattice_abc"]
    alpha, beta, gamma = row["lattice_angles"]
    groups = ", ".join(f"{k} {v}" for k, v in row["found_space_groups"].items())
    nearest = row["nearest"]
    facts = [
        *([("Request", _request_name(entry))] if entry else ()),
        ("Probability", _percent(row["probability"])),
        ("Proposed by", row["symmetry_source"]),
        ("Lattice", f"a {a:.3f}, b {b:.3f}, c {c:.3f} Å"),
        (
            "Angles",
            f"\N{GREEK SMALL LETTER ALPHA} {alpha:.2f}, β {beta:.2f}, "
            f"\N{GREEK SMALL LETTER GAMMA} {gamma:.2f}°",
        ),
        ("Cell", f"{row['num_atoms']} atoms, Z = {row['z']}, {row['volume']:.2f} Å³"),
        ("Density", f"{row['density']:.3f} g/cm³"),
        ("Shortest distance", f"{row['min_distance']:.3f} Å"),
        ("Composition", "exact" if row["composition_exact"] else "NOT exact"),
        ("Space group found", groups),
        ("Nearest training structure", _nearest_text(nearest)),
        ("Sample", _choice_text(row["choice"])),
    ]
    listed = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    notes = "".join(f"<li>{escape(text)}</li>" for text in row["warnings"])
    label = f"{row['formula']}, space group {row['space_group_symbol']}, {row['num_atoms']} atoms"
    return f"""<article class="card" id="c{number}">
<div class="view">
<canvas data-scene="{number}" tabindex="0" role="img"
 aria-label="{escape(label)}: drawing, turn with the arrow keys, zoom with plus and minus"></canvas>
<div class="legend"></div>
<div class="tools">
<button type="button" data-do="a" title="Look along a">a</button>
<button type="button" data-do="b" title="Look along b">b</button>
<button type="button" data-do="c" title="Look along c">c</button>
<button type="button" data-do="bonds" aria-pressed="true">Bonds</button>
<button type="button" data-do="faces" aria-pressed="true">Polyhedra</button>
<button type="button" data-do="reset">Reset</button>
</div>
</div>
<div class="facts">
<h2><span class="rank">{row["rank"]}</span> {formula_html(row["formula"])}
 {symbol_html(row["space_group"])} <span class="muted">no. {row["space_group"]}</span></h2>
<p>{_sites_html(row["sites"])}</p>
<dl>{listed}</dl>
{_sites_table(crystal)}
{f'<ul class="warn">{notes}</ul>' if notes else ""}
<p class="links"><a class="button" download="{escape(name)}.cif"
 href="data:chemical/x-cif;base64,{cif}">Download CIF</a>
 <span class="muted">{escape(row["file"])}</span></p>
</div>
</article>"""


def _nearest_text(nearest: Mapping[str, Any] | None) -> str:
    if nearest is None:
        return "none within tolerance"
    return (
        f"{nearest['material_id']}, {nearest['formula']}, group {nearest['space_group']}, "
        f"{nearest['kind']}, rms {nearest['distance']:.4f}{_volume(nearest)}"
    )


def _volume(nearest: Mapping[str, Any]) -> str:
    text = volume_text(nearest)
    return f", volume {text}" if text else ""


def _choice_text(choice: Mapping[str, Any]) -> str:
    if choice["samples"] == 1:
        return "the only one"
    return (
        f"no. {choice['sample'] + 1} of {choice['samples']}, "
        f"mean distance to the others {choice['consensus']:.3f}"
    )


def _sites_table(crystal: Crystal) -> str:
    rows = []
    structure: Structure = crystal.to_structure()
    start = 0
    for site, position in zip(crystal.sites, crystal.positions, strict=True):
        x, y, z = structure[start].frac_coords
        symbol = structure[start].specie.symbol
        start += position.multiplicity
        rows.append(
            f'<tr><th scope="row">{symbol}</th><td>{position.multiplicity}{site.letter}</td>'
            f'<td class="num">{x:.4f}</td><td class="num">{y:.4f}</td>'
            f'<td class="num">{z:.4f}</td></tr>'
        )
    head = "".join(f'<th scope="col">{t}</th>' for t in ("", "Site", "x", "y", "z"))
    return (
        "<details><summary>Coordinates</summary><table><thead><tr>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def _omitted(number: int) -> str:
    if number <= 0:
        return ""
    return f'<p class="muted">{number} more crystals are in the folder but not drawn here.</p>'


def _provenance(results: Mapping[str, Any]) -> str:
    networks, rankers = (
        "; ".join(f"{c['name']} ({c['hash']})" for c in results[key])
        for key in ("checkpoints", "symmetry_models")
    )
    pairs = [
        ("Program", results["created_by"]),
        ("Computed with", f"{results['backend']} on {results['device']}"),
        ("Network", networks),
        ("Symmetries ranked by", rankers),
        ("Symmetry prior", results["prior"]["hash"]),
        ("Request", results["requests_sha256"][:12]),
    ]
    listed = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
    return f"<dl>{listed}</dl><p>{escape(results['attribution'])}</p>"
