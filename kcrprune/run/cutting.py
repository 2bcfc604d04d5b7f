"""The stages from the cut on: a network cut by its plan, refitted, and trained on."""

from math import isfinite

from kcrprune.errors import DivergedError
from kcrprune.measure.report import Accuracy
from kcrprune.method.kernel_complexity import Covariance
from kcrprune.plan import ChannelPlan
from kcrprune.run.context import Context
from kcrprune.run.deadline import pace_of, recovery_steps, say_early
from kcrprune.run.measuring import Reference, accuracy_on
from kcrprune.run.memory import back_at_once
from kcrprune.run.opening import Network, Pool, Weights, objective_of
from kcrprune.run.ranking import Searched, Tightened, refit
from kcrprune.run.selecting import Selected, distance_of, searched_network
from kcrprune.run.store import Result
from kcrprune.surgery.arranged import features_of
from kcrprune.surgery.narrow import cut_
from kcrprune.training.losses import HeldOut
from kcrprune.training.recover import Recovered, recover_


class Cut(Result):
    """A cut network, and its distance to the dense one on held-out images: after the refit, and before."""

    plan: ChannelPlan
    weights: Weights
    distance: float
    uncorrected: float | None = None  # None: not refitted
    trained: int = 0  # steps of the search that its weights have behind them


class Recovery(Result):
    """A network that was trained on after the cut, and how good it was before."""

    weights: Weights
    cut: Accuracy | None


def cut(
    context: Context,
    network: Network,
    pool: Pool,
    balanced: Weights | None,
    tightened: Tightened | None,
    searched: Searched | None,
    selected: Selected,
) -> Cut:
    """The network cut by the plan that was selected, and refitted; the search's plan out of what the search left."""
    searched = searched if selected.searched else None
    model, goal = searched_network(network, balanced, tightened, searched)
    measure = HeldOut(distance_of(context, network), pool.parts.held_out, context.device, context.listener)
    pruned, uncorrected = cut_(model, selected.plan), None
    name = "search" if selected.searched else "scores"
    if context.settings.refit:
        uncorrected = measure.loss(pruned)
        refit(context, network, pool.parts.calibration, goal, pruned, selected.plan, name, context.snapshots)
    distance = measure.loss(pruned)
    if not isfinite(distance):
        raise DivergedError(
            f"the network cut by its {name} answers what are no finite numbers; a higher --refit-ridge, or --no-refit, "
            "may help"
        )
    context.record.decisions["plans"] = {
        "ranking": context.settings.ranked_by,
        "before_refit": {} if uncorrected is None else {name: uncorrected},
        "held_out_distillation": {name: distance},
        "chosen": name,
    }
    return Cut(
        plan=selected.plan,
        weights=pruned.state_dict(),
        distance=distance,
        uncorrected=uncorrected,
        trained=searched.steps if searched and searched.weights is not None else 0,
    )


def recover(context: Context, network: Network, pool: Pool, reference: Reference, cut: Cut) -> Recovery | None:
    """Trains what the cut left; None where nothing is trained."""
    settings = context.settings
    steps = recovery_steps(settings, pool.parts, cut.trained)
    if steps == 0:
        return None
    model = network.pruned(cut.plan, cut.weights)
    with context.part("measure cut"):
        accuracy = accuracy_on(context, network, pool, model)
    if accuracy is not None and accuracy.top1 is not None:
        context.say(f"after cut and refit, before recovery: top-1 {100 * accuracy.top1:.2f} %")
    if accuracy is not None and accuracy.distance is not None:
        context.say(f"after cut and refit, before recovery: relative squared distance {accuracy.distance:.4g}")
    at_once = back_at_once(context, "recover", model, pool.parts.calibration)
    pace = pace_of(context, "recover", steps)
    with context.part("recover", steps):
        found = recover_(
            model,
            objective_of(context, network, pool),
            settings,
            context.accelerator,
            pool.parts.training.from_step,
            pool.parts.held_out,
            _seen(reference.seen(context.device), network, cut.plan),
            pace=pace,
            listener=context.listener,
            snapshots=context.snapshots,
            at_once=at_once,
        )
    say_early(context, "recover", pace, len(found.history))
    _remember(context, found)
    context.say_replaced("recover", pool.parts.training.replaced)
    context.say_waited("recover", pool.parts.training.waited)
    return Recovery(weights=model.state_dict(), cut=accuracy)


def _seen(dense: Covariance, network: Network, plan: ChannelPlan) -> Covariance:
    """The covariance of the dense network's features, in the order of those of the cut one."""
    if plan.stream is None:
        return dense
    return dense.taken(features_of(network.dense, network.groups, plan))


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
