"""`uni-mdm evaluate`: generated crystals against known ones, with controls in the same table.

`uni-mdm evaluate symmetry` compares rankings of symmetries with the true ones.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from common.backend import load_generator
from common.checkpoint import PRECEDENTS, Checkpoint, checkpoint_folder, load_checkpoint, shipped
from common.cli import OnceGroup
from common.config import RunConfig, parse_config
from common.data.locations import DATASETS, dataset
from common.data.store import Record, read_records
from common.diffusion.score import network_calls
from common.errors import UserError
from common.files import output_folder, unused

if TYPE_CHECKING:
    from rich.console import Console

#: Symmetries ranked where nothing else is said.
DEFAULT_TOP = 20

app = typer.Typer(cls=OnceGroup, invoke_without_command=True)


@app.callback()
def crystals(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="train, val, or a CSV or Parquet file.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    given: Annotated[
        Literal["symmetry", "composition"],
        typer.Option(help="What is told of each reference: with its composition, symmetries."),
    ] = "symmetry",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder or name; the small shipped formation-energy model.")
    ] = None,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Samples per reference; the chosen one is counted.")
    ] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Network calls per sample; the checkpoint's own.")
    ] = None,
    property_kind: Annotated[
        Literal["true", "shuffled", "null"],
        typer.Option("--property", help="Property told: its own, another reference's, or none."),
    ] = "true",
    symmetry_model: Annotated[
        str | None,
        typer.Option(
            help="With --given composition: 'glm4' with the prior (default), 'prior', a shipped "
            "model's name, or a folder."
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="With --given composition: symmetries ranked; 20."),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no-controls",
            help="Random draw and nearest template; priors and the nearest composition.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report, whose files it replaces; "
            "runs/evaluate-[composition-]CHECKPOINT-DATA, numbered if it is there."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per CPU.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or ascend.")] = "auto",
) -> None:
    """Sample crystals for known ones, match them, and write JSON, Markdown and a plot."""
    if context.invoked_subcommand is not None:
        return
    _check_options(given, num_samples, top, symmetry_model)
    from rich.console import Console

    from common.evaluate.composition import CompositionEvaluation, Network
    from common.evaluate.report import to_summary, write_report
    from common.evaluate.run import Evaluation, Told
    from common.evaluate.tables import Shown
    from common.ranking import load_ranker

    folder = checkpoint_folder(checkpoint) if checkpoint else _default_checkpoint()
    saved = load_checkpoint(folder)
    config = parse_config(saved.config, f"{folder}/config.yaml")
    kind = "composition-" if given == "composition" else ""
    target = out or unused(Path("runs", f"evaluate-{kind}{config.name}-{_split_name(data)}"))
    with output_folder(target, "give another --out"):
        generator = load_generator(folder, backend, device)
        if given == "composition":
            ranker = load_ranker(
                generator.properties[:1], symmetry_model, backend=backend, device=device
            )
            if ranker.note:
                raise UserError(ranker.note)
        references = _references(data, limit, workers)
        training, name = _known_rows(saved, config, workers)
        evaluation = Evaluation(references, _split_name(data), training, name, workers)
        calls = network_calls(config.diffusion, steps)
        if given == "composition":
            told = Told.of(references, generator.properties[:1], property_kind, seed)
            network = Network(generator, config.name, saved.hash, calls, seed)
            asked = CompositionEvaluation(evaluation, told, top or DEFAULT_TOP)
            methods = asked.ask(ranker)
            if controls:
                methods += asked.controls(training, ranker)
            rows = asked.rows(methods, network)
        else:
            rows = [
                evaluation.model(
                    generator,
                    name=config.name,
                    checkpoint=saved.hash,
                    k=num_samples,
                    seed=seed,
                    steps=calls,
                    device=generator.device_name,
                    told=Told.of(references, generator.properties, property_kind, seed),
                )
            ]
            if controls:
                rows += evaluation.controls(seed)
        console = Console()
        # Seen even where it cannot be saved.
        console.print(Shown(to_summary(rows)))
        paths = write_report(rows, target)
        _tell_report(console, paths)


def _check_options(
    given: str, num_samples: int, top: int | None, symmetry_model: str | None
) -> None:
    if given == "composition" and num_samples > 1:
        raise UserError(
            "--num-samples goes with --given symmetry: one crystal per symmetry is made"
        )
    for option, value in (("--top", top), ("--symmetry-model", symmetry_model)):
        if given != "composition" and value is not None:
            raise UserError(f"{option} goes with --given composition")


@app.command()
def symmetry(
    model: Annotated[
        str,
        typer.Option(
            help="Language model's folder or shipped name; 'prior' for the controls alone."
        ),
    ] = "glm4",
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
        Path | None,
        typer.Option(
            help="Folder for the report, whose files it replaces; "
            "runs/evaluate-symmetry-MODEL-DATA, numbered if it is there."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per CPU.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or ascend.")] = "auto",
) -> None:
    """Rank the symmetries of known crystals' compositions, and write JSON, Markdown and a plot."""
    from rich.console import Console

    from common.evaluate.symmetry_report import to_summary, write_symmetry_report
    from common.evaluate.symmetry_run import History, SymmetryEvaluation
    from common.evaluate.tables import Shown
    from common.ranking import load_ranker

    ranker = load_ranker(
        [] if target == "none" else [target], model, backend=backend, device=device
    )
    if ranker.note:
        raise UserError(ranker.note)
    if ranker.model is None and not controls:
        raise UserError("nothing to measure: give --model, or leave --no-controls out")
    name = ranker.name.replace(" ", "-")
    target_folder = out or unused(Path("runs", f"evaluate-symmetry-{name}-{_split_name(data)}"))
    with output_folder(target_folder, "give another --out"):
        references = _references(data, limit, workers)
        history = History.of(ranker.folder) if ranker.folder else History()
        # What every control learns from; the last set of a model that had several.
        training_name = history.data[-1][0] if history.data else "train"
        training = dataset(training_name, workers)
        evaluation = SymmetryEvaluation(
            references, _split_name(data), target, training, training_name, ranker.prior
        )
        rows = []
        if ranker.model is not None:
            rows += evaluation.model(ranker.model, ranker.name, history)
        if controls:
            rows += evaluation.controls()
        console = Console()
        console.print(Shown(to_summary(rows)))
        paths = write_symmetry_report(rows, target_folder)
        _tell_report(console, paths)


