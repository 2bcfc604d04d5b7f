"""MACs and weights of an ONNX graph, from its operators and their shapes alone.

One function an operator, each from input and output shapes to multiply-accumulates; a graph with an operator that
multiplies matrices and is not in the table has no honest figure, and gets none.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Final

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

Shape = tuple[int, ...]
Attributes = Mapping[str, Any]

LARGEST_CONSTANT = 1024  # elements; a larger one is a weight, whose shape is enough
AXES_ARE_INPUTS: Final = 13  # opset; before it, Unsqueeze had them as an attribute
INDICES: Final = {TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING}
STANDARD: Final = {"", "ai.onnx"}


def matmul_macs(inputs: list[Shape], output: Shape, attributes: Attributes) -> int:
    """(..., M, K) by (..., K, N)."""
    return prod(output) * inputs[0][-1]


def gemm_macs(inputs: list[Shape], output: Shape, attributes: Attributes) -> int:
    """(M, K), or (K, M) transposed, by (K, N)."""
    return prod(output) * inputs[0][0 if attributes.get("transA") else 1]


def conv_macs(inputs: list[Shape], output: Shape, attributes: Attributes) -> int:
    """Every output element sums over a weight's (channels of its group, height, width)."""
    return prod(output) * prod(inputs[1][1:])


def attention_macs(inputs: list[Shape], output: Shape, attributes: Attributes) -> int:
    """Opset 23's fused attention over (B, heads, N, d), or (B, N, heads * d)."""
    query, key = inputs[:2]
    if len(query) == 4:
        return prod(query[:3]) * key[2] * (query[3] + output[3])
    return prod(query[:2]) * key[1] * (query[2] + output[2])


COUNTED: Final[Mapping[str, Callable[[list[Shape], Shape, Attributes], int]]] = {
    "MatMul": matmul_macs,
    "Gemm": gemm_macs,
    "Conv": conv_macs,
    "Attention": attention_macs,
}
UNCOUNTED: Final = {
    *("ConvInteger", "ConvTranspose", "DeformConv", "Einsum", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    *("GRU", "LSTM", "RNN", "If", "Loop", "Scan"),
}


def graph_macs(model: ModelProto) -> int | None:
    """MACs of one image; None where a shape stays open or an operator is beyond the table.

    A free batch size is taken as one; the MACs of a fixed one are shared by its images.
    """
    bare = skeleton(model)
    nodes = bare.graph.node
    if bare.functions or any(node.op_type in UNCOUNTED or node.domain not in STANDARD for node in nodes):
        return None
    batch = bare.graph.input[0].type.tensor_type.shape.dim[0]
    batch.dim_value = batch.dim_value if batch.dim_value > 0 else 1
    try:
        shapes = _shapes(bare)
        total = sum(_node_macs(node, shapes) for node in nodes if node.op_type in COUNTED)
    except (onnx.shape_inference.InferenceError, LookupError, ValueError):
        return None
    return total // batch.dim_value


def weight_count(model: ModelProto) -> int:
    """Number of values that the graph stores, without indices and shapes."""
    stored = [*model.graph.initializer, *(node.attribute[0].t for node in model.graph.node if _is_constant(node))]
    return sum(prod(tensor.dims) for tensor in stored if tensor.data_type not in INDICES)


def skeleton(model: ModelProto) -> ModelProto:
    """The graph without its weights: they become inputs of a known shape, behind the graph's own inputs."""
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]  # old graphs list their weights as well
    bare = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.CopyFrom(GraphProto(name="skeleton", node=graph.node, input=inputs, output=graph.output))
    for tensor in graph.initializer:
        if prod(tensor.dims) > LARGEST_CONSTANT:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            bare.graph.initializer.append(tensor)
    return bare


def _is_constant(node: NodeProto) -> bool:
    return node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].type == AttributeProto.TENSOR


def _shapes(bare: ModelProto) -> dict[str, Shape]:
    """The shape of every value whose shape inference finds whole."""
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    if _unsqueeze_scalars_(bare, inferred):
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def _unsqueeze_scalars_(bare: ModelProto, inferred: GraphProto) -> bool:
    """Writes the reshapes that make a vector of a scalar as what inference knows the value of; whether there are some.

    Exporters make so the shape that a constant is expanded to.
    """
    kinds = {value.name: value.type.tensor_type for value in inferred.value_info}
    scalars = {name for name, kind in kinds.items() if kind.HasField("shape") and not kind.shape.dim}
    found = [node for node in bare.graph.node if node.op_type == "Reshape" and node.input[0] in scalars]
    for node in found:
        axes = onnx.helper.make_tensor(f"{node.output[0]}_axes", TensorProto.INT64, [1], [0])
        bare.graph.initializer.append(axes)
        node.CopyFrom(onnx.helper.make_node("Unsqueeze", [node.input[0], axes.name], node.output))
    return bool(found) and any(of.version >= AXES_ARE_INPUTS for of in bare.opset_import if of.domain in STANDARD)


def _node_macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs = [shapes[name] for name in node.input if name]
    return COUNTED[node.op_type](inputs, shapes[node.output[0]], attributes)
