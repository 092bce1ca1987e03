"""What a launcher asks before it starts many processes: is everything here, and where does it go?

    python -m common.launch CONFIG [KEY=VALUE ...] --backend torch --device cuda --processes 8

prints the run's folder, or, with exit status 2, one line on stderr for everything that is missing.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from common.backend import REQUIRED_PACKAGE, load_backend, wrong_version
from common.commands.train import absent, absent_packages, check_start, parse_run, prepare
from common.config import read_settings
from common.data.locations import check_dataset
from common.errors import UserError


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    backend: Annotated[str, typer.Option(help="torch or mindspore.")] = "torch",
    device: Annotated[str, typer.Option(help="As the framework calls it.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="On this machine.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME.")] = None,
) -> None:
    """Checks what a run needs."""
    problems = list(missing(backend, device, processes))
    try:
        run = parse_run(read_settings(config, tuple(settings or ())), str(config))
        folder = out or Path("runs") / run.name
        problems += absent_packages(run, backend)
        for name in (run.train.data, run.train.validation):
            check_dataset(name)
        prepare(folder, run, None, scripted=True)
        check_start(run)
    except UserError as error:
        problems.append(str(error))
    except ModuleNotFoundError as error:  # what the settings of a language model need
        problems.append(absent(str(error.name)))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(2)
    print(folder)


def missing(backend: str, device: str, processes: int) -> Iterator[str]:
    """One line for everything that this machine lacks.

    Args:
        backend: ``torch`` or ``mindspore``.
        device: as the framework calls it.
        processes: on this machine.
    """
    wrong = wrong_version(REQUIRED_PACKAGE[backend])
    if wrong:
        yield wrong
        return
    try:
        yield from load_backend(backend).problems(device, processes)
    except (UserError, ImportError, OSError, RuntimeError) as error:
        yield f"backend '{backend}': {' '.join(str(error).split())}"


if __name__ == "__main__":
    typer.run(main)
