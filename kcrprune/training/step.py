"""The step that every training stage takes: gradients in what memory there is, clipping, the watch for divergence."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, isfinite
from typing import Final

import torch
from torch import Tensor, nn

from kcrprune import processes
from kcrprune.errors import DivergedError
from kcrprune.events import Listener, Note, StepDone, ignore
from kcrprune.method.objective import Loss
from kcrprune.training.pace import Pace
from kcrprune.training.portions import Portions
from kcrprune.training.randomness import seeded
from kcrprune.training.snapshots import State, load_, state_of

PASSED_OVER: Final = 3  # gradients in a row that are no finite numbers end a training; a choice of ours
NORM: Final = "gradient_norm"  # ends the names of such figures
READ_EVERY: Final = {"cpu": 1, "cuda": 10}  # steps; a GPU waits when figures are read, so many are read together

Batch = tuple[Tensor, Tensor]


def train_(model: nn.Module) -> None:
    """Puts a network into training mode, in which its batch norms keep the statistics that they have.

    Those of a batch would depend on the parts that it is taken in, and a few steps find none that are as good.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def decayed(model: nn.Module, weight_decay: float) -> list[dict]:
    """The weights of a network for an optimiser; what a user has frozen is left out.

    Matrices decay; biases, norms, tokens and tables do not, as in timm.
    """
    exempt = getattr(model, "no_weight_decay", set)()
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if name in getattr(model, "frozen", ()):
            continue
        groups[parameter.ndim > 1 and name not in exempt and "table" not in name].append((name, parameter))
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


@dataclass
class Training:
    """One stage that lowers a loss: its steps, and the figures that they leave in `history`.

    A batch that does not fit the memory is halved until it does: `loss` is asked for each part, and the parts add up to
    the same step where it is a mean over images; so do the parts of several processes. What is dropped out follows from
    the step's address. A gradient that is no finite number counts as none, and that batch as passed over, twice in a
    row; the third time, and at once where the loss or another figure is none, the training has diverged.
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
    at_once: int | None = None  # images, of which that many fit the memory for sure; None: of a whole batch, until not
    done: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    beside: Mapping[str, "Training"] = field(default_factory=dict)  # trainings told of here, by the prefix of figures
    _norms: Tensor | None = None  # (tensors,) of the last gradient that was no finite number, or of the first one
    _passed_over: int = 0  # batches in a row
    _unread: list[dict[str, Tensor | float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._portions = Portions(self.stage, self.device, self.listener, self.at_once)

    def step_(self, batch: Batch) -> Loss:
        """Moves what the optimiser holds by one batch; nothing here waits for the device."""
        batch = batch[0].to(self.device, non_blocking=True), batch[1].to(self.device, non_blocking=True)
        loss = self._portions.of(len(batch[0]), partial(self._gradients_, batch))
        loss = self._sum_over_processes_(loss, len(batch[0]))
        norm = self._clip_()
        self.optimizer.step()
        self.done += 1
        self.pace.move_(self.done)
        if self.schedule is not None:
            self.schedule.step()
        return replace(loss, parts=loss.parts | {NORM: norm})

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
        kept = {"done": self.done, "history": self.history, "part": self._portions.at_once, "schedule": schedule}
        return kept | {"optimizer": state_of(self.optimizer)}

    def load_(self, state: State) -> None:
        """Goes on from a state."""
        self.done, self.history, self._portions.at_once = state["done"], state["history"], state["part"]
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
        strange = sorted((name for name in figures if not isfinite(figures[name])), key=_is_of_gradient)
        self._passed_over = self._passed_over + 1 if strange else 0
        if strange:
            self._meet_(step, strange[0], figures[strange[0]])
        self.listener(StepDone(self.stage, step, figures))

    def _meet_(self, step: int, name: str, value: float) -> None:
        """Says that a batch was passed over for its gradient; DivergedError for too many of them, or another figure."""
        tensor = self.beside.get(name.removesuffix(NORM), self)._lost_tensor() if _is_of_gradient(name) else ""
        told = f"{self.stage}, step {step}: {name}{tensor} is {value}"
        if not _is_of_gradient(name) or self._passed_over == PASSED_OVER:
            raise DivergedError(
                f"{told}, so the training diverged; a lower learning rate may help, unless the weights or the images "
                "hold such values themselves"
            )
        self.listener(Note(f"{told}; this batch was passed over", warning=True))

    def _learned(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _gradients_(self, batch: Batch, at_once: int) -> Loss:
        """Leaves the gradient of a batch, summed over its parts, and returns their loss."""
        self.optimizer.zero_grad()
        images, learned, found = len(batch[0]), self._learned(), []
        parts = zip(*(tensor.split(at_once) for tensor in batch), strict=True)
        with torch.enable_grad(), seeded(self.seed, self.stage, self.done, _dropout(), self.device):
            for part in parts:
                with self.autocast():
                    loss = self.loss(*part)
                share = len(part[0]) / images
                (share * loss.total).backward(inputs=learned)
                found.append((share, replace(loss, total=loss.total.detach())))
        return Loss.mean(found)

    def _sum_over_processes_(self, loss: Loss, images: int) -> Loss:
        """Makes gradient and figures those of the whole batch, of which this process has so many images."""
        if processes.count() == 1:
            return loss
        gradients = [parameter.grad for parameter in self._learned() if parameter.grad is not None]
        figures = torch.stack([loss.total, *loss.parts.values(), torch.ones_like(loss.total)]).to(gradients[0])
        mine = torch.cat([*(gradient.flatten() for gradient in gradients), figures]) * images
        whole = processes.summed(mine)
        whole /= whole[-1].clone()
        *found, figures = whole.split([*(gradient.numel() for gradient in gradients), len(figures)])
        for gradient, flat in zip(gradients, found, strict=True):
            gradient.copy_(flat.view_as(gradient))
        return replace(loss, total=figures[0], parts=dict(zip(loss.parts, figures[1:-1], strict=True)))

    def _clip_(self) -> Tensor:
        """Bounds the gradient, and returns the norm that it had; one that is no finite number becomes zero."""
        gradients = [parameter.grad for parameter in self._learned() if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))  # type: ignore[attr-defined]  (tensors,)
        norm = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(self._learned(), self.clip_grad, norm)
        lost = norm.isfinite().logical_not()
        for gradient in gradients:
            gradient.masked_fill_(lost, 0)
        self._norms = norms if self._norms is None else torch.where(lost, norms, self._norms)
        return norm

    def _lost_tensor(self) -> str:
        """Of which tensor the gradient was no finite number, the last time that one was; '' where none has a name."""
        names = [name for group in self.optimizer.param_groups for name in group.get("param_names", ())]
        named = [name for name, weight in zip(names, self._learned(), strict=False) if weight.grad is not None]
        finite = [] if self._norms is None else self._norms.isfinite().tolist()
        return next((f" of {name}" for name, is_finite in zip(named, finite, strict=False) if not is_finite), "")


def _is_of_gradient(figure: str) -> bool:
    return figure.endswith(NORM)


def _dropout() -> str:
    """The address of what is dropped out; each process has images of its own."""
    return f"dropout of process {processes.rank()}" if processes.rank() else "dropout"


def _read(rows: list[dict[str, Tensor | float]], device: torch.device) -> list[dict[str, float]]:
    """The figures as numbers; those on the device are read together."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
    read = iter(torch.stack([value.to(device, torch.float64) for value in tensors]).tolist() if tensors else [])
    return [{name: next(read) if isinstance(value, Tensor) else value for name, value in row.items()} for row in rows]
