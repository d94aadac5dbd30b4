# SPDX-License-Identifier: Apache-2.0
"""What `fedge build` says when it cannot: one line that names the node or option and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from forward_models import Net, cnn, mlp
from onnx import TensorProto, helper, numpy_helper

from edge_sdk.cli import main

ML = "ai.onnx.ml"


def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def forest() -> onnx.ModelProto:
    leaves = {
        "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0, 0, 0],
        "nodes_values": [0.5, 0.0, 0.0], "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
        "nodes_truenodeids": [1, 0, 0], "nodes_falsenodeids": [2, 0, 0], "class_treeids": [0, 0],
        "class_nodeids": [1, 2], "class_ids": [0, 1], "class_weights": [1.0, 1.0],
        "classlabels_int64s": [0, 1],
    }  # fmt: skip
    node = helper.make_node(
        "TreeEnsembleClassifier", ["x"], ["label", "y"], name="forest", domain=ML, **leaves
    )
    outputs = [value("label", TensorProto.INT64, "N"), value("y", TensorProto.FLOAT, "N", 2)]
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, "N", 4)], outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(ML, 3)], ir_version=8)


def words() -> onnx.ModelProto:
    nodes = [
        helper.make_node("StringNormalizer", ["x"], ["lower"], name="lower"),
        helper.make_node("Gemm", ["lower", "w"], ["y"], name="head"),
    ]
    stored = [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")]
    inputs = [value("x", TensorProto.STRING, "N", 4)]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", TensorProto.FLOAT, "N", 3)], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def turns_from_data() -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Tanh", ["h"], ["h2"])],
        "body",
        [value("i", TensorProto.INT64), value("c", TensorProto.BOOL), value("h", 1, "N", 8)],
        [value("c2", TensorProto.BOOL), value("h2", 1, "N", 8)],
    )
    net = Net(("N", 6)).dense("body", 6, 8)
    net.weights["yes"] = np.ones((), np.bool_)
    net.nodes += [
        helper.make_node("ReduceMax", [net.last], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["turns"], to=TensorProto.INT64),
        helper.make_node("Loop", ["turns", "yes", net.last], ["out"], name="while", body=body),
    ]
    net.last = "out"
    return net.dense("head", 8, 3).model()


def learning_batchnorm(opset: int) -> onnx.ModelProto:
    net = Net(("N", 3, 8, 8), opset=opset).conv("conv", 3, 4, 3)
    for name in ("gamma", "beta", "mean", "var"):
        net.weights[name] = np.ones(4, np.float32)
    more = {"training_mode": 1} if opset >= 14 else {}
    net.add("BatchNormalization", "gamma", "beta", "mean", "var", **more)
    net.nodes[-1].output.extend(["mean2", "var2"] if opset >= 14 else ["m", "v", "sm", "sv"])
    return net.add("GlobalAveragePool").add("Flatten").dense("head", 4, 3).model()


def with_operator(op: str, *, domain: str = "", inputs: tuple[str, ...] = ()) -> onnx.ModelProto:
    net = Net(("N", 6)).dense("body", 6, 8)
    net.nodes.append(helper.make_node(op, [net.last, *inputs], ["out"], name="mine", domain=domain))
    net.last = "out"
    net.weights["half"], net.weights["yes"] = np.array(0.5, np.float32), np.ones((), np.bool_)
    model = net.dense("head", 8, 3).model()
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def in_half() -> onnx.ModelProto:
    model = mlp()
    for tensor in model.graph.initializer:
        narrow = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    for put in (model.graph.input[0], model.graph.output[0]):
        put.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "trees": (forest, "TreeEnsembleClassifier node 'forest'", "no gradient: use a network"),
    "strings": (words, "StringNormalizer node 'lower'", "works on strings"),
    "loop": (turns_from_data, "Loop node 'while'", "depends on the data"),
    "batchnorm": (
        lambda: learning_batchnorm(18), "BatchNormalization node 'batchnorm", "model.eval()",
    ),
    "old batchnorm": (
        lambda: learning_batchnorm(11), "BatchNormalization node 'batchnorm", "training mode",
    ),
    "dropout": (
        lambda: with_operator("Dropout", inputs=("half", "yes")), "Dropout node 'mine'", "eval()",
    ),
    "random": (lambda: with_operator("Bernoulli"), "Bernoulli node 'mine'", "random numbers"),
    "sequence": (
        lambda: with_operator("SequenceConstruct"), "SequenceConstruct node 'mine'", "not tensors",
    ),
    "custom": (
        lambda: with_operator("Magic", domain="com.example"), "com.example.Magic node 'mine'",
        "ONNX's own operators",
    ),
    "optimized": (
        lambda: with_operator("SkipLayerNormalization", domain="com.microsoft"),
        "com.microsoft.SkipLayerNormalization node 'mine'", "as it was exported",
    ),
    "float16": (in_half, "'input' is float16", "export the model in float32"),
    "old": (lambda: mlp(opset=9), "opset 11 or newer, got 9", "export the model again"),
}  # fmt: skip

FILES = {
    "absent.onnx": (None, "absent.onnx: No such file", "correct the path"),
    "text.onnx": (b"hello, this is no model", "text.onnx is not one", "export it again"),
    "cut.onnx": (cnn().SerializeToString()[:-300], "cut.onnx is not one, or is cut short", "again"),
    "empty.onnx": (b"", "empty.onnx holds a graph without nodes", "export it again"),
    "model.tflite": (b"\0\0\0\0TFL3", "model.tflite is not one", "export it again"),
}

OPTIONS: dict[str, tuple[list[str], str]] = {
    "loss": (["--loss", "hinge"], "choose from 'bce_logits', 'cross_entropy', 'mse'"),
    "optimizer": (["--optimizer", "lion"], "choose from 'sgd', 'momentum', 'adam'"),
    "no number": (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    "lr": (["--lr", "-1"], "expected lr above 0, got -1.0: choose a positive number"),
    "clip": (["--clip", "0"], "expected max_norm above 0, got 0.0"),
    "decay": (["--optimizer", "momentum", "--decay", "2"], "expected decay in [0, 1), got 2.0"),
    "folder": (["-o", "no/such/x.fedge"], "a folder that exists, got -o no/such/x.fedge"),
    "unknown": (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
}

SELECTORS = {
    "haed.weight": "did you mean 'head.weight'?: the model has body.weight, ",
    "foo.*": "none match: the model has body.weight, body.bias, head.weight, head.bias",
    "last:9": "k from 1 to 2, the layers with weights, got 'last:9'",
    "input": "'input' is none",
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(capsys: pytest.CaptureFixture[str], code: int, model: str, *more: str) -> str:
    """Run `fedge build`; it must end with this code, one line on stderr, and no bundle."""
    args = ["build", model, "-o", "x.fedge", "--loss", "cross_entropy", *more]
    try:
        ended: object = main(args)
    except SystemExit as left:
        ended = left.code
    said = capsys.readouterr()
    assert ended == code, said.err
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("fedge")
    assert not Path("x.fedge").exists()
    return said.err


@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_learn_is_refused_by_name(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, what, why = MODELS[name]
    onnx.save(make(), "model.onnx")
    said = fails(capsys, 5, "model.onnx")
    assert what in said
    assert why in said


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_model_is_refused_by_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, what, advice = FILES[name]
    if data is not None:
        Path(name).write_bytes(data)
    said = fails(capsys, 5, name)
    assert what in said
    assert advice in said


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option_is_wrong_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(mlp(), "model.onnx")
    more, what = OPTIONS[name]
    said = fails(capsys, 2, "model.onnx", *more)
    assert what in said
    assert "see fedge build --help" in said


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selector_that_finds_nothing_says_what_there_is(
    selector: str, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(mlp(), "model.onnx")
    assert SELECTORS[selector] in fails(capsys, 5, "model.onnx", "--train", selector)
