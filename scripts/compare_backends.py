"""How closely MindSpore and torch agree on the shipped checkpoints and in training.

    python scripts/compare_backends.py crystals [--rows 500] [--out FILE.json]
    python scripts/compare_backends.py training CONFIG [--steps 100] [--first torch] [--out FILE]
    python scripts/compare_backends.py language CONFIG [--steps 50] [--base-steps 100] [--out FILE]

Each framework runs in a process of its own, on the CPU.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from common.backend import SampleRequest, load_backend, load_generator
from common.checkpoint import checkpoint_folder, shipped, shipped_language
from common.commands.train import parse_run
from common.config import AnyRunConfig, RunConfig, load_config, read_settings
from common.crystal.structure import Crystal
from common.data.locations import dataset
from common.data.store import Record
from common.errors import UserError
from common.evaluate.match import MatchItem, match_many
from common.evaluate.run import read_back_many
from common.files import write_atomic
from common.machine import apart, cpu_count

BACKENDS = ("torch", "mindspore")
#: Rows whose crystals are compared number by number; the match rate is that of all rows.
COMPARED_ROWS = 200
#: Largest differences of crystals that count as the same: lattice lengths (A), coordinates.
LENGTH_LIMIT, COORDINATE_LIMIT = 1e-3, 1e-3
CURVE_LIMIT = 1e-4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()


@dataclass(frozen=True)
class Difference:
    """Largest differences of two crystals: lattice lengths (A) and fractional coordinates."""

    length: float
    coordinate: float

    @property
    def is_small(self) -> bool:
        """Whether both are within their limits; never where one is not a number."""
        return self.length <= LENGTH_LIMIT and self.coordinate <= COORDINATE_LIMIT


def difference(first: Crystal, second: Crystal) -> Difference:
    """Of two crystals of one symmetry, over all atoms of the conventional cell."""
    a, b = first.to_structure(), second.to_structure()
    assert [site.species for site in a] == [site.species for site in b]
    apart = a.frac_coords - b.frac_coords
    lengths = np.abs(np.array(a.lattice.abc) - np.array(b.lattice.abc))
    return Difference(float(lengths.max()), float(np.abs(apart - np.round(apart)).max()))


def requests_of(records: Sequence[Record], properties: Sequence[str]) -> list[SampleRequest]:
    """One per row: its symmetry, and its own properties."""
    return [
        SampleRequest.of(
            record.crystal,
            record.material_id,
            {p: v for p in properties if (v := record.properties[p]) is not None},
        )
        for record in records
    ]


def sample(backend: str, checkpoint: Path, records: Sequence[Record], seed: int) -> list[Crystal]:
    """A crystal per row, made in this process."""
    generator = load_generator(checkpoint, backend, "cpu")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"sampling with {backend}", total=len(records))
        return generator.sample(
            requests_of(records, generator.properties),
            seed,
            progress=lambda count: progress.advance(task, count),
        )


def path(
    backend: str, checkpoint: Path, records: Sequence[Record], seed: int
) -> list[NDArray[np.float32]]:
    """Free coordinates before every network call, one row at a time: each [calls,S,3]."""
    generator: Any = load_generator(checkpoint, backend, "cpu")
    name = "model" if backend == "torch" else "network"
    network = getattr(generator, name)
    seen: list[NDArray[np.float32]] = []

    def watched(*inputs: Any) -> Any:
        free = inputs[-3]  # (..., free_params, lattice, t)
        seen.append(np.array(free.numpy() if backend == "torch" else free.asnumpy())[0])
        return network(*inputs)

    setattr(generator, name, watched)
    paths = []
    for request in requests_of(records, generator.properties):
        seen.clear()
        generator.sample([request], seed)
        paths.append(np.stack(seen))
    return paths


def parting_steps(
    checkpoint: Path, records: Sequence[Record], seed: int
) -> list[tuple[str, int | None]]:
    """For each row the first network call before which coordinates differ beyond the limit."""
    if not records:
        return []
    first, second = (apart(path, name, checkpoint, records, seed) for name in BACKENDS)
    found: list[tuple[str, int | None]] = []
    for record, a, b in zip(records, first, second, strict=True):
        sites = min(a.shape[1], b.shape[1])  # padded to other sizes
        between = a[:, :sites] - b[:, :sites]
        far = np.abs(between - np.round(between)).max((1, 2)) > COORDINATE_LIMIT
        found.append((record.material_id, int(np.argmax(far)) if far.any() else None))
    return found


def matched(crystals: Sequence[Crystal], records: Sequence[Record]) -> int:
    """Rows whose crystal matches the reference at the standard tolerance."""
    items = [
        MatchItem((one.structure,), record.structure or record.crystal.to_structure(primitive=True))
        for one, record in zip(read_back_many(crystals), records, strict=True)
    ]
    return sum(found[0].rms is not None for found in match_many(items))


@app.command()
def crystals(
    rows: Annotated[int, typer.Option(min=1, help="First rows of the validation set.")] = 500,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """The shipped checkpoints through both backends: same seed, same crystals?"""
    records = dataset("val")[:rows]
    figures: dict[str, Any] = {"data": "val", "rows": rows, "seed": seed}
    table = Table("", *shipped())
    columns = []
    for name, checkpoint in shipped().items():
        made = {b: apart(sample, b, checkpoint, records, seed) for b in BACKENDS}
        pairs = list(zip(*made.values(), strict=True))[:COMPARED_ROWS]
        found = [difference(a, b) for a, b in pairs]
        same_group = sum(a.space_group == b.space_group for a, b in pairs)
        others = [r for r, d in zip(records, found, strict=False) if not d.is_small]
        own = figures[name] = {
            "compared": len(pairs),
            "same space group": same_group,
            "same crystal": sum(d.is_small for d in found),
            "median length (A)": float(np.median([d.length for d in found])),
            "median coordinate": float(np.median([d.coordinate for d in found])),
            "parted (row, step)": parting_steps(checkpoint, others, seed),
        }
        own |= {f"matched, {b}": matched(made[b], records) for b in BACKENDS}
        columns.append(own)
    for label in columns[0]:
        table.add_row(label, *(_text(column[label]) for column in columns))
    console.print(table)
    console.print(
        f"val, {rows} rows, seed {seed}; same: lengths within {LENGTH_LIMIT} A, coordinates within "
        f"{COORDINATE_LIMIT}"
    )
    _save(figures, out)


def _text(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def train(backend: str, run: AnyRunConfig, folder: Path, resume: bool) -> None:
    """A run, or the rest of one, in this process."""
    module = load_backend(backend)
    start = module.train if isinstance(run, RunConfig) else module.train_language
    start(run, folder, resume=resume, threads=cpu_count(), device="cpu")


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@app.command()
def training(
    config: Annotated[Path, typer.Argument(help="The run; trained in float32.")],
    steps: Annotated[int, typer.Option(min=1, help="Before the change, and after it.")] = 100,
    first: Annotated[
        list[str] | None, typer.Option(help="Who begins, torch or mindspore; each of them once.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Train in one framework, go on in the other: is the loss curve the same?"""
    changes = [
        f"train.steps={2 * steps}",
        f"train.checkpoint_every={steps}",
        f"train.validation_every={2 * steps}",
        "train.log_every=1",
        "train.precision=float32",
        "train.compile=false",
    ]
    run = load_config(config, (*(settings or ()), *changes))
    figures: dict[str, Any] = {"config": config.name, "steps": steps}
    for stays in first or BACKENDS:
        if stays not in BACKENDS:
            raise typer.BadParameter(f"{stays}: name {' or '.join(BACKENDS)}")
        (takes_over,) = set(BACKENDS) - {stays}
        with TemporaryDirectory() as folder:
            whole, rest = Path(folder, "whole"), Path(folder, "rest")
            apart(train, stays, run, whole, False)
            name = f"step_{steps:08d}"
            copytree(whole / name, rest / name)  # as if the run had been stopped there
            apart(train, takes_over, run, rest, True)
            expected, found = losses(whole), losses(rest)
            relative = {s: abs(found[s] / expected[s] - 1) for s in found if s > steps}
        assert len(relative) == steps
        worst = max(relative, key=relative.__getitem__)
        figures[f"{stays} -> {takes_over}"] = {
            "largest relative difference": relative[worst],
            "at step": worst,
            "within": next((s - steps - 1 for s in relative if relative[s] > CURVE_LIMIT), steps),
            "differences": [relative[s] for s in sorted(relative)],
        }
        console.print(
            f"{stays} {steps} steps, then {takes_over}: loss of the next {steps} steps differs by "
            f"at most {relative[worst]:.1e} (step {worst}) from {stays}'s own"
        )
    _save(figures, out)


