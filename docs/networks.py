"""Writes what kcrprune knows of timm's networks, from the installed timm: `python docs/networks.py`.

Every network that timm registers is built on the meta device, which takes no memory, and some of them run there; half
an hour in all. Written are, in kcrprune/checkpoints, signatures.json (those that can be cut, and all that have the same
tensors), registry.json (those of registry.MODULES that shapes tell) and networks.json (what of each can be cut, or why
not), and networks.md beside this file. `python docs/networks.py 'levit*' 'xcit*'` renews what it says of these alone.
"""

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kcrprune.checkpoints import registry, signatures
from kcrprune.checkpoints.networks import networks as table
from kcrprune.checkpoints.registry import Known
from kcrprune.checkpoints.signatures import Signature
from kcrprune.config import RunConfig
from kcrprune.containers.contents import shapes_of
from kcrprune.errors import KcrPruneError, UnsupportedModelError
from kcrprune.families import contract_of, family_of, groups_of, kept_widths, outlining
from kcrprune.families.whole import attentions_in, left_whole
from kcrprune.measure.report import Network
from kcrprune.measure.tables import escaped
from kcrprune.method.cost import MacCost
from kcrprune.plan import AXES, Axis
from kcrprune.run.network import opened_groups
from kcrprune.surgery.gated import matches

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "kcrprune" / "checkpoints"
PAGE = ROOT / "docs" / "networks.md"
INTRODUCTION = """# Networks

Written by `python docs/networks.py` with timm {version}; do not edit. `kcrprune inspect --list` prints the same for
each name.

Of {all} networks that timm registers {cut} can be cut. {transformers} are transformers, which
here says that a module of theirs is an attention (by the name of its class, `kcrprune/families/whole.py`);
{transformers_cut} of these can be cut, {complete} in all of their attentions. A network whose sizes are not timm's
opens where its kind is a ViT or a Swin.

The floor is the smallest share of the MACs that all axes together reach, at the registered image size.
"""


