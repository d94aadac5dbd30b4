# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import pytest
from forward_models import Net, Steps, blobs, cnn, mlp
from onnx import helper

from coordinator.compiler import build
from edge_sdk.errors import CompileError

CNN = [
    f"{layer}.{part}" for layer in ("conv1", "conv2", "fc", "head") for part in ("weight", "bias")
]


def chosen(model: onnx.ModelProto, train: str | list[str]) -> list[str]:
    return list(build(model, loss="mse", train=train).shapes)


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("all", CNN),
        ("bias", CNN[1::2]),
        ("head.*", CNN[-2:]),
        ("*.weight", CNN[::2]),
        ("conv[12].bias", ["conv1.bias", "conv2.bias"]),
        ("last:1", CNN[-2:]),
        ("last:2", CNN[-4:]),
        ("last:4", CNN),
        ("fc.bias", ["fc.bias"]),
        (["fc.bias"], ["fc.bias"]),
        (["head.*", "conv1.weight"], ["conv1.weight", *CNN[-2:]]),
        (["last:1", "bias"], ["conv1.bias", "conv2.bias", "fc.bias", *CNN[-2:]]),
    ],
)
def test_selectors_choose_in_topological_order(train: str | list[str], names: list[str]) -> None:
    assert chosen(cnn(), train) == names
    assert build(cnn(), loss="mse", train=train).manifest["train"] == train


@pytest.mark.parametrize("train", ["all", "bias", "last:2", "*.weight", ["conv1.bias", "head.*"]])
def test_every_choice_trains_and_leaves_the_rest(train: str | list[str]) -> None:
    x, y = blobs((1, 8, 8), 4)
    run = Steps(build(cnn(), loss="cross_entropy", train=train))
    losses = [run.step(x, y, lr=0.05) for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("haed.weight", r"'haed\.weight' is none; did you mean 'head\.weight'\?.*body\.weight"),
        ("tail.*", r"none match: the model has body\.weight, body\.bias, head\.weight"),
        ([], r"at least one weight"),
        ("last:0", r"k from 1 to 2"),
        ("last:3", r"k from 1 to 2"),
        ("last:two", r"k from 1 to 2"),
        ("input", r"'input' is none"),
        ("", r"'' is none"),
    ],
)
def test_a_choice_of_nothing_says_what_there_is(train: str | list[str], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        chosen(mlp(), train)


def test_names_that_are_not_text_are_refused() -> None:
    with pytest.raises(CompileError, match="names or globs"):
        chosen(mlp(), [3])  # type: ignore[list-item]


def test_an_added_bias_belongs_to_the_layer_before_it() -> None:
    net = Net(("N", 6))
    net.add("MatMul", net.weight("a.w", 6, 5)).add("Add", net.weight("a.b", 5)).add("Relu")
    net.add("MatMul", net.weight("b.w", 5, 4)).add("Add", net.weight("b.b", 4))
    assert chosen(net.model(), "last:1") == ["b.w", "b.b"]
    assert chosen(net.model(), "bias") == ["a.b", "b.b"]


def test_a_normalized_input_is_not_a_weight_but_can_be_asked_for() -> None:
    net = Net(("N", 6))
    net.add("Sub", net.weight("mean", 6)).add("Div", net.weight("deviation", 6))
    net.dense("head", 6, 3)
    assert chosen(net.model(), "all") == ["head.weight", "head.bias"]
    assert chosen(net.model(), ["mean", "head.*"]) == ["head.weight", "head.bias", "mean"]


def test_batch_statistics_are_not_weights() -> None:
    net = Net(("N", 1, 8, 8)).conv("conv", 1, 4, 3)
    names = [net.weight(f"bn.{n}", 4) for n in ("scale", "shift", "mean", "var")]
    net.weights["bn.var"] = abs(net.weights["bn.var"]) + 1
    net.add("BatchNormalization", *names).add("Relu").add("Flatten").dense("head", 144, 3)
    model = net.model()
    assert chosen(model, "all") == [
        "conv.weight", "conv.bias", "bn.scale", "bn.shift", "head.weight", "head.bias",
    ]  # fmt: skip
    with pytest.raises(CompileError, match=r"no gradient reaches 'bn\.var'"):
        chosen(model, "bn.var")


def test_a_weight_behind_a_step_function_is_left_out_or_refused() -> None:
    net = Net(("N", 6)).dense("body", 6, 8).add("Floor").dense("head", 8, 3)
    assert chosen(net.model(), "all") == ["head.weight", "head.bias"]
    with pytest.raises(
        CompileError, match=r"no gradient reaches 'body\.weight': the model has head"
    ):
        chosen(net.model(), "body.weight")


def test_an_operator_without_a_rule_is_named_with_what_to_do() -> None:
    net = Net(("N", 6)).dense("body", 6, 9)
    net.weights |= {"square": np.array([-1, 3, 3]), "column": np.array([-1, 1])}
    net.add("Reshape", "square").add("Det").add("Reshape", "column").dense("head", 1, 3)
    assert chosen(net.model(), "head.*") == ["head.weight", "head.bias"]
    with pytest.raises(CompileError, match=r"Det node 'det_2\.node' has none"):
        chosen(net.model(), "all")


def test_a_transposed_weight_is_found_behind_the_transpose() -> None:
    model = mlp()
    head = next(n for n in model.graph.node if "head.weight" in n.input)
    del head.attribute[:]
    head.input[1] = "turned"
    turn = helper.make_node("Transpose", ["head.weight"], ["turned"], perm=[1, 0])
    model.graph.node.insert(0, turn)
    assert chosen(model, "last:1") == ["head.weight", "head.bias"]
    x, y = blobs((6,), 3)
    plain, turned = (Steps(build(m, loss="cross_entropy")) for m in (mlp(), model))
    for _ in range(4):
        assert plain.step(x, y) == pytest.approx(turned.step(x, y), rel=1e-6)
