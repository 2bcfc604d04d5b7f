"""The stages of a run, in order: the one table that says what each reads and what it follows from.

The first stages, which refuse, and the last one, which writes, are made each time; all others are kept.
"""

from dataclasses import replace
from functools import partial
from typing import Final

from kcrprune.config import NETWORK
from kcrprune.run import (
    cutting,
    given,
    given_saving,
    measuring,
    opening,
    pricing,
    ranking,
    saving,
    selecting,
    spending,
)
from kcrprune.run.context import ALL
from kcrprune.run.given import Source
from kcrprune.run.stage import Stage
from kcrprune.run.store import Codec

IMAGES: Final = (
    *("data", "dataset", "train_split", "val_split", "class_map", "labels", "generated_images", "hflip"),
    *("calibration_images", "score_images", "search_split", "batch_size"),
)
TARGETS: Final = ("target_flops", "target_latency")
ALLOWED: Final = ("axes", "include", "exclude", "round_to", "min_width")  # what may be cut
RANKING: Final = ("ranked_by", "searches")
SEARCHING: Final = ("searches", "timed", "searches_jointly", "search_steps", "recover_steps", "epochs")
REFIT: Final = ("refit", "refit_ridge", "reconstruct_epochs", "reconstruct_lr")
LOSSES: Final = ("task", "labels", "smoothing", "distill_temperature", "kernel_weight", "kernel_norm")
TRAINING: Final = ("weight_decay", "clip_grad", "kernel_rank", "kernel_every", "precision", "seed")

OPEN: Final = Stage(
    name="open",
    reads=(*NETWORK, "teacher", "seed"),
    after=(),
    make=opening.open_network,
    fingerprint=lambda network: network.digest,
)
PLACE: Final = Stage(
    name="place",
    reads=("timed", "latency_table", "latency_batch"),
    after=("open",),
    make=pricing.open_place,
    fingerprint=lambda place: place.fingerprint if place else "",
)
TARGET: Final = Stage(
    name="target",
    reads=(*TARGETS, *ALLOWED),
    after=("open", "place"),
    make=spending.require_spendable,
)
POOL: Final = Stage(
    name="images",
    reads=(*IMAGES, "seed"),
    after=("open",),
    make=opening.open_pool,
    fingerprint=lambda pool: pool.fingerprint,
)
TASK: Final = Stage(
    name="task",
    reads=ALL,
    after=("open", "images"),
    make=opening.require_task,
)
TIMES: Final = Stage(
    name="times",
    reads=("timed", *ALLOWED),
    after=("open", "place"),
    make=pricing.price,
    kept=Codec(pricing.Times | None),
    only="timed",
)
BUDGET: Final = Stage(
    name="budget",
    reads=(*TARGETS, *ALLOWED),
    after=("open", "times"),
    make=spending.budget,
)
DENSE: Final = Stage(
    name="dense",
    reads=("kernel_rank",),
    after=("open", "images"),
    make=measuring.measure_dense,
    kept=Codec(measuring.Reference),
)
BALANCE: Final = Stage(
    name="balance",
    reads=("balance",),
    after=("open", "images"),
    make=ranking.balance,
    kept=Codec(opening.Weights | None),
)
SCORE: Final = Stage(
    name="score",
    reads=(*RANKING, *ALLOWED, "seed"),
    after=("open", "images", "balance"),
    make=ranking.score,
    kept=Codec(ranking.Ranked),
)
TIGHTEN: Final = Stage(
    name="tighten",
    reads=("tighten_steps", *RANKING, *ALLOWED, *REFIT, "seed"),
    after=("open", "images", "budget", "balance", "score"),
    make=ranking.tighten,
    kept=Codec(ranking.Tightened | None),
)
SEARCH: Final = Stage(
    name="search",
    reads=(
        *("ranked_by", "search_lr", "search_spread", "search_weight_lr"),
        *("temperature", "temperature_floor", "target_flops", "max_minutes"),
        *SEARCHING,
        *ALLOWED,
        *LOSSES,
        *TRAINING,
    ),
    after=("open", "images", "dense", "balance", "score", "tighten"),
    make=ranking.search,
    kept=Codec(ranking.Searched | None),
)
SELECT: Final = Stage(
    name="select",
    reads=("ranked_by", *REFIT, *LOSSES, "seed"),
    after=("open", "images", "budget", "balance", "score", "tighten", "search"),
    make=selecting.select,
    kept=Codec(selecting.Selected),
)
CUT: Final = Stage(
    name="cut",
    reads=("ranked_by", *REFIT, "distill_temperature", "seed"),
    after=("open", "images", "balance", "tighten", "search", "select"),
    make=cutting.cut,
    kept=Codec(cutting.Cut),
)
RECOVER: Final = Stage(
    name="recover",
    reads=("recover_steps", "epochs", "lr", "warmup_steps", "keep_best", "max_minutes", *LOSSES, *TRAINING),
    after=("open", "images", "dense", "cut"),
    make=cutting.recover,
    kept=Codec(cutting.Recovery | None),
)
MEASURE: Final = Stage(
    name="measure",
    reads=("kernel_rank", "dtype"),
    after=("open", "images", "dense", "cut", "recover"),
    make=saving.measure_pruned,
    kept=Codec(saving.Measured),
)
SAVE: Final = Stage(
    name="save",
    reads=ALL,
    after=("open", "images", "times", "dense", "cut", "recover", "measure"),
    make=saving.save,
)

# cheap; whatever can be refused is refused here, before there is a folder
REFUSALS: Final = (OPEN, PLACE, TARGET, POOL, TASK)
STAGES: Final = (
    *(*REFUSALS, TIMES, BUDGET, DENSE, BALANCE, SCORE, TIGHTEN, SEARCH),
    *(SELECT, CUT, RECOVER, MEASURE, SAVE),
)


def in_memory(source: Source) -> tuple[Stage, ...]:
    """The same stages for a network in memory, which is opened, measured and saved in another way."""
    others = {
        "open": replace(OPEN, make=partial(given.open_given, source)),
        "images": replace(POOL, make=partial(given.open_feeds, source)),
        "task": replace(TASK, make=given.require_given_task),
        "measure": replace(MEASURE, make=given_saving.measure_given, kept=Codec(given_saving.GivenFigures)),
        "save": replace(SAVE, make=given_saving.save_run),
    }
    return tuple(others.get(stage.name, stage) for stage in STAGES)
