# SPDX-License-Identifier: Apache-2.0
"""Models in QOperator format become QDQ, compute the same and learn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from forward_models import Net, Steps, blobs, cnn, mlp, quantized, session
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType

from coordinator.compiler import build, export, momentum
from coordinator.compiler.load import load
from coordinator.compiler.qoperator import RULES, to_qdq
from edge_sdk.errors import CompileError

X, LABELS = blobs((1, 8, 8), 4)
F, S8 = np.float32, np.int8
MS = "com.microsoft"
_NONE = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    runs = session(model.SerializeToString())
    out: np.ndarray = runs.run(None, {runs.get_inputs()[0].name: x})[0]
    return out


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("opset", [12, 17, 21])
def test_a_quantized_network_is_rewritten_and_learns(
    opset: int, unsigned: bool, per_channel: bool
) -> None:
    model = quantized(
        cnn(opset=opset), X, qdq=False, unsigned=unsigned, per_channel=per_channel and opset > 12
    )
    ops = {node.op_type for node in model.graph.node}
    assert "QLinearConv" in ops
    plain = load(model)
    left = {node.op_type for node in plain.graph.node}
    assert {"Conv", "DequantizeLinear"} <= left
    assert not left & (
        ops - {"QuantizeLinear", "DequantizeLinear", "MaxPool", "Reshape", "Flatten"}
    )
    expected, got = run(model, X), run(plain, X)
    step = max(numpy_helper.to_array(t).max() for t in plain.graph.initializer
               if t.name == plain.graph.node[-1].input[1])  # fmt: skip
    assert np.abs(got - expected).max() <= step * 1.01
    assert np.mean(got != expected) < 0.02
    trained = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.03)))
    assert {p["kind"] for p in trained.bundle.manifest["patches"]["onnx"]} == {"quantized", "bias"}
    losses = [trained.step(X, LABELS) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    export(trained.bundle, trained.params())


def dynamic(model: onnx.ModelProto, folder: Path, **options: Any) -> onnx.ModelProto:
    """Quantize dynamically as onnxruntime's users do."""
    from onnxruntime import quantization as q

    source, made = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(model, source)
    logging.disable(logging.WARNING)
    try:
        q.quantize_dynamic(source, made, **options)
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(made)


@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_quantization_becomes_a_product_of_dequantized_factors(
    tmp_path: Path, per_channel: bool
) -> None:
    x, y = blobs((6,), 3)
    model = dynamic(mlp(opset=17), tmp_path, per_channel=per_channel)
    assert "MatMulInteger" in {node.op_type for node in model.graph.node}
    plain = load(model)
    assert "MatMulInteger" not in {node.op_type for node in plain.graph.node}
    np.testing.assert_allclose(run(plain, x), run(model, x), atol=2e-2)
    np.testing.assert_allclose(np.median(np.abs(run(plain, x) - run(model, x))), 0, atol=1e-5)
    trained = Steps(build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.05)))
    assert "quantized" in {p["kind"] for p in trained.bundle.manifest["patches"]["onnx"]}
    losses = [trained.step(x, y) for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]


def test_dynamically_quantized_convolutions_are_rewritten(tmp_path: Path) -> None:
    model = dynamic(cnn(opset=17), tmp_path, weight_type=QuantType.QUInt8)
    assert "ConvInteger" in {node.op_type for node in model.graph.node}
    plain = load(model)
    np.testing.assert_allclose(run(plain, X), run(model, X), atol=2e-2)
    build(model, loss="cross_entropy")


def scalar(value: float, dtype: Any = F) -> np.ndarray:
    return np.array(value, dtype)


def single(
    op: str,
    rest: list[np.ndarray | str],
    shape: tuple[int, ...],
    dtype: Any = S8,
    **attributes: Any,
) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """One operator; the texts in `rest` are inputs of the given shape, the arrays are stored."""
    rng = np.random.default_rng(0)
    ends = np.iinfo(dtype)
    names = [item if isinstance(item, str) else f"c{i}" for i, item in enumerate(rest)]
    stored = [numpy_helper.from_array(v, n) for n, v in zip(names, rest, strict=True)
              if not isinstance(v, str)]  # fmt: skip
    given = [item for item in rest if isinstance(item, str) and item]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    domain = "" if op in {"QLinearConv", "QLinearMatMul", "MaxPool"} else MS
    node = helper.make_node(op, names, ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(n, kind, shape) for n in given],
        [helper.make_tensor_value_info("y", kind, None)], stored,
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return model, [rng.integers(ends.min, ends.max, shape, dtype, endpoint=True) for _ in given]


A, B, C = ((scalar(s), scalar(z, S8)) for s, z in ((0.05, 3), (0.02, -5), (0.07, 1)))
_RNG = np.random.default_rng(1)


