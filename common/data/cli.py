"""`uni-mdm data`: import, fingerprint, split and describe data sets."""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from common.data.importer import ImportReport, import_dataset
from common.data.locations import cache_dir, dataset, dataset_path
from common.data.sources import PROPERTIES_FILE, CifFolderSource, open_source
from common.data.store import (
    PROPERTIES,
    Record,
    deal_by_formula,
    lacking_lines,
    read_metadata,
    read_records,
    write_records,
)
from common.errors import UserError
from common.language.dataset import (
    Drop,
    Form,
    PromptSet,
    Reference,
    make_prompt_set,
    prompt_rows,
    read_ids,
    write_prompts,
)

app = typer.Typer(help="Import, split and describe data sets.", no_args_is_help=True)

Data = Annotated[str, typer.Argument(help="train, val, extra, or a CSV or Parquet file.")]


class Format(StrEnum):
    """What a source is made of."""

    auto = "auto"
    csv = "csv"
    cif = "cif"
    mp = "mp"


@app.command("import")
def import_command(
    source: Annotated[
        str,
        typer.Option(help="CSV file (.csv, .csv.gz) or its URL, CIF file or folder, or 'mp'."),
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    workers: Annotated[int | None, typer.Option(help="Processes; default: all CPUs.")] = None,
    max_atoms: Annotated[
        int | None, typer.Option(help="Refuse cells with more atoms than this.")
    ] = None,
    format_: Annotated[Format, typer.Option("--format", help="Kind of source.")] = Format.auto,
) -> None:
    """Label a source's structures; rows that cannot be used go to OUT.quarantine.jsonl."""
    if out.suffix != ".parquet":  # as a source's own is not, and as a data set is known by
        raise UserError(f"{out}: give a name that ends in .parquet")
    opened = open_source(source, cache_dir(), format_.value, max_atoms, show_progress=True)
    if isinstance(opened, CifFolderSource) and opened.path.is_dir() and opened.unmatched:
        named = ", ".join(opened.unmatched[:5]) + (", ..." if len(opened.unmatched) > 5 else "")
        typer.echo(f"{PROPERTIES_FILE}: no CIF for {len(opened.unmatched)} ids: {named}", err=True)
    report = import_dataset(opened, out, workers, max_atoms, cache_dir())
    Console().print(_report_table(report))


@app.command()
def fingerprint(data: Data) -> None:
    """Print the name of a data set's rows by their content, whatever their order."""
    typer.echo(read_metadata(dataset_path(data))["fingerprint"])


@app.command()
def split(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for train, val and test.parquet.")],
    fractions: Annotated[
        str, typer.Option(help="Fractions for train, val and test.")
    ] = "0.8,0.1,0.1",
    seed: Annotated[int, typer.Option(help="Another seed gives another split.")] = 0,
) -> None:
    """Part a data set so that no reduced formula is in two parts, which come out even."""
    path = dataset_path(data)
    targets = [out / f"{name}.parquet" for name in ("train", "val", "test")]
    if path.resolve() in [target.resolve() for target in targets]:
        raise UserError(f"{path}: a part of it would take its place; give another --out")
    shares = _fractions(fractions, len(targets))
    parts = deal_by_formula(read_records(path), shares, seed)
    metadata = read_metadata(path)
    for target, part in zip(targets, parts, strict=True):
        origin = {"split": target.stem, "fractions": fractions, "seed": seed}
        origin |= {"of": metadata["fingerprint"], "source": metadata["source"]}
        write_records(part, target, origin)
        typer.echo(f"{target}: {len(part)} rows")
    for line in _empty_parts(targets, parts, shares):
        typer.echo(line, err=True)


def _empty_parts(
    targets: Sequence[Path], parts: Sequence[list[Record]], shares: Sequence[float]
) -> list[str]:
    """A line for each part that got nothing of the share it should have."""
    formulas = len({record.reduced_formula for part in parts for record in part})
    return [
        f"{target} is empty: {formulas} formulas are too few for {share:g} of them; "
        "import more, or give other --fractions"
        for target, part, share in zip(targets, parts, shares, strict=True)
        if share > 0 and not part
    ]


class Target(StrEnum):
    """The property that a language model is told."""

    band_gap = "band_gap"
    formation_energy = "formation_energy"
    none = "none"


@app.command()
def prompts(
    data: Annotated[list[str], typer.Argument(help="train, extra, or CSV or Parquet files.")],
    out: Annotated[Path, typer.Option(help="Folder for the parts and report.json.")],
    target: Annotated[Target, typer.Option(help="Property in the questions.")] = Target.band_gap,
    form: Annotated[
        Form, typer.Option("--format", help="JSON lines, or the list MindFormers reads.")
    ] = Form.jsonl,
    fractions: Annotated[
        str, typer.Option(help="Fractions for train, val and test.")
    ] = "0.8,0.1,0.1",
    seed: Annotated[int, typer.Option(help="Another seed gives another split.")] = 0,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Set that must stay unseen: val, a CSV or Parquet file, or a .txt file with an "
            "id and, if known, a formula per line. Repeatable; default: val."
        ),
    ] = None,
    drop: Annotated[
        Drop, typer.Option(help="Leave out rows that share this with such a set.")
    ] = Drop.id,
    analogues: Annotated[
        int,
        typer.Option(min=0, help="Symmetries of similar compositions in a question, at most."),
    ] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes for labels.")] = None,
) -> None:
    """Write questions and answers for a language model, and what they share with other sets."""
    from rich.progress import track

    from common.language.analogues import AnalogueIndex

    index = AnalogueIndex.shipped(analogues) if analogues else None
    records = {r.material_id: r for name in data for r in dataset(name, workers)}
    references = [_reference(name, workers) for name in against or ["val"]]
    wanted = None if target is Target.none else target.value
    rows = list(records.values())
    made = make_prompt_set(rows, references, _fractions(fractions, 3), seed, drop, wanted)
    for line in lacking_lines("+".join(data), rows, [wanted] if wanted else [], "left out"):
        typer.echo(line)
    parts = {
        name: list(track(prompt_rows(rows, wanted, index), f"{name} prompts", len(rows)))
        for name, rows in made.parts.items()
    }
    for path in write_prompts(made, parts, out, wanted, form):
        typer.echo(path)
    Console().print(_overlap_table(made))


