# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from forward_models import (
    Net,
    Steps,
    Tensor,
    blobs,
    cnn,
    evaluate,
    logits_of_training,
    mlp,
    predict,
    quantized,
    session,
)
from onnx import TensorProto, numpy_helper

from coordinator.compiler import adam, build, export, momentum, sgd
from coordinator.compiler.graph import Graph
from edge_sdk.bundle import Bundle
from edge_sdk.errors import CompileError

KINDS: dict[str, dict[str, Any]] = {
    "int8 per tensor": {},
    "int8 per channel": {"per_channel": True},
    "uint8 per tensor": {"unsigned": True},
    "uint8 per channel": {"unsigned": True, "per_channel": True},
}
X, LABELS = blobs((1, 8, 8), 4)
SHIFTED = (X[:, :, ::-1] * 1.1).copy()  # upside down, and a little stronger


@pytest.fixture(scope="module")
def learned() -> onnx.ModelProto:
    """A float model that knows the problem: the people it is for see it shifted."""
    run = Steps(build(cnn(opset=17), loss="cross_entropy", optimizer=momentum(0.9, lr=0.05)))
    for _ in range(30):
        run.step(X, LABELS)
    return onnx.load_from_string(export(run.bundle, run.params()))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, learned: onnx.ModelProto) -> onnx.ModelProto:
    return quantized(learned, X, **KINDS[request.param])


def accuracy(logits: Tensor, y: Tensor) -> float:
    return float(np.mean(logits.argmax(1) == y))


