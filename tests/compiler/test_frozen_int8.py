# SPDX-License-Identifier: Apache-2.0
"""What the runtime really ran, from its profile: frozen int8 layers compute and store integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from forward_models import Net, Steps, blobs, cnn, evaluate, quantized, session

from coordinator.compiler import build, momentum
from coordinator.compiler.dequant import unsigned
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph

X, LABELS = blobs((1, 8, 8), 4)
ACTIVATIONS = {"int8": False, "uint8": True}
WAYS: dict[str, dict[str, Any]] = {
    "head": {"train": "head.*"},
    "head, learned ranges": {"train": "head.*", "ranges": "learned"},
    "last two layers": {"train": "last:2"},
}


def depthwise() -> onnx.ModelProto:
    net = Net(("N", 1, 8, 8), opset=17).conv("stem", 1, 8, 3, pads=[1, 1, 1, 1]).add("Relu")
    net.conv("depthwise", 8, 8, 3, pads=[1, 1, 1, 1], group=8).add("Relu")
    net.conv("pointwise", 8, 12, 1).add("Relu").add("GlobalAveragePool").add("Flatten")
    return net.dense("fc", 12, 12).add("Relu").dense("head", 12, 4).model()


MODELS = {"cnn": cnn(opset=17), "depthwise": depthwise()}


def kernels(data: bytes, feeds: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Run a graph once and return what the runtime's profile says of each kernel."""
    runs = session(data, enable_profiling=True, profile_file_prefix=str(folder / "profile"))
    runs.run(None, feeds)
    events = json.loads(Path(runs.end_profiling()).read_text())
    return [
        event["args"]
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    ]


def images(kernel: dict[str, Any]) -> list[str]:
    """Return the element types of a kernel's outputs that are [examples, ...] images."""
    found = [(t, shape) for out in kernel["output_type_shape"] for t, shape in out.items()]
    return [t for t, shape in found if len(shape) == 4 and shape[0] == len(X)]


@pytest.mark.parametrize("unsigned_input", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_below_the_first_trained_layer_all_is_computed_and_kept_in_integers(
    name: str, way: str, *, unsigned_input: bool, tmp_path: Path
) -> None:
    model = quantized(MODELS[name], X, unsigned=unsigned_input, per_channel=True)
    run = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03), **WAYS[way]))
    lr = np.array(0.03, np.float32)
    feeds = {"x": X, "y": LABELS, "lr": lr, **run.state}
    ran = kernels(run.bundle.member("onnx/train.onnx"), feeds, tmp_path)
    operators = [kernel["op_name"] for kernel in ran]
    convolutions = [n.op_type for n in MODELS[name].graph.node].count("Conv")
    assert operators.count("QLinearConv") == convolutions
    assert not {"Conv", "FusedConv", "NhwcFusedConv"} & set(operators)
    assert operators.count("QGemm") == (1 if way.startswith("head") else 0)
    kinds = [t for kernel in ran for t in images(kernel)]
    assert len(kinds) > convolutions
    assert set(kinds) == {"uint8"}  # one byte for each number that is kept


@pytest.mark.parametrize("name", MODELS)
def test_integers_of_another_type_are_the_same_numbers(name: str) -> None:
    pair = [quantized(MODELS[name], X, unsigned=unsigned_input) for unsigned_input in (False, True)]
    losses = [[], []]
    for model, seen in zip(pair, losses, strict=True):
        run = Steps(build(model, loss="cross_entropy", train="head.*"))
        seen += [run.step(X, LABELS) for _ in range(5)]
        assert float(evaluate(run.bundle, X, LABELS, run.params())["loss"]) < seen[0]
    assert losses[0] == losses[1]


def test_what_others_read_as_int8_stays_int8() -> None:
    e = Emit()
    x = e.input("x", np.float32, (2, 3))
    scale, zero = e.const(0.5), e.const(-3, np.int8)
    inner, outer = (e.QuantizeLinear(x, scale, zero) for _ in range(2))
    y = e.DequantizeLinear(inner, scale, zero)
    made = unsigned(e.graph(outputs=[y, outer]))
    first, second = (n for n in made.nodes if n.kind == "QuantizeLinear")
    assert made.initializers[first.inputs[2]] == np.uint8(125)
    assert second.inputs[2] == zero
    values = np.float32([[-70, -62.4, -0.3], [0.2, 60, 70]])
    told, kept = session(made.to_model().SerializeToString()).run(None, {"x": values})
    plain = Graph.to_model(e.graph(outputs=[y, outer])).SerializeToString()
    was, also = session(plain).run(None, {"x": values})
    np.testing.assert_array_equal(told, was)
    np.testing.assert_array_equal(kept, also)
