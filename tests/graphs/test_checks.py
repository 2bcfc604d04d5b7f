"""What of a graph are its images and its answers, told by names and shapes alone."""

import re
from typing import Any

import pytest
from onnx import TensorProto, helper

from kcrprune.errors import CheckpointError
from kcrprune.graphs import checks
from kcrprune.plan import Preprocessing


def value(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def graph(inputs: list[Any], outputs: list[Any], *stored: str) -> Any:
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [1], [0.0]) for name in stored]
    return helper.make_graph([], "g", inputs, outputs, weights)


IMAGES = value("x", "N", 3, 8, 8)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_the_images_are_the_only_input_that_is_no_weight(kind: int):
    found = checks.image_input(graph([value("w", 1), value("x", "N", 3, 8, 8, kind=kind)], [], "w"))
    assert found.name == "x"


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([], "it has 0 inputs (); one, the images, is expected"),
        ([IMAGES, value("y", 1)], "it has 2 inputs (x, y); one, the images, is expected"),
        (
            [value(f"{number}{'n' * 50}", 1) for number in range(7)],
            ", ".join(f"{number}{'n' * 39}" for number in range(5)) + ");",
        ),
        (
            [value("x" * 50, "N", 3, 8)],
            f"its input {'x' * 40!r} is not a floating-point tensor (batch, channels, height, w",
        ),
        ([value("x", "N", 3, 8, 8, kind=TensorProto.INT64)], "its input 'x' is not a floating-point tensor"),
    ],
)
def test_other_inputs_are_refused_with_the_first_of_their_names(inputs: list[Any], told: str):
    with pytest.raises(CheckpointError, match=re.escape(told)):
        checks.image_input(graph(inputs, []))


@pytest.mark.parametrize(
    ("shape", "asked", "size"),
    [
        (("N", 3, 8, 16), None, (3, 8, 16)),
        ((2, 3, 8, 16), 32, (3, 8, 16)),  # what the graph says counts
        (("N", 3, "h", "w"), 32, (3, 32, 32)),
        (("N", 3, "h", "w"), (32, 16), (3, 32, 16)),
        (("N", 1, 8, "w"), (32, 16), (1, 8, 16)),
        (("N", 64, 2048, 2048), None, (64, 2048, 2048)),
    ],
)
def test_the_size_of_the_images_is_the_graphs_or_what_is_asked_for(shape: Any, asked: Any, size: tuple[int, ...]):
    assert checks.input_size(value("x", *shape), asked) == size


@pytest.mark.parametrize(
    ("shape", "asked", "told"),
    [
        (("N", 3, "h", 8), None, "its input leaves the size of the images open; say it with --img-size"),
        (("N", "c", 8, 8), 8, "its input leaves the size of the images open"),
        (("N", 0, 8, 8), None, "its input leaves the size of the images open"),
        (("N", 3, 2049, 8), None, "its input is 3 x 2049 x 8, which are no channels, height and width"),
        (("N", 65, 8, 8), None, "its input is 65 x 8 x 8, which are no channels"),
        (("N", 3, "h", "w"), (8, 4096), "its input is 3 x 8 x 4096"),
    ],
)
def test_a_size_that_is_open_or_cannot_be_is_refused(shape: Any, asked: Any, told: str):
    with pytest.raises(CheckpointError, match=re.escape(told)):
        checks.input_size(value("x", *shape), asked)


def test_metadata_prepare_images_of_the_size_that_the_graph_takes():
    prepared = Preprocessing(input_size=(3, 8, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    checks.agree(None, (1, 2, 3))
    checks.agree(prepared, (3, 8, 16))
    with pytest.raises(CheckpointError, match=r"prepare images of \(3, 8, 16\), its input takes \(3, 16, 8\)"):
        checks.agree(prepared, (3, 16, 8))


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        ([value("anything", "N", 5, 7)], "anything"),
        ([value("a", "N", 5), value("logits", "N", 5, 7)], "logits"),
        ([value("features", "N", 5), value("b", "N", 7)], "features"),
        ([value("features", "N", 5), value("logits", "N", 7)], "logits"),
        ([value("maps", "N", 5, 8, 8), value("flat", "N", 7)], "flat"),
    ],
)
def test_the_answers_are_the_only_output_or_one_of_a_known_name_or_the_only_flat_one(outputs: list[Any], name: str):
    assert checks.answers(graph([], outputs)) == name


@pytest.mark.parametrize("outputs", [[], [value("a", "N", 5), value("b", "N", 7)]])
def test_outputs_that_nothing_tells_apart_are_refused(outputs: list[Any]):
    names = ", ".join(each.name for each in outputs)
    with pytest.raises(
        CheckpointError, match=rf"^it has {len(outputs)} outputs \({names}\), none of them clearly the log"
    ):
        checks.answers(graph([], outputs))
