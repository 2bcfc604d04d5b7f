"""What can go wrong for a user, and the exit code that it ends in.

KcrPruneError (1)
|-- ConfigError (2)             a value or a combination of options that cannot work
|-- CheckpointError (3)         a file that cannot be read, or is not what it claims
|-- UnsupportedModelError (4)   a network that no family covers, with the reason
|-- DataError (5)               images or labels that do not fit
|   |-- ImageError              an image that cannot be read
|   `-- DivergedError           a training whose figures are no finite numbers any more
|-- BudgetError (6)             a target that the open axes cannot reach
|-- PlanMismatchError (7)       a plan made for another network
|-- ExportError (8)             an exported graph that does not compute what the model does
|-- OutputExistsError (9)       something is already there; nothing is overwritten
|-- LostProcessError (10)       another process of the same run has ended
`-- FetchError (11)             a name of the hub whose files cannot be fetched now
"""

import re
from typing import Final

NO_MEMORY: Final = re.compile(
    r"out of memory|(can't|cannot|could not|failed to|unable to) allocate|not enough memory|bad[ _]alloc", re.IGNORECASE
)


class KcrPruneError(Exception):
    """One clear sentence for the user; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(KcrPruneError):
    """A value, or a combination of values, that cannot work."""

    exit_code = 2


class CheckpointError(KcrPruneError):
    """A file that cannot be read, or is not what it claims to be."""

    exit_code = 3


class UnsupportedModelError(KcrPruneError):
    """A network that no family covers."""

    exit_code = 4


class DataError(KcrPruneError):
    """Images or labels that are missing or do not fit the network."""

    exit_code = 5


class ImageError(DataError):
    """An image that cannot be read; `name` is that of its file."""

    def __init__(self, sentence: str, name: str = "") -> None:
        super().__init__(sentence)
        self.name = name


class DivergedError(DataError):
    """A training whose loss, gradient or other figure is not a finite number."""


class BudgetError(KcrPruneError):
    """A target that the open axes cannot reach."""

    exit_code = 6


class PlanMismatchError(KcrPruneError):
    """A plan that was made for another network."""

    exit_code = 7


class ExportError(KcrPruneError):
    """An exported graph that does not compute what the model computes."""

    exit_code = 8


class OutputExistsError(KcrPruneError):
    """The requested path is taken; kcrprune overwrites nothing."""

    exit_code = 9


class LostProcessError(KcrPruneError):
    """Another process of the same run has ended, or does not answer."""

    exit_code = 10


class FetchError(KcrPruneError):
    """A name of the Hugging Face hub whose files cannot be fetched now."""

    exit_code = 11


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy, torch, onnxruntime or the system says so, of a CPU's memory or a GPU's."""
    by_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return by_class or bool(NO_MEMORY.search(str(error)))
