"""`uni-mdm bench`: speed on this machine, the two views side by side."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.backend import backend_name
from common.checkpoint import checkpoint_folder, load_checkpoint, shipped
from common.config import RunConfig, load_config, parse_config
from common.data.batch import View
from common.data.locations import dataset
from common.data.store import Record
from common.delivery import Delivery, deliver_apart
from common.errors import UserError
from common.files import write_atomic, write_together
from common.machine import cpu_count
from common.size_cost import MANY_ATOMS, Law, SizeCost, in_flight, laws_of, to_png
from common.speed import (
    DIFFCSP_PP_CALLS,
    NetworkSpeed,
    labelling_speed,
    measure_apart,
    measure_sizes_apart,
    most_common,
)

#: Figures of which more are better.
_THE_MORE_THE_BETTER = {
    "training",
    "sampling",
    "peak",
    "training_share",
    "sampling_share",
    "saving",
}


def command(
    config: Annotated[
        Path | None, typer.Argument(help="Network to measure, YAML; the shipped one without it.")
    ] = None,
    data: Annotated[str, typer.Option(help="Crystals: train, val, or a file.")] = "val",
    limit: Annotated[
        int | None,
        typer.Option(min=8, help="The first rows of it; 256, with --checkpoint 1000."),
    ] = None,
    calls: Annotated[
        int | None,
        typer.Option(
            min=1, help="Network calls per sample; 10, with --checkpoint as many as it asks for."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (torch); all.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
    against: Annotated[
        str | None,
        typer.Option(help="A backend to compare with, same view; one view with the other without."),
    ] = None,
    sizes: Annotated[
        int | None,
        typer.Option(min=1, help="Only crystals of the most common sizes, so many; all of them."),
    ] = None,
    by_size: Annotated[
        Path | None,
        typer.Option(
            help="PNG: sampling only, cost against size up to 52 atoms, and nothing else."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="How long a trained one takes for crystals, and nothing else: name or folder."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="With --checkpoint: auto, cpu, cuda or ascend.")] = (
        "auto"
    ),
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure training and sampling: one token per site against one per atom, or two backends."""
    if checkpoint is not None:
        if config is not None or against is not None or sizes is not None or by_size is not None:
            raise UserError(
                "--checkpoint goes without CONFIG, --against, --sizes and --by-size: leave them out"
            )
        folder = checkpoint_folder(checkpoint)
        _show_delivery(folder, data, limit, backend, threads or cpu_count(), device, calls, out)
        return
    if device != "auto":
        raise UserError("--device goes with --checkpoint: leave it out")
    limit, calls = limit or 256, calls or 10

    run = load_config(config) if config else _shipped_config()
    records = dataset(data)[:limit]
    if not records:
        raise UserError(f"{data}: no usable rows to measure with")
    cores = threads or cpu_count()
    if by_size is not None:
        if against is not None or sizes is not None:
            raise UserError("--by-size goes without --against and --sizes: leave them out")
        _show_sizes(run, records, backend, calls, cores, by_size, out)
        return
    if against is not None:
        backend = backend_name(backend)
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
    for line in _published(speeds):
        console.print(line)
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


def _show_delivery(
    folder: Path,
    data: str,
    limit: int | None,
    backend: str,
    threads: int,
    device: str,
    calls: int | None,
    out: Path | None,
) -> None:
    """What a trained checkpoint takes for the first crystals of a data set."""
    saved = load_checkpoint(folder)
    name = parse_config(saved.config, f"{folder}/config.yaml").name
    records = dataset(data)[: limit or 1000]
    if not records:
        raise UserError(f"{data}: no usable rows to measure with")
    if limit is not None and len(records) < limit:
        raise UserError(f"{data}: {len(records)} usable rows: give --limit {len(records)} or less")
    console = Console()
    console.print(f"Sampling {len(records):,} crystals in a process of its own", highlight=False)
    times = deliver_apart(backend, folder, records, threads, device, calls)
    console.print(_delivery_table(name, times))
    console.print(
        f"first {len(records):,} rows of {data}, one sample each; nothing warmed up; "
        f"{times.device}",
        soft_wrap=True,
    )
    if out is not None:
        run = {"checkpoint": name, "hash": saved.hash, "data": data, "threads": threads}
        write_atomic(out, json.dumps(run | times.to_dict(), indent=1) + "\n")