def _tell_report(console: "Console", paths: dict[str, Path]) -> None:
    console.print(
        f"Report: {paths['md']}: all figures, by kind of structure, paired tests, how it was made",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _default_checkpoint() -> Path:
    folder = shipped().get("crystal_dit_small_fm")
    if folder is None:
        raise UserError("no shipped checkpoint is found: give --checkpoint")
    return folder


def _known_rows(
    saved: Checkpoint, config: RunConfig, workers: int | None
) -> tuple[list[Record], str]:
    """What a network has learned from or starts its samples from, and its name."""
    path = saved.path / PRECEDENTS
    if not path.is_file():
        return dataset(config.train.data, workers), config.train.data
    seen = dict.fromkeys(name for name, _ in saved.rows_seen) or [config.train.data]
    return read_records(path), " and ".join(seen)


def _references(data: str, limit: int | None, workers: int | None) -> list[Record]:
    records = dataset(data, workers)[:limit]
    if not records:
        raise UserError(f"{data}: no usable rows to evaluate on")
    counts = Counter(record.material_id for record in records)
    if repeated := [name for name, count in counts.items() if count > 1]:
        what = f"{len(repeated)} ids are there more than once, such as {repeated[0]}"
        raise UserError(f"{data}: {what}; give each row its own")
    return records


def _split_name(data: str) -> str:
    return data if data in DATASETS else Path(data).name.split(".")[0]
