"""The stages before the cut: balance, scores, a budget that tightens, and the search."""

import copy

import torch
from torch import Tensor, nn

from kcrprune.errors import CheckpointError
from kcrprune.events import StepDone
from kcrprune.method.budget import Scores, solve
from kcrprune.method.gates import Gates
from kcrprune.method.innovations import Innovations
from kcrprune.plan import Axis, ChannelPlan
from kcrprune.run.context import Context
from kcrprune.run.measuring import Reference
from kcrprune.run.opening import Network, Pool, Weights, allowed, objective_of
from kcrprune.run.store import Result
from kcrprune.surgery.balance import balance_
from kcrprune.surgery.expanded import expand_
from kcrprune.surgery.gated import add_gates_, remove_gates_
from kcrprune.surgery.pruned import apply_plan_
from kcrprune.surgery.refit import refit_
from kcrprune.training.innovations import innovations_of
from kcrprune.training.loop import endless
from kcrprune.training.reconstruct import Reconstruction
from kcrprune.training.scores import equal_scores, fisher_scores, magnitude_scores, random_scores
from kcrprune.training.search import search_


class Ranked(Result):
    """What each channel is worth; `innovations` are kept where a search needs them, by linear."""

    scores: dict[str, dict[Axis, Tensor]]
    innovations: dict[str, dict[str, Tensor]]


class Tightened(Result):
    """A network of dense shape that has been cut and refitted on the way to its target, and what is left to rank."""

    weights: Weights
    ranked: Ranked


class Searched(Result):
    """Scores that a search has learned, and the weights where it trained them as well."""

    scores: dict[str, dict[Axis, Tensor]]
    weights: Weights | None


def balance(context: Context, network: Network, pool: Pool) -> Weights | None:
    """The weights of the same function in the balanced basis; None: the dense ones."""
    if not context.settings.balance:
        return None
    model = network.with_weights(None)
    with context.part("balance"):
        balance_(model, network.sites, pool.parts.calibration)
    return model.state_dict()


def score(context: Context, network: Network, pool: Pool, balanced: Weights | None) -> Ranked:
    """The worth of every channel of the balanced network."""
    return _ranked(context, network, pool, network.with_weights(balanced))


def _ranked(context: Context, network: Network, pool: Pool, model: nn.Module) -> Ranked:
    settings, purse, scoring = context.settings, allowed(context, network), pool.parts.scoring
    generator = torch.Generator().manual_seed(settings.seed)
    innovations: dict[str, Innovations] = {}
    if settings.ranked_by == "innovation":
        with context.part("order"):
            innovations = innovations_of(model, purse.open_axes, purse.sites, scoring, generator)
    gates = _gate_(context, model, innovations)
    with context.part("score"):
        scores = _scores(settings.ranked_by, model, gates, scoring, generator)
    remove_gates_(model, gates)
    if not any(score.any() for of_site in scores.values() for score in of_site.values()):
        raise CheckpointError(
            f"every score is zero: on {sum(map(len, scoring)):,} images nothing that may be cut changes "
            "what the network answers; is its classifier trained?"
        )
    kept = {name: vars(found) for name, found in innovations.items()} if settings.searches else {}
    return Ranked(scores={site: dict(of_site) for site, of_site in scores.items()}, innovations=kept)


def _scores(ranking: str, model: nn.Module, gates: Gates, scoring: list[Tensor], generator: torch.Generator) -> Scores:
    if ranking == "magnitude":
        return magnitude_scores(model, gates)
    if ranking == "random":
        return random_scores(gates, generator)
    if ranking == "equal":
        return equal_scores(gates)
    return fisher_scores(model, gates, scoring, generator)


def _gate_(context: Context, model: nn.Module, innovations: dict[str, Innovations]) -> Gates:
    settings = context.settings
    return add_gates_(model, settings.axes, include=settings.include, exclude=settings.exclude, innovations=innovations)


def tighten(
    context: Context, network: Network, pool: Pool, balanced: Weights | None, ranked: Ranked
) -> Tightened | None:
    """Cuts and refits to shares above the target, each time back in dense shape; None where that is not asked for."""
    settings, purse = context.settings, allowed(context, network)
    if settings.tighten_steps == 1:
        return None
    model = network.with_weights(balanced)
    for number in range(1, settings.tighten_steps):
        share = settings.target_flops ** (number / settings.tighten_steps)
        plan = solve(purse, ranked.scores, share, network.opened.architecture.name)
        pruned = apply_plan_(copy.deepcopy(model), plan)
        if settings.refit:
            refit(context, network, pool, balanced, pruned, plan, f"to {share:.2f}")
        expand_(model, pruned, purse.sites, plan)
        ranked = _ranked(context, network, pool, model)
    return Tightened(weights=model.state_dict(), ranked=ranked)


def refit(
    context: Context,
    network: Network,
    pool: Pool,
    balanced: Weights | None,
    pruned: nn.Module,
    plan: ChannelPlan,
    name: str,
) -> None:
    """Corrects the linears of a cut network, in place, towards the balanced one."""
    stage, settings, sites = f"refit ({name})", context.settings, network.sites
    generator = torch.Generator().manual_seed(settings.seed)
    reconstruction = Reconstruction(settings.reconstruct_epochs, settings.reconstruct_lr, generator)
    with context.part(stage, len(sites)):
        refit_(
            pruned,
            network.with_weights(balanced),
            sites,
            plan,
            pool.parts.calibration,
            ridge=settings.refit_ridge,
            fit_block=reconstruction if settings.reconstruct_epochs > 0 else None,
            on_block=lambda done: context.listener(StepDone(stage, done)),
        )


def search(
    context: Context,
    network: Network,
    pool: Pool,
    reference: Reference,
    balanced: Weights | None,
    ranked: Ranked,
    tightened: Tightened | None,
) -> Searched | None:
    """Scores that gates learn under the budget, from the scores on; None where nothing is to be searched."""
    settings = context.settings
    if not settings.searches:
        return None
    weights, ranked = (tightened.weights, tightened.ranked) if tightened else (balanced, ranked)
    model = network.with_weights(weights)  # whose weights may be trained as well
    innovations = {
        name: Innovations(**{part: tensor.to(context.device) for part, tensor in parts.items()})
        for name, parts in ranked.innovations.items()
    }
    gates = _gate_(context, model, innovations)
    steps = settings.search_steps if settings.epochs is None else settings.epochs * len(pool.parts.gates)
    with context.part("search", steps):
        found = search_(
            model,
            gates,
            ranked.scores,
            network.macs,
            objective_of(context, network, pool),
            settings,
            context.accelerator,
            endless(pool.parts.weights),
            endless(pool.parts.gates),
            reference.seen,
            steps=steps,
            listener=context.listener,
        )
    remove_gates_(model, gates)
    context.remember("search", found.history)
    scores = {site: dict(of_site) for site, of_site in found.scores.items()}
    return Searched(scores=scores, weights=model.state_dict() if settings.search_weight_lr > 0 else None)
