"""Fixtures of all tests. Nothing is imported that takes long: who hands out the tests to others makes none itself."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from tests.tiny import Tiny

# One thread: a second brings tiny networks nothing, and where the cores are shared it makes them ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--on cuda`: tensors that name no device lie there."""
    parser.addoption("--on", default="cpu", help="the device of tensors that name none")


def pytest_configure(config: pytest.Config) -> None:
    """Before any network is built."""
    if (device := config.getoption("--on")) != "cpu":
        import torch

        torch.set_default_device(device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`tiny` is each tiny network in turn, where a test names none of its own."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "tiny" in metafunc.fixturenames and not any("tiny" in names for names in named):
        from tests.tiny import TINY

        metafunc.parametrize("tiny", TINY, ids=lambda tiny: tiny.label)


@pytest.fixture(scope="session", autouse=True)
def painted_once() -> Iterator[None]:
    """An image is generated once a process and not once a run: 10 ms each were a sixth of the suite."""
    from kcrprune.training.images.generated import GeneratedImages

    paint = GeneratedImages._generated

    @cache
    def kept(count: int, size: tuple[int, int], seed: int, index: int) -> "torch.Tensor":
        return paint(GeneratedImages(count, size, seed), index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            GeneratedImages, "_generated", lambda self, index: kept(self.count, self.size, self.seed, index).clone()
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def registered_once() -> Iterator[None]:
    """The exporter to ONNX reads its 500 operators once a process and not once an export, for a second each."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session", autouse=True)
def timed_briefly() -> Iterator[None]:
    """What a run is timed for, seconds a run: here the fewest rounds."""
    from kcrprune.run import pricing, saving, spending, timed

    with pytest.MonkeyPatch.context() as patch:
        for each in (pricing, saving, spending, timed):
            patch.setattr(each, "SECONDS", 0.0)
        yield


@pytest.fixture
def tiny_vit() -> "Tiny":
    """The plain tiny ViT, for tests that need only one."""
    from tests.tiny import TINY

    return TINY[0]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run (`SHORT`, on the plain tiny ViT), made once; nobody writes into it."""
    from kcrprune import pipeline
    from kcrprune.events import ignore
    from tests.pipeline.test_compress import SHORT, save
    from tests.tiny import TINY

    folder = tmp_path_factory.mktemp("finished")
    return pipeline.compress(save(TINY[0], folder / "dense.safetensors"), SHORT, folder / "run", ignore).folder
