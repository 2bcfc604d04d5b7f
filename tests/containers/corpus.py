"""Small honest files of every kind that is opened, and files that were made to hurt; what fuzzing starts from."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import timm
import torch
from safetensors.torch import save

from kcrprune.artifact.artifact import save_model
from kcrprune.plan import Architecture, Preprocessing
from kcrprune.surgery.narrow import full_plan
from tests.checkpoints import ways
from tests.graphs import graphs

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
ARCHITECTURE = Architecture(family="vit", name="vit_tiny_patch16_224", arguments=SIZES)


@dataclass(frozen=True)
class Sample:
    """One file, or the main file of a folder with others beside it."""

    name: str
    data: bytes
    beside: dict[str, bytes]


def honest(folder: Path) -> list[Sample]:
    """Files that open, a few kilobytes each."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE.name, **SIZES).eval()
    swin = ways.timm_swin(img_size=16, embed_dim=8, window_size=2)().eval()
    arguments = {"num_heads": 2, "act_layer": "gelu", "global_pool": "token", "img_size": 16}
    pretrained = {"mean": [0.5, 0.5, 0.5], "crop_pct": 0.9, "input_size": [3, 16, 16]}
    statement = {"architecture": ARCHITECTURE.name, "model_args": arguments, "pretrained_cfg": pretrained}
    said = {"timm": json.dumps(statement)}
    safetensors = save(dict(model.state_dict()), said)
    config = json.dumps(statement | {"label_names": ["a", "b", "c"]}).encode()
    index = {"weight_map": dict.fromkeys(model.state_dict(), "part.safetensors")}
    training = {"state_dict": model.state_dict(), "args": Options(), "epoch": 3}
    return [
        Sample("weights.safetensors", safetensors, {}),
        Sample("swin.safetensors", save(dict(swin.state_dict())), {}),
        Sample("model.safetensors", _artifact(folder, model), {}),
        Sample("swin.pth", _torch(dict(swin.state_dict())), {}),
        Sample("training.pth", _torch(training), {}),
        Sample("whole.pth", _torch(model), {}),
        Sample("older.pth", _torch(training, _use_new_zipfile_serialization=False), {}),
        Sample("arrays.pkl", pickle.dumps(ways.arrays(dict(model.state_dict()))), {"config.json": config}),
        Sample("config.json", config, {"model.safetensors": safetensors}),
        Sample(
            "model.safetensors.index.json",
            json.dumps(index).encode(),
            {"part.safetensors": safetensors, "config.json": config},
        ),
        Sample("graph.onnx", graphs.classifier().SerializeToString(), {}),
        Sample("outside.onnx", _outside(), {"weights.bin": graphs.WEIGHT.tobytes()}),
    ]


class Options:
    """Training options, as an object that a pickle must not make."""

    def __init__(self) -> None:
        self.model = ARCHITECTURE.name
        self.num_heads = 2


class Payload:
    """Pickles to a call that makes a file; where the file exists, code of a stranger ran."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def hostile(witness: Path) -> list[Sample]:
    """Files that run code, blow up, nest, lead elsewhere or are no checkpoints; `witness` appears if code ran."""
    import os

    weights = dict(timm.create_model(ARCHITECTURE.name, **SIZES).state_dict())
    touch = Payload(os.system, f"touch '{witness}'")
    evaluate = Payload(eval, f"open({str(witness)!r}, 'w')")
    samples = [
        Sample("payload.pth", _torch(weights | {"extra": touch}), {}),
        Sample("payload_eval.pth", _torch({"state_dict": weights, "args": evaluate}), {}),
        Sample("payload_old.pth", _torch([touch, weights], _use_new_zipfile_serialization=False), {}),
        Sample("payload.pkl", pickle.dumps(touch, protocol=0), {}),
        Sample("deep.pkl", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", {}),
        Sample("tuples.pkl", b"\x80\x02(" + b"0\x85" * 10 + b"K\x01" + b"\x85" * 200_000 + b".", {}),
        Sample("doubling.pkl", b"\x80\x02K\x00" + b"".join(b"2\x86" for _ in range(200)) + b"}q\x00" + b"2s.", {}),
        Sample("wide.pth", _expanded(), {}),
        Sample("deflated.pth", _deflated(), {}),
        Sample("shared.pth", _shared(), {}),
        Sample("long.pkl", b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.", {}),
        Sample("memo.pkl", b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".", {}),
        Sample("header.safetensors", struct.pack("<Q", 2**63) + b"{}", {}),
        Sample("nested.safetensors", _safetensors(b'{"a":' * 2000 + b"1" + b"}" * 2000), {}),
        Sample("huge.safetensors", _safetensors(_entry("F32", [2**31, 2**31], 2**64)), {}),
        Sample("negative.safetensors", _safetensors(_entry("F32", [-1], 4)), {}),
        Sample("nested.json", b"[" * 100_000, {"model.safetensors": save(weights)}),
        Sample("page.pth", b"<!DOCTYPE html><html><body>Not found</body></html>", {}),
        Sample("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", {}),
        Sample("empty.pth", b"", {}),
    ]
    return [*samples, *_escapes(weights)]


def _escapes(weights: dict[str, torch.Tensor]) -> Iterator[Sample]:
    """Indices and graphs that point outside their folder."""
    for place in ("../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "a/../../b.safetensors", ""):
        index = {"weight_map": dict.fromkeys(weights, place)}
        yield Sample("model.safetensors.index.json", json.dumps(index).encode(), {})
        yield Sample("escape.onnx", graphs.put_outside(graphs.classifier(), place or ".").SerializeToString(), {})


def _torch(value: object, **how: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def _artifact(folder: Path, model: torch.nn.Module) -> bytes:
    path = folder / "artifact.safetensors"
    save_model(
        path,
        model,
        architecture=ARCHITECTURE,
        plan=full_plan(model, ARCHITECTURE.name),
        preprocessing=Preprocessing(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3),
        class_names=("a", "b", "c"),
        record={"seed": 0},
    )
    return path.read_bytes()


def _outside() -> bytes:
    model = graphs.put_outside(graphs.classifier(), "weights.bin")
    onnx.checker.check_model(graphs.classifier())
    return model.SerializeToString()


def _safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _entry(dtype: str, shape: list[int], size: int) -> bytes:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()


def _expanded() -> bytes:
    """Sixty-four tensors of four gigabytes over one number."""
    return _torch({f"blocks.{index}.weight": torch.zeros(1).expand(2**15, 2**15) for index in range(64)})


def _shared() -> bytes:
    """A module of 2**60 parts, each level twice the one below."""
    module: torch.nn.Module = torch.nn.Linear(1, 1)
    for _ in range(60):
        module = torch.nn.Sequential(module, module)
    return _torch(module)


def _deflated() -> bytes:
    """A torch file whose entries are compressed a thousandfold."""
    plain = zipfile.ZipFile(io.BytesIO(_torch({f"w{index}": torch.zeros(2**18) for index in range(16)})))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    return buffer.getvalue()
