# SPDX-License-Identifier: Apache-2.0
"""For every operator in the table of rules: settings to differentiate it at."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from check_grads import Case
from grad_cases_rest import REST
from grad_cases_rewritten import REWRITTEN
from grad_draws import RNG, F, ints, normal, positive, spaced, unary


def _binary(op: str, right: Callable[..., np.ndarray] = normal) -> list[Case]:
    return [
        Case(op, (normal(3, 4), right(3, 4)), wrt=(0, 1), batch=(0, 1)),
        Case(op, (normal(3, 4), right(4)), wrt=(0, 1), batch=(0,)),
        Case(op, (normal(2, 3, 4), right(3, 1)), wrt=(0, 1), batch=(0,)),
        Case(op, (normal(1, 4), right(3, 4)), wrt=(0, 1)),
        Case(op, (normal(2, 3), right(1, 3)), wrt=(0, 1), batch=(0,)),
        Case(op, (normal(2, 3), right()), wrt=(0, 1), batch=(0,)),
    ]


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _several(op: str, make: Callable[..., np.ndarray]) -> list[Case]:
    rows = make(6, 4)
    return [
        Case(op, (rows[:2], rows[2:4], rows[4:]), wrt=(0, 1, 2), batch=(0, 1, 2)),
        Case(op, (rows[:3], rows[3]), wrt=(0, 1), batch=(0,)),
        Case(op, (rows[:3],), batch=(0,)),
    ]


_TWO = [(3, 4), (2, 3, 5)]

ELEMENTWISE = [
    *_binary("Add"),
    *_binary("Sub"),
    *_binary("Mul"),
    *_binary("Div", positive),
    *unary("Neg", normal),
    *unary("Abs", spaced),
    *unary("Reciprocal", positive),
    *unary("Exp", normal),
    *unary("Log", positive),
    *unary("Sqrt", positive),
    *[Case("Erf", (normal(*s),), meaning=np.vectorize(math.erf), batch=(0,)) for s in _TWO],
    *unary("Sigmoid", normal),
    *unary("Tanh", normal),
    *unary("Softplus", normal),
    *unary("Softsign", normal),
    *unary("Mish", normal),
    Case("Gelu", (normal(3, 4),), meaning=_gelu, batch=(0,), opset=20),
    Case("Gelu", (normal(2, 5),), {"approximate": "tanh"}, batch=(0,), opset=20),
    *unary("Sin", normal),
    *unary("Cos", normal),
    *unary("Atan", normal),
    *unary("Selu", spaced, {}, {"alpha": 1.5, "gamma": 0.8}),
    *_several("Sum", normal),
    *_several("Mean", normal),
    *_several("Max", spaced),
    *_several("Min", spaced),
    *unary("Relu", spaced),
    *unary("LeakyRelu", spaced, {}, {"alpha": 0.3}, {"alpha": -0.5}),
    *unary("Elu", spaced, {}, {"alpha": 0.3}),
    *unary("HardSigmoid", lambda *s: spaced(*s, gap=0.7), {}, {"alpha": 0.3, "beta": 0.4}),
    *unary("HardSwish", lambda *s: spaced(*s, gap=0.7)),
    Case("PRelu", (spaced(3, 4), normal(4)), wrt=(0, 1), batch=(0,)),
    Case("PRelu", (spaced(2, 3, 2, 2), normal(3, 1, 1)), wrt=(0, 1), batch=(0,)),
    Case("Clip", (spaced(4, 5), np.array(-0.3, F), np.array(0.6, F)), {}, fixed=(1, 2), batch=(0,)),
    Case(
        "Clip",
        (spaced(4, 5, gap=0.7), np.array(0, F), np.array(6, F)),
        {},
        fixed=(1, 2),
        batch=(0,),
    ),
    Case("Clip", (spaced(4, 5), None, np.array(0.6, F)), {}, fixed=(2,), batch=(0,)),
    Case("Clip", (spaced(4, 5), np.array(-0.2, F)), {}, fixed=(1,), batch=(0,)),
    Case("Clip", (spaced(4, 5), np.array(-0.3, F), np.array(0.6, F)), {}, batch=(0,)),
    Case("Clip", (spaced(4, 5),), {}, batch=(0,)),
    Case("Pow", (positive(3, 4), np.array(2, F)), fixed=(1,), batch=(0,)),
    Case("Pow", (positive(3, 4), np.array(-0.5, F)), fixed=(1,), batch=(0,)),
    Case("Pow", (normal(3, 4), np.array(3, np.int64)), fixed=(1,), batch=(0,)),
    Case("Pow", (positive(3, 1), positive(4)), batch=(0,)),
    Case("Where", (RNG.random((3, 4)) > 0.5, normal(3, 4), normal(4)), wrt=(1, 2), batch=(0, 1)),
    Case("Where", (np.array([True, False]), normal(3, 2), normal(3, 1)), wrt=(1, 2)),
]

LINEAR = [
    Case("Gemm", (normal(3, 4), normal(4, 5), normal(5)), wrt=(0, 1, 2), batch=(0,)),
    Case(
        "Gemm",
        (normal(3, 4), normal(5, 4), normal(1, 5)),
        {"transB": 1, "alpha": 0.5, "beta": 2.0},
        wrt=(0, 1, 2),
        batch=(0,),
    ),
    Case("Gemm", (normal(4, 3), normal(4, 5)), {"transA": 1, "alpha": 2.0}, wrt=(0, 1)),
    Case(
        "Gemm",
        (normal(4, 3), normal(5, 4), normal(3, 1)),
        {"transA": 1, "transB": 1},
        wrt=(0, 1, 2),
    ),
    Case("Gemm", (normal(3, 4), normal(4, 2), normal()), {"beta": 0.3}, wrt=(0, 1, 2), batch=(0,)),
    Case("MatMul", (normal(3, 4), normal(4, 2)), wrt=(0, 1), batch=(0,)),
    Case("MatMul", (normal(3, 2, 4), normal(4, 5)), wrt=(0, 1), batch=(0,)),
    Case("MatMul", (normal(3, 2, 4), normal(3, 4, 5)), wrt=(0, 1), batch=(0, 1)),
    Case("MatMul", (normal(3, 2, 4), normal(1, 4, 5)), wrt=(0, 1), batch=(0,)),
    Case("MatMul", (normal(2, 4), normal(3, 4, 5)), wrt=(0, 1), batch=(1,)),
    Case("MatMul", (normal(2, 1, 3, 4), normal(3, 4, 2)), wrt=(0, 1), batch=(0,)),
    Case("MatMul", (normal(4), normal(4)), wrt=(0, 1)),
    Case("MatMul", (normal(4), normal(4, 3)), wrt=(0, 1)),
    Case("MatMul", (normal(3, 4), normal(4)), wrt=(0, 1), batch=(0,)),
    Case("MatMul", (normal(4), normal(2, 4, 3)), wrt=(0, 1), batch=(1,)),
    Case("MatMul", (normal(2, 3, 4), normal(4)), wrt=(0, 1), batch=(0,)),
]


def _linear_in_each(op: str, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Case:
    return Case(
        op,
        inputs,
        attributes,
        wrt=tuple(range(len(inputs))),
        batch=(0,),
        eps=0.5,
        evaluator="ort",
    )


def _conv(x: tuple[int, ...], w: tuple[int, ...], bias: bool = False, **attributes: Any) -> Case:
    inputs = (normal(*x), normal(*w), normal(w[0])) if bias else (normal(*x), normal(*w))
    return _linear_in_each("Conv", inputs, attributes)


def _deconv(x: tuple[int, ...], w: tuple[int, ...], bias: int = 0, **attributes: Any) -> Case:
    inputs = (normal(*x), normal(*w), normal(bias)) if bias else (normal(*x), normal(*w))
    return _linear_in_each("ConvTranspose", inputs, attributes)


CONV = [
    _conv((2, 3, 5, 4), (4, 3, 3, 3), bias=True),
    _conv((2, 5, 5, 4), (3, 5, 3, 3), bias=True, pads=[1, 1, 1, 1]),
    _conv((2, 5, 7, 6), (3, 5, 3, 2), strides=[2, 3], pads=[1, 0, 2, 1]),
    _conv((2, 5, 7, 7), (3, 5, 3, 3), dilations=[2, 2], pads=[2, 1, 2, 0]),
    _conv((2, 5, 8, 7), (3, 5, 3, 3), dilations=[2, 1], strides=[2, 2], pads=[1, 1, 1, 1]),
    _conv((2, 5, 6, 5), (3, 5, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    _conv((2, 3, 6, 5), (3, 3, 2, 2), auto_pad="SAME_LOWER"),
    _conv((2, 5, 6, 6), (3, 5, 3, 3), strides=[2, 2], auto_pad="VALID"),
    _conv((2, 5, 4, 3), (6, 5, 1, 1), bias=True),
    _conv((2, 5, 5, 4), (6, 5, 1, 1), strides=[2, 2]),
    _conv((2, 5, 5, 4), (6, 5, 1, 1), pads=[1, 1, 1, 1]),
    _conv((2, 1, 8, 5), (3, 1, 4, 2), strides=[2, 2], pads=[1, 1, 1, 1]),
    _conv((2, 4, 5, 5), (4, 1, 3, 3), bias=True, group=4, pads=[1, 1, 1, 1]),
    _conv((2, 4, 6, 5), (4, 1, 3, 3), group=4, strides=[2, 2], pads=[1, 1, 1, 1]),
    _conv((2, 3, 5, 5), (6, 1, 3, 3), group=3, pads=[1, 1, 1, 1]),
    _conv((2, 4, 5, 5), (6, 2, 3, 3), group=2, strides=[2, 1]),
    _conv((2, 4, 6, 6), (4, 2, 3, 3), group=2, dilations=[2, 2], pads=[2, 2, 2, 2]),
    _conv((2, 3, 9), (4, 3, 3), bias=True, pads=[1, 1]),
    _conv((2, 5, 9), (4, 5, 3), strides=[2], dilations=[2]),
    _conv((2, 4, 9), (4, 1, 3), group=4, strides=[3], pads=[2, 0]),
    _conv((1, 2, 3, 4, 3), (2, 2, 2, 2, 2)),
    _deconv((2, 3, 4, 3), (3, 2, 3, 3), bias=2),
    _deconv((2, 3, 4, 3), (3, 2, 3, 3), strides=[2, 2], pads=[1, 0, 0, 1]),
    _deconv((2, 3, 4, 3), (3, 2, 3, 3), strides=[2, 2], pads=[1] * 4, output_padding=[1, 1]),
    _deconv((2, 4, 4, 3), (4, 1, 3, 3), bias=2, group=2, strides=[2, 1]),
    _deconv((2, 4, 4, 3), (4, 1, 2, 2), group=4, strides=[2, 2]),
    _deconv((2, 3, 4, 3), (3, 2, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    _deconv((2, 3, 4, 3), (3, 2, 2, 3), dilations=[2, 1]),
    _deconv((2, 3, 4, 3), (3, 2, 3, 3), strides=[2, 2], output_shape=[8, 6]),
    _deconv((2, 5, 6), (5, 2, 4), strides=[2], pads=[1, 1]),
]


def _average(*shape: int, **attributes: Any) -> Case:
    return _linear_in_each("AveragePool", (normal(*shape),), attributes)


def _maximum(*shape: int, outputs: int = 1, **attributes: Any) -> Case:
    return Case(
        "MaxPool",
        (spaced(*shape),),
        attributes,
        batch=(0,),
        eps=0.02,
        evaluator="ort",
        outputs=outputs,
    )


POOL = [
    _average(2, 3, 4, 6, kernel_shape=[2, 2], strides=[2, 2]),
    _average(2, 3, 5, 5, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    _average(2, 3, 5, 5, kernel_shape=[3, 3], pads=[1, 0, 1, 1], count_include_pad=1),
    _average(2, 3, 6, 5, kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1),
    _average(2, 3, 6, 6, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=[1, 1, 0, 0]),
    _average(2, 3, 7, 5, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    _average(2, 3, 5, 5, kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
    _average(2, 3, 5, 4, kernel_shape=[5, 4]),
    _average(2, 3, 8, kernel_shape=[3], strides=[2]),
    _average(2, 3, 8, kernel_shape=[3], strides=[3]),
    _maximum(2, 3, 4, 6, kernel_shape=[2, 2], strides=[2, 2]),
    _maximum(2, 3, 5, 5, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    _maximum(2, 2, 6, 6, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    _maximum(2, 2, 6, 6, kernel_shape=[2, 2], dilations=[2, 2]),
    _maximum(2, 3, 5, 5, kernel_shape=[3, 3], auto_pad="SAME_UPPER"),
    _maximum(2, 3, 9, kernel_shape=[2], strides=[2]),
    _maximum(2, 2, 7, 9, kernel_shape=[2, 3], strides=[2, 3]),
    _maximum(2, 2, 7, 9, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    _maximum(2, 3, 4, 4, kernel_shape=[2, 2], strides=[2, 2], outputs=2),
    _linear_in_each("GlobalAveragePool", (normal(2, 3, 4, 5),), {}),
    _linear_in_each("GlobalAveragePool", (normal(2, 3, 4),), {}),
    Case("GlobalMaxPool", (spaced(2, 3, 4, 2),), batch=(0,)),
    Case("GlobalMaxPool", (spaced(2, 3, 4),), batch=(0,), eps=0.02, evaluator="ort"),
]

NORM = [
    Case(
        "BatchNormalization",
        (normal(3, 4, 2, 3), normal(4), normal(4), normal(4), positive(4)),
        wrt=(0, 1, 2),
        fixed=(3, 4),
        batch=(0,),
    ),
    Case(
        "BatchNormalization",
        (normal(3, 4), normal(4), normal(4), normal(4), positive(4)),
        {"epsilon": 0.1},
        wrt=(0, 1, 2),
        fixed=(3, 4),
        batch=(0,),
    ),
    Case("LayerNormalization", (normal(2, 3, 5), normal(5), normal(5)), wrt=(0, 1, 2), batch=(0,)),
    Case(
        "LayerNormalization",
        (normal(2, 3, 5), normal(3, 5), normal(3, 5)),
        {"axis": 1, "epsilon": 0.1},
        wrt=(0, 1, 2),
        batch=(0,),
    ),
    Case("LayerNormalization", (normal(4, 6), normal(6)), {"axis": 1}, wrt=(0, 1), batch=(0,)),
    Case(
        "InstanceNormalization",
        (normal(2, 3, 4, 2), normal(3), normal(3)),
        wrt=(0, 1, 2),
        batch=(0,),
    ),
    Case(
        "InstanceNormalization",
        (normal(2, 3, 5), normal(3), normal(3)),
        {"epsilon": 0.1},
        wrt=(0, 1, 2),
        batch=(0,),
    ),
    Case("Softmax", (normal(3, 5),), batch=(0,)),
    Case("Softmax", (normal(2, 4, 3),), {"axis": 1}, batch=(0,)),
    Case("LogSoftmax", (normal(3, 5),), batch=(0,)),
    Case("LogSoftmax", (normal(2, 4, 3),), {"axis": 1}, batch=(0,)),
]


def _reduce(op: str, make: Callable[..., np.ndarray] = normal) -> list[Case]:
    return [
        Case(op, (make(3, 4, 2), ints(1)), {"keepdims": 0}, fixed=(1,), batch=(0,)),
        Case(op, (make(3, 4, 2), ints(-1, 1)), {"keepdims": 1}, fixed=(1,), batch=(0,)),
        Case(op, (make(3, 4),), {"noop_with_empty_axes": 1}, batch=(0,)),
        Case(op, (make(3, 4),), {"keepdims": 0}),
        Case(op, (make(3, 4), ints(0)), {"keepdims": 0}, fixed=(1,)),
    ]


REDUCE = [
    *_reduce("ReduceSum"),
    *_reduce("ReduceMean"),
    *_reduce("ReduceMax", spaced),
    *_reduce("ReduceMin", spaced),
    *_reduce("ReduceL2")[:2],
    *_reduce("ReduceSumSquare")[:2],
    *_reduce("ReduceLogSumExp")[:2],
]


def _linear_at_first(op: str, inputs: tuple[Any, ...]) -> Case:
    """Return a case whose other inputs are constants, its evaluator being onnxruntime."""
    fixed = tuple(range(1, len(inputs)))
    return Case(op, inputs, fixed=fixed, batch=(0,), eps=0.5, evaluator="ort")


SHAPE = [
    *unary("Identity", normal),
    Case("Cast", (normal(3, 4),), {"to": 1}, batch=(0,), eps=0.5),
    Case("Cast", (normal(3, 4),), {"to": 11}, batch=(0,)),
    Case("Reshape", (normal(2, 3, 4), ints(0, -1)), fixed=(1,), batch=(0,)),
    Case("Reshape", (normal(2, 12), ints(-1, 3, 4)), fixed=(1,), batch=(0,)),
    Case("Flatten", (normal(2, 3, 4),), batch=(0,)),
    Case("Flatten", (normal(2, 3, 4),), {"axis": 2}),
    Case("Transpose", (normal(2, 3, 4),), {"perm": [0, 2, 1]}, batch=(0,)),
    Case("Transpose", (normal(2, 3, 4),), {"perm": [1, 2, 0]}),
    Case("Transpose", (normal(2, 3, 4),)),
    Case("Squeeze", (normal(2, 1, 4), ints(1)), fixed=(1,), batch=(0,)),
    Case("Squeeze", (normal(2, 1, 4, 1),)),
    Case("Unsqueeze", (normal(2, 4), ints(1)), fixed=(1,), batch=(0,)),
    Case("Unsqueeze", (normal(2, 4), ints(1, -1)), fixed=(1,), batch=(0,)),
    Case("Expand", (normal(3, 1), ints(2, 3, 4)), fixed=(1,)),
    Case("Expand", (normal(3, 1, 4), ints(1, 5, 1)), fixed=(1,), batch=(0,)),
    Case(
        "Concat", (normal(2, 3), normal(2, 1), normal(2, 2)), {"axis": 1}, (0, 1, 2), (), (0, 1, 2)
    ),
    Case("Concat", (normal(2, 3), normal(2, 4)), {"axis": -1}, (1,), (), (0, 1)),
    Case("Concat", (normal(2, 3), normal(1, 3)), {"axis": 0}, (0, 1)),
    Case("Split", (normal(2, 6),), {"axis": 1, "num_outputs": 3}, (0,), (), (0,), 3, (0, 1, 2)),
    Case("Split", (normal(2, 6), ints(1, 5)), {"axis": 1}, (0,), (1,), (0,), 2, (1,)),
    Case("Split", (normal(4, 2), ints(1, 3)), {"axis": 0}, (0,), (1,), (), 2, (0, 1)),
    Case("Slice", (normal(3, 6), ints(1), ints(5), ints(1)), fixed=(1, 2, 3), batch=(0,)),
    Case(
        "Slice",
        (normal(3, 6), ints(5), ints(-(2**31)), ints(1), ints(-2)),
        fixed=(1, 2, 3, 4),
        batch=(0,),
    ),
    Case("Slice", (normal(3, 6), ints(0, -4), ints(2, 2**40)), fixed=(1, 2)),
    Case(
        "Slice",
        (normal(2, 6, 7), ints(1, 0), ints(6, 100), ints(-1, 1), ints(3, 2)),
        fixed=(1, 2, 3, 4),
        batch=(0,),
    ),
    Case("Gather", (normal(3, 5), np.array([[0, 2], [4, 2]])), {"axis": 1}, (0,), (1,), (0,)),
    Case("Gather", (normal(5, 3), ints(1, -1, 1)), {}, (0,), (1,)),
    Case("Gather", (normal(5, 3), np.array([[1, 0], [1, 3]])), {"axis": 0}),
    Case("Gather", (normal(5, 4), np.array([[1, 0], [1, 3]], np.int32)), {"axis": 0}),
    Case("Gather", (normal(3, 5, 2), np.array(-1)), {"axis": 1}, (0,), (1,), (0,)),
    Case("Pad", (normal(2, 3, 4), ints(0, 1, 0, 0, 2, 1)), {}, (0,), (1,), (0,)),
    _linear_at_first("Pad", (normal(2, 5), ints(1, -1), np.array(3, F), ints(1))),
    Case(
        "Pad", (normal(2, 5), ints(2, 3), None, ints(-1)), {"mode": "reflect"}, (0,), (1, 3), (0,)
    ),
    Case("Pad", (normal(2, 3, 4), ints(0, 1, 2, 0, 2, 1)), {"mode": "edge"}, (0,), (1,), (0,)),
    Case("Dropout", (normal(3, 4),), batch=(0,)),
    Case("Dropout", (normal(3, 4), np.array(0.3, F)), fixed=(1,), batch=(0,), outputs=2),
]


def _quantized(dtype: Any, scale: np.ndarray, zero: np.ndarray | None, axis: int) -> Case:
    """Quantize and dequantize: to be differentiated as a clip at the quantizer's range."""
    info = np.iinfo(dtype)

    def build(e: Any, x: str) -> str:
        s = e.const(scale)
        z = None if zero is None else e.const(zero, dtype)
        return e.DequantizeLinear(e.QuantizeLinear(x, s, z, axis=axis), s, z, axis=axis)

    ones = [1, 1]
    if scale.ndim:
        ones[axis] = -1
    s = scale.reshape(ones)
    z = (
        np.zeros((1, 1))
        if zero is None
        else zero.astype(float).reshape(ones if zero.ndim else [1, 1])
    )

    def meaning(x: np.ndarray) -> np.ndarray:
        return np.clip(x, (info.min - z - 0.5) * s, (info.max - z + 0.5) * s)

    x = (normal(4, 3) * 150 * s).astype(F)
    return Case(
        "QuantizeLinear",
        (x,),
        {"dtype": str(np.dtype(dtype)), "axis": axis},
        build=build,
        meaning=meaning,
        covers=(("DequantizeLinear", 0),),
        batch=() if scale.ndim and axis == 0 else (0,),
    )


