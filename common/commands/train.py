"""`uni-mdm train CONFIG`: start a run, or go on with one."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from common.backend import backend_name, load_backend
from common.checkpoint import CONFIG, FINAL, MANIFEST, latest, load_checkpoint, verify
from common.config import AnyRunConfig, RunConfig, parse_as, parse_config, read_settings
from common.errors import Interrupted, UserError
from common.files import alone_in, output_folder, refused, unused
from common.machine import cpu_share, launched_by

#: Settings of `train` that may change when a run goes on: they change what it writes, its speed or
#: its memory, but not what it computes.
FREE_SETTINGS = {
    "validation_every",
    "checkpoint_every",
    "log_every",
    "compile",
    "gradient_checkpointing",
    "fsdp",
}
#: Settings of a network that its weights fit whatever they are.
_FREE_OF_WEIGHTS = {"cell", "target", "positions"}
#: What a language model's run imports beside the framework.
LANGUAGE_PACKAGES = {
    "torch": ("transformers", "peft"),
    "mindspore": ("mindformers",),
}


def command(
    config: Annotated[Path, typer.Argument(help="YAML file, as in configs/.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting: train.steps=100."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME.")] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh",
            help="Go on with the run in OUT, or put it aside and start anew; "
            "without either, go on if there is one.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (torch); all.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or mindspore.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or ascend.")] = "auto",
) -> None:
    """Train a network as a YAML file says; a run that was interrupted goes on."""
    many = launched_by("WORLD_SIZE") or launched_by("MS_WORKER_NUM")
    if resume is False and many:
        raise UserError("--fresh: several processes cannot put a run aside; give another --out")
    run = parse_run(read_settings(config, tuple(settings or ())), str(config))
    folder = out or Path("runs") / run.name
    without = " without --fresh" if resume is False else ""
    backend = backend_name(backend, device)
    for line in absent_packages(run, backend):
        raise UserError(line)
    if not many:  # otherwise the launch script has
        check_start(run)
    train = _trainer(load_backend(backend, device), run)
    try:
        resume = prepare(folder, run, resume, scripted=many)
    except OSError as error:
        raise refused(folder, error, "give another --out") from error
    with output_folder(folder, "give another --out"):
        try:
            train(run, folder, resume=resume, threads=threads or cpu_share(), device=device)
        except Interrupted as stopped:
            line = f"{stopped}; the same command{without} goes on"
            raise Interrupted(line, stopped.signal) from None


def parse_run(data: dict[str, Any], where: str) -> AnyRunConfig:
    """Checks a run's settings, of whatever network its ``kind`` names; errors of `parse_as`.

    MindFormers' own YAML is one of a language model.
    """
    if "kind" not in data and not is_mindformers(data):
        return parse_config(data, where)
    from common.language.config import LanguageRunConfig  # what it needs may not be installed
    from common.language.mindformers import parse_mindformers

    if is_mindformers(data):
        return parse_mindformers(data, where)
    return parse_as(LanguageRunConfig, data, where)


def saved_run(data: dict[str, Any], where: str) -> AnyRunConfig:
    """The run of a checkpoint, without what earlier versions kept and did not heed."""
    given = data.get("mindformers")
    if given:
        from common.language.mindformers_sections import passed_on, unheeded

        if unheeded(given):
            data = data | {"mindformers": passed_on(given)}
    return parse_run(data, where)


def is_mindformers(data: dict[str, Any]) -> bool:
    """Whether settings are in the words of MindFormers' YAML."""
    return "kind" not in data and {"runner_config", "trainer"} <= data.keys()


def _trainer(backend: Any, run: AnyRunConfig) -> Callable[..., None]:
    """What trains such a run."""
    name = "train" if isinstance(run, RunConfig) else "train_language"
    if not hasattr(backend, name):
        raise UserError(f"{backend.__name__} cannot train {run.name}: give --backend torch")
    found: Callable[..., None] = getattr(backend, name)
    return found


def absent_packages(run: AnyRunConfig, backend: str) -> list[str]:
    """One line for every package that a run needs beside its framework, and that is not installed.

    Args:
        run: the run.
        backend: ``torch`` or ``mindspore``.
    """
    names = ["tensorboard"]
    if not isinstance(run, RunConfig):
        names += LANGUAGE_PACKAGES[backend]
    return [absent(name) for name in names if find_spec(name) is None]