def networks(patterns: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Every network of such a name that timm registers and can build without memory."""
    for name in (name for name in timm.list_models() if matches(name, patterns)):
        try:
            model = outline(name)
        except (NotImplementedError, RuntimeError, ValueError):  # it computes with its weights while it is built
            continue
        yield name, model


def outline(name: str) -> nn.Module:
    """A registered network on the meta device."""
    with outlining():
        return timm.create_model(name).eval().requires_grad_(False)


def is_covered(model: nn.Module) -> bool:
    """True where something of the network can be cut."""
    return bool(groups_of(model))


def support_of(name: str, model: nn.Module) -> Network:
    """What of a registered network can be cut and how far; it runs once, on its own device."""
    family = type(model).__module__.rpartition(".")[2]
    about = {"name": name, "family": family, "transformer": bool(attentions_in(model))}
    try:
        family_of(model)
        axes, whole = parts_of(model)
        return Network(**about, axes=axes, floor=floor_of(model, axes), whole=whole)
    except KcrPruneError as error:
        return Network(**about, refused=_reason(model, error))


def parts_of(model: nn.Module) -> tuple[tuple[Axis, ...], dict[str, str]]:
    """The axes that a network has, and the classes of attention that stay whole, with the reason."""
    groups = groups_of(model)
    open_ = {group.axis for group in groups if not group.whole}
    return tuple(axis for axis in AXES if axis in open_), left_whole(model, groups)


def _reason(model: nn.Module, error: KcrPruneError) -> str:
    whole = left_whole(model, ())
    if isinstance(error, UnsupportedModelError) and whole:
        return "; ".join(f"{kind}: {reason}" for kind, reason in whole.items())
    return "no rule for any of its parts yet" if attentions_in(model) else "no attention, and no part with a rule"


def floor_of(model: nn.Module, axes: Iterable[Axis]) -> float:
    """The smallest share of the MACs that some axes reach, rounded up."""
    size = timm.get_pretrained_cfg(model.pretrained_cfg["architecture"]).input_size  # type: ignore[index, union-attr]
    images = torch.zeros(1, *size, device=next(model.parameters()).device)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math, kept_widths(), FlopCounterMode(display=False) as counter:
        contract = contract_of(model, images)
    macs = counter.get_total_flops() // 2  # two operations are one multiply-accumulate
    cost = MacCost.of(model, contract, macs)
    share = opened_groups(cost, RunConfig(axes=tuple(axes))).floor() / macs
    return -(-share * 1000 // 1) / 1000


def signature_of(model: nn.Module) -> Signature:
    """The signature of a registered network."""
    return Signature(signatures.tensors(shapes_of(model.state_dict())), signatures.behaviour(model))


def row_of(name: str, model: nn.Module) -> dict[str, Any]:
    """The sizes and traits of a registered network that are not the usual ones."""
    return _unusual(registry.describe(name, model))


def _unusual(row: Known) -> dict[str, Any]:
    usual = {field.name: field.default for field in fields(Known)}
    return {key: value for key, value in asdict(row).items() if value != usual[key]}


def tables(patterns: Sequence[str] = ("*",)) -> dict[Path, str]:
    """The text of each table by its file; what no pattern names stays as it stands there."""
    ordered = [name for module in registry.MODULES for name in timm.list_models(module=module)]
    rows = {row.name: json.dumps(_unusual(row)) for row in registry.table() if not matches(row.name, patterns)}
    kept = {name: row for name, row in signatures.table().items() if not matches(name, patterns)}
    listed = {network.name: network for network in table() if not matches(network.name, patterns)}
    covered, found = {signature.tensors for signature in kept.values()}, {}
    for name, model in networks(patterns):
        found[name] = signature_of(model)
        listed[name] = support_of(name, model)
        if is_covered(model):
            covered.add(found[name].tensors)
            if name in ordered and registry.is_plain(model):
                rows[name] = json.dumps(row_of(name, model))
    kept |= {name: signature for name, signature in found.items() if signature.tensors in covered}
    every = [listed[name] for name in sorted(listed)]
    return {
        TABLES / "registry.json": _lines(rows[name] for name in ordered if name in rows),
        TABLES / "signatures.json": json.dumps({name: " ".join(kept[name]) for name in sorted(kept)}, indent=0) + "\n",
        TABLES / "networks.json": _lines(map(line_of, every)),
        PAGE: page(every),
    }


def _lines(rows: Iterable[str]) -> str:
    return "[\n" + ",\n".join(rows) + "\n]\n"


def line_of(network: Network) -> str:
    """One network of networks.json."""
    return json.dumps(network.model_dump(exclude_defaults=True))


def figures(listed: Iterable[Network]) -> dict[str, int]:
    """How many networks there are, and how many can be cut."""
    listed = list(listed)
    cut = [network for network in listed if not network.refused]
    return {
        "all": len(listed),
        "cut": len(cut),
        "transformers": sum(network.transformer for network in listed),
        "transformers_cut": sum(network.transformer for network in cut),
        "complete": sum(network.transformer and not network.whole for network in cut),
    }


def page(listed: Iterable[Network]) -> str:
    """The networks by kind, as Markdown."""
    listed = list(listed)
    kinds: dict[tuple[Any, ...], list[Network]] = {}
    for network in listed:
        if network.transformer or not network.refused:
            key = (network.family, network.axes, tuple(network.whole.items()), network.refused)
            kinds.setdefault(key, []).append(network)
    head = INTRODUCTION.format(version=timm.__version__, **figures(listed))
    lines = ["| module of timm | names | for example | axes | floor | stays whole |", "|:--|--:|:--|:--|--:|:--|"]
    lines += [_row(*kind, of_kind) for kind, of_kind in sorted(kinds.items(), key=lambda item: item[0][:1])]
    return head + "\n" + "\n".join(lines) + "\n"


def _row(family: str, axes: Any, whole: Any, refused: str, of_kind: list[Network]) -> str:
    floors = sorted(network.floor for network in of_kind if network.floor is not None)
    span = "" if not floors else f"{floors[0]:.3f}" + ("" if floors[0] == floors[-1] else f" to {floors[-1]:.3f}")
    why = refused or "; ".join(f"{kind}: {reason}" for kind, reason in whole)
    shown = ", ".join(axes) or "refused"
    return f"| {family} | {len(of_kind)} | {of_kind[0].name} | {shown} | {span} | {escaped(why)} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # timm's own, to developers
    for file, text in tables(sys.argv[1:] or ("*",)).items():
        file.write_text(text, encoding="utf-8")
