"""`uni-mdm generate`: crystals for a formula and a target property."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from common.errors import UserError
from common.machine import cpu_count

if TYPE_CHECKING:
    from common.pipeline import Progress, Query
    from common.runs import Outcome


def command(
    formula: Annotated[
        str | None,
        typer.Argument(
            help="SrTiO3, or with the cell's real count Sr2Ti2O6; O2 means O.", show_default=False
        ),
    ] = None,
    formula_option: Annotated[
        str | None, typer.Option("--formula", help="The formula, if it is not the argument.")
    ] = None,
    band_gap: Annotated[float | None, typer.Option(help="Wanted band gap, eV.")] = None,
    formation_energy: Annotated[
        float | None, typer.Option(help="Wanted formation energy, eV/atom.")
    ] = None,
    space_group: Annotated[
        str | None, typer.Option(help="Number 1-230, or symbol: Fm-3m, P2_1/c.")
    ] = None,
    sites: Annotated[str | None, typer.Option(help='As in "Sr:1a Ti:1b O:3c".')] = None,
    z: Annotated[
        int | None,
        typer.Option("--z", help="Formula units in the conventional cell; atoms, of O2 too."),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="CSV or JSONL of many requests, instead of a formula."),
    ] = None,
    top: Annotated[int, typer.Option(help="Symmetries per request.")] = 5,
    num_samples: Annotated[
        int, typer.Option(help="Crystals sampled per symmetry, of which one is chosen.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Network calls per crystal; the checkpoint's own number.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; runs/FORMULA. Never overwritten."),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder or name; the smallest shipped one for the property.")
    ] = None,
    symmetry_model: Annotated[
        str | None,
        typer.Option(
            help="What ranks symmetries: 'glm4' with the prior (default), 'prior', a shipped "
            "model's name, or a folder."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that compare crystals; one per CPU.")
    ] = None,
) -> None:
    """Crystals for a formula and a target property, the most probable symmetry first."""
    single = {
        "--band-gap": band_gap,
        "--formation-energy": formation_energy,
        "--space-group": space_group,
        "--sites": sites,
        "--z": z,
    }
    if formula is not None and formula_option is not None:
        raise UserError("the formula is given twice, with --formula and without; give it once")
    formula = formula_option if formula is None else formula
    if (formula is None) == (input_file is None):
        raise UserError("give a formula or --input, one of them: uni-mdm generate SrTiO3")
    if input_file is not None and any(value is not None for value in single.values()):
        given = next(name for name, value in single.items() if value is not None)
        raise UserError(f"{given} does not go with --input: write it into the file")
    from common.pipeline import Settings, make_query

    settings = Settings(top, num_samples, seed, steps)
    if input_file is not None:
        from common.requests import read_requests

        queries = read_requests(input_file)
        folder = out or Path("runs") / input_file.stem
    else:
        assert formula is not None
        query = make_query(
            formula, band_gap, formation_energy, space_group=space_group, sites=sites, z=z
        )
        queries = [query]
        folder = out or Path("runs") / query.formula.text
    console = Console()
    with _progress(console) as report:
        report("Loading", 0, 1)
        from common.runs import generate_many

        outcome = generate_many(
            queries,
            folder,
            settings,
            backend=backend,
            checkpoint=checkpoint,
            symmetry_model=symmetry_model,
            workers=workers or cpu_count(),
            progress=report,
        )
    _show(console, queries, outcome)


@contextmanager
def _progress(console: Console) -> "Iterator[Progress]":
    """Bars, one per kind of work, that vanish when all is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bars = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    tasks: dict[str, Any] = {}
    with bars:

        def report(stage: str, done: int, total: int) -> None:
            if "Loading" in tasks and stage != "Loading":
                bars.update(tasks["Loading"], completed=1)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _show(console: Console, queries: "list[Query]", outcome: "Outcome") -> None:
    """The table of a single request, or how many were answered; and where everything is."""
    entries = outcome.entries
    if len(entries) == 1:
        _show_table(console, entries[0])
    else:
        done = len(entries) - len(outcome.failed)
        console.print(f"{done} of {len(entries)} requests answered", highlight=False)
        rows = [row for entry in entries for row in entry["crystals"]]
        if warned := sum(bool(row["warnings"]) for row in rows):
            told = f"{warned} of {len(rows)} crystals have warnings, which report.html shows"
            console.print(f"[yellow]{told}[/yellow]", highlight=False)
    for entry in outcome.failed[:10]:
        name = f" ({entry['query']['name']})" if entry["query"]["name"] else ""
        console.print(
            f"[red]request {entry['index'] + 1}{escape(name)}[/red]: {escape(entry['error'])}",
            highlight=False,
        )
    for note in outcome.notes:
        console.print(f"[yellow]note[/yellow]: {escape(note)}", highlight=False, soft_wrap=True)
    rankers = ", ".join(f"{one['name']} ({one['hash']})" for one in outcome.rankers)
    console.print(f"symmetries ranked by {escape(rankers)}", highlight=False, soft_wrap=True)
    if outcome.resumed:
        told = f"{outcome.resumed} of the {len(entries)} requests had been answered before"
        console.print(told, highlight=False)
    console.print(
        f"[bold]{escape(str(outcome.folder))}[/bold]: report.html, results.json, results.extxyz, "
        "one CIF per candidate",
        highlight=False,
        soft_wrap=True,
    )


def _show_table(console: Console, entry: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from common.reference import volume_text

    table = Table(title=escape(_title(entry["query"])), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("#", justify="right")
    table.add_column("Space group", no_wrap=True)
    table.add_column("Wyckoff sites", overflow="fold")
    table.add_column("Prob.", justify="right", no_wrap=True)
    table.add_column("g/cm3", justify="right", no_wrap=True)
    table.add_column("Nearest known", no_wrap=True)
    table.add_column("rms", justify="right", no_wrap=True)
    table.add_column("dV", justify="right", no_wrap=True)
    for row in entry["crystals"]:
        nearest = row["nearest"]
        table.add_row(
            str(row["rank"]),
            f"{row['space_group_symbol']} ({row['space_group']})",
            _short_sites(row["sites"]),
            f"{row['probability']:.3f}",
            f"{row['density']:.2f}",
            "-" if nearest is None else _nearest(nearest, row["formula"]),
            "-" if nearest is None else f"{nearest['distance']:.3f}",
            "-" if nearest is None else volume_text(nearest) or "-",
        )
    console.print(table)
    for row in entry["crystals"]:
        for note in row["warnings"]:
            console.print(f"[yellow]{row['rank']}[/yellow]: {escape(note)}", highlight=False)


def _title(query: dict[str, Any]) -> str:
    """What was asked: formula (ours, then the user's), units if they were counted, property."""
    parts = [str(query["formula"])]
    if query["asked"]:
        parts.append(f"asked as {query['asked']}")
    if query["formula_units"]:
        parts.append(f"{query['formula_units']} formula units per cell")
    for name, unit in (("band_gap", "eV"), ("formation_energy", "eV/atom")):
        if query[name] is not None:
            parts.append(f"{name.replace('_', ' ')} {query[name]:g} {unit}")
    return ", ".join(parts)


def _short_sites(sites: str) -> str:
    """Sites with repeated ones counted: ``Zn:3a x9``."""
    from collections import Counter

    counts = Counter(sites.split())
    return " ".join(f"{site} x{n}" if n > 1 else site for site, n in counts.items())


def _nearest(nearest: dict[str, Any], formula: str) -> str:
    name = str(nearest["material_id"])
    return name if nearest["formula"] == formula else f"{name} {nearest['formula']}"
