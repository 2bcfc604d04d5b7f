"""Writes cli.md beside this file from the commands themselves: `python docs/cli_reference.py`."""

from pathlib import Path
from typing import Any

from typer.main import get_command

from kcrprune.cli.app import app
from kcrprune.cli.options import sections
from kcrprune.errors import KcrPruneError

PAGE = Path(__file__).with_name("cli.md")
EXIT_CODES = {
    0: "done",
    1: "something unforeseen, or the machine's own limits (disk full, permission, memory, processes that load images)",
    129: "stopped by SIGHUP: the terminal was closed",
    130: "stopped by SIGINT: Ctrl-C",
    141: "whoever read standard output has closed it, as `head` does",
    143: "stopped by SIGTERM: a scheduler or `kill`",
}
INTRODUCTION = """# The command line

Written by `python docs/cli_reference.py`; do not edit.

Results go to standard output, progress and errors to standard error. An error is one line that begins with `error:`.
Colour is used in terminals alone; `NO_COLOR=1` turns it off. `KCRPRUNE_TRACEBACK=1` shows where an error arose.
Progress that nobody reads (`2>&1 | head`, a full or closed log) is lost and ends nothing. A signal ends a command with
one line and a code of its own; a run goes on when the same command is given again.

A setting has the same name everywhere: `--target-flops` here, `target_flops` in the TOML file that `--config` names and
in `kcrprune.compress(...)`. A flag wins over the TOML file, the file over the recipe, the recipe over the defaults.
"""


def page() -> str:
    """The whole reference as Markdown."""
    group: Any = get_command(app)
    parts = [INTRODUCTION, _exit_codes()]
    for name, command in group.commands.items():
        parts.append(_command(name, command, command.make_context(name, [], resilient_parsing=True)))
    return "\n".join(parts)


def _exit_codes() -> str:
    codes = EXIT_CODES | {kind.exit_code: str(kind.__doc__) for kind in KcrPruneError.__subclasses__()}
    rows = [f"| {code} | {codes[code].rstrip('.')} |" for code in sorted(codes)]
    return "\n".join(["## Exit codes", "", "| code | meaning |", "|--:|:--|", *rows, ""])


def _command(name: str, command: Any, context: Any) -> str:
    usage = " ".join(command.collect_usage_pieces(context)).replace("{", "").replace("}", "")
    lines = [f"## kcrprune {name}", "", f"`kcrprune {name} {usage}`", "", command.help, ""]
    for title, rows in sections(command, context).items():
        lines += [f"**{title}**", "", "| | |", "|:--|:--|"]
        lines += [f"| `{_escaped(declared)}` | {_escaped(meaning)} |" for declared, meaning in rows]
        lines.append("")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
