"""The stage that decides by whose plan a network is cut, the scores' or the search's: a first look at both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf, isfinite, sqrt
from typing import Final

from torch import Tensor, nn

from kcrprune.families.given import glimpse
from kcrprune.method.objective import Objective
from kcrprune.plan import ChannelPlan
from kcrprune.run.context import Context
from kcrprune.run.opening import Network, Pool, Weights, objective_of
from kcrprune.run.ranking import Ranked, Searched, Tightened, by_group, refit
from kcrprune.run.spending import Budget, planned
from kcrprune.run.store import Result
from kcrprune.surgery.certificate import require_certificate
from kcrprune.surgery.narrow import cut_
from kcrprune.training.losses import HeldOut, make_objective

LOOKED_AT: Final = 1 / 4  # of the calibration images; what the plans differ by shows with as few, a choice of ours
SURE: Final = 2  # standard errors; at one a plan won that test images did not confirm
ENOUGH: Final = 8  # parts of the held-out images; fewer tell no error, a choice of ours
NAMES: Final = {"labels": "task loss", "distill": "distance"}  # of the parts of a loss

# the distance to the dense network alone, whatever the losses of the run
PLAIN: Final = {"task": "distill", "labels": False, "kernel_weight": 0.0, "kernel_norm": "relative", "smoothing": 0.0}


class Selected(Result):
    """The plan that is cut, and whether it is the search's."""

    plan: ChannelPlan
    searched: bool


@dataclass(frozen=True)
class Compared:
    """A mean loss on held-out images by the plan of the scores and by that of the search, and what the search adds."""

    name: str
    scores: float
    search: float
    added: float
    error: float  # standard error of `added`, from the same images under both plans

    @classmethod
    def of(cls, name: str, scores: Tensor, search: Tensor) -> "Compared":
        """From sums over parts of the images, (parts, 2): of the losses, and of images."""
        images, difference = float(scores[:, 1].sum()), search[:, 0] - scores[:, 0]
        before, after, added = (float(of[:, 0].sum()) / images for of in (scores, search, search - scores))
        rest, parts = difference - added * scores[:, 1], len(scores)
        error = sqrt(float(rest.square().sum()) * parts / (parts - 1)) / images if parts >= ENOUGH else inf
        return cls(name, before, after, added, error)

    @property
    def lower(self) -> bool:
        """Whether the search's is the lower beyond chance; what is no finite number is never lower."""
        if isfinite(self.search) and not isfinite(self.scores):
            return True
        return self.added < -SURE * self.error

    def told(self) -> dict[str, float | None]:
        """Its figures; None for what is no finite number."""
        figures = {"scores": self.scores, "search": self.search, "added": self.added, "error": self.error}
        return {name: figure if isfinite(figure) else None for name, figure in figures.items()}

    def __str__(self) -> str:
        error = f"± {self.error:.2g}" if isfinite(self.error) else "too few images to tell"
        return f"{self.name} {self.scores:.4g} to {self.search:.4g} ({error})"


def select(
    context: Context,
    network: Network,
    pool: Pool,
    budget: Budget,
    balanced: Weights | None,
    ranked: Ranked,
    tightened: Tightened | None,
    searched: Searched | None,
) -> Selected:
    """The scores' plan, unless the search's is better on held-out images by two standard errors, in all that counts.

    Equal scores are a start and no plan, so the search's is taken there. The cut of what is taken is proven.
    """
    before = tightened.ranked if tightened else ranked
    if searched is None or context.settings.ranked_by == "equal":
        scores = before if searched is None else searched
        selected = Selected(
            plan=planned(context, network, budget, by_group(scores.scores)), searched=searched is not None
        )
    else:
        plans = [planned(context, network, budget, by_group(scores.scores)) for scores in (before, searched)]
        moved, figures = plans[1].moved_from(plans[0]), list[Compared]()
        if moved > 0:
            figures = _first_look(
                context, network, pool, partial(searched_network, network, balanced, tightened, searched), plans
            )
        kept = bool(figures) and all(figure.lower for figure in figures)
        channels = sum(group.heads * group.width for group in budget.allowed.opened)
        _tell(context, {"steps": searched.steps, "moved": moved, "channels": channels}, figures, kept=kept)
        selected = Selected(plan=plans[kept], searched=kept)
    glimpsed = glimpse(pool.parts.calibration[0]).to(context.device)
    require_certificate(network.dense, network.groups, selected.plan, glimpsed)
    return selected


def _first_look(
    context: Context,
    network: Network,
    pool: Pool,
    whole: Callable[[], tuple[nn.Module, Weights | None]],
    plans: Sequence[ChannelPlan],
) -> list[Compared]:
    """The plans of the scores and of the search cut out of the same network, so that nothing else differs."""
    few = pool.parts.calibration[: ceil(LOOKED_AT * len(pool.parts.calibration))]
    objective = replace(objective_of(context, network, pool), use_dense=True)
    measure = HeldOut(objective, pool.parts.held_out, context.device, context.listener)
    found: list[dict[str, Tensor]] = []
    for name, plan in zip(("scores", "search"), plans, strict=True):
        model, goal = whole()
        pruned = cut_(model, plan)
        if context.settings.refit:
            refit(context, network, few, goal, pruned, plan, f"first look, {name}")
        found.append(measure.parts(pruned))
    return [Compared.of(NAMES.get(part, part), found[0][part], found[1][part]) for part in found[0] if part != "loss"]


def searched_network(
    network: Network, balanced: Weights | None, tightened: Tightened | None, searched: Searched | None
) -> tuple[nn.Module, Weights | None]:
    """What a plan is cut out of, and the weights that the cut is refitted towards.

    A search that trained the weights left the network with open gates to both: towards the balanced network the refit
    would take back what they have learned.
    """
    model = tightened.model(network) if tightened else network.with_weights(balanced)
    if searched is None or searched.weights is None:
        return model, balanced
    model.load_state_dict(searched.weights)
    return model, balanced if tightened else searched.weights


def distance_of(context: Context, network: Network) -> Objective:
    """The distance to the dense network, whatever else a run minimises."""
    plain = context.settings.model_copy(update=PLAIN)
    return make_objective(plain, network.followed, labelled=False, outputs=network.outputs)


def _tell(context: Context, counts: dict[str, int], figures: list[Compared], *, kept: bool) -> None:
    """One sentence, and the figures in it."""
    told = ["{steps:,} steps", "{moved:,} of {channels:,} channels moved"]
    verdict = "" if kept else "not better by two standard errors, the scores' plan " if figures else "the scores' plan "
    context.say(f"selection: {', '.join([*told, *map(str, figures), verdict + 'kept'])}".format(**counts))
    context.record.decisions["selection"] = {
        **counts,
        "kept": kept,
        **{figure.name: figure.told() for figure in figures},
    }
