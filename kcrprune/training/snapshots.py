"""How far a stage has come, written down now and then, so that a kill costs minutes.

Draws have addresses, so a state is weights, optimiser and step, and a training that goes on from it ends bit by bit
where one that was not stopped does.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol

from torch import optim

State = dict[str, Any]  # tensors, numbers and strings, in dicts with names and in lists


class Snapshots(Protocol):
    """The states of one stage."""

    def newest(self) -> State | None:
        """The last one that was kept; None: the stage begins."""

    def offer(self, state: Callable[[], State]) -> None:
        """Keeps a state, if it is time for one."""


class NoSnapshots:
    """For a training that nobody goes on with."""

    def newest(self) -> State | None:
        """Nothing is kept."""
        return None

    def offer(self, state: Callable[[], State]) -> None:
        """Nothing is asked for."""


NO_SNAPSHOTS: Final = NoSnapshots()


def state_of(optimizer: optim.Optimizer) -> State:
    """An optimiser's state under names; torch counts parameters by number."""
    state = optimizer.state_dict()
    return state | {"state": {str(number): values for number, values in state["state"].items()}}


def load_(optimizer: optim.Optimizer, state: State) -> None:
    """Gives an optimiser its state back."""
    numbered = {int(name): values for name, values in state["state"].items()}
    optimizer.load_state_dict(state | {"state": numbered})
