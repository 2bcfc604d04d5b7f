"""A stage of a run, and the one loop that executes stages or takes what a store has kept of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import sha256
from typing import Any, Generic, TypeVar

from kcrprune.config import RunConfig
from kcrprune.errors import DivergedError, KcrPruneError
from kcrprune.plan import canonical_json
from kcrprune.run.context import Context, Record
from kcrprune.run.snapshots import FolderSnapshots
from kcrprune.run.store import Codec, Key, Store, of_first
from kcrprune.training.snapshots import NO_SNAPSHOTS

R = TypeVar("R")


@dataclass(frozen=True)
class Stage(Generic[R]):
    """A step of a run; `make` is called with the context and the results of the stages that it comes after."""

    name: str
    reads: tuple[str, ...]  # settings that change its result
    after: tuple[str, ...]  # stages whose results it takes
    make: Callable[..., R]
    kept: Codec[R] | None = None  # how the result becomes files; None: it is made each time
    only: str = ""  # the setting without which it gives nothing, which is not kept; "": always
    version: int = 1  # raised when the same settings give another result
    fingerprint: Callable[[R], str] | None = None  # of what it reads from outside, a file or images

    def keeps(self, config: RunConfig) -> bool:
        """Whether its result becomes files."""
        return self.kept is not None and (not self.only or bool(getattr(config, self.only)))

    def key(self, config: RunConfig, keys: dict[str, Key], fingerprint: str = "") -> Key:
        """What its result depends on: the name, and a digest over everything that changes it."""
        values = {name: getattr(config, name) for name in self.reads}
        before = {name: keys[name].digest for name in self.after}
        text = canonical_json([self.name, self.version, values, before, fingerprint])
        return Key(self.name, sha256(text.encode()).hexdigest()[:16])


@dataclass
class Results:
    """Results of stages by name, read from their files when they are first asked for, and what they depend on."""

    values: dict[str, Callable[[], Any]] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]()


def execute(
    stages: Sequence[Stage],
    context: Context,
    store: Store | None = None,
    given: Results | None = None,
    *,
    wanted: Sequence[str],
) -> Results:
    """The results of the `wanted` stages; of those in between, what the store has, or can take over, is not made again.

    `given` are results of an earlier call. A result is forgotten behind the last stage that takes it, and goes the way
    over its files' form even in memory, so that a run that was stopped goes on with the very same numbers.
    """
    given = given or Results()
    found = Results(dict(given.values), dict(given.keys))
    kept, told = list[tuple[Record, str | None]](), False
    for number, stage in enumerate(stages):
        if stage.name in found.keys:
            continue
        key = stage.key(context.config, found.keys)
        if store is not None and stage.kept is not None and stage.keeps(context.config) and store.has(key):
            context.records[stage.name] = store.record(key)
            kept.append((context.records[stage.name], store.source(key)))
            found.values[stage.name] = cache(partial(store.result, key, stage.kept))
        else:
            if kept and not told:
                told = context.continues_after(kept)
            result = _made(stage, context, found, store, key)
            found.values[stage.name] = partial(_same, result)
            if stage.fingerprint is not None:
                key = stage.key(context.config, found.keys, stage.fingerprint(result))
        found.keys[stage.name] = key
        needed = {name for later in stages[number + 1 :] for name in later.after}.union(wanted)
        found.values = {name: value for name, value in found.values.items() if name in needed}
    return found


def _made(stage: Stage[R], context: Context, found: Results, store: Store | None, key: Key) -> R:
    """The result of a stage as everything after it sees it, the first process's for all of them.

    A store that is full costs a warning, not the run.
    """
    context.snapshots = NO_SNAPSHOTS if store is None else _snapshots(context, store, key)
    with context.doing(stage.name, stage.reads) as record:
        result = stage.make(context, *(found[name] for name in stage.after))
        if stage.kept is None or not stage.keeps(context.config):
            return result
        packed = of_first(partial(stage.kept.pack, result))
        if name := packed.not_finite:
            raise DivergedError(
                f"{stage.name}: {name} holds what are no finite numbers, as all that follows would; look at the "
                "images and the weights, or try --device cpu"
            )
    if store is not None:
        try:
            store.keep(key, packed, record)
            store.drop_snapshots(key)
        except KcrPruneError as error:
            context.tell(f"{error}; the run goes on, and would have to make this again if it were stopped", True)
    return stage.kept.unpack(packed)


def _snapshots(context: Context, store: Store, key: Key) -> FolderSnapshots:
    return FolderSnapshots(store.snapshots(key), 60 * context.config.snapshot_minutes, context.tell)


def _same(result: R) -> R:
    return result
