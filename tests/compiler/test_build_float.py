# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import pytest
from forward_models import (
    Net,
    Steps,
    Tensor,
    X,
    Y,
    along,
    blobs,
    cnn,
    evaluate,
    mlp,
    predict,
)
from onnx import helper, numpy_helper

from coordinator.compiler import build, export, momentum, sgd
from coordinator.compiler.graph import Graph

MODELS = {"mlp": (mlp(), (6,), 3), "cnn": (cnn(), (1, 8, 8), 4)}


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_and_finds_the_classes(name: str) -> None:
    model, shape, classes = MODELS[name]
    x, y = blobs(shape, classes)
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.05)))
    losses = [run.step(x, y) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    measured = evaluate(run.bundle, x, y, run.params())
    assert measured["correct"] >= 0.95 * len(x)
    assert measured["loss"] == pytest.approx(run.step(x, y), rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_logits"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_the_whole_model_is_its_finite_difference(name: str, loss: str) -> None:
    model, shape, classes = MODELS[name]
    model = cnn(smooth=True) if name == "cnn" else model
    x, y = blobs(shape, classes, n=16)
    target = y if loss == "cross_entropy" else np.eye(classes, dtype=np.float32)[y]
    bundle = build(model, loss=loss, optimizer=sgd(lr=1.0))
    gradient = Steps(bundle).gradient(x, target)

    def measure(params: dict[str, Tensor]) -> float:
        return float(evaluate(bundle, x, target, params)["loss"])

    seen, told = along(measure, bundle.params(), gradient, step=2e-4)
    assert seen == pytest.approx(told, rel=1e-3)


def test_the_predict_graph_is_the_given_model() -> None:
    model = cnn()
    x, _ = blobs((1, 8, 8), 4, n=5)
    bundle = build(model, loss="cross_entropy")
    made = onnx.load_from_string(bundle.member("onnx/predict.onnx"))
    assert [n.op_type for n in made.graph.node] == [n.op_type for n in model.graph.node]
    assert made.graph.input[0].name == X
    assert made.graph.output[0].name == Y
    expected = predict(model.SerializeToString(), x)
    np.testing.assert_array_equal(predict(bundle.member("onnx/predict.onnx"), x), expected)


def test_export_without_training_is_byte_identical_and_with_it_holds_the_weights() -> None:
    x, y = blobs((6,), 3)
    run = Steps(build(mlp(), loss="cross_entropy", train="head.*"))
    assert export(run.bundle, run.bundle.params()) == run.bundle.member("onnx/predict.onnx")
    run.step(x, y)
    trained = export(run.bundle, run.params())
    stored = {t.name: t for t in onnx.load_from_string(trained).graph.initializer}
    for name, value in run.params().items():
        np.testing.assert_array_equal(numpy_helper.to_array(stored[name]), value)
    logits = predict(trained, x)
    loss = -np.mean(log_softmax(logits)[np.arange(len(y)), y])
    assert loss == pytest.approx(float(evaluate(run.bundle, x, y, run.params())["loss"]), rel=1e-5)


def log_softmax(z: Tensor) -> Tensor:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def test_the_same_model_gives_the_same_bytes() -> None:
    first, second = (build(cnn(), loss="cross_entropy", name="n") for _ in range(2))
    assert first.data == second.data


def test_a_path_bytes_and_a_proto_are_the_same_model(tmp_path: object) -> None:
    from pathlib import Path

    model = mlp()
    path = Path(str(tmp_path)) / "net.onnx"
    onnx.save(model, path)
    made = [
        build(m, loss="mse", name="n").digest for m in (path, str(path), path.read_bytes(), model)
    ]
    assert len(set(made)) == 1
    assert build(path, loss="mse").manifest["name"] == "net"


def test_the_argument_is_left_as_it_was() -> None:
    model = mlp(batch=1)
    before = model.SerializeToString()
    build(model, loss="mse")
    assert model.SerializeToString() == before


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax"])
def test_a_last_softmax_is_left_to_the_loss(last: str) -> None:
    x, y = blobs((6,), 3)
    plain = Steps(build(mlp(), loss="cross_entropy"))
    topped = Steps(build(mlp(last=last), loss="cross_entropy"))
    assert [plain.step(x, y) for _ in range(5)] == [topped.step(x, y) for _ in range(5)]
    softmax = Graph.load(topped.bundle.member("onnx/train.onnx"))
    assert [n.op for n in softmax.nodes].count("Softmax") == 0
    assert predict(topped.bundle.member("onnx/predict.onnx"), x).shape == (64, 3)


def test_a_last_sigmoid_is_left_to_bce() -> None:
    x, y = blobs((6,), 2)
    target = y[:, None].astype(np.float32)
    plain = Steps(build(mlp(o=1), loss="bce_logits", optimizer=sgd(lr=0.5)))
    topped = Steps(build(mlp(o=1, last="Sigmoid"), loss="bce_logits", optimizer=sgd(lr=0.5)))
    losses = [plain.step(x, target) for _ in range(40)]
    assert losses == [topped.step(x, target) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    measured = evaluate(plain.bundle, x, target, plain.params())
    assert measured["correct"].dtype == np.int64
    assert measured["correct"] >= 60


def test_an_example_with_several_labels_is_right_when_all_are() -> None:
    bundle = build(mlp(), loss="bce_logits")
    x, _ = blobs((6,), 3, n=20)
    logits = predict(bundle.member("onnx/predict.onnx"), x)
    target = (logits > 0).astype(np.float32)
    assert evaluate(bundle, x, target)["correct"] == 20
    target[:5, 1] = 1 - target[:5, 1]
    assert evaluate(bundle, x, target)["correct"] == 15


def test_losses_stay_finite_on_extreme_logits() -> None:
    model = mlp()
    for tensor in model.graph.initializer:
        if tensor.name == "head.weight":
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor) * 1e4, tensor.name)
            )
    x, y = blobs((6,), 3)
    for loss, target in (("cross_entropy", y), ("bce_logits", np.eye(3, dtype=np.float32)[y])):
        run = Steps(build(model, loss=loss))
        assert np.isfinite(run.step(x, target))
        assert all(np.isfinite(value).all() for value in run.params().values())


