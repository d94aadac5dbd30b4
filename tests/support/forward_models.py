# SPDX-License-Identifier: Apache-2.0
"""Small forward models for the compiler's tests, float and int8, and a plain runner of bundles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_sdk.bundle import Bundle

Tensor = NDArray[Any]
X, Y = "input", "output"


class Net:
    """A model under construction: nodes, weights drawn from a seed, one input and one output."""

    def __init__(self, shape: tuple[int | str, ...], *, opset: int = 18, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Tensor] = {}
        self.shape, self.opset, self.last = shape, opset, X
        self.rng = np.random.default_rng(seed)

    def add(self, op: str, *extra: str, name: str = "", **attributes: Any) -> Net:
        """Add a node that reads the last one."""
        out = name or f"{op.lower()}_{len(self.nodes)}"
        node = helper.make_node(op, [self.last, *extra], [out], name=f"{out}.node", **attributes)
        self.nodes.append(node)
        self.last = out
        return self

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        """Draw a weight and return its name."""
        fan = int(np.prod(shape[1:])) or 1
        size = scale if scale is not None else fan**-0.5
        self.weights[name] = (self.rng.standard_normal(shape) * size).astype(np.float32)
        return name

    def dense(self, name: str, i: int, o: int, **attributes: Any) -> Net:
        w, b = self.weight(f"{name}.weight", o, i), self.weight(f"{name}.bias", o, scale=0.1)
        return self.add("Gemm", w, b, transB=1, **attributes)

    def conv(self, name: str, i: int, o: int, k: int, **attributes: Any) -> Net:
        groups = attributes.get("group", 1)
        w = self.weight(f"{name}.weight", o, i // groups, k, k)
        b = self.weight(f"{name}.bias", o, scale=0.1)
        return self.add("Conv", w, b, kernel_shape=[k, k], **attributes)

    def model(self, *, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
        """Close the model; the shape of its output is left to inference."""
        nodes = [*self.nodes]
        nodes[-1].output[0] = Y
        inputs = [helper.make_tensor_value_info(X, dtype, self.shape)]
        outputs = [helper.make_tensor_value_info(Y, TensorProto.FLOAT, None)]
        stored = [numpy_helper.from_array(v, k) for k, v in self.weights.items()]
        graph = helper.make_graph(nodes, "net", inputs, outputs, stored)
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)


def mlp(
    i: int = 6, h: int = 8, o: int = 3, *, opset: int = 18, batch: int | str = "N", last: str = ""
) -> onnx.ModelProto:
    """Gemm, Relu, Gemm, and `last` (Softmax, Sigmoid) if given."""
    net = Net((batch, i), opset=opset).dense("body", i, h).add("Relu").dense("head", h, o)
    return (net.add(last) if last else net).model()


def cnn(
    *, opset: int = 18, batch: int | str = "N", classes: int = 4, smooth: bool = False
) -> onnx.ModelProto:
    """Two convolutions (one strided), pooling, a hidden layer and a head on [1, 8, 8] images.

    `smooth` has no kinks, for finite differences: Tanh and AveragePool.
    """
    act, pool = ("Tanh", "AveragePool") if smooth else ("Relu", "MaxPool")
    net = Net((batch, 1, 8, 8), opset=opset)
    net.conv("conv1", 1, 6, 3, pads=[1, 1, 1, 1]).add(act)
    net.add(pool, kernel_shape=[2, 2], strides=[2, 2])
    net.conv("conv2", 6, 8, 3, pads=[1, 1, 1, 1], strides=[2, 2]).add(act)
    net.add("Flatten").dense("fc", 32, 12).add(act)
    return net.dense("head", 12, classes).model()


def blobs(
    shape: tuple[int, ...], classes: int, n: int = 64, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Draw a problem that a small model learns: a mean for each class, plus noise."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((classes, *shape))
    y = rng.integers(0, classes, n)
    x = means[y] + 0.5 * rng.standard_normal((n, *shape))
    return x.astype(np.float32), y.astype(np.int64)


def quantized(
    model: onnx.ModelProto,
    x: Tensor,
    *,
    per_channel: bool = False,
    unsigned: bool = False,
    qdq: bool = True,
    **options: Any,
) -> onnx.ModelProto:
    """Quantize statically as onnxruntime's users do."""
    from onnxruntime import quantization as q

    class Rows(q.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.left = iter([{model.graph.input[0].name: x}])

        def get_next(self) -> Mapping[str, Tensor] | None:
            return next(self.left, None)

    logging.disable(logging.WARNING)
    try:
        with TemporaryDirectory() as folder:
            source, made = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
            onnx.save(model, source)
            q.quantize_static(
                source,
                made,
                Rows(),
                quant_format=q.QuantFormat.QDQ if qdq else q.QuantFormat.QOperator,
                per_channel=per_channel,
                activation_type=q.QuantType.QUInt8 if unsigned else q.QuantType.QInt8,
                weight_type=q.QuantType.QInt8,
                **options,
            )
            return onnx.load(made)
    finally:
        logging.disable(logging.NOTSET)


def session(data: bytes, **settings: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    for name, value in settings.items():
        setattr(options, name, value)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def logits_of_training(
    bundle: Bundle, x: Tensor, labels: Tensor, params: dict[str, Tensor]
) -> Tensor:
    """Run the fake-quantized forward pass of the evaluation graph up to its logits."""
    graph = onnx.load_from_string(bundle.member("onnx/evaluate.onnx"))
    name = next(n.input[0] for n in graph.graph.node if n.op_type == "LogSoftmax")
    graph.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    feeds = {"x": x, "y": labels} | {f"p.{i}": v for i, v in enumerate(params.values())}
    logits: Tensor = session(graph.SerializeToString()).run([name], feeds)[0]
    return logits


def predict(data: bytes, x: Tensor) -> Tensor:
    """Run a forward model."""
    runs = session(data)
    out: Tensor = runs.run(None, {runs.get_inputs()[0].name: x})[0]
    return out


class Steps:
    """A bundle's training graph on stock onnxruntime, state in numpy, nothing clever."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.runs = session(bundle.member("onnx/train.onnx"))
        self.outputs = [o.name for o in self.runs.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Start again from the bundle's parameters, with empty slots."""
        values = self.bundle.params().values()
        self.state = {f"p.{i}": value for i, value in enumerate(values)}
        for j, slot in enumerate(self.bundle.manifest["slots"]):
            self.state[f"s.{j}"] = np.zeros(slot["shape"], np.float32)

    def step(self, x: Tensor, y: Tensor, lr: float | None = None, mu: float | None = None) -> float:
        rate = np.array(self.bundle.manifest["lr"] if lr is None else lr, np.float32)
        feeds = {"x": x, "y": y, "lr": rate, **self.state}
        if mu is not None:
            anchors = self.bundle.params().values()
            feeds |= {"mu": np.array(mu, np.float32)} | {
                f"a.{i}": value for i, value in enumerate(anchors)
            }
        made = dict(zip(self.outputs, self.runs.run(None, feeds), strict=True))
        self.state = {name: made[f"{name}.next"] for name in self.state}
        return float(made["loss"])

    def params(self) -> dict[str, Tensor]:
        return {name: self.state[f"p.{i}"] for i, name in enumerate(self.bundle.shapes)}

    def gradient(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the gradient at the start, from one step of plain descent at rate 1."""
        self.reset()
        before = self.params()
        self.step(x, y, lr=1.0)
        after = self.params()
        self.reset()
        return {name: before[name] - after[name] for name in before}


def evaluate(
    bundle: Bundle, x: Tensor, y: Tensor, params: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Run a bundle's evaluation graph."""
    runs = session(bundle.member("onnx/evaluate.onnx"))
    values = (bundle.params() if params is None else params).values()
    feeds = {"x": x, "y": y} | {f"p.{i}": value for i, value in enumerate(values)}
    names = [o.name for o in runs.get_outputs()]
    return dict(zip(names, runs.run(names, feeds), strict=True))


def along(
    measure: Callable[[dict[str, Tensor]], float],
    params: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    *,
    step: float,
    seed: int = 3,
) -> tuple[float, float]:
    """Return a random direction's derivative: by central difference, and by the gradient."""
    rng = np.random.default_rng(seed)
    ahead = {name: rng.standard_normal(v.shape).astype(np.float32) for name, v in params.items()}
    ahead = {name: d + 3 * np.sign(gradient[name]) for name, d in ahead.items()}
    sides = [
        measure({n: (v + sign * step * ahead[n]).astype(np.float32) for n, v in params.items()})
        for sign in (1, -1)
    ]
    told = sum(float(np.vdot(gradient[n].astype(np.float64), ahead[n])) for n in params)
    return (sides[0] - sides[1]) / (2 * step), told


__all__ = [
    "Net", "Steps", "X", "Y", "along", "blobs", "cnn", "evaluate", "mlp", "predict", "quantized",
    "session",
]  # fmt: skip