_SCALES = np.array([1, 1, 2, 3], F)


def _resize(*tail: np.ndarray | None, **attributes: str) -> Case:
    inputs = (normal(2, 3, 2, 3), None, *tail)
    fixed = tuple(range(2, len(inputs)))
    batch = (0,) if len(tail) == 1 else ()  # sizes name the batch, scales do not
    return Case("Resize", inputs, attributes, (0,), fixed, batch, eps=0.5, evaluator="ort")


RESAMPLE = [
    Case("Tile", (normal(2, 3), ints(1, 2)), {}, (0,), (1,), (0,)),
    Case("Tile", (normal(2, 3), ints(3, 2)), {}, (0,), (1,)),
    _resize(_SCALES),
    _resize(_SCALES, coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    _resize(None, ints(2, 3, 4, 6), mode="nearest"),
    Case("DepthToSpace", (normal(2, 8, 2, 3),), {"blocksize": 2}, batch=(0,)),
    Case("DepthToSpace", (normal(2, 8, 2, 3),), {"blocksize": 2, "mode": "CRD"}, batch=(0,)),
    Case("SpaceToDepth", (normal(2, 2, 4, 6),), {"blocksize": 2}, batch=(0,)),
    Case("SpaceToDepth", (normal(2, 1, 3, 6),), {"blocksize": 3}, batch=(0,)),
    Case("CumSum", (normal(2, 5), np.array(1)), {}, (0,), (1,), (0,)),
    Case("CumSum", (normal(2, 5), np.array(1)), {"exclusive": 1, "reverse": 1}, (0,), (1,), (0,)),
    Case("Trilu", (normal(2, 3, 4),), {}, batch=(0,)),
    Case("Trilu", (normal(2, 3, 3), np.array(-1)), {"upper": 0}, (0,), (1,), (0,)),
]


def _learned_step(dtype: Any, step: float, zero: int) -> Case:
    """Differentiate by the step, too, with the rounding held where it is (Esser et al. 2020)."""
    info = np.iinfo(dtype)
    x = (normal(4, 3) * 150 * step).astype(F)
    whole = np.rint(x / step) + zero
    x = np.where((whole == info.min) | (whole == info.max), F(step), x)  # no kink near
    rest = np.rint(x.astype(float) / step) - x.astype(float) / step

    def build(e: Any, x: str, s: str) -> str:
        at = e.const(zero, dtype)
        return e.DequantizeLinear(e.QuantizeLinear(x, s, at), s, at)

    def meaning(x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return s * np.clip(x / s + rest, info.min - zero, info.max - zero)

    return Case(
        "QuantizeLinear",
        (x, np.array(step, F)),
        {"dtype": str(np.dtype(dtype))},
        wrt=(0, 1),
        build=build,
        meaning=meaning,
        covers=(("DequantizeLinear", 0), ("DequantizeLinear", 1)),
    )


QUANTIZE = [
    _learned_step(np.int8, 0.125, 3),
    _learned_step(np.uint8, 0.03125, 128),
    _quantized(np.int8, np.array(0.1, F), np.array(3, np.int8), 1),
    _quantized(np.uint8, np.array(0.02, F), np.array(128, np.uint8), 1),
    _quantized(np.uint8, np.array(0.1, F), None, 1),
    _quantized(np.int8, np.array([0.1, 0.2, 0.01], F), np.array([0, 5, -7], np.int8), 1),
    _quantized(np.int8, np.array([0.1, 0.2, 0.01, 0.3], F), np.zeros(4, np.int8), 0),
]

CASES = [
    *ELEMENTWISE,
    *LINEAR,
    *CONV,
    *POOL,
    *NORM,
    *REDUCE,
    *SHAPE,
    *RESAMPLE,
    *QUANTIZE,
    *REST,
    *REWRITTEN,
]
