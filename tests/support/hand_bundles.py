# SPDX-License-Identifier: Apache-2.0
"""Bundles made by hand, node by node, so that the SDK is tested without the compiler.

One network: x -> MatMul -> Add -> Relu -> MatMul -> Add, cross-entropy or squared error, SGD or
momentum, its gradient written out. `numpy_steps` is the same in plain numpy: the reference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_sdk import bundle as bundles
from edge_sdk.types import Array, Params

NAMES = ("w1", "b1", "w2", "b2")
LR, DECAY = 0.1, 0.9
INPUT_SCALE, INPUT_ZERO = 0.05, 3
OUTPUT_SCALE, OUTPUT_ZERO = 0.125, -7


def mlp(
    sizes: tuple[int, int, int] = (6, 5, 3),
    *,
    loss: str = "cross_entropy",
    momentum: bool = False,
    proximal: bool = False,
    quantized: bool = False,
    seed: int = 0,
) -> bundles.Bundle:
    """Make a bundle of the network; `quantized` gives it an int8 forward model, in and out."""
    params = initial(sizes, seed)
    if quantized:
        predict, patches, params = _quantized_predict(params, sizes)
    else:
        predict, patches = _float_predict(params, sizes)
    members = {
        "onnx/predict.onnx": predict,
        "onnx/train.onnx": _train(params, loss, momentum=momentum, proximal=proximal),
        "onnx/evaluate.onnx": _evaluate(params, loss),
        "params.bin": b"".join(params[n].astype("<f4").tobytes() for n in NAMES),
    }
    return bundles.pack(
        _manifest(params, patches, loss, sizes, momentum=momentum, proximal=proximal, q=quantized),
        members,
    )


def initial(sizes: tuple[int, int, int], seed: int) -> Params:
    """Draw the network's weights."""
    rng = np.random.default_rng(seed)
    i, h, o = sizes
    shapes = {"w1": (i, h), "b1": (h,), "w2": (h, o), "b2": (o,)}
    return {n: rng.normal(0, 0.5, s).astype(np.float32) for n, s in shapes.items()}


def examples(n: int, sizes: tuple[int, int, int] = (6, 5, 3), seed: int = 1) -> tuple[Any, Any]:
    """Draw a learnable toy set: classes are the largest of a hidden linear map."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (n, sizes[0])).astype(np.float32)
    hidden = np.random.default_rng(99).normal(0, 1, (sizes[0], sizes[2]))
    return x, (x @ hidden).argmax(1).astype(np.int64)


def numpy_loss(p: Params, x: Array, y: Any) -> tuple[float, Params]:
    """Return the mean cross-entropy and its gradient, computed in numpy."""
    a = x @ p["w1"] + p["b1"]
    h = np.maximum(a, 0)
    z = h @ p["w2"] + p["b2"]
    z = z - z.max(1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    n = len(x)
    hot = np.eye(z.shape[1], dtype=np.float32)[y]
    dz = (np.exp(logp) - hot) / np.float32(n)
    da = dz @ p["w2"].T * (a > 0)
    grads = {"w1": x.T @ da, "b1": da.sum(0), "w2": h.T @ dz, "b2": dz.sum(0)}
    return float(-(logp * hot).sum() / n), {k: v.astype(np.float32) for k, v in grads.items()}


def numpy_steps(
    p: Params,
    batches: list[tuple[Any, Any]],
    *,
    momentum: bool = False,
    mu: float = 0.0,
    anchor: Params | None = None,
) -> tuple[Params, list[float]]:
    """Train in numpy: the reference for the trainer."""
    base = {k: v.copy() for k, v in (anchor or p).items()}
    p = {k: v.copy() for k, v in p.items()}
    v = {k: np.zeros_like(a) for k, a in p.items()}
    losses = []
    for x, y in batches:
        loss, grads = numpy_loss(p, x, y)
        losses.append(loss)
        for k in p:
            g = grads[k] + np.float32(mu) * (p[k] - base[k])
            v[k] = np.float32(DECAY) * v[k] + g if momentum else g
            p[k] = p[k] - np.float32(LR) * v[k]
    return p, losses


class _Nodes:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, out: str | None = None, **attrs: Any) -> str:
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attrs))
        return out

    def const(self, value: Any, name: str | None = None) -> str:
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def model(self, inputs: list[Any], outputs: list[Any]) -> bytes:
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString(deterministic=True))


def _value(name: str, shape: tuple[Any, ...], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _float_predict(params: Params, sizes: tuple[int, int, int]) -> tuple[bytes, list[Any]]:
    e = _Nodes()
    for name in NAMES:
        e.const(params[name], name)
    h = e("Relu", e("Add", e("MatMul", "features", "w1"), "b1"))
    e("Add", e("MatMul", h, "w2"), "b2", out="logits")
    model = e.model([_value("features", ("n", sizes[0]))], [_value("logits", ("n", sizes[2]))])
    patches = [
        {"param": i, "kind": "float32", "offset": _find(model, params[n].tobytes())}
        for i, n in enumerate(NAMES)
    ]
    return model, patches


def _find(model: bytes, raw: bytes) -> int:
    assert model.count(raw) == 1, "the bytes of a tensor must be found once"
    return model.index(raw)


def quantize(w: Array, axis: int | None) -> tuple[Any, Array]:
    """Quantize to int8 by the bundle's rule; returns the integers and the scale(s)."""
    over = None if axis is None else tuple(i for i in range(w.ndim) if i != axis)
    scale = np.maximum(np.max(w, over) / np.float32(127), np.max(-w, over) / np.float32(127))
    shaped = scale if axis is None else np.expand_dims(scale, over)
    return np.clip(np.rint(w / shaped), -127, 127).astype(np.int8), np.float32(scale)


