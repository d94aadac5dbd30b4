# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from coordinator.compiler import build, channels, momentum, train
from coordinator.compiler.graph import Graph
from coordinator.compiler.rules.window import Layer, Window
from edge_sdk.bundle import Bundle


class Model:
    """A model under construction, layer by layer, over `channels` channels."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape, self.nodes, self.at = tuple(shape), list[onnx.NodeProto](), "image"
        self.stored: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(3)

    def add(self, op: str, *others: str, **attributes: Any) -> Model:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.at, *others], [out], **attributes))
        self.at = out
        return self

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.stored)}"
        value = self.rng.standard_normal(shape, np.float32) / math.sqrt(math.prod(shape[1:]) or 1)
        self.stored.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def depthwise(self, count: int, kernel: Sequence[int], **attributes: Any) -> Model:
        weight, bias = self.weight(count, 1, *kernel), self.weight(count)
        return self.add("Conv", weight, bias, group=count, **attributes)

    def pointwise(self, inputs: int, outputs: int, rank: int = 2) -> Model:
        return self.add("Conv", self.weight(outputs, inputs, *[1] * rank), self.weight(outputs))

    def done(self, features: int) -> onnx.ModelProto:
        self.add("GlobalAveragePool").add("Flatten")
        self.add("Gemm", self.weight(features, 3), self.weight(3))
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", *self.shape])],
            [helper.make_tensor_value_info(self.at, TensorProto.FLOAT, ["n", 3])],
            self.stored,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def bundles(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, Bundle]:
    """Build with turned images, and without."""
    made = [build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.1))]
    monkeypatch.setattr(train, "turn", lambda graph, _: graph)
    made.append(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.1)))
    return made[0], made[1]


def step(bundle: Bundle, batch: int) -> list[Any]:
    session = onnxruntime.InferenceSession(bundle.member("onnx/train.onnx"))
    rng = np.random.default_rng(7)
    shape = bundle.manifest["input"]["shape"][1:]
    feeds = {"x": rng.standard_normal((batch, *shape), np.float32), "lr": np.array(0.1, np.float32)}
    feeds["y"] = rng.integers(0, 3, batch)
    feeds |= {f"p.{i}": value for i, value in enumerate(bundle.params().values())}
    slots = enumerate(bundle.manifest["slots"])
    feeds |= {f"s.{j}": np.zeros(slot["shape"], np.float32) for j, slot in slots}
    return list(session.run(None, feeds))


def ops(bundle: Bundle) -> set[str]:
    graph = onnx.load_from_string(bundle.member("onnx/train.onnx")).graph
    return {node.op_type for node in graph.node}


CASES: dict[str, Callable[[], onnx.ModelProto]] = {
    "tall": lambda: Model((4, 25, 5)).depthwise(4, (3, 3), pads=[1, 1, 1, 1]).add("Relu").done(4),
    "no padding": lambda: Model((4, 12, 5)).depthwise(4, (3, 3)).add("Relu").done(4),
    "one side padded": lambda: Model((3, 11, 6)).depthwise(3, (3, 2), pads=[0, 1, 2, 0]).done(3),
    "stride": lambda: (
        Model((4, 24, 6)).depthwise(4, (3, 3), pads=[1, 1, 1, 1], strides=[2, 2]).done(4)
    ),
    "stride over an odd size": lambda: (
        Model((4, 25, 7)).depthwise(4, (3, 3), pads=[1, 1, 1, 1], strides=[2, 2]).done(4)
    ),
    "stride wider than the kernel": lambda: (
        Model((4, 25, 5)).depthwise(4, (2, 2), strides=[3, 3]).done(4)
    ),
    "dilation": lambda: (
        Model((4, 24, 6)).depthwise(4, (3, 3), pads=[2, 2, 2, 2], dilations=[2, 2]).done(4)
    ),
    "kernel of five": lambda: (
        Model((4, 20, 6)).depthwise(4, (5, 3), pads=[2, 1, 2, 1]).add("Relu").done(4)
    ),
    "signal": lambda: Model((4, 60)).depthwise(4, (5,), pads=[2, 2], strides=[2]).done(4),
    "auto_pad": lambda: (
        Model((4, 25, 5)).depthwise(4, (3, 3), auto_pad="SAME_UPPER", strides=[2, 2]).done(4)
    ),
    "whole image": lambda: Model((4, 3, 3)).depthwise(4, (3, 3), pads=[1, 1, 1, 1]).done(4),
    "pointwise after": lambda: (
        Model((4, 10, 5))
        .depthwise(4, (3, 3), pads=[1, 1, 1, 1])
        .add("Relu")
        .pointwise(4, 6)
        .add("Relu")
        .depthwise(6, (3, 3), pads=[1, 1, 1, 1])
        .add("Sigmoid")
        .done(6)
    ),
    "an operator that knows nothing of it": lambda: (
        Model((4, 10, 5))
        .depthwise(4, (3, 3), pads=[1, 1, 1, 1])
        .add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
        .pointwise(4, 5)
        .done(5)
    ),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_step_over_turned_images_is_the_same_step(
    case: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned, plain = bundles(CASES[case](), monkeypatch)
    assert turned.member("onnx/train.onnx") != plain.member("onnx/train.onnx")
    for got, want in zip(step(turned, batch), step(plain, batch), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)


def test_a_residual_connection_stays_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model((4, 10, 5)).depthwise(4, (3, 3), pads=[1, 1, 1, 1]).add("Relu")
    around = model.at
    model.depthwise(4, (3, 3), pads=[1, 1, 1, 1]).add("Add", around)
    turned, plain = bundles(model.done(4), monkeypatch)
    for got, want in zip(step(turned, 2), step(plain, 2), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)


def test_squeeze_and_excite_stays_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model((4, 10, 5)).depthwise(4, (3, 3), pads=[1, 1, 1, 1]).add("Relu")
    image = model.at
    model.add("GlobalAveragePool").pointwise(4, 2).add("Relu").pointwise(2, 4).add("HardSigmoid")
    turned, plain = bundles(model.add("Mul", image).done(4), monkeypatch)
    for got, want in zip(step(turned, 3), step(plain, 3), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)


def test_what_lies_below_the_trained_layers_is_left_alone() -> None:
    model = Model((4, 25, 5)).depthwise(4, (3, 3), pads=[1, 1, 1, 1]).add("Relu").done(4)
    head = build(model, loss="cross_entropy", train="last:1", optimizer=momentum(0.9, lr=0.1))
    assert "Conv" in ops(head)
    assert "EyeLike" not in ops(head)


def test_names_keep_their_meaning() -> None:
    model = Model((4, 25, 5)).depthwise(4, (3, 3), pads=[1, 1, 1, 1]).add("Relu").done(4)
    graph = Graph.from_model(model).inferred()
    turned = channels.turn(graph, ["w0"])
    assert [v.name for v in turned.outputs] == [v.name for v in graph.outputs]
    x = np.random.default_rng(0).standard_normal((2, 4, 25, 5), np.float32)
    runs = [onnxruntime.InferenceSession(g.to_model().SerializeToString()) for g in (graph, turned)]
    got, want = (run.run(None, {"image": x})[0] for run in runs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_wide_image_stays_a_convolution() -> None:
    wide = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), (112, 112), (112, 112))
    assert channels.blocks_of(Layer(None, 32, 32, 32, wide)) is None


def test_blocks_cover_every_row_of_the_output() -> None:
    tall = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), (25, 5), (25, 5))
    cut = channels.blocks_of(Layer(None, 64, 64, 64, tall))
    assert cut is not None
    assert cut.number * cut.out >= 25
    assert cut.rows == cut.before + cut.step + cut.after
