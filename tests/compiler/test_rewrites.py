# SPDX-License-Identifier: Apache-2.0
"""Operators that are spelled in simpler ones compute and learn what they did before."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from check_grads import Case, assert_close, emit_forward, session
from forward_models import Net, Steps, along, blobs, evaluate, predict
from grad_cases_rewritten import REWRITTEN
from onnx import helper

from coordinator.compiler import build, momentum, sgd
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph, Node, Value
from coordinator.compiler.rewrite import REWRITES, rewritten
from coordinator.compiler.vjp import RULES
from edge_sdk.errors import CompileError

F = np.float32
TITLES = [f"{i}-{case.op}" for i, case in enumerate(REWRITTEN)]


@pytest.mark.parametrize("case", REWRITTEN, ids=TITLES)
def test_what_is_spelled_out_computes_the_same(case: Case) -> None:
    e = Emit(opset=case.opset)
    names, outs = emit_forward(case, e, dynamic=True, dtype=F)
    spelled = rewritten(e.graph(outputs=outs), [names[i] for i in case.wrt])
    assert not {node.kind for node in spelled.nodes} & set(REWRITES)
    feeds = {f"x{i}": x for i, x in enumerate(case.inputs) if x is not None and i not in case.fixed}
    expected = session(e, outs).run(outs, feeds)
    for got, known in zip(session(Emit(spelled), outs).run(outs, feeds), expected, strict=True):
        assert_close(got, known, 2e-6)


FUSED = [
    ("Gelu", 1, {}), ("BiasGelu", 2, {}), ("FastGelu", 1, {}), ("FastGelu", 2, {}),
    ("QuickGelu", 1, {"alpha": 1.5}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "attributes"), FUSED)
def test_fused_activations_of_onnxruntime_are_spelled_out(
    op: str, inputs: int, attributes: dict[str, Any]
) -> None:
    given = [Value("x", np.dtype(F), (None, 4)), Value("b", np.dtype(F), (4,))][:inputs]
    node = Node(op, tuple(v.name for v in given), ("y",), attributes, "com.microsoft")
    made = Value("y", np.dtype(F))
    values = {v.name: v for v in (*given, made)}
    whole = Graph((node,), {}, tuple(given), (made,), values)
    spelled = rewritten(whole, ["x"])
    assert all(n.kind in RULES for n in spelled.nodes)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((3, 4)).astype(F), "b": rng.standard_normal(4).astype(F)}
    feeds = {v.name: feeds[v.name] for v in given}
    expected, got = (session(Emit(g), ["y"]).run(["y"], feeds)[0] for g in (whole, spelled))
    assert_close(got, expected, 2e-6)


def recurrent(op: str, *, steps: int | str = 5, way: str = "forward", opset: int = 18) -> Net:
    """Sequences [N, steps, 3] through one recurrent layer of six units; its last state is kept."""
    dirs = 2 if way == "bidirectional" else 1
    gates = {"LSTM": 24, "GRU": 18, "RNN": 6}[op]
    net = Net(("N", steps, 3), opset=opset).add("Transpose", perm=[1, 0, 2])
    net.weight("cell.w", dirs, gates, 3)
    net.weight("cell.r", dirs, gates, 6)
    net.weight("cell.b", dirs, 2 * gates, scale=0.1)
    node = helper.make_node(
        op, [net.last, "cell.w", "cell.r", "cell.b"], ["all", "last"], name="cell",
        hidden_size=6, direction=way,
    )  # fmt: skip
    net.nodes.append(node)
    net.last = "last"
    return net.add("Transpose", perm=[1, 0, 2]).add("Flatten").dense("head", 6 * dirs, 3)


@pytest.mark.parametrize("opset", [11, 14, 22])
@pytest.mark.parametrize(
    ("op", "way"), [("LSTM", "bidirectional"), ("GRU", "reverse"), ("RNN", "forward")]
)
def test_a_recurrent_classifier_learns(op: str, way: str, opset: int) -> None:
    x, y = blobs((5, 3), 3)
    bundle = build(
        recurrent(op, way=way, opset=opset).model(),
        loss="cross_entropy",
        optimizer=momentum(0.9, lr=0.1),
    )
    assert list(bundle.shapes)[:3] == ["cell.w", "cell.r", "cell.b"]
    predict_ops = {
        n.op_type for n in onnx.load_from_string(bundle.member("onnx/predict.onnx")).graph.node
    }
    assert op in predict_ops
    run = Steps(bundle)
    losses = [run.step(x, y) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_frozen_recurrent_layer_keeps_its_kernel() -> None:
    bundle = build(recurrent("LSTM").model(), loss="cross_entropy", train="head.*")
    train = onnx.load_from_string(bundle.member("onnx/train.onnx"))
    assert "LSTM" in {n.op_type for n in train.graph.node}


def test_what_cannot_be_unrolled_is_refused_by_name() -> None:
    e = Emit()
    given = [e.input(n, F, s) for n, s in (("x", (5, 2, 3)), ("w", (1, 24, 3)), ("r", (1, 24, 6)))]
    lengths = e.const([5, 4], np.int32)
    y = e.op("LSTM", [*given, None, lengths], hidden_size=6)[0]
    with pytest.raises(CompileError, match="whole sequences in LSTM"):
        rewritten(e.graph(outputs=[y]), ["x"])
    e = Emit()
    given = [e.input(n, F, s) for n, s in (("x", (None, 2, 3)), ("w", (1, 6, 3)), ("r", (1, 6, 6)))]
    y = e.op("RNN", given, hidden_size=6)[0]
    with pytest.raises(CompileError, match="known sequence length in RNN"):
        rewritten(e.graph(outputs=[y]), ["x"])
    e = Emit()
    given = [e.input(n, F, s) for n, s in (("x", (4, 2, 3)), ("w", (1, 6, 3)), ("r", (1, 6, 6)))]
    y = e.op("RNN", given, hidden_size=6, activations=["Affine"])[0]
    with pytest.raises(CompileError, match="got Affine"):
        rewritten(e.graph(outputs=[y]), ["x"])


def test_a_group_normalized_network_learns() -> None:
    x, y = blobs((2, 6), 3)
    net = Net(("N", 2, 6), opset=21)
    net.add("Conv", net.weight("conv", 4, 2, 3), pads=[1, 1])
    net.weights |= {"gamma": np.ones(4, F), "beta": np.zeros(4, F)}
    net.add("GroupNormalization", "gamma", "beta", num_groups=2).add("Relu").add("Flatten")
    bundle = build(net.dense("head", 24, 3).model(), loss="cross_entropy")
    assert {"gamma", "beta"} <= set(bundle.shapes)
    run = Steps(bundle)
    losses = [run.step(x, y) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert predict(bundle.member("onnx/predict.onnx"), x).shape == (64, 3)


def test_an_einsum_with_a_stored_operand_learns() -> None:
    x, y = blobs((4, 6), 3)
    net = Net(("N", 4, 6))
    net.add("Einsum", net.weight("mix", 6, 4, 5), equation="bij,jik->bk")
    bundle = build(net.add("Tanh").dense("head", 5, 3).model(), loss="cross_entropy")
    assert list(bundle.shapes) == ["mix", "head.weight", "head.bias"]
    run = Steps(bundle)
    losses = [run.step(x, y) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("op", "way"), [("LSTM", "bidirectional"), ("GRU", "reverse"), ("RNN", "forward")]
)
def test_a_recurrent_network_descends_as_its_finite_difference_says(op: str, way: str) -> None:
    x, y = blobs((5, 3), 3, n=16)
    bundle = build(recurrent(op, way=way).model(), loss="cross_entropy", optimizer=sgd(lr=1.0))
    gradient = Steps(bundle).gradient(x, y)

    def measure(params: dict[str, np.ndarray]) -> float:
        return float(evaluate(bundle, x, y, params)["loss"])

    seen, told = along(measure, bundle.params(), gradient, step=2e-4)
    assert seen == pytest.approx(told, rel=1e-3)