def _quantized_predict(
    params: Params, sizes: tuple[int, int, int]
) -> tuple[bytes, list[Any], Params]:
    """int8 in, per-channel w1 with an int32 bias, float hidden, per-tensor w2, int8 out."""
    q1, s1 = quantize(params["w1"], 1)
    q2, s2 = quantize(params["w2"], None)
    sb = np.float32(INPUT_SCALE) * s1
    qb = np.rint(params["b1"] / sb).astype(np.int32)
    masters = {
        "w1": q1.astype(np.float32) * s1,
        "b1": (qb * sb).astype(np.float32),
        "w2": q2.astype(np.float32) * s2,
        "b2": params["b2"],
    }
    e = _Nodes()
    x = e(
        "DequantizeLinear",
        "features",
        e.const(np.float32(INPUT_SCALE)),
        e.const(np.int8(INPUT_ZERO)),
    )
    w1 = e(
        "DequantizeLinear", e.const(q1), e.const(s1), e.const(np.zeros(len(s1), np.int8)), axis=1
    )
    b1 = e("DequantizeLinear", e.const(qb), e.const(sb), axis=0)
    w2 = e("DequantizeLinear", e.const(q2), e.const(s2), e.const(np.int8(0)))
    h = e("Relu", e("Add", e("MatMul", x, w1), b1))
    z = e("Add", e("MatMul", h, w2), e.const(params["b2"]))
    e(
        "QuantizeLinear",
        z,
        e.const(np.float32(OUTPUT_SCALE)),
        e.const(np.int8(OUTPUT_ZERO)),
        out="scores",
    )
    model = e.model(
        [_value("features", ("n", sizes[0]), TensorProto.INT8)],
        [_value("scores", ("n", sizes[2]), TensorProto.INT8)],
    )
    at = {"kind": "quantized", "dtype": "int8"}
    patches = [
        {
            **at,
            "param": 0,
            "offset": _find(model, q1.tobytes()),
            "scale_offset": _find(model, s1.tobytes()),
            "scales": len(s1),
            "axis": 1,
            "zero_point": 0,
        },
        {
            "param": 1,
            "kind": "bias",
            "offset": _find(model, qb.tobytes()),
            "scale_offset": _find(model, sb.tobytes()),
            "scales": len(s1),
            "input_scale": INPUT_SCALE,
            "weight": 0,
        },
        {
            **at,
            "param": 2,
            "offset": _find(model, q2.tobytes()),
            "scale_offset": _find(model, s2.tobytes()),
            "scales": 1,
            "axis": None,
            "zero_point": 0,
        },
        {"param": 3, "kind": "float32", "offset": _find(model, params["b2"].tobytes())},
    ]
    return model, patches, masters


def _forward(e: _Nodes) -> tuple[str, str, str]:
    a = e("Add", e("MatMul", "x", "p.0"), "p.1")
    h = e("Relu", a)
    return a, h, e("Add", e("MatMul", h, "p.2"), "p.3")


def _batch_size(e: _Nodes) -> str:
    shape = e("Shape", "x", start=0, end=1)
    return e("Squeeze", e("Cast", shape, to=TensorProto.FLOAT))


def _loss(e: _Nodes, z: str, loss: str, classes: int) -> str:
    """Add the loss node, named `loss`; returns the gradient by the network's output."""
    n = _batch_size(e)
    if loss == "mse":
        error = e("Sub", z, "y")
        count = e("Mul", n, e.const(np.float32(classes)))
        square = e("ReduceSum", e("Mul", error, error), keepdims=0)
        e("Div", square, count, out="loss")
        return e("Div", e("Mul", error, e.const(np.float32(2))), count)
    logp = e("LogSoftmax", z, axis=1)
    depth, ends = e.const(np.int64(classes)), e.const(np.array([0, 1], np.float32))
    hot = e("OneHot", "y", depth, ends)
    e("Div", e("Neg", e("ReduceSum", e("Mul", logp, hot), keepdims=0)), n, out="loss")
    return e("Div", e("Sub", e("Exp", logp), hot), n)