def _reference(name: str, workers: int | None) -> Reference:
    if name.endswith(".txt"):
        return read_ids(Path(name))
    return Reference.of_records(name, dataset(name, workers))


def _overlap_table(made: PromptSet) -> Table:
    table = Table(title="Rows shared with other sets", title_justify="left")
    for column in ("part", "rows", "set", "ids", "formulas", "same symmetry too"):
        table.add_column(column)
    for name, parts in made.overlaps.items():
        for part, shared in parts.items():
            counts = (shared.ids, shared.formula, shared.symmetry)
            cells = ["unknown" if n is None else str(n) for n in counts]
            table.add_row(part, str(len(made.parts[part])), name, *cells)
    table.caption = f"{made.dropped} rows were left out, whose {made.drop} is in one of these sets"
    return table


@app.command()
def info(data: Data) -> None:
    """Describe a data set in a table."""
    path = dataset_path(data)
    Console().print(_info_table(path, read_records(path)))


def _fractions(text: str, count: int) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"fractions {text!r}: give {count} numbers, as in 0.8,0.1,0.1") from error
    if len(values) != count:
        raise UserError(f"fractions {text!r}: give {count} numbers, as in 0.8,0.1,0.1")
    return values


def _report_table(report: ImportReport) -> Table:
    table = _table(str(report.path))
    table.add_row("rows read", str(report.rows))
    table.add_row("rows written", str(report.written))
    for reason, count in report.reasons.items():
        table.add_row(f"refused: {reason}", str(count))
    for name, count in report.lacking.items():
        table.add_row(f"written without {name}", str(count))
    if report.reasons:
        table.add_row("refused rows in", str(report.quarantine_path))
    origin = " (from the cache)" if report.from_cache else ""
    table.add_row("time", f"{report.seconds:.1f} s{origin}")
    return table


def _info_table(path: Path, records: list[Record]) -> Table:
    metadata = read_metadata(path)
    table = _table(str(path))
    table.add_row("rows", str(len(records)))
    table.add_row("fingerprint", metadata["fingerprint"])
    for key in ("kind", "name", "sha256"):
        if key in metadata["source"]:
            table.add_row(f"source {key}", str(metadata["source"][key]))
    if not records:
        return table
    table.add_row("reduced formulas", str(len({record.reduced_formula for record in records})))
    groups = Counter(record.crystal.space_group for record in records)
    common = ", ".join(f"{group} ({count})" for group, count in groups.most_common(5))
    table.add_row("space groups", f"{len(groups)}; most frequent {common}")
    cells = [len(record.cell.atomic_numbers) for record in records if record.cell is not None]
    quantities = {
        "sites": [len(record.crystal.sites) for record in records],
        "free coordinates": [record.crystal.num_free_coords for record in records],
        "atoms, conventional cell": [record.crystal.num_atoms for record in records],
        "atoms, cell as given": cells,
    }
    for name, values in quantities.items():
        table.add_row(name, _range(values))
    units = {"band_gap": "eV", "formation_energy": "eV/atom", "e_above_hull": "eV/atom"}
    for name in PROPERTIES:
        known = [v for r in records if (v := r.properties[name]) is not None]
        table.add_row(f"{name} ({units[name]})", f"{len(known)} known, {_range(known)}")
    return table


def _range(values: list[int] | list[float]) -> str:
    if not values:
        return "none"
    return f"{min(values):.4g} to {max(values):.4g}, mean {np.mean(values):.4g}"


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
