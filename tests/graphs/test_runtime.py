from importlib.metadata import PackageNotFoundError

import onnx
import onnxruntime
import pytest
import torch

from kcrprune.errors import ConfigError
from kcrprune.graphs import open_onnx, runtime
from tests.graphs.graphs import classifier


@pytest.fixture
def graph(tmp_path):
    onnx.save(classifier(("N", 3, 32, 32)), tmp_path / "m.onnx")
    return open_onnx(tmp_path / "m.onnx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_onnx_runtime_does_not_give_is_an_error(graph):
    assert graph(torch.zeros(2, 3, 32, 32)).shape[0] == 2
    again = open_onnx(graph.path)
    again.device = "cuda"
    with pytest.raises(ConfigError, match=r"device 'cuda' is asked for, and ONNX Runtime .* gives the CPU here"):
        again(torch.zeros(2, 3, 32, 32))


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not torch.cuda.is_available(),
    reason="no CUDA device",
)
def test_cuda_gives_what_the_cpu_gives(graph):
    images = torch.randn(2, 3, 32, 32)
    expected = graph(images)
    again = open_onnx(graph.path)
    again.device = "cuda"
    assert torch.allclose(again(images), expected, atol=1e-3)


def test_two_packages_in_one_folder_are_told_of(monkeypatch):
    there = {"onnxruntime": "1.32.0"}

    def version(name):
        if name not in there:
            raise PackageNotFoundError
        return there[name]

    monkeypatch.setattr(runtime, "version", version)
    assert runtime.told_of_both() is None
    there["onnxruntime-gpu"] = "1.31.1"
    told = runtime.told_of_both()
    assert told is not None
    assert told.startswith("onnxruntime-gpu 1.31.1 and onnxruntime 1.32.0 are both installed")
