import hashlib
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import kcrprune
from kcrprune.errors import ConfigError, ExportError, OutputExistsError
from kcrprune.events import StageEnded, StageStarted, StepDone
from kcrprune.graphs import export, export_onnx, metadata_of, open_onnx
from kcrprune.graphs.counted import graph_macs
from kcrprune.measure.macs import count_macs, count_parameters
from kcrprune.measure.report import block_widths
from kcrprune.plan import Preprocessing, canonical_json
from kcrprune.surgery.narrow import cut_
from tests.tiny import TINY, nested_plan, random_plan

BY_LABEL = {tiny.label: tiny for tiny in TINY}
EXPORTED = ("dinov2_reg4 dense", "deit_distilled pruned", "swin_padded nested")


@cache
def network(label):
    """A tiny network and the plan that cut it."""
    name, state = label.split()
    tiny = BY_LABEL[name]
    model = tiny.model()
    plan = {"dense": None, "pruned": random_plan, "nested": nested_plan}[state]
    plan = plan and plan(model, tiny.architecture.name, seed=1)
    return tiny, cut_(model, plan) if plan else model, plan


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request, tmp_path_factory):
    """A tiny network, its plan, and what its export wrote."""
    tiny, model, plan = network(request.param)
    metadata = metadata_of(
        architecture=tiny.architecture,
        preprocessing=Preprocessing(input_size=tiny.input_size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1)),
        plan=plan,
        outputs="classes",
        class_names=("cat", "dog", "newt", "owl", "yak"),
        parameters=count_parameters(model),
        macs=count_macs(model, tiny.input_size),
        dense_macs=count_macs(tiny.model(), tiny.input_size),
    )
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return tiny, model, plan, export_onnx(model, path, input_size=tiny.input_size, metadata=metadata)


def test_onnx_runtime_computes_what_pytorch_does_at_other_batch_sizes(exported):
    tiny, model, _, result = exported
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"]
    for batch in (1, 3, 4, 7):  # the export itself compared 1, 2 and 5
        images = tiny.images(batch, seed=batch)
        with torch.no_grad():
            expected = model(images).numpy()
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert np.abs(logits - expected).max() <= 1e-4 * expected.std()


def test_the_result_says_what_was_measured(exported):
    *_, result = exported
    assert result.batch_sizes == (1, 2, 5)
    assert 0 < result.max_abs_diff <= result.tolerance
    assert result.max_rel_diff * result.tolerance == pytest.approx(result.max_abs_diff * export.TOLERANCE)
    graph = onnx.load(result.path)
    assert result.nodes == len(graph.graph.node)
    assert result.opset == 20 == graph.opset_import[0].version
    assert result.bytes == result.path.stat().st_size


def test_three_routes_count_the_same_macs(exported):
    tiny, model, _, result = exported
    counted = count_macs(model, tiny.input_size)
    graph = open_onnx(result.path)
    assert graph_macs(onnx.load(result.path)) == counted
    assert graph.counted_macs == counted == graph.macs


def test_the_graph_stores_the_weights_and_little_else(exported):
    _, model, _, result = exported
    extra = open_onnx(result.path).stored_values - count_parameters(model)
    tables = sum(
        buffer.numel() * module.num_heads - module.relative_position_bias_table.numel()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name == "relative_position_index"  # the exporter unrolls each table, a value a pair of tokens
    )
    masks = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("attn_mask"))
    assert 0 <= extra - tables <= masks + 2  # scalars: the attention scale, the halves of two heads


def test_a_graph_describes_itself(exported):
    tiny, model, plan, result = exported
    graph = open_onnx(result.path)
    assert graph.preprocessing == Preprocessing(input_size=tiny.input_size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    assert graph.class_names == ("cat", "dog", "newt", "owl", "yak")
    assert graph.parameters == count_parameters(model)
    assert graph.metadata["kcrprune.architecture"] == tiny.architecture.name
    assert graph.record.dense_macs == count_macs(tiny.model(), tiny.input_size)
    if plan is None:
        assert graph.record.plan_digest is graph.record.blocks is None
    else:
        digest = hashlib.sha256(canonical_json(plan.model_dump(mode="json")).encode()).hexdigest()
        assert graph.record.plan_digest == digest
        assert graph.record.blocks == block_widths(plan)


def test_nothing_of_the_exporting_machine_stays_in_the_file(exported):
    *_, result = exported
    data = result.path.read_bytes()
    traces = (str(Path(timm.__file__).parents[1]), str(Path.cwd()), "site-packages", '.py"', "line ", "pkg.torch")
    assert [trace for trace in traces if trace.encode() in data] == []
    graph = onnx.load(result.path)
    assert (graph.producer_name, graph.producer_version) == ("kcrprune", kcrprune.__version__)


def test_the_checker_of_onnx_has_no_complaint(exported):
    onnx.checker.check_model(exported[-1].path, full_check=True)


@pytest.mark.parametrize("exported", ["deit_distilled pruned"], indirect=True)
def test_equal_input_gives_equal_bytes_and_the_model_is_left_alone(exported, tmp_path):
    tiny, model, _, result = exported
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heard = []
    metadata = open_onnx(result.path).metadata
    backwards = dict(reversed(metadata.items()))
    model.train()
    export_onnx(
        model, tmp_path / "again.onnx", input_size=tiny.input_size, metadata=backwards, seed=7, listener=heard.append
    )
    assert model.training
    model.eval()
    assert (tmp_path / "again.onnx").read_bytes() == result.path.read_bytes()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(event) for event in heard] == [StageStarted, StepDone, StepDone, StepDone, StageEnded]


