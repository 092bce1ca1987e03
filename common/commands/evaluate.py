"""`uni-mdm evaluate`: generated crystals against known ones, with controls in the same table.

`uni-mdm evaluate symmetry` compares rankings of symmetries with the true ones.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.backend import load_generator
from common.checkpoint import load_checkpoint, shipped
from common.cli import OnceGroup
from common.config import parse_config
from common.data.locations import DATASETS, dataset
from common.data.store import Record
from common.errors import UserError
from common.files import output_folder

app = typer.Typer(cls=OnceGroup, invoke_without_command=True)


@app.callback()
def crystals(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="train, val, or a CSV or Parquet file.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    given: Annotated[
        Literal["symmetry"], typer.Option(help="What the model is told of each reference.")
    ] = "symmetry",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; the shipped formation-energy model.")
    ] = None,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Samples per reference; the chosen one is counted.")
    ] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Network calls per sample; the checkpoint's own.")
    ] = None,
    use_property: Annotated[
        bool, typer.Option("--property/--no-property", help="Tell the model the true property.")
    ] = True,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Random draw and nearest template.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; runs/evaluate-CHECKPOINT-DATA.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per CPU.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or ascend.")] = "auto",
) -> None:
    """Sample crystals for known ones' symmetry, match them, and write JSON, Markdown and a plot."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.markdown import Markdown

    from common.evaluate.report import to_markdown, write_report
    from common.evaluate.run import Evaluation

    folder = checkpoint or _default_checkpoint()
    saved = load_checkpoint(folder)
    config = parse_config(saved.config, f"{folder}/config.yaml")
    target = out or Path("runs") / f"evaluate-{config.name}-{_split_name(data)}"
    with output_folder(target, "give another --out"):
        generator = load_generator(folder, backend, device)
        references = _references(data, limit, workers)
        training = dataset(config.train.data, workers)
        evaluation = Evaluation(references, _split_name(data), training, config.train.data, workers)
        calls = steps or config.diffusion.steps
        if config.diffusion.kind == "score":
            calls = steps or 2 * config.diffusion.timesteps
        rows = [
            evaluation.model(
                generator,
                name=config.name,
                checkpoint=saved.hash,
                k=num_samples,
                seed=seed,
                steps=calls,
                device=generator.device_name,
                given=generator.properties if use_property else (),
            )
        ]
        if controls:
            rows += evaluation.controls(seed)
        console = Console()
        # Seen even where it cannot be saved.
        console.print(Markdown(to_markdown(rows)))
        paths = write_report(rows, target)
        console.print(f"Report: {paths['md']}", highlight=False)


@app.command()
def symmetry(
    model: Annotated[
        Path | None,
        typer.Option(help="Language model's folder; the shipped one, or the controls alone."),
    ] = None,
    data: Annotated[str, typer.Option(help="train, val, or a CSV or Parquet file.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    target: Annotated[
        Literal["none", "band_gap", "formation_energy"],
        typer.Option(help="The property whose true value is told."),
    ] = "none",
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Template prior and templates.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; runs/evaluate-symmetry-MODEL-DATA.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per CPU.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
) -> None:
    """Rank the symmetries of known crystals' compositions, and write JSON, Markdown and a plot."""
    from rich.console import Console
    from rich.markdown import Markdown

    from common.evaluate.symmetry_report import to_markdown, write_symmetry_report
    from common.evaluate.symmetry_run import SymmetryEvaluation, training_of
    from common.ranking import load_ranker

    ranker = load_ranker([] if target == "none" else [target], model, backend=backend)
    if ranker.note:
        raise UserError(ranker.note)
    if ranker.model is None and not controls:
        raise UserError("no language model is shipped: give --model, or leave --no-controls out")
    name = ranker.name.replace(" ", "-")
    target_folder = out or Path("runs") / f"evaluate-symmetry-{name}-{_split_name(data)}"
    with output_folder(target_folder, "give another --out"):
        references = _references(data, limit, workers)
        learned = training_of(ranker.folder) if ranker.folder else {}
        training_name = str(learned.get("data", "train"))
        training = dataset(training_name, workers)
        evaluation = SymmetryEvaluation(
            references, _split_name(data), target, training, training_name, ranker.prior
        )
        rows = []
        if ranker.model is not None:
            rows.append(evaluation.model(ranker.model, ranker.name, learned.get("seed")))
        if controls:
            rows += evaluation.controls()
        console = Console()
        console.print(Markdown(to_markdown(rows)))
        paths = write_symmetry_report(rows, target_folder)
        console.print(f"Report: {paths['md']}", highlight=False)


def _default_checkpoint() -> Path:
    folder = shipped().get("crystal_dit_small_fm")
    if folder is None:
        raise UserError("no shipped checkpoint is found: give --checkpoint")
    return folder


def _references(data: str, limit: int | None, workers: int | None) -> list[Record]:
    records = dataset(data, workers)[:limit]
    if not records:
        raise UserError(f"{data}: no usable rows to evaluate on")
    return records


def _split_name(data: str) -> str:
    return data if data in DATASETS else Path(data).name.split(".")[0]
