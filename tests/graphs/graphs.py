"""Small ONNX graphs as strangers may write them."""

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

WEIGHT = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
BIAS = np.arange(5, dtype=np.float32)


def classifier(
    shape=("N", 3, 8, 8),
    *,
    kind=TensorProto.FLOAT,
    opset=20,
    metadata=None,
    outputs=("logits",),
    weights_as_inputs=False,
) -> ModelProto:
    """Mean over height and width, then a linear: `expected` computes the same."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "weight", "bias"], ["logits"]),
    ]
    weights = [
        numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
        numpy_helper.from_array(WEIGHT.astype(dtype), "weight"),
        numpy_helper.from_array(BIAS.astype(dtype), "bias"),
    ]
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    if weights_as_inputs:
        inputs = [*(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights), *inputs]
    shapes = {"logits": (shape[0], 5), "mean": (shape[0], 3)}
    results = [helper.make_tensor_value_info(name, kind, shapes[name]) for name in outputs]
    graph = helper.make_graph(nodes, "stranger", inputs, results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, metadata or {})
    return model


def expected(images: np.ndarray) -> np.ndarray:
    """The classifier's logits by numpy."""
    return images.mean((2, 3)) @ WEIGHT + BIAS


def put_outside(model: ModelProto, location: str, name: str = "weight") -> ModelProto:
    """The same model with one weight's values in another file, which is not written."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    set_external_data(tensor, location, offset=0, length=len(tensor.raw_data))
    tensor.ClearField("raw_data")
    return model
