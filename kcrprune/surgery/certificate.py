"""The proof by noise that a group is what its rule claims: closed channels that the network does not see.

It runs on a copy, before a cut: an upstream class that changed its forward, a patched module or a wrong rule moves the
output, and is refused before anything is lost.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from kcrprune.errors import KcrPruneError, UnsupportedModelError
from kcrprune.families import Group, Key, Slot, owner_of
from kcrprune.families.contract import class_name
from kcrprune.method.budget import kept_of
from kcrprune.plan import ChannelPlan, Kept
from kcrprune.surgery.arranged import arranged
from kcrprune.surgery.constant import Constant
from kcrprune.surgery.gated import add_gates_, harden_
from kcrprune.surgery.narrow import cut_, keep_all, positions

AGREEMENT: Final = 1e-3  # of the largest output: what a cut network may differ by from a masked one, in float32


@torch.no_grad()
def certificate(model: nn.Module, groups: Sequence[Group], plan: ChannelPlan, images: Any) -> dict[Key, float]:
    """By group, how far the output moves when what the plan closes is filled with noise; 0 where all is as claimed.

    The gates of the plan close the readers' inputs while the closed rows of the writers hold noise. A group without
    readers is closed at q: noise in q while the closed rows of k are zero, and the other way round.
    """
    masked = _masked(model, groups, plan)
    expected = masked(images)
    found = {}
    for group in _claimed(groups):
        rows = _closed_rows(group, plan)
        found[group.key] = max(_moved(masked, expected, images, *(side(group, rows) for side in way)) for way in WAYS)
    return found


@torch.no_grad()
def require_certificate(model: nn.Module, groups: Sequence[Group], plan: ChannelPlan, images: Any) -> None:
    """UnsupportedModelError names a group whose closed channels the network sees; all are tried at once first.

    So it does a branch that goes as a whole and would leave more than the constant that is put in its place, and a plan
    that sets an order of streams in which the network answers something else.
    """
    if plan.stream is not None:
        _require_same(model, arranged(model, groups, plan)[0], images)
    masked = _masked(model, groups, plan)
    with _constants_left(model, masked, [group for group in groups if group.site in plan.gone]):
        expected = masked(images)
    if _moved_by_all(masked, groups, plan, expected, images) == 0:
        return
    for (site, axis), distance in certificate(model, groups, plan, images).items():
        if distance != 0:
            raise UnsupportedModelError(
                f"{axis} of {site!r} ({type(model.get_submodule(site)).__name__}) is not what its rule says: noise in "
                f"closed channels moves the output by {distance:.1e}; leave its block out with --exclude"
            )


@contextmanager
def _constants_left(model: nn.Module, masked: nn.Module, gone: Sequence[Group]) -> Iterator[None]:
    """While a masked network runs: UnsupportedModelError where a closed branch gives more than its constant."""

    def check(site: str, constant: Constant) -> Any:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            left = constant(inputs[0])
            if output.shape != left.shape or not torch.allclose(output, left):
                raise UnsupportedModelError(
                    f"{site!r} ({type(model.get_submodule(site)).__name__}) gives more than the bias of its last "
                    "linear where nothing of it is read, so it cannot go; leave min_width above 0"
                )

        return see

    branches = {group.site: Constant.of(model, group) for group in gone}
    hooks = [masked.get_submodule(site).register_forward_hook(check(site, left)) for site, left in branches.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _require_same(model: nn.Module, other: nn.Module, images: Any) -> None:
    """UnsupportedModelError where a network whose streams stand in another order does not answer what it did."""
    expected = model(images)
    distance = float((other(images) - expected).abs().max())
    if not distance <= AGREEMENT * float(expected.abs().max()):
        raise UnsupportedModelError(
            f"the stream of this {type(model).__name__} is not what is known of its class: in another order of its "
            f"channels the output moves by {distance:.1e}; leave mlp_io out of --axes"
        )


@torch.no_grad()
def unproven(model: nn.Module, groups: Sequence[Group], images: Any) -> dict[str, str]:
    """Why some classes of branch modules cannot be cut in this network, by name; none where all are as rules claim.

    Half of everything is closed, at all sites and, where that fails, at those of one class after the other: noise in
    closed channels may not move the output, and the cut network has to answer what the masked one does.
    """
    if not _fault(model, groups, {group.site for group in groups}, images):
        return {}
    sites: dict[str, set[str]] = {}
    for group in groups:
        sites.setdefault(class_name(type(model.get_submodule(group.site))), set()).add(group.site)
    found = {name: _fault(model, groups, of_class, images) for name, of_class in sites.items()}
    return {name: fault for name, fault in found.items() if fault}


def _fault(model: nn.Module, groups: Sequence[Group], sites: set[str], images: Any) -> str | None:
    plan = ChannelPlan(architecture=None, groups=tuple(_halved(g, sites) for g in groups if g.axis != "heads"))
    masked = _masked(model, groups, plan)
    expected = masked(images)
    if moved := _moved_by_all(masked, groups, plan, expected, images):
        return f"noise in closed channels moves the output by {moved:.1e}"
    try:
        answer = cut_(copy.deepcopy(model), plan).eval()(images)
    except (KcrPruneError, RuntimeError, ValueError) as error:  # of a stranger's forward, on tensors that it never saw
        return f"its forward does not run on what a cut leaves ({str(error).partition(chr(10))[0]})"
    if not torch.allclose(answer, expected, rtol=0, atol=AGREEMENT * float(expected.abs().max())):
        return f"a cut moves the output by {float((answer - expected).abs().max()):.1e} more than closed channels do"
    return None


def _halved(group: Group, sites: set[str]) -> Kept:
    """The entry of a plan that keeps half of a group at one of these sites, and all elsewhere."""
    if group.site not in sites:
        return keep_all(group)
    heads = range(max(1, group.heads // 2))
    units = range(group.units if group.whole else max(1, group.units // 2))
    return kept_of(group, list(heads), [list(units) for _ in heads])


Rows = Sequence[tuple[Slot, Sequence[int]]]  # closed rows of writers


def _masked(model: nn.Module, groups: Sequence[Group], plan: ChannelPlan) -> nn.Module:
    masked = copy.deepcopy(model)
    harden_(add_gates_(masked, groups, [group for group in groups if not group.whole]), plan)
    return masked.eval()


def _claimed(groups: Sequence[Group]) -> list[Group]:
    """Those with writers of their own: not the stream's channels, nor heads, which the other groups hold."""
    return [group for group in groups if not group.wide and group.axis != "heads"]


