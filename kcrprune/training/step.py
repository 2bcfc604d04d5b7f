"""The step that every training stage takes: gradients in what memory there is, clipping, the watch for divergence."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Final

import torch
from torch import Tensor, nn

from kcrprune.errors import ConfigError, DivergedError, ran_out_of_memory
from kcrprune.events import Listener, Note, StepDone, ignore
from kcrprune.method.objective import Loss
from kcrprune.training.pace import Pace
from kcrprune.training.randomness import seeded
from kcrprune.training.snapshots import State, load_, state_of

READ_EVERY: Final = {"cpu": 1, "cuda": 10}  # steps; a GPU waits when figures are read, so many are read together

Batch = tuple[Tensor, Tensor]


@dataclass
class Training:
    """One stage that lowers a loss: its steps, and the figures that they leave in `history`.

    A batch that does not fit the memory is halved until it does: `loss` is asked for each part, and the parts add up to
    the same step where it is a mean over images. What is dropped out follows from the step's address.
    """

    stage: str
    loss: Callable[[Tensor, Tensor], Loss]
    optimizer: torch.optim.Optimizer
    device: torch.device
    seed: int
    pace: Pace
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    clip_grad: float = inf  # largest gradient norm
    autocast: Callable[..., AbstractContextManager] = nullcontext
    listener: Listener = ignore
    done: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    _part: int | None = None  # images of a batch at a time; None: all
    _unread: list[dict[str, Tensor | float]] = field(default_factory=list)

    def step_(self, batch: Batch) -> Loss:
        """Moves what the optimiser holds by one batch; nothing here waits for the device."""
        batch = batch[0].to(self.device, non_blocking=True), batch[1].to(self.device, non_blocking=True)
        while (loss := self._gradients_(batch)) is None:
            self._halve_(len(batch[0]))
        norm = nn.utils.clip_grad_norm_(self._learned(), self.clip_grad)
        self.optimizer.step()
        self.done += 1
        self.pace.move_(self.done)
        if self.schedule is not None:
            self.schedule.step()
        return replace(loss, parts=loss.parts | {"gradient_norm": norm})

    def tell_(self, figures: Mapping[str, Tensor | float]) -> None:
        """Takes the figures of the last step; DivergedError, when they are read, for one that is no finite number."""
        self._unread.append({"step": self.done, **figures})
        if self.done % READ_EVERY[self.device.type] == 0 or self.pace.ended:
            rows, self._unread = _read(self._unread, self.device), []
            for row in rows:
                self._take_(row)

    def state(self) -> State:
        """All that the next step depends on, but for what the loss holds."""
        schedule = None if self.schedule is None else self.schedule.state_dict()
        kept = {"done": self.done, "history": self.history, "part": self._part, "schedule": schedule}
        return kept | {"optimizer": state_of(self.optimizer)}

    def load_(self, state: State) -> None:
        """Goes on from a state."""
        self.done, self.history, self._part = state["done"], state["history"], state["part"]
        self.pace.start_(self.done)
        load_(self.optimizer, state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])

    @property
    def all_told(self) -> bool:
        """Whether every figure so far was read, so that a state has them all."""
        return not self._unread

    def _take_(self, row: dict[str, float]) -> None:
        self.history.append(row)
        step, figures = int(row["step"]), {name: value for name, value in row.items() if name != "step"}
        for name, value in figures.items():
            if not isfinite(value):
                raise DivergedError(
                    f"{self.stage}, step {step}: {name} is {value}, so the training diverged; a lower learning rate "
                    "may help, unless the weights or the images hold such values themselves"
                )
        self.listener(StepDone(self.stage, step, figures))

    def _learned(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _gradients_(self, batch: Batch) -> Loss | None:
        """Leaves the gradient of a batch, summed over its parts, and returns their loss; None where memory ran out."""
        self.optimizer.zero_grad()
        images, learned, found = len(batch[0]), self._learned(), []
        parts = zip(*(tensor.split(self._part or images) for tensor in batch), strict=True)
        try:
            with torch.enable_grad(), seeded(self.seed, self.stage, self.done, "dropout", self.device):
                for part in parts:
                    with self.autocast():
                        loss = self.loss(*part)
                    share = len(part[0]) / images
                    (share * loss.total).backward(inputs=learned)
                    found.append((share, replace(loss, total=loss.total.detach())))
        except (MemoryError, RuntimeError) as error:  # a CPU's has no class of its own
            if not ran_out_of_memory(error):
                raise
            return None
        return Loss.mean(found)

    def _halve_(self, images: int) -> None:
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before = min(self._part or images, images)
        if before == 1:
            raise ConfigError(f"{self.stage}: not one image fits the memory of {self.device}; choose another device")
        self._part = (before + 1) // 2
        told = f"{before} images at once do not fit the memory; batches are taken in parts of {self._part}"
        self.listener(Note(f"{self.stage}: {told}"))


def _read(rows: list[dict[str, Tensor | float]], device: torch.device) -> list[dict[str, float]]:
    """The figures as numbers; those on the device are read together."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
    read = iter(torch.stack([value.to(device, torch.float64) for value in tensors]).tolist() if tensors else [])
    return [{name: next(read) if isinstance(value, Tensor) else value for name, value in row.items()} for row in rows]
