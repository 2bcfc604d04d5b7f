"""The stages before the cut: balance, scores, a budget that tightens, and the search."""

import copy
from functools import partial
from typing import Final

from torch import Tensor, nn

from kcrprune.errors import CheckpointError, DivergedError
from kcrprune.events import StepDone
from kcrprune.method.budget import Scores, solve
from kcrprune.method.gates import Gates
from kcrprune.method.innovations import Innovations
from kcrprune.plan import Axis, ChannelPlan
from kcrprune.run.context import Context
from kcrprune.run.deadline import pace_of, say_early, search_steps
from kcrprune.run.measuring import Reference, plain_pass
from kcrprune.run.memory import back_at_once, keep_streams, room
from kcrprune.run.opening import Network, Pool, Weights, allowed, objective_of
from kcrprune.run.spending import Budget
from kcrprune.run.store import Result
from kcrprune.surgery.balance import balance_
from kcrprune.surgery.gated import add_gates_, remove_gates_
from kcrprune.surgery.narrow import close_norms_, cut_, expand_
from kcrprune.surgery.refit import memory_of_refit, refit_
from kcrprune.training.innovations import innovations_of
from kcrprune.training.portions import Portions
from kcrprune.training.randomness import generator
from kcrprune.training.reconstruct import Reconstruction
from kcrprune.training.scores import equal_scores, fisher_scores, magnitude_scores, random_scores
from kcrprune.training.search import search_
from kcrprune.training.snapshots import NO_SNAPSHOTS, Snapshots

OUT_OF_STEPS: Final = "it would take its steps out of those of the recovery, and recover_steps is 0"
OF_SUMS: Final = 0.5  # of the memory that is left; the rest is for what is computed on the way
Sites = dict[str, dict[Axis, Tensor]]  # scores by site, then axis: what has a place in a file


class Ranked(Result):
    """What each channel is worth; `innovations` are kept where a search needs them, by linear."""

    scores: Sites
    innovations: dict[str, dict[str, Tensor]]


class Tightened(Result):
    """A network of dense shape that has been cut and refitted on the way to its target, and what is left to rank."""

    plan: ChannelPlan  # of the last cut; closed in the norms over what it took
    weights: Weights
    ranked: Ranked

    def model(self, network: Network) -> nn.Module:
        """That network."""
        return close_norms_(network.with_weights(self.weights), self.plan)


class Searched(Result):
    """Scores that a search has learned in so many steps, and the weights where it trained them as well."""

    scores: Sites
    weights: Weights | None
    steps: int


def by_site(scores: Scores) -> Sites:
    """Scores in the form that is kept."""
    found: Sites = {}
    for (site, axis), score in scores.items():
        found.setdefault(site, {})[axis] = score
    return found


def by_group(scores: Sites) -> Scores:
    """Scores from the form that is kept."""
    return {(site, axis): score for site, of_site in scores.items() for axis, score in of_site.items()}


def balance(context: Context, network: Network, pool: Pool) -> Weights | None:
    """The weights of the same function in the balanced basis; None: the dense ones."""
    if not context.settings.balance:
        return None
    model = network.with_weights(None)
    with context.part("balance", plain_pass=plain_pass(context, network, pool.parts.calibration)):
        portions = Portions("balance", context.device, context.listener)
        portions.of_batches(pool.parts.calibration, partial(balance_, model, network.groups))
    return model.state_dict()


def score(context: Context, network: Network, pool: Pool, balanced: Weights | None) -> Ranked:
    """The worth of every channel of the balanced network."""
    return _ranked(context, network, pool, network.with_weights(balanced))


def _ranked(context: Context, network: Network, pool: Pool, model: nn.Module) -> Ranked:
    settings, opened, scoring = context.settings, allowed(context, network).opened, pool.parts.scoring
    innovations: dict[str, Innovations] = {}
    plain = plain_pass(context, network, scoring)
    at_once = back_at_once(context, "order and score", model, scoring)
    if settings.ranked_by == "innovation":
        with context.part("order", plain_pass=plain):
            space = OF_SUMS * room(context, context.device)
            innovations = Portions("order", context.device, context.listener, at_once).of_batches(
                scoring,
                lambda batches: innovations_of(
                    model, opened, batches, generator(settings.seed, "order", 0, "labels"), network.outputs, space
                ),
            )
    gates = add_gates_(model, network.groups, opened, innovations=innovations)
    with context.part("score", plain_pass=plain):
        scores = _scores(context, network, model, gates, scoring, at_once)
    remove_gates_(model, gates)
    if not any(score.any() for score in scores.values()):
        raise CheckpointError(
            f"every score is zero: on {sum(map(len, scoring)):,} images nothing that may be cut changes "
            "what the network answers; is its classifier trained?"
        )
    kept = {name: vars(found) for name, found in innovations.items()} if settings.searches else {}
    return Ranked(scores=by_site(scores), innovations=kept)


