from math import prod

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from kcrprune.graphs.counted import graph_macs, weight_count


def graph(nodes, weights=(), shape=("N", 3, 8, 8), domains=()):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_empty_tensor_value_info("y")]
    stored = [numpy_helper.from_array(np.zeros(size, np.float32), name) for name, size in weights]
    imports = [helper.make_opsetid("", 23), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, stored), opset_imports=imports)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_costs_its_kernel_at_every_output(kernel, groups):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], group=groups, strides=[2, 2], pads=[1, 1, 1, 1])]
    side = (8 + 2 - kernel) // 2 + 1
    expected = sum(6 * (3 // groups) * kernel * kernel for _ in range(side * side))
    assert graph_macs(graph(nodes, [("w", (6, 3 // groups, kernel, kernel))])) == expected


@pytest.mark.parametrize(("transposed", "size"), [(0, (192, 7)), (1, (7, 192))])
def test_a_linear_costs_its_weights(transposed, size):
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["y"], transB=transposed),
    ]
    assert graph_macs(graph(nodes, [("w", size)])) == prod(size)


def test_a_transposed_first_factor():
    nodes = [helper.make_node("Squeeze", ["x"], ["m"]), helper.make_node("Gemm", ["m", "w"], ["y"], transA=1)]
    assert graph_macs(graph(nodes, [("w", (8, 5))], shape=(1, 1, 8, 4))) == 8 * 4 * 5


def test_a_batched_product_counts_every_matrix():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    assert graph_macs(graph(nodes, [("w", (8, 5))])) == 3 * 8 * 8 * 5


def test_the_macs_of_a_fixed_batch_are_shared():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    assert graph_macs(graph(nodes, [("w", (8, 5))], shape=(4, 3, 8, 8))) == 3 * 8 * 8 * 5


@pytest.mark.parametrize("rank", [3, 4])
def test_fused_attention_equals_its_two_products(rank):
    """Queries, keys and values of (batch 1, 3 heads, 8 tokens, 8 channels), fused or as two products."""
    products = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["x", "t"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("MatMul", ["shares", "x"], ["y"]),
    ]
    fused = [helper.make_node("Attention", ["x", "x", "x"], ["y"])]
    if rank == 3:
        flat = numpy_helper.from_array(np.array([1, 8, 24]), "flat")
        fused = [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1, 3]),
            helper.make_node("Constant", [], ["flat"], value=flat),
            helper.make_node("Reshape", ["t", "flat"], ["m"]),
            helper.make_node("Attention", ["m", "m", "m"], ["y"], q_num_heads=3, kv_num_heads=3),
        ]
    assert graph_macs(graph(fused)) == graph_macs(graph(products)) == 2 * 3 * 8 * 8 * 8


def test_shapes_are_followed_through_a_computed_reshape():
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Constant", [], ["rest"], value=numpy_helper.from_array(np.array([24, 8]), "rest")),
        helper.make_node("Concat", ["batch", "rest"], ["size"], axis=0),
        helper.make_node("Reshape", ["x", "size"], ["m"]),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    assert graph_macs(graph(nodes, [("w", (8, 5))])) == 24 * 8 * 5


def test_shapes_are_followed_through_what_a_constant_is_expanded_to():
    """As the exporter writes a shape: a scalar product of sizes, made a vector and joined with others."""
    constants = {"three": np.array(3), "vector": np.array([-1]), "rest": np.array([8])}
    nodes = [
        *(helper.make_node("Constant", [], [n], value=numpy_helper.from_array(v, n)) for n, v in constants.items()),
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Squeeze", ["batch"], ["scalar"]),
        helper.make_node("Mul", ["scalar", "three"], ["windows"]),
        helper.make_node("Reshape", ["windows", "vector"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["size"], axis=0),
        helper.make_node("Expand", ["bias", "size"], ["m"]),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    assert graph_macs(graph(nodes, [("w", (8, 5)), ("bias", (8,))])) == 3 * 8 * 5


@pytest.mark.parametrize(
    ("nodes", "domains"),
    [
        ([helper.make_node("Einsum", ["x", "w"], ["y"], equation="nchw,wk->nchk")], ()),
        ([helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")], ("com.microsoft",)),
        (
            [
                helper.make_node("NonZero", ["x"], ["found"]),  # its shape depends on the values
                helper.make_node("Cast", ["found"], ["f"], to=TensorProto.FLOAT),
                helper.make_node("MatMul", ["w", "f"], ["y"]),
            ],
            (),
        ),
    ],
)
def test_what_cannot_be_counted_has_no_figure(nodes, domains):
    assert graph_macs(graph(nodes, [("w", (8, 4))], domains=domains)) is None


def test_counting_leaves_the_graph_alone():
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [("w", (8, 5))])
    before = model.SerializeToString(deterministic=True)
    graph_macs(model)
    assert model.SerializeToString(deterministic=True) == before


def test_stored_values_are_counted_without_indices():
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros((2, 3), np.float16), "c"))
    index = helper.make_node("Constant", [], ["i"], value=numpy_helper.from_array(np.arange(9), "i"))
    model = graph([constant, index], [("w", (8, 5)), ("b", ())])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 4), np.int8), "quantised"))
    assert weight_count(model) == 6 + 40 + 1 + 16


def test_the_output_that_is_charged_is_the_one_that_onnx_computes():
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], strides=[3, 2])]
    model = graph(nodes, [("w", (5, 3, 2, 2))])
    (output,) = ReferenceEvaluator(model).run(None, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert graph_macs(model) == np.asarray(output).size * 12
