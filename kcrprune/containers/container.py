"""What kind of file or folder a path is, and how its contents are reached."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from kcrprune.containers.contents import Contents, TensorRef
from kcrprune.containers.safetensors_file import is_safetensors, read_header
from kcrprune.containers.strict_json import read_object
from kcrprune.containers.torch_file import CALLS, MAGIC, read_stream, read_zip
from kcrprune.containers.unpickle import unpickle
from kcrprune.errors import CheckpointError

# files that are taken for the network of a folder, best first
FOLDER_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
CONFIGS: Final = ("config.json", "open_clip_config.json")  # beside the weights, best first
PREPROCESSOR: Final = "preprocessor_config.json"
SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")

# beginnings of files that people mistake for checkpoints, and what to tell them
FOREIGN: Final[dict[bytes, str]] = {
    b"version https://git-lfs": "is a git-lfs pointer and not the file itself; `git lfs pull` fetches it",
    b"<!doctype": "is a web page, so the download went wrong; fetch the file again",
    b"<html": "is a web page, so the download went wrong; fetch the file again",
    b"<?xml": "is an XML text, so the download may have gone wrong; fetch the file again",
    b"\x89hdf": "is an HDF5 file (Keras); only PyTorch and safetensors checkpoints are read",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"bzh": "is compressed with bzip2; unpack it first",
    b"\xfd7zxz": "is compressed with xz; unpack it first",
    b"gguf": "is a GGUF file; only PyTorch and safetensors checkpoints are read",
    b"\x93numpy": "is a numpy array; only PyTorch and safetensors checkpoints are read",
}
FOREIGN_SUFFIXES: Final[dict[str, str]] = {
    ".npz": "is a numpy archive (JAX, Flax), and timm reads those of ViTs: m = timm.create_model(NAME, "
    "checkpoint_path=FILE), then torch.save(m.state_dict(), 'model.pth') writes what opens here",
    ".distcp": "is a part of a distributed checkpoint of PyTorch; name its folder, which tells the way on",
    ".onnx": "is an ONNX graph, which cannot be trained or cut; name the checkpoint it came from",
}


def open_container(path: Path) -> Contents:
    """The contents of a checkpoint file or folder; CheckpointError with one sentence for anything that is none."""
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
        contents = _open_index(path) if path.name.endswith(".index.json") else _open_file(path)
        return _with_neighbours(contents, path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _open_folder(folder: Path) -> Contents:
    present = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder} is a distributed checkpoint of PyTorch; join its parts first: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pth"
        )
    present = present or sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not present:
        raise CheckpointError(f"the folder {folder} holds no weights ({', '.join(SUFFIXES)})")
    if len(present) > 1 and present[0].name not in FOLDER_FILES:
        names = ", ".join(file.name for file in present[:5])
        raise CheckpointError(f"the folder {folder} holds several checkpoints ({names}); name one of them")
    return replace(open_container(present[0]), path=folder)


def _with_neighbours(contents: Contents, folder: Path) -> Contents:
    """The contents with the JSON files that lie beside them."""
    config = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    preprocessor = folder / PREPROCESSOR
    return replace(
        contents,
        config=read_object(config) if config else {},
        preprocessor=read_object(preprocessor) if preprocessor.is_file() else {},
    )


def _open_index(path: Path) -> Contents:
    """The contents of shards that an index names: {"weight_map": {tensor: file}}."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} is no index of shards: it has no weight_map")
    tree: dict[str, Any] = {}
    shards = {name: _open_file(_inside(path.parent, name)) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        ref = shards[name].tree.get(tensor) if isinstance(shards[name].tree, dict) else None
        if not isinstance(ref, TensorRef):
            raise CheckpointError(f"{path} says that {name} holds {tensor[:80]!r}, and it does not")
        tree[tensor] = ref
    return Contents(
        path=path,
        files=tuple(file for shard in shards.values() for file in shard.files),
        container=f"{len(shards)} shards",
        tree=tree,
        foreign_names=tuple(sorted({name for shard in shards.values() for name in shard.foreign_names})),
    )


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder; a name or a link that leads elsewhere is refused.

    Hugging Face's cache is the exception: there every file is a link from snapshots/<revision> into ../../blobs.
    """
    if "\0" in name:
        raise CheckpointError(f"{folder} refers to {name[:200]!r}, which is no name of a file")
    file = folder / name
    home = folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(file.resolve().is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{folder} refers to {name[:200]!r}, which lies outside the folder; that is not followed")
    if not file.is_file():
        raise CheckpointError(f"{folder} lacks the shard {name[:200]!r}")
    return file


def _open_file(path: Path) -> Contents:
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise CheckpointError(f"{path} is empty")
    for beginning, sentence in FOREIGN.items():
        if start.lstrip().lower().startswith(beginning):
            raise CheckpointError(f"{path} {sentence}")
    return _reader(path, start)(path)


def _reader(path: Path, start: bytes) -> Callable[[Path], Contents]:
    if is_safetensors(path):
        return _safetensors
    if path.suffix in FOREIGN_SUFFIXES:
        raise CheckpointError(f"{path} {FOREIGN_SUFFIXES[path.suffix]}")
    if start.startswith(b"PK"):
        return _zip
    if start[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is a tar archive; unpack it first (torch before 0.1.10 wrote such files, not read)"
        )
    if start.lstrip()[:1] == b"{":
        raise CheckpointError(f"{path} is a JSON text and no weights; name the folder or the weights beside it")
    if start[:1] in (b"\x80", b"(", b"c", b"]", b"}"):  # protocol 2 and later; how those before begin
        return _pickle
    raise CheckpointError(f"{path} is no checkpoint that kcrprune knows: neither safetensors nor PyTorch")


def _safetensors(path: Path) -> Contents:
    header = read_header(path)
    return Contents(path, (path,), "safetensors file", dict(header.tensors), header.metadata)


def _zip(path: Path) -> Contents:
    data = read_zip(path)
    return Contents(path, (path,), "PyTorch file", data.tree, foreign_names=data.foreign_names)


def _pickle(path: Path) -> Contents:
    """A bare pickle, or the stream of pickles that torch wrote before 1.6."""
    with path.open("rb") as file:
        data = unpickle(file, str(path), None, CALLS)
    if data.tree == MAGIC:
        data = read_stream(path)
        return Contents(path, (path,), "PyTorch file (before 1.6)", data.tree, foreign_names=data.foreign_names)
    return Contents(path, (path,), "pickle", data.tree, foreign_names=data.foreign_names)