def _scores(
    context: Context, network: Network, model: nn.Module, gates: Gates, scoring: list[Tensor], at_once: int | None
) -> Scores:
    settings = context.settings
    if settings.ranked_by == "magnitude":
        return magnitude_scores(model, gates, network.groups)
    if settings.ranked_by == "random":
        return random_scores(gates, network.cost, generator(settings.seed, "score", 0, "scores"))
    if settings.ranked_by == "equal":
        return equal_scores(gates, network.cost)
    return Portions("score", context.device, context.listener, at_once).of_batches(
        scoring,
        lambda batches: fisher_scores(
            model, gates, batches, generator(settings.seed, "score", 0, "labels"), network.outputs
        ),
    )


def tighten(
    context: Context, network: Network, pool: Pool, budget: Budget, balanced: Weights | None, ranked: Ranked
) -> Tightened | None:
    """Cuts and refits to shares above the target, each time back in dense shape; None where that is not asked for."""
    settings, tightened = context.settings, None
    for number in range(1, settings.tighten_steps):
        model = tightened.model(network) if tightened else network.with_weights(balanced)
        share = budget.target ** (number / settings.tighten_steps)
        plan = solve(budget.allowed, by_group(ranked.scores), share, network.name)
        pruned = cut_(copy.deepcopy(model), plan)
        if settings.refit:
            refit(context, network, pool.parts.calibration, balanced, pruned, plan, f"to {share:.2f}")
        model = expand_(network.with_weights(None), pruned, plan)
        ranked = _ranked(context, network, pool, model)
        tightened = Tightened(plan=plan, weights=model.state_dict(), ranked=ranked)
    return tightened


def refit(
    context: Context,
    network: Network,
    calibration: list[Tensor],
    goal: Weights | None,
    pruned: nn.Module,
    plan: ChannelPlan,
    name: str,
    snapshots: Snapshots = NO_SNAPSHOTS,
) -> None:
    """Corrects the linears of a cut network, in place, towards the one with the weights `goal`, which it was cut from.

    Goes on from a snapshot of itself.
    """
    stage, settings = f"refit ({name})", context.settings

    def done(blocks: int) -> None:
        context.listener(StepDone(stage, blocks))
        snapshots.offer(lambda: {"blocks": blocks, "weights": pruned.state_dict()})

    first = snapshots.newest() or {"blocks": 0, "weights": copy.deepcopy(pruned.state_dict())}
    reconstruction = Reconstruction(settings.reconstruct_epochs, settings.reconstruct_lr, settings.seed, stage)
    plain = plain_pass(context, network, calibration)
    keep = keep_streams(context, memory_of_refit(network.dense, network.groups, calibration))

    def fit(batches: list[Tensor]) -> None:
        pruned.load_state_dict(first["weights"])
        refit_(
            pruned,
            network.with_weights(goal),
            network.groups,
            plan,
            batches,
            ridge=settings.refit_ridge,
            keep=keep,
            fit_block=reconstruction if settings.reconstruct_epochs > 0 else None,
            on_block=done,
            begin=first["blocks"],
        )

    with context.part(stage, len(plan.blocks), plain_pass=plain):
        Portions(stage, context.device, context.listener).of_batches(calibration, fit)


def search(
    context: Context,
    network: Network,
    pool: Pool,
    reference: Reference,
    balanced: Weights | None,
    ranked: Ranked,
    tightened: Tightened | None,
) -> Searched | None:
    """Scores that gates learn under the budget, from the scores on; None where nothing is searched, or it diverged."""
    settings = context.settings
    if not settings.searches:
        if settings.search_steps > 0:
            why = "its gates keep to MACs, and the target is a time" if settings.timed else OUT_OF_STEPS
            context.say(f"no search: {why}")
        return None
    model = tightened.model(network) if tightened else network.with_weights(balanced)  # may be trained as well
    at_once = back_at_once(context, "search", model, pool.parts.calibration)
    ranked = tightened.ranked if tightened else ranked
    innovations = {
        name: Innovations(**{part: tensor.to(context.device) for part, tensor in parts.items()})
        for name, parts in ranked.innovations.items()
    }
    gates = add_gates_(model, network.groups, allowed(context, network).opened, innovations=innovations)
    steps = search_steps(settings, pool.parts)
    pace = pace_of(context, "search", steps)
    try:
        with context.part("search", steps):
            found = search_(
                model,
                gates,
                by_group(ranked.scores),
                network.cost,
                objective_of(context, network, pool),
                settings,
                context.accelerator,
                pool.parts.weights.from_step,
                pool.parts.gates.from_step,
                reference.seen(context.device),
                pace=pace,
                listener=context.listener,
                snapshots=context.snapshots,
                at_once=at_once,
            )
    except DivergedError as error:
        if settings.ranked_by == "equal":
            raise
        context.say(f"{error}; the plan of the scores is kept", True)
        return None
    remove_gates_(model, gates)
    say_early(context, "search", pace, len(found.history))
    context.remember("search", found.history)
    for batches in (pool.parts.gates, pool.parts.weights):
        context.say_replaced(batches.stage, batches.replaced)
    context.say_waited("search", pool.parts.gates.waited + pool.parts.weights.waited)
    return Searched(
        scores=by_site(found.scores),
        weights=model.state_dict() if settings.search_weight_lr > 0 else None,
        steps=len(found.history),
    )
