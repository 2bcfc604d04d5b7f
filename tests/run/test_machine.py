"""What a run tells of itself and its machine."""

import platform
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from kcrprune.config import RunConfig
from kcrprune.plan import Preprocessing
from kcrprune.run.machine import HEEDED, LIBRARIES, machine_record, peak_device_mib, peak_memory_mib, processor_name
from kcrprune.run.memory import back_at_once
from kcrprune.training import parts
from kcrprune.training.images.sets import open_images
from kcrprune.training.parts import divide
from kcrprune.training.portions import kept_for_gradients


def test_the_peak_of_the_memory_never_falls():
    before = peak_memory_mib()
    assert psutil.Process().memory_info().rss / 2**20 <= before * 1.01
    torch.ones(2**25).sum()  # 128 MiB
    assert peak_memory_mib() >= before


def test_windows_tells_its_own_peak(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=3 * 2**20))
    assert peak_memory_mib() == pytest.approx(3)


def test_what_waits_for_the_way_back_is_counted_once_and_weights_are_not():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    for images in (1, 3):
        kept = 4 * images * (4 + 8 + 8)  # the inputs of the three layers, in float32
        assert kept_for_gradients(model, torch.randn(images, 4)) == kept


def test_half_of_the_memory_bounds_the_images_that_pass_back_at_once():
    model, batches, told = nn.Linear(1024, 2), [torch.randn(64, 1024)], []
    context: Any = SimpleNamespace(device=torch.device("cpu"), tell=told.append)
    for gibibytes, expected in ((1.0, None), (2 * 10 * 4096 / 2**30, 10), (1e-9, 1)):
        context.settings = SimpleNamespace(max_memory=gibibytes)
        assert back_at_once(context, "search", model, batches) == expected
    assert len(told) == 2


def test_images_that_take_much_of_the_memory_lie_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = RunConfig(generated_images=10, calibration_images=8, score_images=4, batch_size=4, workers=0)
    size = Preprocessing(input_size=(3, 8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    places = []
    monkeypatch.setattr(parts, "in_files", lambda folder: places.append(folder) or (lambda batch: batch.clone()))
    many, few = (
        divide(open_images(config, size, 5), config.model_copy(update={"max_memory": memory})) for memory in (1.0, 1e-9)
    )
    assert places == [tmp_path, tmp_path]
    for ours, theirs in zip(many.calibration, few.calibration, strict=True):
        assert torch.equal(ours, theirs)


CPUINFO = "processor\t: 0\nmodel\t: 85\nmodel name\t: A Processor: fast \nmodel name\t: another\n"


@pytest.mark.parametrize(
    ("told", "processor", "name"),
    [(CPUINFO, "x", "A Processor: fast"), ("nothing", "arm", "arm"), (None, "", "aarch64"), (None, "arm", "arm")],
)
def test_a_processor_is_called_as_its_maker_does_else_as_the_system_does(monkeypatch, told, processor, name):
    def read(*_: Any, **__: Any) -> str:
        if told is None:
            raise FileNotFoundError
        return told

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert processor_name(torch.device("cpu")) == name


def test_the_record_of_a_machine_holds_what_changes_figures_and_no_other_variable(monkeypatch):
    for name in HEEDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SOMEBODYS_TOKEN", "secret")
    found = machine_record(torch.device("cpu"))
    assert found["environment"] == {"OMP_NUM_THREADS": "3"}
    assert found["libraries"].keys() >= set(LIBRARIES)
    assert torch.__version__.startswith(found["libraries"]["torch"])
    assert found["threads"] == torch.get_num_threads()
    assert found["flags"].keys() == {"deterministic", "tf32_matmul", "tf32_cudnn", "cudnn_benchmark"}
    assert (found["device"], found["python"]) == ("cpu", platform.python_version())
    assert peak_device_mib(torch.device("cpu")) is None
