import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from kcrprune.errors import CheckpointError, DataError
from kcrprune.graphs import GraphRecord, open_onnx, wire
from kcrprune.plan import Preprocessing
from tests.graphs.graphs import BIAS, WEIGHT, classifier, expected, put_outside


@pytest.fixture
def written(tmp_path):
    """Writes a model, or bytes, as a file."""

    def write(content):
        path = tmp_path / "graph.onnx"
        path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        return path

    return write


def images(count, size=(3, 8, 8)):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("shape", [("N", 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8)])
def test_a_strangers_graph_runs_on_any_number_of_images(written, kind, shape):
    graph = open_onnx(written(classifier(shape, kind=kind)))
    for count in (1, 4, 6):
        logits = graph(images(count))
        assert logits.dtype == torch.float32
        np.testing.assert_allclose(logits, expected(images(count).numpy()), atol=1e-2 if kind == 10 else 1e-5)


def test_what_is_read_without_running_it(written):
    path = written(classifier((4, 3, 8, 8), opset=19, metadata={"author": "somebody"}))
    graph = open_onnx(path)
    assert (graph.path, graph.file_bytes) == (path, path.stat().st_size)
    assert (graph.nodes, graph.opset, graph.batch_size, graph.input_size) == (2, 19, 4, (3, 8, 8))
    assert graph.parameters == WEIGHT.size + BIAS.size
    assert graph.macs == WEIGHT.size
    assert graph.preprocessing is graph.class_names is None
    assert graph.metadata == {"author": "somebody"}
    assert graph.record == GraphRecord()
    assert "_session" not in vars(graph)


def test_old_graphs_that_list_their_weights_as_inputs(written):
    graph = open_onnx(written(classifier(weights_as_inputs=True)))
    np.testing.assert_allclose(graph(images(3)), expected(images(3).numpy()), atol=1e-5)
    assert graph.macs == WEIGHT.size


def test_logits_are_found_among_other_outputs(written):
    graph = open_onnx(written(classifier(outputs=("mean", "logits"))))
    assert graph(images(2)).shape == (2, 5)


@pytest.mark.parametrize(("asked", "size"), [(6, (6, 6)), ((8, 4), (8, 4))])
def test_open_height_and_width_take_the_given_size(written, asked, size):
    path = written(classifier(("N", 3, "H", "W")))
    with pytest.raises(CheckpointError, match="leaves the size of the images open; say it with --img-size"):
        open_onnx(path)
    graph = open_onnx(path, img_size=asked)
    assert graph.input_size == (3, *size)
    assert graph.macs == WEIGHT.size
    np.testing.assert_allclose(graph(images(2, (3, *size))), expected(images(2, (3, *size)).numpy()), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 1, 8, 8), (3, 8, 8)])
def test_images_of_another_size_are_refused(written, shape):
    graph = open_onnx(written(classifier()))
    with pytest.raises(DataError, match=r"takes batches of images of size \(3, 8, 8\).*has the shape"):
        graph(torch.zeros(shape))


def test_metadata_come_back_as_they_went_in(written):
    record = GraphRecord(
        version="0.1",
        architecture='a "quoted" näme',
        preprocessing=Preprocessing(input_size=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(1, 1, 1)),
        class_names=("123", "tench, Tinca tinca"),
        macs=17,
    )
    graph = open_onnx(written(classifier(metadata=record.to_metadata() | {"kcrprune.of_tomorrow": "?"})))
    assert graph.record == record
    assert graph.macs == 17
    assert graph.counted_macs == WEIGHT.size


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("macs", "many"),
        ("macs", "-1"),
        ("class_names", '{"0": "cat"}'),
        ("preprocessing", '{"input_size": [3, 8, 8]}'),
        ("blocks", "[" * 100_000),
    ],
)
def test_damaged_metadata_are_refused(written, key, value):
    path = written(classifier(metadata={f"kcrprune.{key}": value}))
    with pytest.raises(CheckpointError, match=rf"graph\.onnx: its metadata is damaged: kcrprune\.{key}: "):
        open_onnx(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; fetch it again"),
        (b"\n<!DOCTYPE html><html></html>", "a web page, not an ONNX graph; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer.*run `git lfs pull`"),
        (b"PK\x03\x04" + bytes(64), "no ONNX graph, or it is damaged or cut short; fetch it again"),
        (classifier().SerializeToString()[:200], "no ONNX graph, or it is damaged or cut short"),
        (
            classifier().SerializeToString().replace(b"weight", b"we\xe5ght"),
            "the graph is damaged: a name in it is no text",
        ),
        (onnx.ModelProto(ir_version=10), "no ONNX graph: it holds no operators"),
        (classifier((3, 8, 8)), r"its input 'x' is not a floating-point tensor \(batch, channels, height, width\)"),
        (classifier(("N", 3, 8, 2**40)), "which are no channels, height and width"),
        (classifier((1, 224, 224, 3)), "which are no channels, height and width"),
        (classifier(outputs=("mean", "mean")), r"it has 2 outputs \(mean, mean\), none of them clearly the logits"),
    ],
)
def test_what_is_not_a_classifier_is_refused_with_the_reason(written, content, message):
    path = written(content)
    with pytest.raises(CheckpointError, match=rf"graph\.onnx: .*{message}"):
        open_onnx(path)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ((7,), 1),  # operators of the graph
        ((7,), 5),  # weights
        ((7, 1), 5),  # attributes of an operator
        ((), 14),  # metadata
        ((7, 11, 2, 1, 2), 1),  # dimensions of an input
    ],
)
def test_a_small_file_of_many_empty_parts_never_reaches_the_parser(written, monkeypatch, path, part):
    bomb = bytes([part << 3 | 2, 0]) * 110_000
    for number in reversed(path):
        bomb = bytes([number << 3 | 2]) + varint(len(bomb)) + bomb
    monkeypatch.setattr(onnx, "load_model_from_string", None)
    with pytest.raises(CheckpointError, match="its graph has more than 100000 parts, which no network needs"):
        open_onnx(written(classifier().SerializeToString() + bomb))


