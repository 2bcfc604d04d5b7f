"""How far the solver's plans lie from the exact ones, on networks small enough to try every plan.

    python docs/benchmarks/solver.py [--draws 200]

Each draw has one or two blocks of 16 or 32 hidden units, 2 heads of 16 channels and random scores (exponentials of
uniform numbers, or heavy-tailed ones); all allowed widths are tried. Prints by open axes: how often the solver's plan
is the exact one, and the score that it loses beyond it, as a share of all score: mean and worst. Some minutes.
"""

import argparse
import itertools
from collections.abc import Iterator

import torch

from kcrprune.families import Group
from kcrprune.families.contract import Contract, Key
from kcrprune.measure.tables import Table, markdown
from kcrprune.method.allowed import Allowed
from kcrprune.method.budget import Scores, solve
from kcrprune.method.cost import MacCost, Side, Term, dense_widths, plan_widths
from kcrprune.plan import PER_HEAD, Axis

OPENED: dict[str, tuple[Axis, ...]] = {
    "the default's": ("mlp_hidden", "attn_query", "attn_value"),
    "with whole heads": ("mlp_hidden", "attn_query", "attn_value", "heads"),
    "with mlp_io": ("mlp_io", "mlp_hidden", "attn_value"),
}
TARGETS = (0.8, 0.6, 0.4)


def network(blocks: int, hidden: int, axes: tuple[Axis, ...]) -> Allowed:
    """Blocks of width 16, as groups and as the terms of their cost; widths go by 4."""
    width, heads, dim, tokens = 16, 2, 16, 10
    groups: list[Group] = []
    terms: dict[str, tuple[Term, ...]] = {}
    for index in range(blocks):
        attn, mlp = f"{index}.attn", f"{index}.mlp"
        query, value = Group(attn, "attn_query", heads, dim), Group(attn, "attn_value", heads, dim)
        io, inner = Group(mlp, "mlp_io", 1, width), Group(mlp, "mlp_hidden", 1, hidden)
        groups += [query, value, Group(attn, "heads", 1, heads), io, inner]
        both: dict[Key, int] = {query.key: 1, value.key: 1}
        terms[attn] = (
            Term(tokens, Side(0, {query.key: 2, value.key: 1}), Side(width)),
            Term(tokens, Side(width), Side(0, {value.key: 1})),
            Term(tokens * tokens, Side(0, both), Side(1)),
        )
        terms[mlp] = (Term(2 * tokens, Side(0, {io.key: 1}), Side(0, {inner.key: 1})),)
    contract = Contract(tuple(groups), {}, {})
    dense = sum(MacCost(0, contract, terms).of_site(site, dense_widths(groups)) for site in terms)
    opened = frozenset(group.key for group in groups if group.axis in axes)
    return Allowed(MacCost(dense, contract, terms), tuple(groups), opened, round_to=4, min_width=0.01)


def random_scores(groups: tuple[Group, ...], seed: int) -> Scores:
    """Scores of many sizes: every other draw is heavy-tailed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {g.key: (g.heads, g.units) if g.axis in PER_HEAD else (g.units,) for g in groups}
    draws = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    return {key: draw.exp() if seed % 2 else draw.clamp_min(1e-3) ** -1.5 for key, draw in draws.items()}


def losses(allowed: Allowed, scores: Scores, target: float) -> tuple[float, float]:
    """Score lost by the solver's plan and by the exact one."""
    opened = allowed.opened
    lost = {g.key: _lost(scores[g.key]) for g in opened}
    found = plan_widths(solve(allowed, scores, target, None))
    best = min(
        sum(lost[g.key][w] for g, w in zip(opened, widths, strict=True))
        for widths in _affordable(allowed, target * allowed.cost.dense)
    )
    return sum(lost[g.key][found[g.key]] for g in opened), best


def _lost(score: torch.Tensor) -> list[float]:
    ranked = score.double().sort(descending=True, dim=-1).values
    ranked = ranked.sum(0) if ranked.ndim == 2 else ranked
    return [*ranked.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def _affordable(allowed: Allowed, limit: float) -> Iterator[tuple[int, ...]]:
    """Every choice of widths, in any whole step, that the limit allows."""
    dense = dense_widths(allowed.groups)
    levels = [range(1, g.width + 1) if g.axis == "heads" else allowed.levels(g) for g in allowed.opened]
    for widths in itertools.product(*levels):
        chosen = {**dense, **{g.key: w for g, w in zip(allowed.opened, widths, strict=True)}}
        if allowed.cost_of(chosen) <= limit:
            yield widths


def rows(draws: int) -> Iterator[tuple[str, ...]]:
    """One row for each choice of axes."""
    for label, axes in OPENED.items():
        gaps = []
        for seed in range(draws):
            allowed = network(1 + seed % 2, 16 if seed % 2 else 32, axes)
            scores = random_scores(allowed.groups, seed)
            target = max(TARGETS[seed % 3], allowed.floor() / allowed.cost.dense + 0.05)
            found, best = losses(allowed, scores, target)
            gaps.append((found - best) / sum(float(scores[g.key].sum()) for g in allowed.opened))
        exact = sum(gap <= 1e-12 for gap in gaps) / draws
        yield label, f"{exact:.0%}", f"{100 * sum(gaps) / draws:.2f} %", f"{100 * max(gaps):.2f} %"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    heading = ("open axes", "exact, or better by finer steps", "score lost beyond it, mean", "worst")
    table = Table("The solver beside an exact one", heading, tuple(rows(parser.parse_args().draws)))
    print(markdown(table))  # noqa: T201 (a script's result)


if __name__ == "__main__":
    main()