def test_int8_models_train_and_come_out_as_int8(model: onnx.ModelProto) -> None:
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03)))
    assert list(run.bundle.shapes) == [
        f"{layer}.{part}"
        for layer in ("conv1", "conv2", "fc", "head")
        for part in ("weight", "bias")
    ]
    before = evaluate(run.bundle, SHIFTED, LABELS)
    losses = [run.step(SHIFTED, LABELS) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    trained = export(run.bundle, run.params())
    types = [
        {
            t.name: (t.data_type, tuple(t.dims))
            for t in onnx.load_from_string(data).graph.initializer
        }
        for data in (predict_of(run.bundle), trained)
    ]
    assert types[0] == types[1]
    assert len(trained) == len(predict_of(run.bundle))
    learned = accuracy(predict(trained, SHIFTED), LABELS)
    assert learned > int(before["correct"]) / len(X) + 0.3
    told = int(evaluate(run.bundle, SHIFTED, LABELS, run.params())["correct"]) / len(X)
    assert learned == pytest.approx(told, abs=0.05)


def predict_of(bundle: Bundle) -> bytes:
    return bundle.member("onnx/predict.onnx")


def test_the_exported_model_computes_what_training_saw(model: onnx.ModelProto) -> None:
    run = Steps(build(model, loss="cross_entropy", optimizer=adam(lr=0.01)))
    step = run.bundle.manifest["output"]["scale"]
    for _ in range(10):
        run.step(X, LABELS)
    seen = logits_of_training(run.bundle, X, LABELS, run.params())
    came = predict(export(run.bundle, run.params()), X)
    assert step is None or step > 0
    lattice = scale_of_output(export(run.bundle, run.params()))
    off = np.abs(seen - came) / lattice
    assert np.mean(off < 0.5) > 0.9  # the same lattice point but for roundings at its edges
    assert off.max() < 4.5
    assert accuracy(seen, LABELS) == pytest.approx(accuracy(came, LABELS), abs=0.05)


def scale_of_output(data: bytes) -> float:
    graph = Graph.load(data)
    last = graph.producers[graph.outputs[0].name]
    return float(graph.initializers[last.inputs[1]].reshape(()))


def test_an_untrained_export_is_byte_identical(model: onnx.ModelProto) -> None:
    bundle = build(model, loss="cross_entropy")
    assert export(bundle, bundle.params()) == predict_of(bundle)
    np.testing.assert_array_equal(
        predict(predict_of(bundle), X), predict(model.SerializeToString(), X)
    )


def test_only_trained_tensors_and_what_follows_them_change(model: onnx.ModelProto) -> None:
    run = Steps(build(model, loss="cross_entropy", train=["conv2.weight"], optimizer=sgd(lr=0.1)))
    run.step(SHIFTED, LABELS)
    before, after = (
        {t.name: t for t in onnx.load_from_string(data).graph.initializer}
        for data in (predict_of(run.bundle), export(run.bundle, run.params()))
    )
    changed = {name for name, t in before.items() if t != after[name]}
    allowed = {
        "conv2.weight_quantized", "conv2.weight_scale", "conv2.bias_quantized",
        "conv2.bias_quantized_scale",
    }  # fmt: skip
    assert {"conv2.weight_quantized", "conv2.weight_scale"} <= changed <= allowed
    value = [
        numpy_helper.to_array(s["conv2.bias_quantized"])
        * numpy_helper.to_array(s["conv2.bias_quantized_scale"])
        for s in (before, after)
    ]
    np.testing.assert_allclose(*value, atol=1e-4)  # the frozen bias means the same on its new scale


def test_a_bias_alone_trains_in_a_frozen_int8_layer(model: onnx.ModelProto) -> None:
    run = Steps(build(model, loss="cross_entropy", train="bias", optimizer=momentum(0.9, lr=0.05)))
    assert [n.rpartition(".")[2] for n in run.bundle.shapes] == ["bias"] * 4
    losses = [run.step(SHIFTED, LABELS) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    came = predict(export(run.bundle, run.params()), X)
    seen = logits_of_training(run.bundle, X, LABELS, run.params())
    assert np.mean(np.abs(seen - came) < 0.5 * scale_of_output(predict_of(run.bundle))) > 0.9


def optimized(data: bytes, path: Path) -> list[str]:
    """Return the operators that onnxruntime runs after its own optimizations."""
    session(
        data,
        optimized_model_filepath=str(path),
        graph_optimization_level=ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    )
    return [node.op_type for node in onnx.load(path).graph.node]


def test_frozen_int8_layers_stay_on_integer_kernels(model: onnx.ModelProto, tmp_path: Path) -> None:
    bundle = build(model, loss="cross_entropy", train="head.*")
    operators = optimized(bundle.member("onnx/train.onnx"), tmp_path / "train.onnx")
    assert operators.count("QLinearConv") == 2
    assert operators.count("QGemm") == 1
    assert "Conv" not in operators
    assert optimized(predict_of(bundle), tmp_path / "predict.onnx").count("QLinearConv") == 2


def test_moved_numbers_are_not_quantized_again_where_gradients_flow(
    model: onnx.ModelProto,
) -> None:
    given = [n.op_type for n in model.graph.node].count("QuantizeLinear")
    learning = build(model, loss="cross_entropy").manifest["cost"]["train_operators"]
    frozen = build(model, loss="cross_entropy", train="head.*").manifest["cost"]["train_operators"]
    assert learning["QuantizeLinear"] == given - 2  # after MaxPool and after Flatten
    assert frozen["QuantizeLinear"] == given


def test_a_scale_that_others_share_is_copied_before_it_changes() -> None:
    model = quantized(cnn(opset=17), X)
    scale = next(n.input[1] for n in model.graph.node if n.input[0] == "fc.weight_quantized")
    for node in model.graph.node:
        if node.input[0] == "head.weight_quantized":
            node.input[1] = scale
    run = Steps(build(model, loss="cross_entropy", train="head.weight", optimizer=sgd(lr=0.5)))
    fc = dict(zip(*frozen_layer(predict_of(run.bundle)), strict=True))
    run.step(X, LABELS)
    assert dict(zip(*frozen_layer(export(run.bundle, run.params())), strict=True)) == fc


def frozen_layer(data: bytes) -> tuple[list[str], list[bytes]]:
    graph = Graph.load(data)
    node = next(n for n in graph.nodes if n.inputs[0] == "fc.weight_quantized")
    return list(node.inputs), [graph.initializers[name].tobytes() for name in node.inputs]


def test_two_trained_weights_of_one_scale_get_one_each() -> None:
    model = quantized(cnn(opset=17), X)
    scale = next(n.input[1] for n in model.graph.node if n.input[0] == "fc.weight_quantized")
    for node in model.graph.node:
        if node.input[0] == "head.weight_quantized":
            node.input[1] = scale
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03)))
    patches = [p for p in run.bundle.manifest["patches"]["onnx"] if p["kind"] == "quantized"]
    assert len({p["scale_offset"] for p in patches}) == len(patches) == 4
    for _ in range(10):
        run.step(X, LABELS)
    seen = logits_of_training(run.bundle, X, LABELS, run.params())
    came = predict(export(run.bundle, run.params()), X)
    assert np.mean(np.abs(seen - came) < 0.5 * scale_of_output(predict_of(run.bundle))) > 0.85