def varint(number):
    """Protobuf's own way to write a length."""
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def test_the_check_on_the_wire_refuses_what_the_parser_refuses():
    data = classifier().SerializeToString()
    for length in range(1, len(data) + 1):
        assert accepts(lambda part: wire.check(part, onnx.ModelProto), data[:length]) == accepts(
            onnx.load_model_from_string, data[:length]
        )


def accepts(parser, data):
    try:
        parser(data)
    except (CheckpointError, DecodeError):
        return False
    return True


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_a_graph(data, tmp_path_factory):
    content = bytearray(classifier(metadata={"kcrprune.macs": "15"}).SerializeToString())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        graph = open_onnx(path)
    except CheckpointError:
        return
    assert graph.counted_macs is None or graph.counted_macs >= 0
    assert all(size > 0 for size in graph.input_size)


def test_names_that_nobody_relies_on_may_be_no_text(written):
    graph = open_onnx(written(classifier().SerializeToString().replace(b"stranger", b"str\xe5nger")))
    assert graph.macs == WEIGHT.size


def test_two_inputs_are_refused(written):
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, (1, 5)))
    with pytest.raises(CheckpointError, match=r"it has 2 inputs \(x, mask\); one, the images, is expected"):
        open_onnx(written(model))


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.onnx: there is no such file"):
        open_onnx(tmp_path / "none.onnx")
    with pytest.raises(CheckpointError, match="this is a folder, not an ONNX file"):
        open_onnx(tmp_path)


def test_a_file_beyond_protobufs_limit_is_not_read(tmp_path):
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # a hole; takes no disk
    with pytest.raises(CheckpointError, match="the file has 2147483648 bytes; an ONNX file holds at most"):
        open_onnx(path)


@pytest.mark.parametrize("break_it", ["unknown operator", "wrong shapes"])
def test_a_graph_that_cannot_run_says_so_at_the_first_call(written, break_it):
    model = classifier()
    if break_it == "unknown operator":
        model.graph.node[1].op_type = "Gemmm"
    else:
        model.graph.initializer[1].dims[:] = [5, 3]
    graph = open_onnx(written(model))
    with pytest.raises(CheckpointError, match=r"graph\.onnx (cannot be loaded by|fails in) ONNX Runtime: \S+"):
        graph(images(1))


def test_nothing_is_printed_by_what_fails(written, capfd):
    model = classifier()
    model.graph.node[1].op_type = "\n\xff"
    with pytest.raises(CheckpointError):
        open_onnx(written(model))(images(1))
    assert capfd.readouterr() == ("", "")


def test_data_beside_the_graph_are_read(written, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weight.bin").write_bytes(WEIGHT.tobytes())
    path = written(put_outside(classifier(), "data/weight.bin"))
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.onnx"
    link.symlink_to(path)
    for file in (path, link):
        graph = open_onnx(file)
        assert graph.file_bytes == path.stat().st_size + WEIGHT.nbytes
        np.testing.assert_allclose(graph(images(2)), expected(images(2).numpy()), atol=1e-5)


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/hostname",
        "",
        ".",
        "data/../../secret",
        "linked/secret",
        "link",
        "*/_ORT_MEM_ADDR_/*",
        "a\0b",
        "x" * 5000,
    ],
)
def test_data_from_elsewhere_are_refused(tmp_path, location):
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    (folder / "linked").symlink_to(tmp_path)
    (folder / "link").symlink_to(tmp_path / "secret")
    path = folder / "graph.onnx"
    path.write_bytes(put_outside(classifier(), location).SerializeToString())
    with pytest.raises(CheckpointError, match=r"only files in its own folder are read|is missing; put it beside"):
        open_onnx(path)


@pytest.mark.parametrize("where", ["constant", "branch", "sparse", "function"])
def test_data_from_elsewhere_are_found_wherever_they_hide(written, where):
    model = classifier()
    outside = put_outside(classifier(), "../secret").graph.initializer[1]
    node = helper.make_node("Constant", [], ["c"], value=outside)
    if where == "constant":
        model.graph.node.append(node)
    elif where == "branch":
        body = helper.make_graph([node], "body", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, (3, 5))])
        model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))
    elif where == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(outside)
    else:
        model.functions.append(helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 20)]))
    with pytest.raises(CheckpointError, match=r"'\.\./secret'; only files in its own folder are read"):
        open_onnx(written(model))
