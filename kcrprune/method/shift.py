"""The expected MACs of gates, and the shift of all logits that makes them the budget: all at once, on one device.

Letters: n gates, R rows (the heads of all groups), G groups, T terms of the cost, S shifts tried at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kcrprune.families import Group, Key
from kcrprune.method.cost import MacCost, Side, dense_widths, kept_count
from kcrprune.method.gates import Gates
from kcrprune.plan import PER_HEAD

TRIED = 16  # parts that a round divides the bracket in
REACH = 100.0  # a shift that no logits exceed


class ExpectedMacs:
    """MACs of a network whose channels are kept with the probabilities of their gates; differentiable in the logits.

    A channel inside a head is kept with its own probability times its head's. What has no gate is whole.
    """

    def __init__(self, cost: MacCost, gates: Gates) -> None:
        groups, device = cost.contract.groups, gates.logits.device
        always = len(gates.logits)  # the place of a probability of 1
        rows = [(index, head) for index, group in enumerate(groups) for head in range(group.heads)]
        number = {row: position for position, row in enumerate(rows)}
        index_of = {group.key: index for index, group in enumerate(groups)}
        row_of = [
            number[index_of[group.key], unit // group.units]
            for group, part in gates
            for unit in range(part.stop - part.start)
        ]
        spans = [float(group.span) for group, part in gates for _ in range(part.stop - part.start)]
        whole = [0.0 if groups[index].key in gates.slices else float(groups[index].width) for index, _ in rows]
        head_of = [_head_gate(groups[index], head, gates, always) for index, head in rows]

        self.row_of, self.head_of = (torch.tensor(index, device=device) for index in (row_of, head_of))  # (n,), (R,)
        self.any_heads = any(head != always for head in head_of)
        self.of_group = torch.zeros(len(rows), len(groups), dtype=torch.float64, device=device)  # (R, G) ones
        self.of_group[range(len(rows)), [index for index, _ in rows]] = 1
        self.spans, self.whole = (_wide(values, device) for values in (spans, whole))  # (n,), (R,)
        terms = [term for of_site in cost.terms.values() for term in of_site]
        keys = [group.key for group in groups]
        self.left, self.right = (
            _matrix([getattr(term, side) for term in terms], keys, device) for side in ("left", "right")
        )
        self.rows = _wide([float(term.rows) for term in terms], device)  # (T,)
        dense = dense_widths(groups)
        counts = _wide([float(kept_count(group, dense)) for group in groups], device)
        self.rest = cost.dense - float(self._of_counts(counts[None])[0])  # what no group can change

    def __call__(self, logits: Tensor) -> Tensor:
        """(S,) MACs, in float64, of logits (S, n) or (n,)."""
        kept = torch.nn.functional.pad(logits.double().view(-1, logits.shape[-1]), (0, 1), value=float("inf")).sigmoid()
        return self._of_probabilities(kept) + self.rest

    def _of_probabilities(self, kept: Tensor) -> Tensor:
        """What gates can change, of probabilities (S, n + 1), the last of which is 1."""
        rows = self.whole.expand(len(kept), -1).index_add(1, self.row_of, kept[:, :-1] * self.spans)  # (S, R)
        if self.any_heads:
            rows = rows * kept.index_select(1, self.head_of)
        return self._of_counts(rows @ self.of_group)

    def _of_counts(self, counts: Tensor) -> Tensor:
        """Of kept channels (S, G)."""
        (left, left_times), (right, right_times) = self.left, self.right
        sides = torch.addmm(left, counts, left_times) * torch.addmm(right, counts, right_times)  # (S, T)
        return sides @ self.rows

    @torch.no_grad()
    def shift_(self, logits: Tensor, target: float, reach: Tensor | float = REACH, rounds: int = 8) -> None:
        """Adds one constant to all logits (n,), at most `reach` up or down, so that the expected MACs are `target`.

        Each round divides the bracket by TRIED and keeps the part in which the target lies; the lower end is taken, so
        that the budget is not exceeded.
        """
        extended = torch.nn.functional.pad(logits.double(), (0, 1), value=float("inf"))  # (n + 1,)
        steps = torch.arange(1, TRIED, dtype=torch.float64, device=logits.device)  # (S,)
        low = -reach * torch.ones((), dtype=torch.float64, device=logits.device)
        widths = -2 * low * TRIED ** -(1 + torch.arange(rounds, dtype=torch.float64, device=logits.device))
        for width in widths:
            shifts = torch.addcmul(low, steps, width)  # the ends of the bracket are known
            cheap = self._of_probabilities((extended + shifts[:, None]).sigmoid()) <= target - self.rest
            low = torch.addcmul(low, cheap.sum(), width)
        logits += low.to(logits)

    def follow_(self, logits: Tensor, before: Tensor, target: float) -> None:
        """The shift after a step from `before`, where the expected MACs were `target`: in fewer rounds.

        No shift beyond the largest change of a logit can be needed, since the cost rises with every logit.
        """
        self.shift_(logits, target, 1.01 * (logits - before).abs().max() + 1e-6, rounds=5)


def _head_gate(group: Group, head: int, gates: Gates, always: int) -> int:
    part = gates.slices.get((group.site, "heads")) if group.axis in PER_HEAD else None
    return always if part is None else part.start + head


def _wide(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _matrix(sides: Sequence[Side], keys: Sequence[Key], device: torch.device) -> tuple[Tensor, Tensor]:
    """Constants (T,) and multiples (G, T) of the sides of all terms."""
    constants = _wide([float(side.constant) for side in sides], device)
    times = [[float(side.times.get(key, 0)) for side in sides] for key in keys]
    return constants, torch.tensor(times, dtype=torch.float64, device=device)
