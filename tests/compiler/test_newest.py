# SPDX-License-Identifier: Apache-2.0
"""Operators newer than the newest set that is read are spelled out as ONNX defines them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from forward_models import Steps, blobs, predict
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from coordinator.compiler import build, momentum
from coordinator.compiler.graph import OPSET_CEILING
from coordinator.compiler.load import load, opset_of

RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 2).astype(np.float32)


def layers(
    op: str, opset: int, *extra: tuple[str, np.ndarray], **attributes: Any
) -> onnx.ModelProto:
    """[N, 4, 8] through a layer, the operator (an attention: three layers) and a head."""
    parts = ["q", "k", "v"] if op == "Attention" else ["q"]
    stored = {f"w{p}": weight(8, 8) for p in parts} | dict(extra) | {"head": weight(32, 3)}
    nodes = [
        *(helper.make_node("MatMul", ["x", f"w{p}"], [p]) for p in parts),
        helper.make_node(op, [*parts, *(name for name, _ in extra)], ["h"], **attributes),
        helper.make_node("Flatten", ["h"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(v, k) for k, v in stored.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


ANGLES = weight(1, 4, 2)
MODELS = {
    "Swish": layers("Swish", 24, alpha=1.5),
    "RMSNormalization": layers("RMSNormalization", 23, ("gain", np.ones(8, np.float32))),
    "Attention": layers("Attention", 23, q_num_heads=2, kv_num_heads=2),
    "causal": layers("Attention", 23, q_num_heads=4, kv_num_heads=4, is_causal=1, scale=0.3),
    "RotaryEmbedding": layers(
        "RotaryEmbedding", 23, ("cos", np.cos(ANGLES)), ("sin", np.sin(ANGLES)), num_heads=2
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_operator_of_the_newest_sets_is_spelled_out_and_learns(name: str) -> None:
    model = MODELS[name]
    plain = load(model)
    assert opset_of(plain) == OPSET_CEILING
    x, y = blobs((4, 8), 3)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(predict(plain.SerializeToString(), x), expected, atol=1e-5)
    bundle = build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03))
    assert {"wq", "head"} <= set(bundle.shapes)
    assert ("gain" in bundle.shapes) == (name == "RMSNormalization")
    run = Steps(bundle)
    losses = [run.step(x, y) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
