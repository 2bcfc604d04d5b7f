"""How near the budget solver comes to its target on every timm network that kcrprune can cut.

    python docs/benchmarks/budget.py [--names 'swin_*'] [--out RESULTS.json]

Networks are built on the meta device, without weights; scores are random, MACs are those of torch's own counter, and
the plan's MACs are predicted. Prints each network whose plan misses the window, and the worst gap for each target.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kcrprune.errors import BudgetError, UnsupportedModelError
from kcrprune.families import BlockSite, sites
from kcrprune.method.budget import WINDOW, Purse, dense_widths, predicted_macs, solve
from kcrprune.plan import Axis

TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
AXES: tuple[Axis, ...] = ("mlp_hidden", "attn_query", "attn_value")
log = logging.getLogger("budget")


def networks(pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Every timm network that a family accepts, on the meta device."""
    for name in timm.list_models(pattern):
        if not name.startswith(("vit_", "deit", "swin_", "flexivit", "beit", "eva")):
            continue
        try:
            with torch.device("meta"):
                model = timm.create_model(name).eval()
            sites(model)
        except (UnsupportedModelError, RuntimeError, NotImplementedError):
            continue
        yield name, model


def meta_macs(model: nn.Module) -> int:
    """MACs of one image at the network's own size, by torch's counter; one MAC is two of its FLOPs."""
    size = resolve_model_data_config(model)["input_size"]
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:  # its module tracker wants gradients
        model(torch.zeros(1, *size, device="meta"))
    return counter.get_total_flops() // 2


def random_scores(found: tuple[BlockSite, ...], generator: torch.Generator) -> dict[str, dict[Axis, torch.Tensor]]:
    """Log-normal scores of every channel."""
    scores: dict[str, dict[Axis, torch.Tensor]] = {site.name: {} for site in found}
    for site in found:
        for axis in AXES:
            shape = (site.heads, site.head_dim) if axis != "mlp_hidden" else (dense_widths(site)[axis],)
            scores[site.name][axis] = torch.randn(shape, generator=generator).mul(2).exp()
    return scores


def main() -> None:
    """Prints the gaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="*")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.simplefilter("ignore")
    gaps: dict[str, dict[float, float | None]] = {}
    start = time.monotonic()
    for name, model in networks(arguments.names):
        found, macs = sites(model), meta_macs(model)
        purse = Purse(macs, found, {site.name: tuple(axis for axis in AXES if axis in site.axes) for site in found})
        scores = random_scores(found, torch.Generator().manual_seed(0))
        gaps[name] = {}
        for target in TARGETS:
            try:
                share = predicted_macs(macs, found, solve(purse, scores, target, name)) / macs
                gaps[name][target] = target - share
            except BudgetError:
                gaps[name][target] = None
        missed = {target: gap for target, gap in gaps[name].items() if gap is not None and not 0 <= gap < WINDOW}
        if missed:
            log.info("%s misses: %s", name, missed)
    log.info("%d networks, %.0f s", len(gaps), time.monotonic() - start)
    for target in TARGETS:
        reached = {name: row[target] for name, row in gaps.items() if row[target] is not None}
        worst = max(reached, key=lambda name: reached[name] or 0.0)
        log.info("target %.1f: %d reachable, worst gap %.5f (%s)", target, len(reached), reached[worst] or 0.0, worst)
    if arguments.out:
        arguments.out.write_text(json.dumps(gaps, indent=1))


if __name__ == "__main__":
    main()