@app.command()
def language(
    config: Annotated[Path, typer.Argument(help="The run, which has lora; trained in float32.")],
    steps: Annotated[int, typer.Option(min=1, help="Of LoRA.")] = 50,
    base_steps: Annotated[
        int, typer.Option(min=1, help="Of the base, trained with torch if there is none.")
    ] = 100,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Fine-tune GLM-4 by MindFormers' Trainer, and by transformers and peft: the same loss curve?

    A run with 10 % more learning_rate is compared, too, which must differ.
    """
    with TemporaryDirectory() as folder:
        runs = {name: Path(folder, name) for name in (*BACKENDS, "changed")}
        read = tuple(settings or ())
        given = read_settings(config, read)
        if given.get("kind") != "language":
            raise UserError(
                f"{config}: no run of a language model, as configs/glm4_tiny_fm.yaml is"
            )
        base = parse_run(given, str(config)).train.init_from
        if base is None or not checkpoint_folder(base, shipped_language()).exists():
            base = str(Path(folder, "base"))
            made = given | {"lora": None, "name": "base", "mindformers": {}}
            run = parse_run(_short(made, base_steps, init_from=None, learning_rate=1.5e-3), "base")
            apart(train, "torch", run, Path(base), False)
            console.print(
                f"{config.name}: its base is not here; torch made one in {base_steps} steps"
            )
        own = _short(given, steps, init_from=base)
        rate = parse_run(own, str(config)).train.learning_rate
        for name, folder_of_run in runs.items():
            changed = _short(own, steps, learning_rate=1.1 * rate) if name == "changed" else own
            backend = "torch" if name == "changed" else name
            apart(train, backend, parse_run(changed, str(config)), folder_of_run, False)
        curves = {name: list(losses(path).values()) for name, path in runs.items()}
    expected, found, other = (np.array(curves[name]) for name in ("torch", "mindspore", "changed"))
    assert len(expected) == len(found) == steps
    relative, noticed = np.abs(found / expected - 1), np.abs(other / expected - 1)
    console.print(
        f"{config.name}, {steps} steps of LoRA, loss {expected[0]:.3f} to {expected[-1]:.3f}: "
        f"MindFormers' Trainer differs by at most {relative.max():.1e} "
        f"(step {int(relative.argmax()) + 1}) from transformers and peft; "
        f"10 % more learning_rate by {noticed.max():.1e}"
    )
    _save({"config": config.name, "steps": steps, **curves}, out)


def _short(given: dict[str, Any], steps: int, **changes: Any) -> dict[str, Any]:
    """Settings of a run of so many steps, all of them logged, in float32."""
    plain: dict[str, Any] = {
        "steps": steps,
        "warmup": min(given["train"].get("warmup", steps), steps // 5),
        "checkpoint_every": steps,
        "validation_every": steps,
        "validation_rows": 64,
        "log_every": 1,
        "precision": "float32",
        "compile": False,
    }
    return given | {"train": given["train"] | plain | changes}


def _save(figures: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        write_atomic(out, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
