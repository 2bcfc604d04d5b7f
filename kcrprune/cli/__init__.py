"""The command line: words in, words out."""

import sys

from kcrprune.cli import signals, streams


def main() -> None:
    """The program `kcrprune`; a signal ends it from its first moment on."""
    streams.open_closed()
    with signals.heeded():
        try:
            from kcrprune.cli.app import program

            code = program(sys.argv[1:])
        except KeyboardInterrupt:
            code = signals.told()
    sys.exit(code)