def test_a_class_id_out_of_range_is_an_error_not_a_silent_zero() -> None:
    x, y = blobs((6,), 3)
    run = Steps(build(mlp(), loss="cross_entropy"))
    y[3] = 3
    with pytest.raises(Exception, match=r"(?i)index|bound"):
        run.step(x, y)


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 17, 18, 20, 21, 22])
def test_every_operator_set_from_11_on_trains(opset: int) -> None:
    x, y = blobs((1, 8, 8), 4)
    run = Steps(build(cnn(opset=opset), loss="cross_entropy", optimizer=momentum(0.9, lr=0.05)))
    losses = [run.step(x, y) for _ in range(15)]
    assert losses[-1] < losses[0]
    train = onnx.load_from_string(run.bundle.member("onnx/train.onnx"))
    assert train.opset_import[0].version == max(18, opset)
    assert train.ir_version <= 10


def test_a_model_newer_than_the_oldest_runtime_is_brought_down_to_it() -> None:
    x, y = blobs((6,), 3)
    bundle = build(mlp(opset=24), loss="cross_entropy")
    predicts = onnx.load_from_string(bundle.member("onnx/predict.onnx"))
    assert predicts.opset_import[0].version == 22
    Steps(bundle).step(x, y)


def test_weights_in_constant_nodes_train() -> None:
    x, y = blobs((6,), 3)
    plain, model = mlp(), mlp()
    stored = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in reversed(stored):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    a, b = (Steps(build(m, loss="cross_entropy", name="n")) for m in (plain, model))
    assert list(a.bundle.shapes) == list(b.bundle.shapes)
    assert a.step(x, y) == b.step(x, y)
    assert export(b.bundle, b.params()) != b.bundle.member("onnx/predict.onnx")


def test_tensors_named_like_the_bundles_own_do_not_collide() -> None:
    model = mlp()
    names = {X: "x", Y: "y", "body.weight": "p.0", "head.bias": "lr", "relu_1": "loss"}
    for node in model.graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
    for item in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        item.name = names.get(item.name, item.name)
    x, y = blobs((6,), 3)
    plain, clash = (Steps(build(m, loss="cross_entropy")) for m in (mlp(), model))
    assert [plain.step(x, y) for _ in range(3)] == [clash.step(x, y) for _ in range(3)]
    assert list(clash.bundle.shapes) == ["p.0", "body.bias", "head.weight", "lr"]


def test_a_weight_used_twice_is_one_parameter() -> None:
    net = Net(("N", 6))
    w = net.weight("tied", 6, 6)
    net.add("MatMul", w).add("Tanh").add("MatMul", w)
    bundle = build(net.model(), loss="mse", optimizer=sgd(lr=1.0))
    assert list(bundle.shapes) == ["tied"]
    x, _ = blobs((6,), 3, n=8)
    target = np.ones((8, 6), np.float32)
    gradient = Steps(bundle).gradient(x, target)

    def measure(params: dict[str, Tensor]) -> float:
        return float(evaluate(bundle, x, target, params)["loss"])

    seen, told = along(measure, bundle.params(), gradient, step=2e-4)
    assert seen == pytest.approx(told, rel=1e-3)


def test_the_manifest_says_what_it_costs() -> None:
    bundle = build(mlp(), loss="cross_entropy", train="head.*")
    cost = bundle.manifest["cost"]
    assert cost["params"] == 6 * 8 + 8 + 8 * 3 + 3
    assert cost["trainable"] == 27
    assert cost["trainable_share"] == pytest.approx(27 / 83, abs=1e-6)
    assert cost["bytes_dense"] == 108
    assert cost["operators"] == {"Gemm": 2, "Relu": 1}
    assert 2 * (48 + 24) <= cost["flops_forward"] <= 2 * (48 + 24) + 40
    assert cost["flops_step"] > cost["flops_forward"]
    assert "trainable share" in str(bundle.explain())


def test_the_training_graph_has_no_backward_below_what_is_trained() -> None:
    whole = build(cnn(), loss="cross_entropy").manifest["cost"]
    head = build(cnn(), loss="cross_entropy", train="last:1").manifest["cost"]
    assert "ConvTranspose" not in head["train_operators"]
    assert head["train_operators"]["Conv"] == 2
    assert head["flops_step"] < 0.6 * whole["flops_step"]
