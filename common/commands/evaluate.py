"""`uni-mdm evaluate`: generated crystals against known ones, with controls in the same table."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.backend import load_generator
from common.checkpoint import load_checkpoint, shipped
from common.config import parse_config
from common.data.locations import DATASETS, dataset
from common.data.store import Record
from common.diffusion.score import own_calls
from common.errors import UserError
from common.files import output_folder


def command(
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
        calls = steps or own_calls(config.diffusion)
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