def _delivery_table(name: str, times: Delivery) -> Any:
    from rich.table import Table

    table = Table("", name)
    for label, value, digits in (
        ("crystals", times.crystals, 0),
        ("loading the checkpoint, s", times.loading, 2),
        ("finding precedents, s", times.precedents, 2),
        ("network, s", times.network, 2),
        ("all else, s", times.other, 2),
        ("whole, s", times.seconds, 2),
        ("crystals/s", times.crystals / times.seconds, 1),
        ("network calls per crystal", times.calls, 0),
        ("GFLOP per crystal, padding too", times.flops * 1e-9, 3),
        ("DiffCSP++, times as many", times.saving, 0),
        ("GEMM peak, GFLOP/s", times.peak * 1e-9, 1),
        ("network, % of it", 100 * times.share, 1),
    ):
        table.add_row(label, f"{value:,.{digits}f}")
    return table


def _show_sizes(
    run: RunConfig,
    records: list[Record],
    backend: str,
    calls: int,
    threads: int,
    picture: Path,
    out: Path | None,
) -> None:
    """Cost of sampling against size: a plot, and the laws that fit."""
    console = Console()
    console.print(f"Sampling crystals of up to {MANY_ATOMS} atoms in a process of its own")
    costs = measure_sizes_apart(backend, run, records, calls, threads)
    laws = laws_of(costs)
    title = f"{run.name}, {calls} network calls per crystal, {threads} threads"
    figures = {
        "calls": calls,
        "threads": threads,
        "laws": {name: asdict(law) for name, law in laws.items()},
        "sizes": [cost.to_dict() for cost in costs],
    }
    files: dict[Path, bytes | str] = {picture: to_png(costs, title)}
    if out is not None:
        files[out] = json.dumps(figures, indent=1) + "\n"
    for line in _laws(costs, laws):
        console.print(line, soft_wrap=True)
    write_together(files)
    console.print(f"{len(costs)} sizes; {title}; plot: {picture}", soft_wrap=True)


def _laws(costs: Sequence[SizeCost], laws: dict[str, Law]) -> Iterator[str]:
    """How cost grows, what bounds it, and what the largest crystals cost."""
    for name, unit, scale in (("seconds", "ms", 1e3), ("bytes", "KiB", 1 / 1024)):
        if law := laws.get(name):
            yield (
                f"{unit} per crystal: {scale * law.constant:.3g} + {scale * law.slope:.3g} x "
                f"sites x atoms; exponent of the log-log fit {law.exponent:.2f}"
            )
    fitted = [cost for cost in costs if not cost.is_large]
    most = in_flight(fitted)
    yield (
        f"up to {max(cost.atoms for cost in fitted)} atoms: "
        f"{max(cost.padded_edges for cost in fitted):,} padded edges in a call at most"
        + ("" if most is None else f", {most / 2**20:,.0f} MiB for all calls at once")
    )
    for cost in costs:
        if cost.is_large:
            ratio = cost.seconds / float(laws["seconds"].at(cost.size))
            memory = f", {cost.memory / 2**20:,.0f} MiB" if cost.memory else ""
            yield (
                f"{cost.atoms} atoms on {cost.tokens} sites: {cost.seconds:.2f} s{memory} per "
                f"crystal; {ratio:.2f} times the seconds of the line"
            )


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
    for label, name, scale, digits in (
        ("parameters", "parameters", 1.0, 0),
        ("edges per structure", "edges", 1.0, 1),
        ("MFLOP per call and structure", "flops_per_call", 1e-6, 1),
        ("training, structures/s", "training", 1.0, 1),
        ("sampling, structures/s", "sampling", 1.0, 2),
        ("GEMM peak, GFLOP/s", "peak", 1e-9, 1),
        ("training, % of it", "training_share", 100.0, 1),
        ("sampling, % of it", "sampling_share", 100.0, 1),
        ("calls of the run's sampler", "deployed_calls", 1.0, 0),
        ("GFLOP per structure, all of them", "flops_per_sample", 1e-9, 3),
        ("DiffCSP++, times as many", "saving", 1.0, 1),
    ):
        a, b = (getattr(speed, name) * scale for speed in (first, second))
        # How many times the second costs what the first does.
        ratio = a / b if name in _THE_MORE_THE_BETTER else b / a
        table.add_row(label, f"{a:,.{digits}f}", f"{b:,.{digits}f}", f"{ratio:.2f}")
    return table


def _published(speeds: dict[str, NetworkSpeed]) -> Iterator[str]:
    """What DiffCSP++ as published spends, on each set of crystals once."""
    for flops in dict.fromkeys(speed.diffcsp_pp_flops for speed in speeds.values()):
        yield (
            f"DiffCSP++ as published: {DIFFCSP_PP_CALLS:,} calls x "
            f"{flops / DIFFCSP_PP_CALLS * 1e-6:,.1f} MFLOP = {flops * 1e-9:,.0f} GFLOP "
            "per structure, counted, not measured"
        )
