# SPDX-License-Identifier: Apache-2.0
"""If, Loop and Scan of fixed course are spelled out; others are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from forward_models import Net, Steps, blobs, predict, session
from onnx import TensorProto, helper, numpy_helper

from coordinator.compiler import build, momentum
from coordinator.compiler.load import load
from coordinator.compiler.unroll import unrolled
from edge_sdk.errors import CompileError

F, B, N = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
X, LABELS = blobs((6,), 3)


def value(name: str, kind: int = F, shape: Any = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def body_of_loop(*, stop: str = "", scans: bool = True) -> onnx.GraphProto:
    """state -> tanh(state @ w + b); the state of every turn is a scan output."""
    rng = np.random.default_rng(0)
    stored = [
        numpy_helper.from_array(rng.standard_normal((6, 6)).astype(np.float32) / 2, "w"),
        numpy_helper.from_array(np.array(2, np.int64), "two"),
    ]
    nodes = [
        helper.make_node("MatMul", ["state", "w"], ["product"]),
        helper.make_node("Add", ["product", "outer"], ["moved"]),
        helper.make_node("Tanh", ["moved"], ["next"]),
        helper.make_node("Identity", ["next"], ["row"]),
    ]
    if stop:
        nodes.append(helper.make_node("Less", ["turn", stop], ["goes"]))
    else:
        nodes.append(helper.make_node("Identity", ["go"], ["goes"]))
    outputs = [value("goes", B), value("next")] + ([value("row")] if scans else [])
    inputs = [value("turn", N, []), value("go", B, []), value("state")]
    return helper.make_graph(nodes, "body", inputs, outputs, stored)


def looped(body: onnx.GraphProto, count: int | None, *, opset: int = 18) -> Net:
    net = Net(("N", 6), opset=opset)
    net.weights["outer"] = np.linspace(-1, 1, 6, dtype=np.float32)
    net.weights["go"] = np.ones((), np.bool_)
    if count is not None:
        net.weights["count"] = np.array(count, np.int64)
    outs = ["last", "rows"][: len(body.output) - 1]
    inputs = ["" if count is None else "count", "go", "input"]
    net.nodes.append(helper.make_node("Loop", inputs, outs, name="turns", body=body))
    net.last = "last"
    return net


@pytest.mark.parametrize("opset", [11, 13, 18, 22])
@pytest.mark.parametrize(("stop", "count"), [("", 3), ("two", 9), ("two", None)])
def test_a_loop_of_fixed_length_is_repeated_and_learns(
    opset: int, stop: str, count: int | None
) -> None:
    net = looped(body_of_loop(stop=stop), count, opset=opset)
    net.nodes.append(helper.make_node("Concat", ["rows", "rows"], ["twice"], axis=0))
    net.nodes.append(helper.make_node("Transpose", ["twice"], ["turned"], perm=[1, 0, 2]))
    net.last = "turned"
    model = net.add("Flatten").dense("head", 36, 3).model()
    plain = unrolled(model)
    assert "Loop" not in {n.op_type for n in plain.graph.node}
    expected, got = (
        session(m.SerializeToString()).run(None, {"input": X})[0] for m in (model, plain)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    bundle = build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.1))
    assert "w" in bundle.shapes
    np.testing.assert_allclose(predict(bundle.member("onnx/predict.onnx"), X), expected, atol=1e-5)
    run = Steps(bundle)
    losses = [run.step(X, LABELS) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_no_turn_at_all_leaves_the_state() -> None:
    plain = unrolled(looped(body_of_loop(scans=False), 0).model())
    np.testing.assert_array_equal(predict(plain.SerializeToString(), X), X)
    net = looped(body_of_loop(), 0)
    net.last = "rows"
    with pytest.raises(CompileError, match="at least one turn in Loop node 'turns'"):
        unrolled(net.add("Relu").model())


def test_loops_whose_length_depends_on_the_data_are_refused() -> None:
    body = body_of_loop(scans=False)
    net = looped(body, None).dense("head", 6, 3)
    with pytest.raises(CompileError, match="at most 1024 turns in Loop node 'turns'"):
        load(net.model())
    net = looped(body, 5000).dense("head", 6, 3)
    with pytest.raises(CompileError, match=r"at most 1024 turns .* got 5000"):
        load(net.model())
    body.node[-1].CopyFrom(helper.make_node("Less", ["sum", "two_f"], ["goes"]))
    body.node.insert(4, helper.make_node("ReduceSum", ["next"], ["sum"], keepdims=0))
    body.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two_f"))
    with pytest.raises(CompileError, match="its condition depends on the data"):
        load(looped(body, 5).dense("head", 6, 3).model())
    net = looped(body_of_loop(scans=False), 5)
    sized = [
        helper.make_node("Shape", ["input"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "zero"], ["batch"], axis=0),
    ]
    net.weights["zero"] = np.array(0, np.int64)
    net.nodes[:0] = sized
    net.nodes[2].input[0] = "batch"
    with pytest.raises(CompileError, match="on the data or on the batch"):
        load(net.dense("head", 6, 3).model())


def scanned(steps: int | str, *, backward: bool = False) -> Net:
    """Sum what a layer makes of each row of [steps, N, 6], and keep every sum."""
    nodes = [
        helper.make_node("MatMul", ["row", "w"], ["product"]),
        helper.make_node("Add", ["sum", "product"], ["new"]),
        helper.make_node("Tanh", ["new"], ["seen"]),
    ]
    w = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    inputs, outputs = [value("sum"), value("row")], [value("new"), value("seen")]
    body = helper.make_graph(nodes, "body", inputs, outputs, [numpy_helper.from_array(w, "w")])
    net = Net(("N", steps, 3)).add("Transpose", perm=[1, 0, 2])
    rows = net.last
    net.weights |= {"first": np.zeros((3, 4), np.float32), "axes": np.array([0])}
    net.add("ReduceSum", "axes", keepdims=0).add("MatMul", "first", name="start")
    way = {"scan_input_directions": [1], "scan_output_directions": [1]} if backward else {}
    node = helper.make_node(
        "Scan", ["start", rows], ["end", "all"], name="walk", body=body, num_scan_inputs=1,
        scan_output_axes=[1], **way,
    )  # fmt: skip
    net.nodes.append(node)
    net.last = "all"
    return net.add("Flatten")


@pytest.mark.parametrize("backward", [False, True])
def test_a_scan_is_walked_row_by_row(backward: bool) -> None:
    x, y = blobs((5, 3), 3)
    model = scanned(5, backward=backward).dense("head", 20, 3).model()
    expected = session(model.SerializeToString()).run(None, {"input": x})[0]
    bundle = build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.05))
    np.testing.assert_allclose(predict(bundle.member("onnx/predict.onnx"), x), expected, atol=1e-5)
    assert "w" in bundle.shapes
    run = Steps(bundle)
    losses = [run.step(x, y) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(CompileError, match="known length of at most 1024 in Scan node 'walk'"):
        unrolled(scanned("T").model())


def chosen(condition: list[onnx.NodeProto], **weights: Any) -> onnx.ModelProto:
    """A dense layer behind `if`, another behind `else`; an If within the first."""
    inner = [
        helper.make_graph([helper.make_node("Gemm", ["hidden", n], [o])], n, [], [value(o)],
                          [numpy_helper.from_array(np.eye(6, dtype=np.float32) * k, n)])
        for n, o, k in (("a", "out_a", 2), ("b", "out_b", 3))
    ]  # fmt: skip
    nested = [
        helper.make_node("Relu", ["input"], ["hidden"]),
        helper.make_node("If", ["never"], ["out"], then_branch=inner[0], else_branch=inner[1]),
    ]
    never = numpy_helper.from_array(np.zeros((), np.bool_), "never")
    yes = helper.make_graph(nested, "yes", [], [value("out")], [never])
    no = helper.make_graph([helper.make_node("Neg", ["input"], ["out"])], "no", [], [value("out")])
    net = Net(("N", 6))
    net.weights |= weights
    net.nodes += condition
    net.nodes.append(
        helper.make_node(
            "If", ["condition"], ["made"], name="fork", then_branch=yes, else_branch=no
        )
    )
    net.last = "made"
    return net.dense("head", 6, 3).model()


def asked(axis: int) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Shape", ["input"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "at"], ["size"], axis=0),
        helper.make_node("Equal", ["size", "six"], ["condition"]),
    ]


def test_branches_on_fixed_shapes_are_taken_nested_ones_too() -> None:
    six = {"six": np.array(6, np.int64)}
    model = chosen(asked(1), at=np.array(1, np.int64), **six)
    expected = session(model.SerializeToString()).run(None, {"input": X})[0]
    bundle = build(model, loss="cross_entropy")
    assert "b" in bundle.shapes
    assert "a" not in bundle.shapes
    np.testing.assert_allclose(predict(bundle.member("onnx/predict.onnx"), X), expected, atol=1e-5)
    with pytest.raises(CompileError, match="fixed condition in If node 'fork'"):
        load(chosen(asked(0), at=np.array(0, np.int64), six=np.array(3, np.int64)))


def test_a_branch_that_depends_on_the_data_is_refused() -> None:
    total = [
        helper.make_node("ReduceSum", ["input"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "six"], ["condition"]),
    ]
    with pytest.raises(CompileError, match="fixed condition in If node 'fork', it depends on"):
        load(chosen(total, six=np.array(6, np.float32)))
