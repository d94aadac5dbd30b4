# SPDX-License-Identifier: Apache-2.0
"""Models that no quantizer writes today, but that the format allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from forward_models import Net, Steps, Tensor, blobs, evaluate, mlp, predict, session
from onnx import TensorProto, helper, numpy_helper

from coordinator.compiler import build, export, momentum
from edge_sdk.errors import CompileError

X, LABELS = blobs((6,), 3)


def hand_quantized(
    integers: Tensor, scale: Any, zero: Any, *, axis: int | None = None
) -> onnx.ModelProto:
    """A MatMul by a stored quantized weight, and a float bias."""
    net = Net(("N", 6), opset=17)
    net.weights |= {"w_quantized": integers, "scale": np.asarray(scale, np.float32)}
    net.weights["zero"] = np.asarray(zero, integers.dtype)
    attributes = {} if axis is None else {"axis": axis}
    net.nodes.append(
        helper.make_node("DequantizeLinear", ["w_quantized", "scale", "zero"], ["w"], **attributes)
    )
    net.add("MatMul", "w").add("Add", net.weight("b", 3))
    return net.model()


@pytest.mark.parametrize("zero", [0, 255, 90])
def test_one_sided_uint8_weights_train_within_their_side(zero: int) -> None:
    integers = np.random.default_rng(0).integers(0, 256, (6, 3)).astype(np.uint8)
    model = hand_quantized(integers, 0.004, zero)
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.1)))
    losses = [run.step(X, LABELS) for _ in range(30)]
    assert losses[-1] < losses[0]
    agrees(run)


def agrees(run: Steps) -> None:
    """The exported model says what the evaluation graph measured, kernels' shortcuts aside."""
    exact = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    runs = session(export(run.bundle, run.params()), graph_optimization_level=exact)
    logits = runs.run(None, {"input": X})[0].astype(np.float64)
    logp = logits - logits.max(1, keepdims=True)
    logp = logp - np.log(np.exp(logp).sum(1, keepdims=True))
    told = float(evaluate(run.bundle, X, LABELS, run.params())["loss"])
    assert -logp[np.arange(len(X)), LABELS].mean() == pytest.approx(told, rel=1e-5)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_of_any_axis_with_zero_points_of_their_own(axis: int) -> None:
    n = (6, 3)[axis]
    rng = np.random.default_rng(1)
    integers = rng.integers(-127, 128, (6, 3)).astype(np.int8)
    zeros = rng.integers(-127, 128, n)
    zeros[0] = -127  # no room below
    model = hand_quantized(integers, rng.uniform(0.001, 0.01, n), zeros, axis=axis)
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.05)))
    (patch,) = (p for p in run.bundle.manifest["patches"]["onnx"] if p["kind"] == "quantized")
    assert (patch["axis"], patch["scales"]) == (axis % 2, n)
    assert patch["zero_point"] == zeros.tolist()
    for _ in range(10):
        run.step(X, LABELS)
    agrees(run)


def test_an_all_zero_weight_starts_to_learn() -> None:
    model = hand_quantized(np.zeros((6, 3), np.int8), 0.01, 0)
    run = Steps(build(model, loss="cross_entropy", train="w", optimizer=momentum(0.9, lr=0.1)))
    losses = [run.step(X, LABELS) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    agrees(run)


def test_a_quantized_weight_read_twice_is_one_parameter() -> None:
    model = hand_quantized(np.arange(18, dtype=np.int8).reshape(6, 3), 0.01, 0)
    again = helper.make_node("DequantizeLinear", ["w_quantized", "scale", "zero"], ["w2"])
    model.graph.node.insert(1, again)
    model.graph.node.insert(3, helper.make_node("MatMul", ["input", "w2"], ["twice"]))
    model.graph.node[-1].input[1] = "twice"
    run = Steps(build(model, loss="cross_entropy"))
    assert list(run.bundle.shapes) == ["w"]
    for _ in range(3):
        run.step(X, LABELS)
    agrees(run)


def refuse(model: onnx.ModelProto, message: str, **options: Any) -> None:
    with pytest.raises(CompileError, match=message):
        build(model, **{"loss": "cross_entropy", **options})


def test_integers_read_otherwise_or_by_several_scales_are_refused() -> None:
    integers = np.ones((6, 3), np.int8)
    model = hand_quantized(integers, 0.01, 0)
    cast = helper.make_node("Cast", ["w_quantized"], ["f"], to=TensorProto.FLOAT)
    model.graph.node.insert(0, cast)
    model.graph.node.append(helper.make_node("MatMul", ["input", "f"], ["unread"]))
    model.graph.node.append(helper.make_node("Add", ["add_2", "unread"], ["sum"]))
    model.graph.node[3].output[0] = "add_2"
    model.graph.output[0].name = "sum"
    refuse(model, "only DequantizeLinear to read the integers of 'w_quantized', Cast node")

    model = hand_quantized(integers, 0.01, 0)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.02), "scale2"))
    other = helper.make_node("DequantizeLinear", ["w_quantized", "scale2", "zero"], ["w2"])
    model.graph.node.insert(1, other)
    model.graph.node.insert(3, helper.make_node("MatMul", ["input", "w2"], ["twice"]))
    model.graph.node[-1].input[1] = "twice"
    refuse(model, "one scale for 'w_quantized', its readers have several")