def test_float_weights_that_are_quantized_on_the_way_are_stored_as_int8() -> None:
    options = {"extra_options": {"AddQDQPairToWeight": True}}
    model = quantized(cnn(opset=17), X, **options)
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03)))
    np.testing.assert_array_equal(
        predict(predict_of(run.bundle), X), predict(model.SerializeToString(), X)
    )
    kinds = {p["kind"] for p in run.bundle.manifest["patches"]["onnx"]}
    assert "quantized" in kinds
    losses = [run.step(X, LABELS) for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    export(run.bundle, run.params())


def test_a_matmul_with_an_asymmetric_added_bias_trains() -> None:
    net = Net(("N", 6), opset=17)
    net.add("MatMul", net.weight("a.weight", 6, 8)).add("Add", net.weight("a.bias", 8)).add("Relu")
    net.add("MatMul", net.weight("b.weight", 8, 3)).add("Add", net.weight("b.bias", 3))
    x, y = blobs((6,), 3)
    for kind in KINDS.values():
        run = Steps(
            build(
                quantized(net.model(), x, **kind),
                loss="cross_entropy",
                optimizer=momentum(0.9, lr=0.03),
            )
        )
        assert list(run.bundle.shapes) == ["a.weight", "a.bias", "b.weight", "b.bias"]
        losses = [run.step(x, y) for _ in range(40)]
        assert losses[-1] < 0.5 * losses[0]
        came = predict(export(run.bundle, run.params()), x)
        told = int(evaluate(run.bundle, x, y, run.params())["correct"]) / len(x)
        assert accuracy(came, y) == pytest.approx(told, abs=0.05)


def test_an_int32_bias_outside_convolutions_trains_on_its_own_scale() -> None:
    net = Net(("N", 1, 8, 8), opset=17).add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    names = [net.weight(f"bn.{n}", 1) for n in ("scale", "shift", "mean", "var")]
    net.weights["bn.var"] = np.abs(net.weights["bn.var"]) + 1
    net.add("BatchNormalization", *names).add("Flatten").dense("head", 16, 4)
    model = quantized(net.model(), X)
    run = Steps(build(model, loss="cross_entropy", train=["bn.shift", "head.*"]))
    assert [p["kind"] for p in run.bundle.manifest["patches"]["onnx"]].count("bias") == 2
    for _ in range(10):
        run.step(X, LABELS, lr=0.1)
    came = predict(export(run.bundle, run.params()), X)
    seen = logits_of_training(run.bundle, X, LABELS, run.params())
    assert np.mean(np.abs(seen - came) < 0.5 * scale_of_output(predict_of(run.bundle))) > 0.9


def integer_ends(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a QDQ model take and return int8, as TFLite's full-integer models do."""
    graph = model.graph
    first = next(n for n in graph.node if n.input[0] == graph.input[0].name)
    last = next(n for n in graph.node if n.output[0] == graph.output[0].name)
    assert (first.op_type, last.op_type) == ("QuantizeLinear", "DequantizeLinear")
    graph.input[0].name = first.output[0]
    graph.output[0].name = last.input[0]
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.INT8
    graph.node.remove(first)
    graph.node.remove(last)
    return model


def test_a_model_of_int8_in_and_out_trains_on_floats() -> None:
    x, y = blobs((6,), 3)
    whole = quantized(mlp(opset=17), x)
    float_ends = Steps(build(whole, loss="cross_entropy"))
    run = Steps(build(integer_ends(whole), loss="cross_entropy"))
    ends = [run.bundle.manifest[end] for end in ("input", "output")]
    assert [end["dtype"] for end in ends] == ["int8", "int8"]
    assert all(end["scale"] > 0 and isinstance(end["zero_point"], int) for end in ends)
    assert [run.step(x, y) for _ in range(5)] == [float_ends.step(x, y) for _ in range(5)]
    raw = np.rint(x / np.float32(ends[0]["scale"])) + ends[0]["zero_point"]
    out = predict(export(run.bundle, run.params()), np.clip(raw, -128, 127).astype(np.int8))
    assert out.dtype == np.int8


def saturated(**options: Any) -> Steps:
    model = quantized(cnn(opset=17), X)  # ranges of a model that knows nothing yet
    return Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03), **options))


