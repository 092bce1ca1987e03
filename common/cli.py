"""The command line `uni-mdm`: finds the sub-command, and reports a user's mistake in one line."""

import errno
import io
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from common.errors import Interrupted, UserError
from common.files import refused

#: Name -> one line of help. The module is common.commands.NAME, or another package brings it as an
#: entry point of that name.
COMMANDS = {
    "generate": "Crystals for a formula and a target property.",
    "data": "Import, split and describe data sets.",
    "train": "Train a network as a YAML file says.",
    "evaluate": "Compare generated crystals with known ones.",
    "convert": "Move weights and training state to another framework.",
    "bench": "Measure speed on this machine.",
    "info": "Versions, devices, folders and checkpoints found here.",
}
ENTRY_POINT_GROUP = "uni_mdm.commands"
#: This project's packages: one that is absent is no package to be installed.
PACKAGES = ("common", "torch_impl", "ms_impl", "ckpt_convert")
USER_ERROR = 2
INTERRUPTED = 130
#: What the machine refuses, rather than what is wrong with the program.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class OnceCommand(TyperCommand):
    """A command that refuses an option given twice, where only the last would count."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_repetition(self, ctx, args)
        return super().parse_args(ctx, args)


class OnceGroup(TyperGroup):
    """A group with options of its own that refuses one given twice, or given to a sub-command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_repetition(self, ctx, args)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        for parameter in self.get_params(ctx):
            source = ctx.get_parameter_source(parameter.name)
            if source is not None and source.name == "COMMANDLINE":
                raise UserError(f"{parameter.opts[0]} stands before '{name}': write it behind")
        return name, command, rest


def _refuse_repetition(command: Any, ctx: Any, args: list[str]) -> None:
    _, _, given = command.make_parser(ctx).parse_args(args=list(args))
    for parameter in command.get_params(ctx):
        repeatable = getattr(parameter, "multiple", False) or parameter.nargs != 1
        if given.count(parameter) > 1 and not repeatable:
            raise UserError(f"{parameter.opts[0]} is given twice; give it once")


class LazyGroup(TyperGroup):
    """A group that knows its commands' names, and imports the one that is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, summary in COMMANDS.items():
            self.add_command(TyperCommand(name, help=summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in COMMANDS else command, rest


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"uni-mdm {version('uni-mdm')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """From a composition and a target property to crystal structures."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line and leave the process.

    The exit code is 0, or 2 after a user's mistake, which is one line on stderr, or 130 after
    Ctrl-C, or 143 where SIGTERM was heeded.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # What an ASCII terminal cannot show must not cost the rest of the output.
        sys.stdout.reconfigure(errors="replace")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _report(f"cannot write the output: {error.strerror}")
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = typer.main.get_command(app).main(
            arguments, prog_name="uni-mdm", standalone_mode=False
        )
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Interrupted as stopped:
        typer.echo(_printable(str(stopped)), err=True)
        return 128 + stopped.signal
    except UserError as error:
        return _report(str(error))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "uni-mdm"
        message = " ".join(error.format_message().split()).rstrip(".")
        return _report(f"{message} (see '{path} --help')")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in PACKAGES:
            raise
        package = error.name.split(".")[0]
        return _report(f"package '{package}' is not installed; README says which extra has it")
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = os.fsdecode(error.filename) if error.filename else "the output"
        return _report(str(refused(where, error)))


def _report(message: str) -> int:
    """Print one line on stderr, whatever characters the user's input has brought in."""
    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo(_printable(message), err=True)
    return USER_ERROR


def _printable(message: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def _load(name: str) -> Any:
    """The command of that name, with everything it needs."""
    module_name = f"common.commands.{name}"
    if find_spec(module_name) is None:
        brought = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
        module_name = brought.get(name, module_name)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise UserError(f"uni-mdm {name} is not part of this installation; reinstall") from error
    parent = typer.Typer(add_completion=False, rich_markup_mode=None)
    if not hasattr(module, "app"):
        parent.command(name, cls=OnceCommand)(module.command)
        return typer.main.get_command(parent)
    for command in module.app.registered_commands:
        if command.cls in (None, TyperCommand):
            command.cls = OnceCommand
    module.app.info.no_args_is_help = False
    parent.add_typer(module.app, name=name)
    group: Any = typer.main.get_command(parent)
    return group.commands[name]
