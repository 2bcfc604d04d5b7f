"""Results of stages as files: tensors as safetensors, the rest as JSON, each stage in a folder that is whole or absent.

STORE/NAME-DIGEST/ holds `data.json`, `tensors.safetensors` and `record.json`. Nothing is pickled. Of several processes
the first reads and writes; the others get from it what it has.
A result that another run's store has is taken over from there, as links to the same files where the disk allows that.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, create_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, contiguous_format

from kcrprune import processes
from kcrprune.atomic import make_folder_atomically
from kcrprune.errors import KcrPruneError
from kcrprune.run.context import Record

DATA, TENSORS, RECORD = "data.json", "tensors.safetensors", "record.json"
SNAPSHOTS: Final = ".snapshots"  # behind the name of a stage's result: what is kept until it is whole
PLACE: Final = "$tensor"  # key of what stands in the JSON for a tensor: its name in the file of tensors

R = TypeVar("R")


class Result(BaseModel):
    """Data with tensors in it, which a stage gives to those after it."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Key:
    """A stage's result by its stage and everything that it depends on."""

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}-{self.digest}"


@dataclass(frozen=True)
class Packed:
    """A result apart: its tensors on the CPU by name, and JSON that says where they belong."""

    tensors: dict[str, Tensor]
    data: Any

    @property
    def not_finite(self) -> str | None:
        """The name of the first tensor that holds what is no finite number."""
        return next((name.strip("/") for name, tensor in self.tensors.items() if not tensor.isfinite().all()), None)


class Codec(Generic[R]):
    """Takes results of one type apart, and puts them together again."""

    def __init__(self, kind: Any) -> None:
        self.form: Any = create_model("Form", __base__=Result, value=(kind, ...))

    def pack(self, result: R) -> Packed:
        """A copy that shares no memory with `result`."""
        tensors: dict[str, Tensor] = {}
        return Packed(tensors, _apart(self.form(value=result).model_dump()["value"], "", tensors))

    def unpack(self, packed: Packed) -> R:
        """The result that was packed."""
        return self.form(value=_together(packed.data, packed.tensors)).value


class Store:
    """The results of stages below one folder; `others` are further stores that they may be taken from, named."""

    def __init__(self, folder: Path, others: Mapping[Path, str] = MappingProxyType({})) -> None:
        self.folder, self.others = folder, others
        self._sources: dict[Key, str] = {}

    def has(self, key: Key) -> bool:
        """Whether the whole result is here, or was elsewhere and is here now."""
        return processes.of_first(lambda: _is_whole(self.folder / str(key)) or self._take_over_(key))

    def source(self, key: Key) -> str | None:
        """The name of the store that a result was taken over from."""
        return self._sources.get(key)

    def record(self, key: Key) -> Record:
        """What a stage told."""
        return Record.model_validate(processes.of_first(lambda: self._json(key, RECORD)))

    def result(self, key: Key, codec: Codec[R]) -> R:
        """What a stage gave."""
        return codec.unpack(of_first(lambda: read_packed(self.folder / str(key))))

    def keep(self, key: Key, packed: Packed, record: Record) -> None:
        """Writes a result; KcrPruneError where the disk does not take it, and then nothing of it is here."""
        if processes.rank() == 0:
            write_packed(self.folder / str(key), packed, {RECORD: record.model_dump()})

    def snapshots(self, key: Key) -> Path:
        """The folder for those of a stage that is not whole yet."""
        return self.folder / f"{key}{SNAPSHOTS}"

    def drop_snapshots(self, key: Key | str = "*") -> None:
        """Removes those of a stage that is whole now, or all that are left."""
        for folder in self.folder.glob(f"{key}{SNAPSHOTS}") if processes.rank() == 0 else ():
            shutil.rmtree(folder, ignore_errors=True)

    def _take_over_(self, key: Key) -> bool:
        for store, name in self.others.items():
            found = store / str(key)
            if _is_whole(found):
                with suppress(KcrPruneError, OSError):  # then it is made
                    make_folder_atomically(self.folder / str(key), partial(_link, found))
                    self._sources[key] = name
                    return True
        return False

    def _json(self, key: Key, name: str) -> Any:
        return json.loads((self.folder / str(key) / name).read_text(encoding="utf-8"))


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (DATA, TENSORS, RECORD))


def _link(source: Path, folder: Path) -> None:
    """Puts the files of a result into a folder, without a copy where the disk allows it; nobody writes into them."""
    for name in (DATA, TENSORS, RECORD):
        try:
            (folder / name).hardlink_to(source / name)
        except OSError:
            shutil.copyfile(source / name, folder / name)


def of_first(make: Callable[[], Packed]) -> Packed:
    """What `make` gives to the first of several processes; the others do not call it."""
    made = make() if processes.rank() == 0 else None
    tensors = processes.tensors_of_first(lambda: made.tensors if made else {})
    return Packed(tensors, processes.of_first(lambda: made and made.data))


def read_packed(folder: Path) -> Packed:
    """What lies in a folder, in memory of its own: sums over a mapped file's may round in another order."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    return Packed(tensors, json.loads((folder / DATA).read_text(encoding="utf-8")))


def write_packed(path: Path, packed: Packed, beside: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Makes the folder, with further JSON files in it; KcrPruneError where the disk does not take it."""

    def fill(folder: Path) -> None:
        try:
            save_file(packed.tensors, folder / TENSORS)
        except SafetensorError as error:
            raise KcrPruneError(f"cannot write {path}: {error}") from error
        for name, data in {DATA: packed.data, **beside}.items():
            (folder / name).write_text(json.dumps(data), encoding="utf-8")

    needed = sum(tensor.nbytes for tensor in packed.tensors.values())
    make_folder_atomically(path, fill, needed=needed)


def _apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=contiguous_format)
        return {PLACE: name}
    if isinstance(value, dict):
        return {key: _apart(part, f"{name}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_apart(part, f"{name}/{index}", tensors) for index, part in enumerate(value)]
    return value


def _together(data: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(data, dict):
        if PLACE in data:
            return tensors[data[PLACE]]
        return {key: _together(part, tensors) for key, part in data.items()}
    if isinstance(data, list):
        return [_together(part, tensors) for part in data]
    return data