def _closed_rows(group: Group, plan: ChannelPlan) -> Rows:
    kept = next(kept for kept in plan.groups if kept.key == group.key)
    return [(slot, sorted(positions(slot, keep_all(group)) - positions(slot, kept))) for slot in group.writers]


def _first(group: Group, rows: Rows) -> Rows:
    return rows if group.readers else rows[: len(rows) // 2]


def _second(group: Group, rows: Rows) -> Rows:
    return () if group.readers else rows[len(rows) // 2 :]


WAYS = ((_first, _second), (_second, _first))  # which closed rows hold noise, and which are zero


def _moved(masked: nn.Module, expected: Tensor, images: Any, noisy: Rows, zero: Rows) -> float:
    """How far the output moves with noise in some rows and zeros in others, which are put back afterwards."""
    random = torch.Generator().manual_seed(0)
    before = []
    for rows, amount in ((noisy, 1.0), (zero, 0.0)):
        for slot, index in rows:
            places = torch.tensor(index, dtype=torch.long, device=expected.device)
            for tensor in _written(masked, slot):
                before.append((tensor, places, tensor[places].clone()))
                noise = torch.randn(len(index), *tensor.shape[1:], generator=random)
                tensor[places] = amount * noise.to(tensor, non_blocking=True)
    distance = float((masked(images) - expected).abs().max())
    for tensor, places, values in reversed(before):
        tensor[places] = values
    return distance


def _moved_by_all(
    masked: nn.Module, groups: Sequence[Group], plan: ChannelPlan, expected: Tensor, images: Any
) -> float:
    """How far the output moves with noise in the closed channels of all groups at once."""
    closed = [(group, _closed_rows(group, plan)) for group in _claimed(groups)]
    sides = [[[part for group, rows in closed for part in side(group, rows)] for side in way] for way in WAYS]
    return max(_moved(masked, expected, images, noisy, zero) for noisy, zero in sides)


def _written(model: nn.Module, slot: Slot) -> list[Tensor]:
    owner = owner_of(model, slot.owner)
    return [owner] if isinstance(owner, Tensor) else [t for t in (owner.weight, owner.bias) if isinstance(t, Tensor)]