def _train(params: Params, loss: str, *, momentum: bool, proximal: bool) -> bytes:
    e = _Nodes()
    a, h, z = _forward(e)
    dz = _loss(e, z, loss, params["b2"].size)
    mask = e("Cast", e("Greater", a, e.const(np.float32(0))), to=TensorProto.FLOAT)
    da = e("Mul", e("MatMul", dz, e("Transpose", "p.2", perm=[1, 0])), mask)
    rows = e.const(np.array([0], np.int64))
    grads = [
        e("MatMul", e("Transpose", "x", perm=[1, 0]), da),
        e("ReduceSum", da, rows, keepdims=0),
        e("MatMul", e("Transpose", h, perm=[1, 0]), dz),
        e("ReduceSum", dz, rows, keepdims=0),
    ]
    outputs = [_value("loss", ())]
    for i, grad in enumerate(grads):
        outputs += _update(e, i, grad, params[NAMES[i]].shape, momentum=momentum, proximal=proximal)
    return e.model(_train_inputs(params, loss, momentum=momentum, proximal=proximal), outputs)


def _update(
    e: _Nodes, i: int, grad: str, shape: tuple[int, ...], *, momentum: bool, proximal: bool
) -> list[Any]:
    if proximal:
        grad = e("Add", grad, e("Mul", "mu", e("Sub", f"p.{i}", f"a.{i}")))
    outputs = [_value(f"p.{i}.next", shape)]
    if momentum:
        decayed = e("Mul", f"s.{i}", e.const(np.float32(DECAY)))
        grad = e("Add", decayed, grad, out=f"s.{i}.next")
        outputs.append(_value(f"s.{i}.next", shape))
    e("Sub", f"p.{i}", e("Mul", "lr", grad), out=f"p.{i}.next")
    return outputs


def _inputs(params: Params, loss: str) -> list[Any]:
    y = _value("y", ("n",), TensorProto.INT64)
    if loss == "mse":
        y = _value("y", ("n", params["b2"].size))
    shapes = [_value(f"p.{i}", params[n].shape) for i, n in enumerate(NAMES)]
    return [_value("x", ("n", params["w1"].shape[0])), y, *shapes]


def _train_inputs(params: Params, loss: str, *, momentum: bool, proximal: bool) -> list[Any]:
    inputs = [*_inputs(params, loss), _value("lr", ())]
    if momentum:
        inputs += [_value(f"s.{i}", params[n].shape) for i, n in enumerate(NAMES)]
    if proximal:
        inputs += [_value(f"a.{i}", params[n].shape) for i, n in enumerate(NAMES)]
        inputs.append(_value("mu", ()))
    return inputs


def _evaluate(params: Params, loss: str) -> bytes:
    e = _Nodes()
    _, _, z = _forward(e)
    _loss(e, z, loss, params["b2"].size)
    outputs = [_value("loss", ())]
    if loss == "cross_entropy":
        hit = e("Equal", e("ArgMax", z, axis=1, keepdims=0), "y")
        e("ReduceSum", e("Cast", hit, to=TensorProto.INT64), keepdims=0, out="correct")
        outputs.append(_value("correct", (), TensorProto.INT64))
    return e.model(_inputs(params, loss), outputs)


def _manifest(
    params: Params,
    patches: list[Any],
    loss: str,
    sizes: tuple[int, int, int],
    *,
    momentum: bool,
    proximal: bool,
    q: bool,
) -> dict[str, Any]:
    numbers = sum(math.prod(p.shape) for p in params.values())
    names = [{"name": n, "shape": list(params[n].shape)} for n in NAMES]
    slots = [
        {"name": f"{n}.velocity", "param": i, "shape": list(params[n].shape)}
        for i, n in enumerate(NAMES)
    ]
    return {
        "format": "fedge-bundle/2",
        "source": "onnx",
        "name": "hand",
        "producer": "fedge tests",
        "loss": loss,
        "train": "all",
        "optimizer": [["momentum", {"decay": DECAY, "lr": LR}]]
        if momentum
        else [["sgd", {"lr": LR}]],
        "lr": LR,
        "proximal": proximal,
        "input": _port("features", sizes[0], INPUT_SCALE if q else None, INPUT_ZERO),
        "output": _port(
            "scores" if q else "logits", sizes[2], OUTPUT_SCALE if q else None, OUTPUT_ZERO
        ),
        "target": {"dtype": "float32", "shape": [None, sizes[2]]}
        if loss == "mse"
        else {"dtype": "int64", "shape": [None]},
        "params": names,
        "slots": slots if momentum else [],
        "graphs": {
            "onnx": {
                "predict": "onnx/predict.onnx",
                "train": "onnx/train.onnx",
                "evaluate": "onnx/evaluate.onnx",
            }
        },
        "patches": {"onnx": patches},
        "cost": {
            "params": numbers,
            "trainable": numbers,
            "trainable_share": 1.0,
            "operators": {"MatMul": 2, "Add": 2, "Relu": 1},
            "train_operators": {"MatMul": 5},
            "flops_forward": 2 * numbers,
            "flops_step": 6 * numbers,
            "bytes_dense": 4 * numbers,
            "bytes_update": numbers // 4,
        },
    }


def _port(name: str, width: int, scale: float | None, zero: int) -> dict[str, Any]:
    is_int8 = scale is not None
    return {
        "name": name,
        "dtype": "int8" if is_int8 else "float32",
        "shape": [None, width],
        "scale": scale,
        "zero_point": zero if is_int8 else None,
    }
