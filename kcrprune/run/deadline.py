"""How long search and recovery take: their steps, and what the clock leaves of them (`max_minutes`)."""

from time import monotonic
from typing import Final

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.run.context import Context
from kcrprune.training.pace import Pace
from kcrprune.training.parts import Parts

MARGIN: Final = 2.0  # seconds, for reports and files


def search_steps(config: RunConfig, parts: Parts) -> int:
    """Of a search; one that trains gates and weights together takes its steps out of those of the recovery."""
    if not config.searches_jointly:
        return config.search_steps if config.epochs is None else config.epochs * len(parts.gates)
    return round(recovery_steps(config, parts) * min(1.0, config.search_steps / config.recover_steps))


def recovery_steps(config: RunConfig, parts: Parts, trained: int = 0) -> int:
    """Of a recovery, where the search has trained the weights for so many of them."""
    steps = config.recover_steps and (
        config.recover_steps if config.epochs is None else config.epochs * len(parts.training)
    )
    return max(0, steps - trained)


def pace_of(context: Context, stage: str, steps: int) -> Pace:
    """The pace of a stage of that many steps; what is to follow keeps the time that its like has taken so far."""
    settings, now = context.settings, monotonic()
    if settings.max_minutes is None:
        return Pace(steps)
    until = context.started + 60 * settings.max_minutes - MARGIN - _taken(context, "load", "measure dense")
    if stage == "search":
        # the plans are looked at, half a refit, and one is refitted, which costs about what the scores did
        left = until - 1.5 * _taken(context, "order", "score") - now
        of_search = steps * (2 if settings.search_weight_lr > 0 and not settings.searches_jointly else 1)
        asked = of_search + context.config.recover_steps  # that a search does not declare: it acts on the clock alone
        until = now + left * of_search / asked
    return Pace(steps, processes.of_first(lambda: until))


def say_early(context: Context, stage: str, pace: Pace, done: int) -> None:
    """Tells of a stage that the clock has ended."""
    if done < pace.steps and pace.ended:
        context.say(f"{stage}: {done:,} of {pace.steps:,} steps were done in the time that max_minutes leaves for them")


def _taken(context: Context, *parts: str) -> float:
    return sum(time.seconds for record in context.records.values() for time in record.times if time.stage in parts)
