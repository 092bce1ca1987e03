"""`uni-mdm bench`: speed on this machine, the two views side by side."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.checkpoint import load_checkpoint, shipped
from common.config import RunConfig, load_config, parse_config
from common.data.batch import View
from common.data.locations import dataset
from common.errors import UserError
from common.files import write_atomic
from common.machine import cpu_count
from common.speed import NetworkSpeed, labelling_speed, measure_apart, most_common


def command(
    config: Annotated[
        Path | None, typer.Argument(help="Network to measure, YAML; the shipped one without it.")
    ] = None,
    data: Annotated[str, typer.Option(help="Crystals: train, val, or a file.")] = "val",
    limit: Annotated[int, typer.Option(min=8, help="The first rows of it.")] = 256,
    calls: Annotated[int, typer.Option(min=1, help="Network calls per sample.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all of them.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
    against: Annotated[
        str | None,
        typer.Option(help="A backend to compare with, same view; one view with the other without."),
    ] = None,
    sizes: Annotated[
        int | None,
        typer.Option(min=1, help="Only crystals of the most common sizes, so many; all of them."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure training and sampling: one token per site against one per atom, or two backends."""
    from rich.console import Console

    run = load_config(config) if config else _shipped_config()
    records = dataset(data)[:limit]
    if not records:
        raise UserError(f"{data}: no usable rows to measure with")
    cores = threads or cpu_count()
    if backend == against:
        raise UserError(f"--backend {backend} --against {against}: name two different ones")
    contestants: dict[str, tuple[str, View]] = (
        {"asymmetric": (backend, "asymmetric"), "conventional": (backend, "conventional")}
        if against is None
        else {name: (name, run.model.cell) for name in (backend, against)}
    )
    console = Console()
    speeds = {}
    for label, (name, cell) in contestants.items():
        rows = records if sizes is None else most_common(records, cell, sizes)
        with console.status(f"Measuring {label}"):
            speeds[label] = measure_apart(name, _with_cell(run, cell), rows, calls, cores)
    console.print(_table(speeds))
    cifs = [r.structure.to(fmt="cif") for r in records if r.structure is not None]
    rate = labelling_speed(cifs) if cifs else None
    if rate is not None:
        console.print(f"labelling: {rate:.0f} rows/s in one process")
    of = "" if sizes is None else f", of them those of the {sizes} most common sizes"
    console.print(
        f"{len(records)} structures of {data}{of}; {cores} threads, {calls} calls per sample"
    )
    if out is not None:
        figures: dict[str, Any] = {
            "data": data,
            "structures": len(records),
            "sizes": sizes,
            "threads": cores,
            "labelling_rows_per_second_per_process": rate,
            "networks": {label: speed.to_dict() for label, speed in speeds.items()},
        }
        write_atomic(out, json.dumps(figures, indent=1) + "\n")


def _shipped_config() -> RunConfig:
    folder = shipped().get("crystal_dit_small_fm")
    if folder is None:
        raise UserError("no shipped checkpoint is found: give a configuration")
    return parse_config(load_checkpoint(folder).config, f"{folder}/config.yaml")


def _with_cell(config: RunConfig, cell: View) -> RunConfig:
    """The same width and depth in another view, which has no use for frames if conventional."""
    frames = config.model.frames and cell == "asymmetric"
    model = config.model.model_copy(update={"cell": cell, "frames": frames})
    return config.model_copy(update={"model": model})


def _table(speeds: dict[str, NetworkSpeed]) -> Any:
    from rich.table import Table

    first, second = speeds.values()
    table = Table("", *speeds, "ratio")
    for label, name, digits in (
        ("parameters", "parameters", 0),
        ("edges per structure", "edges", 1),
        ("MFLOP per call and structure", "flops_per_call", 1),
        ("training, structures/s", "training", 1),
        ("sampling, structures/s", "sampling", 2),
    ):
        scale = 1e-6 if name == "flops_per_call" else 1.0
        a, b = (getattr(speed, name) * scale for speed in (first, second))
        # How many times the second costs what the first does.
        ratio = a / b if name in ("training", "sampling") else b / a
        table.add_row(label, f"{a:,.{digits}f}", f"{b:,.{digits}f}", f"{ratio:.2f}")
    return table
