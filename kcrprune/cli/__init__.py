"""The command line: words in, words out."""

from kcrprune.cli.app import main

__all__ = ["main"]
