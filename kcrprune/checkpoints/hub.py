"""Names of the Hugging Face hub, timm's among them: the files that one stands for, in the hub's own cache.

Weights and what is said of them are fetched, as files that our own reader opens; code never is.
"""

import glob
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import timm
from huggingface_hub import HfApi, errors, snapshot_download

from kcrprune.checkpoints.registry import bare_name
from kcrprune.containers.container import CONFIGS, FOLDER_FILES, PREPROCESSOR
from kcrprune.containers.contents import some
from kcrprune.errors import CheckpointError, FetchError
from kcrprune.printable import printable

PREFIX: Final = re.compile(r"hf[-_]hub:")  # timm's
NAME: Final = re.compile(r"[\w.-]+/[\w-][\w.-]*(@[\w./-]+)?")
FILE: Final = re.compile(r".*\.(pth|pt|bin|ckpt|tar|pkl|safetensors|onnx|npz)")
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
PICKLED: Final = (".bin", ".pth", ".pt", ".ckpt")
SHARD: Final = re.compile(r"-\d+-of-\d+")
PATIENCE: Final = 10.0  # seconds; ours, and huggingface_hub's for each file


@dataclass(frozen=True)
class Fetched:
    """The weights of a repository at a commit; what is said of them lies beside."""

    name: str  # as the user wrote it
    repository: str
    revision: str
    weights: Path
    newest: bool  # whether the hub was asked what the name stands for now

    @property
    def source(self) -> str:
        """What names these weights for good."""
        return f"{self.repository}@{self.revision}"

    @property
    def title(self) -> str:
        """What a run's folder and files of these weights are called after."""
        return self.repository.rpartition("/")[2]

    @property
    def note(self) -> str:
        """Where the weights come from, for people."""
        found = f"weights: {self.repository} of the Hugging Face hub, revision {self.revision}"
        return found if self.newest else f"{found}, from the cache; the hub was not reached"


def fetched(path: Path) -> Fetched | None:
    """The files that a name stands for; None for whatever is no name, and where a file or folder is called so.

    `timm/NAME`, with timm's tag or its usual one, and `hf-hub:ORG/NAME`; `@REVISION` may follow. What the cache has is
    not fetched again. FetchError where the hub is not reached and the cache has no weights; CheckpointError where it
    knows no such name, gives it to others alone, or has no weights there.
    """
    name = path.as_posix()
    if path.exists() or not _is_name(name):
        return None
    repository, _, revision = PREFIX.sub("", name).partition("@")
    repository = _of_timm(repository)
    if COMMIT.fullmatch(revision) and (found := _cached(name, repository, revision, newest=True)):
        return found
    try:
        return _from_hub(name, repository, revision or None)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"the Hugging Face hub gives no {printable(name)} ({_reason(error)}); correct the name, or, where it is "
            "not for everybody, `hf auth login`"
        ) from error
    except ValueError as error:  # of huggingface_hub, about names
        raise CheckpointError(f"{printable(name)} is no name of the Hugging Face hub: {_reason(error)}") from error
    except (OSError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage] (whichever library it uses)
        if found := _cached(name, repository, revision or None, newest=False):
            return found
        raise FetchError(
            f"{printable(name)} cannot be fetched ({_reason(error)}), and the cache does not have it; where there is "
            f"a connection, `hf download {repository} --local-dir FOLDER` fetches a folder that can be named here"
        ) from error


def require_present(path: Path) -> None:
    """CheckpointError for what is no path here, with the name that fetches it where it may be one of the hub's."""
    name = path.as_posix()
    if path.exists():
        return
    if PREFIX.match(name):
        raise CheckpointError(f"{printable(name)} is no name of the Hugging Face hub; write hf-hub:ORG/NAME[@REVISION]")
    if "/" not in name and timm.is_model(bare_name(name)):
        raise CheckpointError(f"there is no file {name}; timm/{name} fetches the network of timm that is called so")
    if NAME.fullmatch(name) and not FILE.fullmatch(name) and not path.parent.exists():
        raise CheckpointError(
            f"there is no file {name}; if it is a name of the Hugging Face hub, hf-hub:{name} fetches it"
        )
    if not path.parent.exists():
        raise CheckpointError(f"{path} does not exist, nor does the folder {path.parent}")


def _is_name(name: str) -> bool:
    """Whether something is meant for the hub: by timm's prefix, or as a name in timm's own place there."""
    if match := PREFIX.match(name):
        return bool(NAME.fullmatch(name, match.end()))
    return name.startswith("timm/") and bool(NAME.fullmatch(name)) and not FILE.fullmatch(name)


def _of_timm(repository: str) -> str:
    """Where the weights of a network of timm lie: under its usual tag where none is named, or at their authors'."""
    name = repository.removeprefix("timm/")
    if name == repository or not timm.is_model(bare_name(name)):
        return repository
    with suppress(RuntimeError):  # a tag that this timm does not know
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.hf_hub_id:
            return str(config.hf_hub_id)
        if config is not None and config.url:
            raise CheckpointError(f"timm's weights of {name} are not on the hub; fetch {config.url}, and name the file")
    return repository


def _from_hub(name: str, repository: str, revision: str | None) -> Fetched:
    info = HfApi().model_info(repository, revision=revision, timeout=PATIENCE)
    names = [file.rfilename for file in info.siblings or ()]
    chosen = _chosen(names)
    if chosen is None:
        raise CheckpointError(f"{repository} holds no weights (.safetensors, {', '.join(PICKLED)})")
    if len(chosen) > 1:
        raise CheckpointError(
            f"{repository} holds several checkpoints ({some(chosen)}); `hf download {repository} FILE --local-dir "
            "FOLDER` fetches one, then name that"
        )
    wanted = [glob.escape(file) for file in _with_shards(chosen[0], names)]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    return Fetched(name, repository, folder.name, folder / chosen[0], newest=True)


def _cached(name: str, repository: str, revision: str | None, *, newest: bool) -> Fetched | None:
    """What the cache has of a repository, if there are weights among it."""
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[]))
    except (OSError, ValueError):
        return None
    chosen = _chosen(file.name for file in folder.iterdir())
    return Fetched(name, repository, folder.name, folder / chosen[0], newest) if chosen and len(chosen) == 1 else None


def _chosen(names: Iterable[str]) -> list[str] | None:
    """The weights of a repository, one file or the index of several; more than one where nothing tells which.

    Of equals, those that are safetensors.
    """
    present = [name for name in names if "/" not in name]
    usual = sorted((name for name in FOLDER_FILES if name in present), key=lambda name: ".safetensors" not in name)
    if usual and (".safetensors" in usual[0] or not _safe(present)):
        return usual[:1]
    others = _safe(present) or [name for name in present if Path(name).suffix in PICKLED]
    return sorted(others) or None


def _safe(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors") and not SHARD.search(name)]


def _with_shards(weights: str, names: Iterable[str]) -> list[str]:
    """The weights with their shards, and the few texts beside them that say how they are used."""
    stem, _, suffix = weights.removesuffix(".index.json").rpartition(".")
    shard = re.compile(rf"{re.escape(stem)}{SHARD.pattern}\.{suffix}")
    shards = [name for name in names if weights.endswith(".index.json") and shard.fullmatch(name)]
    return [*(name for name in (*CONFIGS, PREPROCESSOR) if name in names), *shards, weights]


def _reason(error: Exception) -> str:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__), 160)
