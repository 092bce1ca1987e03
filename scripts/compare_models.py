"""Networks trained for the same time on the same rows: whose crystals are right more often?

    python scripts/compare_models.py [CONTESTANT ...] [--minutes 20] [--rows 300] [--seeds 1]

A contestant is a YAML file with settings that replace its own, as in "configs/x.yaml
model.layers=3 name=y". Some steps of each are timed first, in turn, and those that fill the minutes
make its schedule; all are then given the true symmetry of the same validation rows. One table, in
Markdown and JSON, has every figure. The same command goes on with a comparison that was killed.
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.errors import UserError
from common.evaluate.comparison import to_markdown, write_comparison
from common.evaluate.contest import Machine, compare, contestants, make_plan
from common.evaluate.tables import Shown
from common.files import output_folder
from common.machine import cpu_share

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
#: From noise, which takes more calls than a precedent; from precedents; and DiffCSP++.
DEFAULT = (
    "crystal_dit_small_fm.yaml name=crystal_dit_small_fm_noise model.precedents=false "
    "diffusion.steps=50",
    "crystal_dit_small_fm.yaml",
    "diffcsp_pp_small.yaml",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def command(
    contestant: Annotated[
        list[str] | None, typer.Argument(help="CONFIG [KEY=VALUE ...], in quotes.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Training of each.")] = 20.0,
    rows: Annotated[int, typer.Option(min=1, help="First rows of the validation set.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each contestant.")] = 1,
    calls: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Network calls per sample, instead of its own."),
    ] = None,
    timed_steps: Annotated[int, typer.Option(min=1, help="Of each, before training.")] = 30,
    out: Annotated[Path, typer.Option(help="Runs, samples, and what is left to do.")] = Path(
        "runs/compare-models"
    ),
    results: Annotated[Path | None, typer.Option(help="Folder for the table; OUT.")] = None,
    name: Annotated[str, typer.Option(help="Of the table's files.")] = "compare_models",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (torch); all.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes for matching.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or ascend.")] = "auto",
) -> None:
    """Train, measure, and set side by side."""
    console = Console()
    try:
        machine = Machine(backend, device, threads or cpu_share())
        runs = contestants(
            contestant or [f"{shlex.quote(str(CONFIGS))}/{text}" for text in DEFAULT]
        )
        wanted = calls_by_name(calls or [], {run.name for run in runs})
        with output_folder(out, "give another --out"):
            with console.status(f"Timing {timed_steps} steps of each"):
                plan = make_plan(out, runs, minutes, machine, timed_steps)
            found = compare(out, plan, seeds, rows, wanted, console, workers)
        console.print(Shown(to_markdown(plan, found)))
        console.print(f"Table: {write_comparison(results or out, plan, found, name)}")
    except UserError as error:
        raise typer.BadParameter(str(error)) from error


def calls_by_name(texts: list[str], names: set[str]) -> dict[str, int]:
    """Network calls by contestant, of texts as ``diffcsp_pp_small=100``."""
    pairs = dict(text.split("=") for text in texts if text.count("=") == 1)
    if len(pairs) < len(texts) or not all(value.isdecimal() for value in pairs.values()):
        raise UserError("--calls: write NAME=N, each name once")
    if unknown := pairs.keys() - names:
        raise UserError(f"--calls: no contestant {', '.join(sorted(unknown))}")
    return {name: int(value) for name, value in pairs.items()}


if __name__ == "__main__":
    app()
