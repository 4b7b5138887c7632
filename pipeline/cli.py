"""The `manyheads` command: each function of `manyheads.py` made a command, run, and what it found printed. It adds no behaviour.

A function's docstring is the help, its parameters are the arguments and options. Stages are imported inside it, so that `--help`
answers at once and `heads` runs where torch cannot be imported.
Exit codes: 0 done, 1 a check found something, 2 a mistake the user can solve, 130 and 143 interrupted.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, get_args, get_origin

import click
from tqdm import tqdm

import manyheads
from pipeline.errors import PipelineError
from pipeline.io import files

DEFAULT_CONFIG = "configs/digits.yaml"
"""Where a command takes a CONFIG and none is given."""

NAMES = {"place": ("--in", "place"), "output": ("--output", "-o")}
"""Of options that are not called as their parameters are."""

OPTION = re.compile(r"^(\w+)(?: (\S+))? : (.+)$", re.MULTILINE)
"""A line of a docstring on an option: its parameter, what stands for its value where that is not its type, and its help."""

PRETRAIN = "pretrain is a script of the source repository now: python configs/pretraining/pretrain.py configs/pretraining/bundled.yaml"
"""Where a command of an earlier version is."""


def main() -> None:
    """Run the command line; a user's mistake is printed without a traceback and ends with exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # escape what a terminal or pipe has no sign for, such as in a class name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _log_to_stderr()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = cli.main(full(sys.argv[1:]), prog_name="manyheads", standalone_mode=False)
    except PipelineError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (click.exceptions.Abort, KeyboardInterrupt) as stop:  # click makes the first of the second
        click.echo(
            "error: stopped; what was finished is kept, and features, heads and finetune go on from there", err=True
        )
        reason = stop.__cause__.args if stop.__cause__ else stop.args
        sys.exit(143 if reason[:1] == (signal.SIGTERM,) else 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)  # the reader of our output, such as `head`, has what it wanted
    except OSError as error:
        text = files.refusal(error)
        if text is None:
            raise
        click.echo(f"error: {text}", err=True)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


def full(given: list[str]) -> list[str]:
    """Return the words of the command line, with `fit` before what is no command but images, a config or options.

    Raises
    ------
    ConfigError
        When the first word is nothing that there is.
    """
    first = given[0] if given else "--help"
    if first == "pretrain":
        raise click.UsageError(PRETRAIN)
    if first in cli.commands or first in ("-h", "--help", "--version"):
        return given
    if not first.startswith("-"):
        from pipeline.stages import settings

        words = [command.name or "" for command in (*COMMANDS, store)]
        settings.require_there(Path(first).expanduser(), words)
    return ["fit", *given]


class _InOrder(click.Group):
    """A group whose help lists the commands as `manyheads.py` has them, as one comes to need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(package_name="manyheads")
def cli() -> None:
    """Embed every image once, then train, tune and honestly compare many heads on the cached features.

    `manyheads PHOTOS`, of a folder that holds a folder of photos for each class, does it all: it is `manyheads fit PHOTOS`.
    """


def _commands(place: object) -> tuple[click.Command, ...]:
    """Return a command for each public function that a module or class of `manyheads.py` defines."""
    found = [getattr(place, name) for name in vars(place) if not name.startswith("_")]
    return tuple(_command(f) for f in found if inspect.isfunction(f) and f.__module__ == manyheads.__name__)


def _command(function: Callable[..., Any]) -> click.Command:
    """Return a command that calls a function, or goes through its parts, and prints what that gives.

    The help is the function's docstring up to the lines on its options, such as `budget TIME : Time for the search.`
    """
    run: Callable[..., Any] = getattr(function, "__wrapped__", function)
    text = inspect.getdoc(function) or ""
    options = {name: (word or None, told) for name, word, told in OPTION.findall(text)}
    text = OPTION.split(text, maxsplit=1)[0].rstrip()
    takes = [_parameter(each, options.get(each.name)) for each in inspect.signature(function).parameters.values()]

    def call(**given: Any) -> int:
        if overrides := given.pop("overrides", ()):
            from pipeline.stages import settings

            given["config"] = settings.load(given["config"], overrides)
        return 0 if _show(run(**given)) else 1

    first = " ".join(text.split("\n\n")[0].split())  # click would cut it, and wraps what it is given as short
    return click.Command(function.__name__, None, call, takes, text, short_help=first)


def _show(found: Any) -> bool:
    """Print text, the lines of a result, and all that a list or generator of these has; return whether nothing was found wrong.

    A result says that by its `ok`, a list by a bool in it.
    """
    if isinstance(found, bool):
        return found
    if isinstance(found, str):
        click.echo(found)
        return True
    if hasattr(found, "summary_lines"):
        return _show(found.summary_lines()) and getattr(found, "ok", True)
    ok = True
    for each in found:
        ok &= _show(each)
    return ok


def _parameter(given: inspect.Parameter, told: tuple[str | None, str] | None) -> click.Parameter:
    """Return the option that a parameter of a function is where the docstring has told of it, else the argument."""
    if given.kind is given.VAR_KEYWORD:
        told = "KEY=VALUE", "Override a key, such as tuning.trials=8."
        return click.Option(["--set", given.name], multiple=True, metavar=told[0], help=told[1])
    kinds, default = _kinds(given.annotation), None if given.default is given.empty else given.default
    several = Sequence in kinds
    if told is None:
        word = get_args(given.annotation)[1] if Annotated in kinds else None
        default = DEFAULT_CONFIG if given.name == "config" and word is None else default
        more: dict[str, Any] = {"nargs": -1} if several else {"default": default}
        return click.Argument([given.name], type=click.Path(), metavar=word, required=default is None, **more)
    names = NAMES.get(given.name, ("--" + given.name.replace("_", "-"),))
    if bool in kinds:
        return click.Option(names, is_flag=True, help=told[1])
    words = sorted(each for each in kinds if isinstance(each, str))
    types = {int: click.IntRange(min=1), float: click.FLOAT, Path: click.Path(), str: click.STRING}
    kind = click.Choice(words) if words else next(types[each] for each in types if each in kinds)
    more = {"multiple": True} if several else {"default": default}
    return click.Option(names, type=kind, metavar=told[0], help=told[1], **more)


def _kinds(annotation: Any) -> set[Any]:
    """Return the types and words that an annotation is made of."""
    return {annotation, get_origin(annotation)}.union(*map(_kinds, get_args(annotation)))


COMMANDS = _commands(manyheads)
STORE = _commands(manyheads.store)
"""The commands of `manyheads store`, which up to 0.1 stood beside the others: `manyheads status` still works, with a note."""

store = _InOrder("store", help=inspect.getdoc(manyheads.store))


def _by_its_old_name(command: click.Command) -> click.Command:
    def told(**given: Any) -> Any:
        click.echo(f"note: `manyheads {command.name}` is `manyheads store {command.name}` from now on", err=True)
        return command.callback(**given) if command.callback else None

    return click.Command(command.name, callback=told, params=command.params, help=command.help, hidden=True)


for _each in (*COMMANDS, store):
    cli.add_command(_each)
for _each in STORE:
    store.add_command(_each)
    if _each.name not in cli.commands:  # `export` is another command now
        cli.add_command(_by_its_old_name(_each))


def _log_to_stderr() -> None:
    """Show the package's messages as plain lines that do not tear a progress bar."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)

    logger = logging.getLogger("pipeline")
    logger.handlers[:] = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _terminate(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM unwind like Ctrl-C, so that the group in hand is committed."""
    raise KeyboardInterrupt(number)
