"""`uni-mdm convert`: a checkpoint from one framework's files to the other's."""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ckpt_convert.convert import convert
from ckpt_convert.mapping import Framework, MisfitError, Report
from common.checkpoint import checkpoint_folder, shipped, shipped_language
from common.language.hub import weights_folder

#: Tensors that do not fit, of which the names are listed.
_SHOWN = 20


def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Checkpoint or run folder, a shipped model's name, or a file of weights: .ckpt, "
            ".safetensors, .pt.",
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="Folder to make; or, for the weights alone, a file with such a suffix.",
        ),
    ],
    to: Annotated[Framework, typer.Option(help="Framework whose files to write.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML of the network, if SRC is a file without one.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Language model that SRC, an adapter of it, is worked into: a folder, a shipped "
            "model's name, or OWNER/NAME@REVISION.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a DST of the same kind.")
    ] = False,
) -> None:
    """Convert weights and training state, bit by bit; a tensor that does not fit is an error."""
    console = Console()
    models = shipped_language()
    if base is not None:
        base = weights_folder(checkpoint_folder(base, models))
    try:
        report = convert(
            checkpoint_folder(source, shipped() | models),
            destination,
            to,
            config=config,
            base=base,
            overwrite=overwrite,
        )
    except MisfitError as error:
        _show(console, error.report)
        raise
    _show(console, report)
    names = f": {', '.join(report.files)}" if len(report.files) > 1 else ""
    console.print(f"{destination}{names}", highlight=False, markup=False, soft_wrap=True)


def _show(console: Console, report: Report) -> None:
    table = Table("", box=SIMPLE_HEAD)
    for column in ("used", "unused", "missing", "reshaped", "numbers", "type"):
        table.add_column(column, justify="right")
    misfits = []
    for index, count in enumerate(report.counts):
        if index == 0 or count.file != report.counts[index - 1].file:
            table.add_row(escape(count.file))
        kinds = {"unused": count.unused, "missing": count.missing, "reshaped": count.reshaped}
        misfits += [f"{kind}: {name}" for kind, names in kinds.items() for name in names]
        table.add_row(
            f"  {count.part}",
            str(count.used),
            *(str(len(names)) for names in kinds.values()),
            f"{count.numbers:,}",
            ", ".join(count.dtypes),
        )
    console.print(table)
    for line in (*misfits[:_SHOWN], *report.notes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(misfits) > _SHOWN:
        console.print(f"and {len(misfits) - _SHOWN} more", highlight=False)