def absent(package: str) -> str:
    """The line for a package that is not installed."""
    return f"package '{package}' is not installed, and this run needs it: see scripts/install.sh"


def check_start(run: AnyRunConfig) -> None:
    """Makes sure that a run has the weights that it starts from, before its data are read.

    Headers of transformers' files are read, not the weights. A repository of the hub is fetched.

    Raises:
        UserError: if they are absent, damaged, an adapter, or another network's.
    """
    from common.training import start_folder  # slow to import, and most commands do without

    folder = start_folder(run)
    if isinstance(run, RunConfig):
        if folder is not None:
            _check_network(run, verify(folder)[0])
        return
    from common.language.config import LanguageRunConfig  # what it needs may not be installed
    from common.language.foreign import FolderWeights, check_names, is_foreign, refuse_adapter
    from common.language.training import network_of

    assert isinstance(run, LanguageRunConfig)
    if folder is not None and is_foreign(folder):
        _, network = network_of(run, folder)
        check_names(FolderWeights(folder), network, folder)
        return
    if folder is not None:
        refuse_adapter(folder)
        folder, _ = verify(folder)
        _check_network(run, folder)
    network_of(run, folder)


def _check_network(run: AnyRunConfig, folder: Path) -> None:
    """Raises UserError if the weights of a checkpoint are of a network that is built otherwise."""
    found = saved_run(read_settings(folder / CONFIG), f"{folder}/{CONFIG}")
    if type(found) is not type(run):
        raise UserError(f"{folder} is a {_kind(found)}; give a {_kind(run)}'s checkpoint")
    theirs, ours = found.model_dump()["model"], run.model_dump()["model"]
    if "properties" in ours:  # of which the number counts
        theirs["properties"], ours["properties"] = map(
            len, (theirs["properties"], ours["properties"])
        )
    differ = [
        f"{name} {theirs[name]}, not {here}"
        for name, here in ours.items()
        if name not in _FREE_OF_WEIGHTS and theirs[name] != here
    ]
    if differ:
        raise UserError(
            f"{folder} has another network: model.{', model.'.join(differ)}; "
            "give the configuration that it was trained with, or another train.init_from"
        )


def _kind(run: AnyRunConfig) -> str:
    """What a run trains."""
    return "Crystal DiT" if isinstance(run, RunConfig) else "language model"


def prepare(
    folder: Path, config: AnyRunConfig, resume: bool | None, scripted: bool = False
) -> bool:
    """Whether to go on with the run in `folder`; with ``resume=False`` it is put aside.

    Args:
        folder: of the run.
        config: what is to be trained.
        resume: as the option; None goes on if there is something to go on with.
        scripted: whether it is asked by a launch script, which has no --fresh to advise.

    Raises:
        UserError: if there is nothing to go on with although asked to, if the run was started
            with other settings, which are named, if it would be lost, or if one that is to be put
            aside still trains.
    """
    anew = "give another --out" if scripted else "give --fresh or another --out"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give another --out")
    finished = (folder / FINAL / MANIFEST).is_file()
    if resume is False and (finished or latest(folder) is not None):
        with alone_in(folder) as alone:
            if not alone:
                raise UserError(f"{folder}: another process trains there; give another --out")
        folder.rename(unused(folder))
        return False
    if latest(folder) is None:
        if resume:
            raise UserError(f"no checkpoint in {folder} to resume; leave out --resume")
        if finished:
            raise UserError(f"{folder} holds a finished run without its steps: {anew}")
        return False
    started = saved_run(load_checkpoint(folder, optimizer=True).config, str(folder))
    changed = _differences(started, config)
    if changed:
        names = ", ".join(changed)
        raise UserError(f"the run in {folder} has other {names}: {anew}")
    return True


def _differences(a: AnyRunConfig, b: AnyRunConfig) -> list[str]:
    """Names of settings, as in ``train.steps``, in which two runs differ and must not."""
    if type(a) is not type(b):
        return ["kind"]
    first, second = a.model_dump(), b.model_dump()
    found = []
    for section in ("model", "diffusion", "lora", "train"):
        own, other = first.get(section), second.get(section)
        if own is None or other is None:
            found += [section] if own != other else []
            continue
        found += [
            f"{section}.{name}"
            for name, value in own.items()
            if value != other[name] and name not in FREE_SETTINGS
        ]
    return found
