"""A pipeline that only remembers what it was asked, so that the command line is tested alone."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

import kcrprune
from kcrprune.graphs import ExportResult
from kcrprune.measure.report import Comparison, Inspection, ModelReport, StageTime
from kcrprune.pipeline.compress import RunResult
from kcrprune.pipeline.verbs import Ported
from kcrprune.plan import Preprocessing
from kcrprune.training.evaluate import Evaluation

DENSE = ModelReport(
    source="vit.pth",
    layout="timm",
    state="dense",
    architecture="vit_tiny_patch16_224",
    family="vit",
    input_size=(3, 32, 32),
    parameters=33_000,
    macs=1_000_000,
    dense_macs=1_000_000,
    file_bytes=140_000,
)
PRUNED = DENSE.model_copy(update={"source": "run/model.safetensors", "state": "pruned", "macs": 699_000})
COMPARISON = Comparison(before=DENSE, after=PRUNED, stages=(StageTime(stage="search", seconds=12.5),))
EXPORTED = ExportResult(Path("m.onnx"), (1, 2, 5), 1e-6, 1e-6, 1e-4, 500, 90_000, 20, 3.0)
INSPECTION = Inspection(
    source="vit.pth",
    layout="timm state dict",
    architecture="vit_tiny_patch16_224",
    family="vit",
    preprocessing=Preprocessing(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3),
    class_count=5,
    parameters=33_000,
    macs=1_000_000,
    file_bytes=140_000,
    notes=("depth 2: there are two blocks",),
    foreign_names=("argparse.Namespace",),
)


class FakePipeline(ModuleType):
    """Every verb returns a fixed result and keeps its arguments in `asked`; `fails_with` makes it raise."""

    Ported = Ported

    def __init__(self):
        super().__init__("kcrprune.pipeline")
        self.asked = {}
        self.fails_with = None

    def _answer(self, result, **asked):
        self.asked = asked
        if self.fails_with is not None:
            raise self.fails_with
        return result

    def compress(self, checkpoint, config, out, listener, *, fresh=False, origins=None):
        return self._answer(RunResult(Path("run"), COMPARISON), checkpoint=checkpoint, config=config, out=out)

    def report(self, paths, *, bench=None, listener, config=None):
        return self._answer((DENSE, PRUNED)[: len(paths)], paths=paths, bench=bench, config=config)

    def export(self, model, onnx, listener, *, config=None, opset=20):
        return self._answer(EXPORTED, model=model, onnx=onnx, config=config, opset=opset)

    def port(self, model, out, form, config, listener):
        return self._answer(Ported(Path("m.pt2"), form, 90_000), model=model, out=out, form=form, config=config)

    def port_into(self, model, into, out, config, listener, *, keep_shapes):
        return self._answer(Ported(Path("d.pth"), "original", 90_000), into=into, out=out, keep_shapes=keep_shapes)

    def evaluate(self, model, config, listener):
        return self._answer(Evaluation(1000, 0.8465, 0.99, 0.5, None), model=model, config=config)

    def inspect(self, path, config):
        return self._answer(INSPECTION, path=path, config=config)

    def demo(self, out, listener):
        return self._answer((RunResult(Path("run"), COMPARISON), EXPORTED), out=out)


@pytest.fixture
def pipeline(monkeypatch):
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "kcrprune.pipeline", fake)
    monkeypatch.setattr(kcrprune, "pipeline", fake, raising=False)
    return fake
