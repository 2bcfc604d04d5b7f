"""Streams that run through a block again and again, of which what is settled runs once."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kcrprune.surgery.kept import Keep
from kcrprune.surgery.partial import Replay, output_of
from kcrprune.surgery.swap import swap_


class Replayed:
    """The streams before a cut block, batch by batch on its device, for what runs on them.

    Branches whose linears are all fitted run once more; after that their outputs stand in for them.
    """

    def __init__(self, block: nn.Module, streams: list[Tensor], device: torch.device, keep: Keep) -> None:
        self.block, self.streams, self.device, self.keep = block, streams, device, keep
        self.branches: dict[str, nn.Module] = {}  # those that are replayed, by name
        self.replays: dict[str, Replay] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def __iter__(self) -> Iterator[Tensor]:
        for index, stream in enumerate(self.streams):
            for name, replay in self.replays.items():
                replay.now = self.outputs[name][index].to(self.device, non_blocking=True)
            yield stream.to(self.device, non_blocking=True)

    def replay_(self, name: str) -> None:
        """From here on the branch `name` is not run."""
        self.outputs[name], beside = [], []
        for stream in self:
            output, others = output_of(self.block, name, stream)
            self.outputs[name].append(self.keep(output))
            beside.append(others)
        self.replays[name] = Replay(max(beside))
        self.branches[name] = swap_(self.block, name, self.replays[name])

    def return_(self) -> None:
        """Puts the branches back."""
        for name, branch in self.branches.items():
            swap_(self.block, name, branch)
        self.branches, self.replays, self.outputs = {}, {}, {}

    def advance_(self) -> None:
        """Moves the streams behind the block, in place."""
        for index, stream in enumerate(self):
            self.streams[index] = self.keep(self.block(stream))
