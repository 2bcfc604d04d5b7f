"""Graphs from disk: checked as data, then run by ONNX Runtime."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import Tensor
from torch.nn.functional import pad

from kcrprune.errors import CheckpointError, ConfigError, DataError
from kcrprune.graphs import checks, runtime
from kcrprune.graphs.counted import graph_macs, skeleton, weight_count
from kcrprune.graphs.record import GraphRecord
from kcrprune.plan import Outputs, Preprocessing


class OnnxModel:
    """An ONNX graph from images to logits or features; called with a tensor, it runs on `device`.

    ONNX Runtime loads the graph at the first call, so that looking at a file runs nothing of it.
    """

    def __init__(self, path: Path, model: ModelProto, *, img_size: int | tuple[int, int] | None = None) -> None:
        self.path, self.device = path, "cpu"  # or cuda, cuda:N
        self.file_bytes = path.stat().st_size + checks.external_bytes(model, path.resolve().parent)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.record = GraphRecord.from_metadata(self.metadata)
        self.nodes = len(model.graph.node)
        self.opset = max((entry.version for entry in model.opset_import if not entry.domain), default=0)
        self.stored_values = weight_count(model)
        self._output = checks.answers(model.graph)
        image = checks.image_input(model.graph)
        self.input_size = checks.input_size(image, img_size)  # channels, height, width
        for dim, size in zip(image.type.tensor_type.shape.dim[1:], self.input_size, strict=True):
            dim.dim_value = size
        checks.agree(self.record.preprocessing, self.input_size)
        self._skeleton = skeleton(model)
        self._image = self._skeleton.graph.input[0]
        self._dtype = onnx.helper.tensor_dtype_to_np_dtype(self._image.type.tensor_type.elem_type)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How an image becomes an input, where the graph says so."""
        return self.record.preprocessing

    @property
    def outputs(self) -> Outputs:
        """What the graph gives: its own word, else classes unless the output is called features."""
        return self.record.outputs or ("features" if self._output == checks.NAMES["features"] else "classes")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes in the order of the logits, where the graph names them."""
        return self.record.class_names

    @property
    def parameters(self) -> int:
        """Learned values as the exporter counted them, else all values that the graph stores, unrolled tables too."""
        return self.stored_values if self.record.parameters is None else self.record.parameters

    @property
    def macs(self) -> int | None:
        """MACs of one image as the exporter counted them, else from the graph's own shapes if they tell."""
        return self.counted_macs if self.record.macs is None else self.record.macs

    @cached_property
    def counted_macs(self) -> int | None:
        """MACs of one image, counted on the graph's operators."""
        return graph_macs(self._skeleton)

    @property
    def runtime(self) -> str:
        """What runs it, as ONNX Runtime says; ConfigError where that is not what `device` asks for."""
        return f"ONNX Runtime's {self._session.get_providers()[0]}"

    @property
    def batch_size(self) -> int | None:
        """The only batch size that the graph takes, None where it takes any."""
        size = self._image.type.tensor_type.shape.dim[0].dim_value
        return size if size > 0 else None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) or features of normalised images (batch, C, H, W), in float32 on their device."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_size:
            raise DataError(
                f"{self.path} takes batches of images of size {self.input_size} (channels, height, width); "
                f"this tensor has the shape {tuple(images.shape)}"
            )
        parts = images.split(self.batch_size or max(1, len(images)))
        return torch.cat([self._logits(part) for part in parts]).to(images.device)

    def _logits(self, images: Tensor) -> Tensor:
        missing = 0 if self.batch_size is None else self.batch_size - len(images)
        array = pad(images.detach().cpu(), (0, 0, 0, 0, 0, 0, 0, missing)).numpy()
        array = array.astype(self._dtype)
        try:
            logits = self._session.run([self._output], {self._image.name: array})[0]
            return torch.from_numpy(np.asarray(logits, dtype=np.float32))[: len(images)]
        except ConfigError:
            raise
        except Exception as error:  # ONNX Runtime's errors share no other base
            raise CheckpointError(f"{self.path} fails in ONNX Runtime: {_first_line(error)}") from error

    @cached_property
    def _session(self) -> Any:
        try:
            return runtime.session(self.path, self.device)
        except ConfigError:  # the device is not there
            raise
        except Exception as error:  # ONNX Runtime's errors share no other base
            raise CheckpointError(f"{self.path} cannot be loaded by ONNX Runtime: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def open_onnx(path: Path, *, img_size: int | tuple[int, int] | None = None) -> OnnxModel:
    """The graph in a file, checked: whole, images in, logits or features out, no data from outside its folder.

    `img_size` is the side, or height and width, for a graph that leaves them open. CheckpointError for anything else.
    """
    path = Path(path)
    try:
        return OnnxModel(path, checks.parse(path), img_size=img_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
