"""How long search and recovery may take where a run has to end in time (`max_minutes`)."""

from time import monotonic
from typing import Final

from kcrprune.run.context import Context
from kcrprune.training.pace import Pace

MARGIN: Final = 2.0  # seconds, for reports and files


def pace_of(context: Context, stage: str, steps: int) -> Pace:
    """The pace of a stage of that many steps; what is to follow keeps the time that its like has taken so far."""
    settings, now = context.settings, monotonic()
    if settings.max_minutes is None:
        return Pace(steps)
    until = context.started + 60 * settings.max_minutes - MARGIN - _taken(context, "load", "measure dense")
    if stage == "search":
        # each of the two plans is refitted, which costs about what the scores did
        left = until - 2 * _taken(context, "order", "score") - now
        of_search = steps * (2 if settings.search_weight_lr > 0 else 1)
        asked = of_search + context.config.recover_steps  # that a search does not declare: it acts on the clock alone
        until = now + left * of_search / asked
    return Pace(steps, until)


def say_early(context: Context, stage: str, pace: Pace, done: int) -> None:
    """Tells of a stage that the clock has ended."""
    if done < pace.steps and pace.ended:
        context.say(f"{stage}: {done:,} of {pace.steps:,} steps were done in the time that max_minutes leaves for them")


def _taken(context: Context, *parts: str) -> float:
    return sum(time.seconds for record in context.records.values() for time in record.times if time.stage in parts)
