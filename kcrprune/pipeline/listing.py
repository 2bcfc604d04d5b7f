"""What of a network in memory can be cut, and why the rest cannot, for people to read."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from kcrprune.families import BLOCKS, RULES, Group, find_groups
from kcrprune.families.contract import Rules, class_name, of_class
from kcrprune.families.foreign import REASONS


@dataclass(frozen=True)
class Listing:
    """The groups of a network; printed, a line for each class of module."""

    groups: tuple[Group, ...]
    can: tuple[str, ...]  # a sentence for each class that has groups
    cannot: tuple[str, ...]  # a sentence for each other class that holds linears

    def __str__(self) -> str:
        can = self.can or ("nothing",)
        cannot = ("", "stays whole:", *(f"  {line}" for line in self.cannot)) if self.cannot else ()
        return "\n".join(("can be cut:", *(f"  {line}" for line in can), *cannot))


def listing(model: nn.Module, part: str, rules: Rules) -> Listing:
    """By rules alone: whether a network does what they claim, the certificate of a run finds out."""
    inside = {
        name: module
        for name, module in model.named_modules()
        if not part or name == part or name.startswith(f"{part}.")
    }
    groups = tuple(group for group in find_groups(model, {**RULES, **rules}, BLOCKS) if group.site in inside)
    sites = dict.fromkeys(group.site for group in groups)
    counts = Counter(type(inside[site]) for site in sites)
    can = [
        f"{count} x {cls.__name__}: {_axes([group for group in groups if type(inside[group.site]) is cls])}"
        for cls, count in counts.items()
    ]
    others = Counter(
        type(module)
        for name, module in inside.items()
        if _linears(module) and not any(name == site or name.startswith(f"{site}.") for site in sites)
    )
    held = {type(module): _linears(module) for module in inside.values()}
    cannot = [f"{count} x {cls.__name__}: {_reason(cls, held[cls], rules)}" for cls, count in others.items()]
    return Listing(groups, tuple(can), tuple(cannot))


def _axes(groups: list[Group]) -> str:
    """The axes and their widths, from the smallest to the largest."""
    found = []
    for axis in dict.fromkeys(group.axis for group in groups if not group.whole):
        widths = [group.width for group in groups if group.axis == axis]
        span = f"{min(widths)}" if min(widths) == max(widths) else f"{min(widths)} to {max(widths)}"
        found.append(f"{axis} ({span})")
    whole = " (whole heads alone, by its own forward)" if any(group.whole for group in groups) else ""
    return ", ".join(found) + whole


def _linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if isinstance(child, nn.Linear)]


def _reason(cls: type, linears: list[str], rules: Rules) -> str:
    if known := of_class(REASONS, cls):
        return known
    if of_class({**RULES, **rules}, cls):
        return "its rule fits no module that is made like this one"
    if len(linears) == 1:
        return f"{linears[0]} alone makes or reads the stream, which keeps its width"
    return f"no rule for {class_name(cls)} with its linears {', '.join(linears)}; rules= takes one"
