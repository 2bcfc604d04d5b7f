"""The Typer app; an error becomes one line and an exit code."""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from kcrprune import processes
from kcrprune.cli import commands, render, signals, streams
from kcrprune.cli.options import GroupedCommand, OnnxCommand, flag
from kcrprune.config import RENAMED
from kcrprune.errors import KcrPruneError, ran_out_of_memory
from kcrprune.version import __version__

UNREAD = 141  # 128 + SIGPIPE, as shells report it
MORE_MEMORY = "give a smaller --batch-size, fewer --calibration-images, --workers 0, or a machine with more"

# Plain help: Typer's rich one costs 0.2 s of imports, and puts escape codes into pipes on some CI systems.
app = typer.Typer(name="kcrprune", add_completion=False, rich_markup_mode=None)
for command in (commands.compress, commands.report, commands.evaluate, commands.inspect, commands.demo):
    app.command(cls=GroupedCommand)(command)
app.command(cls=OnnxCommand)(commands.export)


def _show_version(*, wanted: bool) -> None:
    if wanted:
        render.line(f"kcrprune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda value: _show_version(wanted=value),
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Smaller vision transformers: a checkpoint in, a cut network and a verified ONNX file out."""


def program(arguments: Sequence[str]) -> int:
    """Sets the process up, and runs one command line."""
    # Read when torch loads. Threads that spin while they wait made the demo's training steps ten times slower on two
    # cores that other programs used as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they break through ours, and through --quiet
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other libraries' notices to developers; `python -W` brings them back
    return run(arguments)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        code = get_command(app).main(list(arguments) or ["--help"], prog_name="kcrprune", standalone_mode=False) or 0
        render.finish()
        signals.raise_again()
    except KeyboardInterrupt:
        code = signals.told()
    except (streams.Unread, SystemExit):  # Typer exits where its own help meets a closed pipe
        streams.abandon_output()
        code = UNREAD
    except Exception as error:  # the last line of defence, so that a user sees a sentence
        # what a library makes of an interrupt is one still
        code = signals.told() if signals.received() else _fail(error, *_told(error))
    return code


def _told(error: Exception) -> tuple[str, int]:
    """The sentence for an error, and its exit code."""
    if isinstance(error, KcrPruneError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):  # a misspelt option, a missing argument
        return _usage(error), error.exit_code
    if ran_out_of_memory(error):
        return f"memory ran out ({_last_line(error)}); {MORE_MEMORY}", 1
    if isinstance(error, OSError):
        return str(error), 1
    return f"unexpected {type(error).__name__}: {_last_line(error)} (KCRPRUNE_TRACEBACK=1 shows where)", 1


def _last_line(error: Exception) -> str:
    """An error's text; of one that a process that loads images has sent with its traceback, the last line."""
    text = str(error).strip()
    return text.splitlines()[-1] if "Traceback (most recent call last)" in text else text


def _usage(error: typer.TyperException) -> str:
    option = getattr(error, "option_name", "").removeprefix("--").replace("-", "_")
    if option in RENAMED:
        error.possibilities = [flag(RENAMED[option])]  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)  # the command that the mistake was made in
    program = context.command_path if context else "kcrprune"
    return f"{error.format_message().replace('Value error, ', '')} (see `{program} --help`)"


def _fail(error: Exception, sentence: str, code: int) -> int:
    if not processes.may_tell_failure():
        return code
    if os.environ.get("KCRPRUNE_TRACEBACK"):
        render.failure("".join(traceback.format_exception(error)).rstrip())
    render.failure(f"error: {' '.join(sentence.split())}")
    return code