def test_a_scale_computed_by_the_model_is_refused() -> None:
    model = hand_quantized(np.ones((6, 3), np.int8), 0.01, 0)
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["b"], ["dynamic"], keepdims=0))
    model.graph.node[1].input[1] = "dynamic"
    refuse(model, "stored float32 scales")


def test_two_tensors_of_one_short_name_keep_their_stored_names() -> None:
    net = Net(("N", 6), opset=17)
    net.weights |= {"w_quantized": np.ones((6, 6), np.int8), "scale": np.float32(0.01)}
    net.nodes.append(helper.make_node("DequantizeLinear", ["w_quantized", "scale"], ["d"]))
    net.add("MatMul", "d").add("MatMul", net.weight("w", 6, 3))
    net.weights["scale"] = np.asarray(0.01, np.float32)
    assert list(build(net.model(), loss="cross_entropy").shapes) == ["w_quantized", "w"]


def test_token_ids_reach_an_embedding() -> None:
    net = Net(("N", 5)).add("Gather", name="embedded")
    net.nodes[0].input[:] = [net.weight("table", 9, 4), "input"]
    net.add("Flatten").dense("head", 20, 3)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (40, 5)), rng.integers(0, 3, 40)
    bundle = build(
        net.model(dtype=TensorProto.INT64),
        loss="cross_entropy",
        optimizer=momentum(0.9, lr=0.1),
    )
    assert bundle.manifest["input"]["dtype"] == "int64"
    assert list(bundle.shapes) == ["table", "head.weight", "head.bias"]
    run = Steps(bundle)
    losses = [run.step(x, y) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("value_float", 2.0), ("value_floats", [2.0]), ("value", None)],
)
def test_constants_in_every_spelling_are_read(attribute: str, value: Any) -> None:
    net = Net(("N", 6)).dense("body", 6, 3).add("Mul", "two")
    if value is None:
        value = numpy_helper.from_array(np.array([2.0], np.float32))
    net.nodes.insert(0, helper.make_node("Constant", [], ["two"], **{attribute: value}))
    assert predict(build(net.model(), loss="mse").member("onnx/predict.onnx"), X).shape == (64, 3)


def test_whole_number_constants_are_read_and_texts_refused() -> None:
    net = Net(("N", 6)).dense("body", 6, 3).add("Unsqueeze", "one").add("Flatten")
    net.nodes.insert(0, helper.make_node("Constant", [], ["one"], value_ints=[1]))
    build(net.model(), loss="mse")
    model = mlp()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["t"], value_string="text"))
    refuse(model, "expected numbers in Constant node")


def test_sparse_weights_are_refused() -> None:
    model = mlp()
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    refuse(model, "dense weights")


def test_an_output_that_no_gradient_reaches_is_refused() -> None:
    model = Net(("N", 6)).dense("body", 6, 3).add("ArgMax", axis=1, keepdims=0).model()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    refuse(model, "none match: the model has none")


def test_an_int8_input_that_is_not_dequantized_at_once_is_refused() -> None:
    net = Net(("N", 6)).add("Abs")
    net.weights |= {"scale": np.asarray(0.1, np.float32)}
    net.add("DequantizeLinear", "scale").dense("body", 6, 3)
    refuse(net.model(dtype=TensorProto.INT8), "DequantizeLinear to read the int8 input 'input'")
