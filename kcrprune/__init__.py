"""kcrprune: smaller vision transformers by reduction of kernel complexity."""

__version__ = "0.1.0"
