"""The stages from the cut on: each candidate cut and refitted, the nearest one chosen and trained on."""

from math import inf, isfinite
from typing import Final

from torch import nn

from kcrprune.errors import DivergedError
from kcrprune.families.given import glimpse
from kcrprune.measure.report import Accuracy
from kcrprune.method.budget import Scores
from kcrprune.plan import ChannelPlan
from kcrprune.run.context import Context
from kcrprune.run.deadline import pace_of, say_early
from kcrprune.run.measuring import Reference, accuracy_on
from kcrprune.run.opening import Network, Pool, Weights, objective_of
from kcrprune.run.ranking import Ranked, Searched, Tightened, by_group, refit
from kcrprune.run.spending import Budget, planned
from kcrprune.run.store import Result
from kcrprune.surgery.certificate import require_certificate
from kcrprune.surgery.narrow import cut_
from kcrprune.training.losses import HeldOut, make_objective
from kcrprune.training.recover import Recovered, recover_

# the distance to the dense network alone, whatever the losses of the run
PLAIN: Final = {"task": "distill", "labels": False, "kernel_weight": 0.0, "kernel_norm": "relative", "smoothing": 0.0}


class Cut(Result):
    """A cut network, and its distance to the dense one on held-out images: after the refit, and before."""

    plan: ChannelPlan
    weights: Weights
    distance: float
    uncorrected: float | None = None  # None: not refitted


class Recovery(Result):
    """A network that was trained on after the cut, and how good it was before."""

    weights: Weights
    cut: Accuracy | None


def cut_searched(
    context: Context,
    network: Network,
    pool: Pool,
    budget: Budget,
    balanced: Weights | None,
    tightened: Tightened | None,
    searched: Searched | None,
) -> Cut | None:
    """The plan of the search; None without one."""
    if searched is None:
        return None
    model = tightened.model(network) if tightened else network.with_weights(balanced)
    if searched.weights is not None:
        model.load_state_dict(searched.weights)
    return _cut(context, network, pool, budget, balanced, model, by_group(searched.scores), "search")


def cut_scored(
    context: Context,
    network: Network,
    pool: Pool,
    budget: Budget,
    balanced: Weights | None,
    ranked: Ranked,
    tightened: Tightened | None,
) -> Cut | None:
    """The plan of the scores; None for equal ones, which are a start and no plan."""
    if context.settings.ranked_by == "equal":
        return None
    model = tightened.model(network) if tightened else network.with_weights(balanced)
    scores = (tightened.ranked if tightened else ranked).scores
    return _cut(context, network, pool, budget, balanced, model, by_group(scores), "scores")


def _cut(
    context: Context,
    network: Network,
    pool: Pool,
    budget: Budget,
    balanced: Weights | None,
    model: nn.Module,
    scores: Scores,
    name: str,
) -> Cut:
    settings = context.settings
    distance = make_objective(
        settings.model_copy(update=PLAIN), network.followed, labelled=False, outputs=network.outputs
    )
    measure = HeldOut(distance, pool.parts.held_out, context.device, context.listener)
    plan = planned(context, network, budget, scores)
    require_certificate(network.dense, network.groups, plan, glimpse(pool.parts.calibration[0]).to(context.device))
    pruned, uncorrected = cut_(model, plan), None
    if settings.refit:
        uncorrected = measure.loss(pruned)
        refit(context, network, pool, balanced, pruned, plan, name, context.snapshots)
    found = measure.loss(pruned)
    if not isfinite(found):
        context.say(f"cut ({name}): the network answers what are no finite numbers", True)
    return Cut(
        plan=plan, weights=pruned.state_dict(), distance=found if isfinite(found) else inf, uncorrected=uncorrected
    )


def choose(context: Context, searched: Cut | None, scored: Cut | None) -> Cut:
    """The candidate that stays closest to the dense network."""
    candidates = {name: cut for name, cut in (("search", searched), ("scores", scored)) if cut is not None}
    best = min(candidates, key=lambda name: candidates[name].distance)
    if candidates[best].distance == inf:
        raise DivergedError(
            f"the network cut by its {best} answers what are no finite numbers; a higher --refit-ridge, or --no-refit, "
            "may help"
        )
    context.record.decisions["plans"] = {
        "ranking": context.settings.ranked_by,
        "before_refit": {n: cut.uncorrected for n, cut in candidates.items() if cut.uncorrected is not None},
        "held_out_distillation": {name: cut.distance for name, cut in candidates.items()},
        "chosen": best,
    }
    if len(candidates) > 1:
        figures = ", ".join(f"{name} {cut.distance:.3g}" for name, cut in candidates.items())
        context.say(f"held-out distance to the dense network by plan: {figures}; kept: {best}")
    return candidates[best]


def recover(context: Context, network: Network, pool: Pool, reference: Reference, cut: Cut) -> Recovery | None:
    """Trains what the cut left; None where nothing is trained."""
    settings = context.settings
    if settings.recover_steps == 0:
        return None
    model = network.pruned(cut.plan, cut.weights)
    with context.part("measure cut"):
        accuracy = accuracy_on(context, network, pool, model)
    if accuracy is not None and accuracy.top1 is not None:
        context.say(f"after cut and refit, before recovery: top-1 {100 * accuracy.top1:.2f} %")
    if accuracy is not None and accuracy.distance is not None:
        context.say(f"after cut and refit, before recovery: relative squared distance {accuracy.distance:.4g}")
    steps = settings.recover_steps if settings.epochs is None else settings.epochs * len(pool.parts.training)
    pace = pace_of(context, "recover", steps)
    with context.part("recover", steps):
        found = recover_(
            model,
            objective_of(context, network, pool),
            settings,
            context.accelerator,
            pool.parts.training.from_step,
            pool.parts.held_out,
            reference.seen(context.device),
            pace=pace,
            listener=context.listener,
            snapshots=context.snapshots,
        )
    say_early(context, "recover", pace, len(found.history))
    _remember(context, found)
    context.say_replaced("recover", pool.parts.training.replaced)
    context.say_waited("recover", pool.parts.training.waited)
    return Recovery(weights=model.state_dict(), cut=accuracy)


def _remember(context: Context, found: Recovered) -> None:
    context.remember("recover", found.history)
    context.record.decisions["recover"] = {
        "held_out_before": found.loss_before,
        "held_out_after": found.loss_after,
        "kept_step": found.kept_step,
    }
    if found.stopped:
        context.say(f"{found.stopped}; the best network from before was kept", True)
    elif found.kept_step == 0:
        context.say("recovery did not lower the held-out loss; the network before it was kept")