def test_the_exporter_prints_and_warns_nothing(tmp_path, capfd, recwarn):
    export_onnx(Plain(), tmp_path / "plain.onnx", input_size=(3, 8, 8), metadata={})
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="still heard"):
        warnings.warn("still heard", stacklevel=1)


class Plain(nn.Module):
    """The smallest network that looks like a classifier."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images):
        return self.head(images.mean((2, 3)))


class Changing(Plain):
    """Computes something else each time, as a graph never does."""

    calls = 0

    def forward(self, images):
        Changing.calls += 1
        return super().forward(images) + Changing.calls


class Undefined(Plain):
    def forward(self, images):
        return super().forward(images) * float("nan")


class Deciding(Plain):
    def forward(self, images):
        return super().forward(images if images.sum().item() > 0 else -images)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Changing, r"outputs differ by .*, allowed are .* \(0\.0001 standard deviations\)"),
        (Undefined, "outputs differ by nan"),
        (Deciding, r"PyTorch cannot export this Deciding: .*data-dependent"),
    ],
)
def test_a_graph_that_is_not_the_model_leaves_no_file(tmp_path, kind, message):
    torch.manual_seed(0)
    with pytest.raises(ExportError, match=message):
        export_onnx(kind(), tmp_path / "out.onnx", input_size=(3, 8, 8), metadata={})
    assert not list(tmp_path.iterdir())


def test_one_flipped_weight_is_found(tmp_path, monkeypatch):
    tidy = export._tidy_

    def flip_(model, metadata):
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
        values = np.frombuffer(weight.raw_data, np.float32).copy()
        values[0] += 1e-3
        weight.raw_data = values.tobytes()
        return tidy(model, metadata)

    monkeypatch.setattr(export, "_tidy_", flip_)
    with pytest.raises(ExportError, match="does not compute what the model does"):
        export_onnx(Plain(), tmp_path / "out.onnx", input_size=(3, 8, 8), metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (23, 11)])
def test_a_graph_asks_for_no_newer_runtime_than_its_opset_does(opset, ir_version, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2).eval()
    path = tmp_path / "out.onnx"
    export_onnx(model, path, input_size=(3, 32, 32), metadata={}, opset=opset, batch_sizes=(1,))
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert (graph.opset_import[0].version, graph.ir_version) == (opset, ir_version)


@pytest.mark.parametrize("opset", [16, 24, 99])
def test_an_opset_that_cannot_be_written_is_refused(opset, tmp_path):
    with pytest.raises(ConfigError, match=f"opset {opset} cannot be written; choose one from 17 to 23"):
        export_onnx(Plain(), tmp_path / "out.onnx", input_size=(3, 8, 8), metadata={}, opset=opset)


def test_metadata_that_contradict_the_graph_leave_no_file(tmp_path):
    prep = Preprocessing(input_size=(3, 9, 9), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ExportError, match="prepare images of"):
        export_onnx(
            Plain(),
            tmp_path / "out.onnx",
            input_size=(3, 8, 8),
            metadata={"kcrprune.preprocessing": prep.model_dump_json()},
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_nothing_is_overwritten_and_no_work_is_done(tmp_path, kind):
    path = tmp_path / "out.onnx"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match=r"out\.onnx exists already"):
        export_onnx(nn.Identity(), path, input_size=(3, 8, 8), metadata={})
    assert kind != "file" or path.read_text() == "precious"


def test_a_network_beyond_one_file_is_refused(tmp_path):
    with torch.device("meta"):
        giant = nn.Linear(2**15, 2**14)
    with pytest.raises(ExportError, match=r"2\.15 GB in float32, and one ONNX file holds at most 2\.14 GB"):
        export_onnx(giant, tmp_path / "out.onnx", input_size=(3, 8, 8), metadata={})
    assert not list(tmp_path.iterdir())