def test_headroom_lets_logits_grow_past_the_range_they_were_quantized_for() -> None:
    tight, roomy = saturated(), saturated(headroom=8.0)
    losses = [[run.step(X, LABELS) for _ in range(80)][-1] for run in (tight, roomy)]
    assert losses[0] > 0.4  # cut off: no logit may exceed its range
    assert losses[1] < 0.1
    steps = [scale_of_output(predict_of(run.bundle)) for run in (tight, roomy)]
    assert steps[1] == pytest.approx(8 * steps[0])
    came = predict(export(roomy.bundle, roomy.params()), X)
    assert accuracy(came, LABELS) > 0.95


def test_headroom_reaches_int8_outputs_and_their_manifest() -> None:
    x, _ = blobs((6,), 3)
    models = [integer_ends(quantized(mlp(opset=17), x)) for _ in range(2)]
    one, four = (
        build(m, loss="cross_entropy", headroom=h) for m, h in zip(models, (1.0, 4.0), strict=True)
    )
    assert four.manifest["output"]["scale"] == pytest.approx(4 * one.manifest["output"]["scale"])
    assert four.manifest["input"] == one.manifest["input"]


@pytest.mark.parametrize("headroom", [0.5, 0.0, -1.0, 1e9, float("nan")])
def test_a_headroom_that_is_none_is_refused(headroom: float) -> None:
    with pytest.raises(CompileError, match="headroom from 1 to 64"):
        build(quantized(cnn(opset=17), X), loss="cross_entropy", headroom=headroom)


def test_headroom_is_for_int8_logits() -> None:
    with pytest.raises(CompileError, match="int8 logits"):
        build(mlp(), loss="cross_entropy", headroom=2.0)


@pytest.mark.parametrize("train", ["all", "fc.*"])
@pytest.mark.parametrize("opset", [11, 13, 19, 20, 21, 22])
def test_int8_models_of_every_operator_set_train(opset: int, train: str) -> None:
    run = Steps(build(quantized(cnn(opset=opset), X), loss="cross_entropy", train=train))
    losses = [run.step(X, LABELS, lr=0.1) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert predict(export(run.bundle, run.params()), X).shape == (64, 4)
    predicts = onnx.load_from_string(predict_of(run.bundle))
    assert predicts.opset_import[0].version == opset


def test_channels_before_opset_13_are_refused() -> None:
    with pytest.raises(CompileError, match=r"onnxruntime loads: .*quantize it again"):
        build(quantized(cnn(opset=11), X, per_channel=True), loss="cross_entropy")


@pytest.mark.parametrize(
    "options",
    [
        {"WeightSymmetric": False},
        {"ActivationSymmetric": True},
        {"QuantizeBias": False},
        {"DedicatedQDQPair": True},
        {"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    ],
)
def test_the_quantizers_options_make_no_difference(options: dict[str, Any]) -> None:
    model = quantized(cnn(opset=17), X, extra_options=options)
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03)))
    losses = [run.step(X, LABELS) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    came = predict(export(run.bundle, run.params()), X)
    told = int(evaluate(run.bundle, X, LABELS, run.params())["correct"]) / len(X)
    assert accuracy(came, LABELS) == pytest.approx(told, abs=0.05)


@pytest.mark.parametrize("operator", ["Conv", "Gemm"])
def test_a_model_may_be_int8_in_part(operator: str) -> None:
    model = quantized(cnn(opset=17), X, op_types_to_quantize=[operator])
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03)))
    kinds = {p["kind"] for p in run.bundle.manifest["patches"]["onnx"]}
    assert kinds == {"float32", "quantized", "bias"}
    losses = [run.step(X, LABELS) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    export(run.bundle, run.params())


def test_building_an_int8_model_twice_gives_the_same_bytes(model: onnx.ModelProto) -> None:
    first, second = (build(model, loss="cross_entropy").data for _ in range(2))
    assert first == second