def _integers(*shape: int) -> np.ndarray:
    return _RNG.integers(-127, 128, shape).astype(S8)


ONE: dict[str, list[tuple[list[np.ndarray | str], tuple[int, ...], dict[str, Any]]]] = {
    "QLinearAdd": [(["a", *A, "b", *B, *C], (2, 3, 4), {})],
    "QLinearMul": [
        (["a", *A, "b", *B, *C], (2, 3, 4), {}),
        (["a", *A, _integers(4), *B, *C], (2, 3, 4), {}),
    ],
    "QLinearSigmoid": [(["a", *A, scalar(1 / 256), scalar(-128, S8)], (2, 12), {})],
    "QLinearLeakyRelu": [(["a", *A, *C], (2, 12), {"alpha": 0.2})],
    "QLinearSoftmax": [
        (["a", *A, scalar(1 / 256), scalar(-128, S8)], (3, 10), {"axis": 1, "opset": 13})
    ],
    "QLinearAveragePool": [
        (["a", *A, *C], (1, 2, 6, 6), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        (["a", *A, *C], (1, 2, 5, 5), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ],
    "QLinearGlobalAveragePool": [(["a", *A, *C], (2, 3, 4, 5), {})],
    "QLinearConcat": [([*C, "a", *A, "b", *B], (2, 3), {"axis": 1})],
    "QLinearMatMul": [
        (["a", *A, _integers(4, 3), *B, scalar(0.3), scalar(0, S8)], (2, 4), {}),
        (
            ["a", *A, _integers(4, 3), np.array([0.02, 0.01, 0.03], F), np.zeros(3, S8),
             scalar(0.3), scalar(0, S8)],
            (2, 4),
            {},
        ),
    ],
    "QLinearConv": [
        (
            ["a", *A, _integers(4, 3, 2, 2), np.array([0.02, 0.01, 0.03, 0.01], F),
             np.zeros(4, S8), scalar(0.4), scalar(2, S8),
             _RNG.integers(-99, 99, 4).astype(np.int32)],
            (1, 3, 5, 5),
            {"kernel_shape": [2, 2]},
        ),
        (
            ["a", A[0].reshape(1), A[1].reshape(1), _integers(3, 1, 2, 2), *B, *C],
            (1, 3, 5, 4),
            {"kernel_shape": [2, 2], "group": 3, "strides": [2, 1]},
        ),
    ],
    "QGemm": [
        (
            ["a", *A, _integers(3, 4), *B, _RNG.integers(-99, 99, 3).astype(np.int32),
             scalar(0.3), scalar(0, S8)],
            (2, 4),
            {"transB": 1},
        ),
        (["a", *A, _integers(4, 3), *B, "", scalar(0.3), scalar(0, S8)], (2, 4), {"alpha": 0.5}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "which"), [(op, i) for op, rows in ONE.items() for i in range(len(rows))]
)
def test_each_operator_agrees_with_what_it_is_rewritten_to(op: str, which: int) -> None:
    rest, shape, attributes = ONE[op][which]
    model, values = single(op, rest, shape, **attributes)
    plain = to_qdq(model)
    assert op not in {node.op_type for node in plain.graph.node}
    feeds = dict(zip([v.name for v in model.graph.input], values, strict=True))
    expected, fused = (
        session(m.SerializeToString()).run(None, feeds)[0].astype(int) for m in (model, plain)
    )
    assert np.abs(fused - expected).max() <= 1
    assert np.mean(fused != expected) <= 0.1
    exact = session(plain.SerializeToString(), graph_optimization_level=_NONE).run(None, feeds)[0]
    assert np.abs(exact.astype(int) - expected).max() <= 1


def test_every_rule_is_measured() -> None:
    assert set(ONE) | {"MaxPool"} == set(RULES)


def test_what_is_not_rewritten_is_refused_by_name() -> None:
    model, _ = single("QLinearReduceMean", ["a", *A, *C], (2, 3), axes=[1])
    with pytest.raises(CompileError, match=r"QLinearReduceMean node 'y' is of QOperator.*QDQ"):
        to_qdq(model)
    model, _ = single("QLinearGlobalAveragePool", ["a", *A, *C], (1, 3, 3, 2), channels_last=1)
    with pytest.raises(CompileError, match="channels first in QLinearGlobalAveragePool"):
        to_qdq(model)
    net = Net(("N", 6)).add("MatMulInteger", "w")
    net.weights["w"] = _integers(6, 3)
    with pytest.raises(CompileError, match=r"MatMulInteger node 'matmul.*' to be cast"):
        to_qdq(net.add("Cast", to=TensorProto.FLOAT).model(dtype=TensorProto.INT8))
