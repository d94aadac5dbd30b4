# SPDX-License-Identifier: Apache-2.0
"""Frozen integer layers get zeros beside their channels, and compute what they did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from forward_models import Net, Steps, blobs, quantized, session

from coordinator.compiler import build
from coordinator.compiler.graph import Graph
from coordinator.compiler.lanes import in_whole_lanes

X, LABELS = blobs((3, 8, 8), 4)


def net() -> Net:
    return Net(("N", 3, 8, 8), opset=17).conv("stem", 3, 8, 3, pads=[1, 1, 1, 1]).add("Relu")


def ended(made: Net, channels: int) -> onnx.ModelProto:
    made.add("GlobalAveragePool").add("Flatten")
    return made.dense("head", channels, 4).model()


def separable() -> onnx.ModelProto:
    made = net().conv("depth", 8, 8, 3, pads=[1, 1, 1, 1], group=8).add("Relu")
    return ended(made.conv("point", 8, 12, 1).add("Relu"), 12)


def dense() -> onnx.ModelProto:
    return ended(net().conv("next", 8, 12, 3).add("Relu"), 12)


def pooled() -> onnx.ModelProto:
    return ended(
        net().add("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv("next", 8, 12, 1), 12
    )


def weights(graph: Graph) -> list[tuple[int, ...]]:
    opened = [graph.producers[n.inputs[1]] for n in graph.nodes if n.kind == "Conv"]
    return [graph.initializers[n.inputs[0]].shape for n in opened]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (separable, [(16, 4, 3, 3), (16, 1, 3, 3), (12, 16, 1, 1)]),
        (dense, [(8, 4, 3, 3), (12, 8, 3, 3)]),
        (pooled, [(8, 4, 3, 3), (12, 8, 1, 1)]),
    ],
)
def test_wider_layers_make_the_same_numbers(
    make: Callable[[], onnx.ModelProto],
    shapes: list[tuple[int, ...]],
    *,
    per_channel: bool,
    unsigned: bool,
) -> None:
    model = quantized(make(), X, unsigned=unsigned, per_channel=per_channel)
    graph = Graph.from_model(model)
    wide = in_whole_lanes(graph)
    assert weights(wide) == shapes
    results = [
        session(g.to_model().SerializeToString()).run(None, {graph.inputs[0].name: X})[0]
        for g in (graph, wide)
    ]
    np.testing.assert_array_equal(*results)


def test_what_is_trained_or_float_stays() -> None:
    for model in (separable(), quantized(separable(), X)):
        made = build(model, loss="cross_entropy", train="all")
        kernels = {
            node.op_type: node
            for node in onnx.load_model_from_string(made.graph("onnx", "train")).graph.node
        }
        assert not any(name.startswith("g.lane") for n in kernels.values() for name in n.input)


def test_a_head_trains_on_wide_layers_as_on_the_model_s_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = quantized(separable(), X)
    wide = Steps(build(model, loss="cross_entropy", train="head.*"))
    monkeypatch.setattr("coordinator.compiler.train.in_whole_lanes", lambda graph: graph)
    plain = Steps(build(model, loss="cross_entropy", train="head.*"))
    assert wide.bundle.graph("onnx", "train") != plain.bundle.graph("onnx", "train")
    for _ in range(4):
        assert wide.step(X, LABELS) == plain.step(X, LABELS)
