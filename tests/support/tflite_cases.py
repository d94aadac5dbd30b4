# SPDX-License-Identifier: Apache-2.0
"""Operators of TFLite, one a case: inputs, options, and how they are quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Ints(NamedTuple):
    """A constant of sizes, axes or indices."""

    values: Any


class Ids(NamedTuple):
    """An input of int32 numbers from 0 to 3."""

    shape: tuple[int, ...]


class Flags(NamedTuple):
    """An input of booleans."""

    shape: tuple[int, ...]


class State(NamedTuple):
    """A variable that starts at zeros."""

    shape: tuple[int, ...]


class Case(NamedTuple):
    """One operator: activations as shapes, constants as arrays."""

    op: str
    inputs: Sequence[Any]
    shape: tuple[int, ...]
    options: str = ""
    fields: dict[str, Any] = {}  # noqa: RUF012  read only
    modes: str = "float int8"
    out: tuple[float, int] | None = None  # scale and zero point; None: the input's
    outputs: int = 1
    made: str = ""  # dtypes of the outputs where they are not the inputs'


ONE_VERSION = {"EXPAND_DIMS", "HARD_SWISH", "PRELU", "RESHAPE", "SQUEEZE"}
RNG = np.random.default_rng(5)
X, Y = (1, 6, 5, 4), (1, 6, 5, 4)
WIDE = (0.05, -7)


def numbers(*shape: int) -> Any:
    return RNG.normal(0, 0.5, shape).astype(np.float32)


def conv(act: int = 0, padding: int = 0, stride: int = 1, dilation: int = 1, **more: Any) -> Any:
    return {
        "padding": padding, "strideH": stride, "strideW": stride, "dilationHFactor": dilation,
        "dilationWFactor": dilation, "fusedActivationFunction": act, **more,
    }  # fmt: skip


def pool(size: int, stride: int, padding: int, act: int = 0) -> Any:
    return {
        "padding": padding, "strideH": stride, "strideW": stride, "filterHeight": size,
        "filterWidth": size, "fusedActivationFunction": act,
    }  # fmt: skip


W, D = numbers(3, 3, 2, 4), numbers(1, 3, 3, 4)
B3, B4 = numbers(3), numbers(4)
SLICE = {"beginMask": 0, "endMask": 0, "ellipsisMask": 0, "newAxisMask": 0, "shrinkAxisMask": 0}
AT = [Ints([0, 1, 0, 0]), Ints([1, 6, 5, 4]), Ints([1, 2, 1, 1])]
HALF = Ints([12, 10])
CASES = {
    "conv, valid": Case("CONV_2D", [X, W, B3], (1, 4, 4, 3), "Conv2DOptions", conv(0, 1), out=WIDE),
    "conv, same, strides": Case(
        "CONV_2D", [X, W, B3], (1, 3, 3, 3), "Conv2DOptions", conv(1, 0, 2), out=(0.02, -128)
    ),
    "conv, dilated": Case(
        "CONV_2D", [X, W, B3], (1, 6, 5, 3), "Conv2DOptions", conv(3, 0, 1, 2), out=(6 / 255, -128)
    ),
    "conv, relu6 that cuts": Case(
        "CONV_2D", [X, W, B3], (1, 6, 5, 3), "Conv2DOptions", conv(3), out=(0.05, -100)
    ),
    "conv, relu of -1 to 1": Case(
        "CONV_2D", [X, W, B3], (1, 6, 5, 3), "Conv2DOptions", conv(2), out=(2 / 255, 0)
    ),
    "conv, groups": Case(
        "CONV_2D", [X, numbers(4, 3, 3, 2), B4], (1, 6, 5, 4), "Conv2DOptions", conv(), "float"
    ),
    "depthwise": Case(
        "DEPTHWISE_CONV_2D",
        [X, D, B4],
        (1, 3, 3, 4),
        "DepthwiseConv2DOptions",
        conv(0, 0, 2, depthMultiplier=1),
        out=WIDE,
    ),
    "depthwise, multiplied": Case(
        "DEPTHWISE_CONV_2D",
        [X, numbers(1, 3, 3, 8), numbers(8)],
        (1, 4, 3, 8),
        "DepthwiseConv2DOptions",
        conv(1, 1, depthMultiplier=2),
        out=(0.03, -128),
    ),
    "depthwise of one channel": Case(
        "DEPTHWISE_CONV_2D",
        [(1, 6, 5, 1), numbers(1, 3, 3, 4), B4],
        (1, 6, 5, 4),
        "DepthwiseConv2DOptions",
        conv(depthMultiplier=4),
        out=WIDE,
    ),
    "transpose conv, same": Case(
        "TRANSPOSE_CONV",
        [Ints([1, 12, 10, 3]), numbers(3, 3, 3, 4), X],
        (1, 12, 10, 3),
        "TransposeConvOptions",
        {"padding": 0, "strideH": 2, "strideW": 2},
        out=WIDE,
    ),
    "transpose conv, valid, bias": Case(
        "TRANSPOSE_CONV",
        [Ints([1, 13, 11, 3]), numbers(3, 3, 3, 4), X, B3],
        (1, 13, 11, 3),
        "TransposeConvOptions",
        {"padding": 1, "strideH": 2, "strideW": 2},
        out=WIDE,
    ),
    "dense": Case(
        "FULLY_CONNECTED",
        [(1, 8), numbers(5, 8), numbers(5)],
        (1, 5),
        "FullyConnectedOptions",
        {"fusedActivationFunction": 1},
        out=(0.03, -128),
    ),
    "dense, flattens": Case(
        "FULLY_CONNECTED",
        [X, numbers(5, 120), numbers(5)],
        (1, 5),
        "FullyConnectedOptions",
        {},
        out=(0.1, 3),
    ),
    "dense, keeps dimensions": Case(
        "FULLY_CONNECTED",
        [(1, 6, 4), numbers(5, 4)],
        (1, 6, 5),
        "FullyConnectedOptions",
        {"keepNumDims": True},
        "float",
    ),
    "matrix product": Case(
        "BATCH_MATMUL", [(1, 3, 4), (1, 4, 5)], (1, 3, 5), "BatchMatMulOptions", {}, out=WIDE
    ),
    "matrix product, turned": Case(
        "BATCH_MATMUL",
        [(1, 3, 4), (1, 5, 4)],
        (1, 3, 5),
        "BatchMatMulOptions",
        {"adjY": True},
        out=WIDE,
    ),
    "mean pool": Case("AVERAGE_POOL_2D", [X], (1, 3, 2, 4), "Pool2DOptions", pool(2, 2, 1)),
    "mean pool, same": Case("AVERAGE_POOL_2D", [X], (1, 3, 3, 4), "Pool2DOptions", pool(3, 2, 0)),
    "max pool": Case("MAX_POOL_2D", [X], (1, 3, 3, 4), "Pool2DOptions", pool(3, 2, 0)),
    "l2 pool": Case("L2_POOL_2D", [X], (1, 3, 2, 4), "Pool2DOptions", pool(2, 2, 1), "float"),
    "add": Case("ADD", [X, Y], X, "AddOptions", {"fusedActivationFunction": 1}, out=(0.04, -128)),
    "add, constant per channel": Case("ADD", [X, B4], X, "AddOptions", out=WIDE),
    "sub": Case("SUB", [X, Y], X, "SubOptions", out=WIDE),
    "mul": Case("MUL", [X, Y], X, "MulOptions", out=WIDE),
    "mul, per example": Case("MUL", [X, (1, 1, 1, 4)], X, "MulOptions", out=WIDE),
    "div": Case("DIV", [X, np.float32([1.5, 2, -3, 4])], X, "DivOptions", {}, "float"),
    "maximum": Case("MAXIMUM", [X, Y], X, "MaximumMinimumOptions"),
    "minimum": Case("MINIMUM", [X, np.float32([0.25])], X, "MaximumMinimumOptions", {}, "float"),
    "squared difference": Case(
        "SQUARED_DIFFERENCE", [X, Y], X, "SquaredDifferenceOptions", {}, "float"
    ),
    "relu": Case("RELU", [X], X, out=(0.02, -128)),
    "relu, coarser": Case("RELU", [X], X, out=(0.0731, -128)),
    "relu6": Case("RELU6", [X], X, out=(0.02341, -128)),
    "relu6, coarser": Case("RELU6", [X], X, out=(0.0731, -128)),
    "relu of -1 to 1": Case("RELU_N1_TO_1", [X], X, modes="float"),
    "relu of 0 to 1": Case("RELU_0_TO_1", [X], X, modes="float"),
    "leaky relu": Case("LEAKY_RELU", [X], X, "LeakyReluOptions", {"alpha": 0.3}, out=(0.021, -30)),
    "prelu": Case("PRELU", [X, numbers(1, 1, 4)], X, out=(0.023, -20)),
    "elu": Case("ELU", [X], X, modes="float"),
    "gelu": Case("GELU", [X], X, "GeluOptions", {"approximate": False}, "float"),
    "gelu, tanh": Case("GELU", [X], X, "GeluOptions", {"approximate": True}, "float"),
    "hard swish": Case("HARD_SWISH", [X], X, "HardSwishOptions", out=(0.021, -110)),
    "logistic": Case("LOGISTIC", [X], X, out=(1 / 256, -128)),
    "tanh": Case("TANH", [X], X, out=(1 / 128, 0)),
    "softmax": Case("SOFTMAX", [X], X, "SoftmaxOptions", {"beta": 1.0}, out=(1 / 256, -128)),
    "softmax, beta": Case(
        "SOFTMAX", [(1, 7)], (1, 7), "SoftmaxOptions", {"beta": 0.5}, out=(1 / 256, -128)
    ),
    "log softmax": Case("LOG_SOFTMAX", [(1, 7)], (1, 7), "LogSoftmaxOptions", out=(16 / 256, 127)),
    "unit length": Case("L2_NORMALIZATION", [X], X, "L2NormOptions", {}, "float"),
    "reshape": Case("RESHAPE", [X, Ints([1, 30, 4])], (1, 30, 4), "ReshapeOptions"),
    "reshape, flat": Case("RESHAPE", [X, Ints([-1, 120])], (1, 120), "ReshapeOptions"),
    "squeeze": Case("SQUEEZE", [(1, 1, 5, 4)], (1, 5, 4), "SqueezeOptions", {"squeezeDims": [1]}),
    "expand": Case("EXPAND_DIMS", [(1, 5, 4), Ints([1])], (1, 1, 5, 4), "ExpandDimsOptions"),
    "transpose": Case("TRANSPOSE", [X, Ints([0, 3, 1, 2])], (1, 4, 6, 5), "TransposeOptions"),
    "mean of space": Case(
        "MEAN", [X, Ints([1, 2])], (1, 4), "ReducerOptions", {"keepDims": False}, out=(0.006, 3)
    ),
    "mean of space, kept": Case(
        "MEAN", [X, Ints([1, 2])], (1, 1, 1, 4), "ReducerOptions", {"keepDims": True}
    ),
    "mean of channels": Case(
        "MEAN", [X, Ints([-1])], (1, 6, 5), "ReducerOptions", {"keepDims": False}, "float"
    ),
    "sum": Case("SUM", [X, Ints([1])], (1, 5, 4), "ReducerOptions", {"keepDims": False}, "float"),
    "largest": Case("REDUCE_MAX", [X, Ints([2])], (1, 6, 4), "ReducerOptions", {"keepDims": False}),
    "least": Case(
        "REDUCE_MIN", [X, Ints([1, 2])], (1, 1, 1, 4), "ReducerOptions", {"keepDims": True}
    ),
    "product": Case(
        "REDUCE_PROD", [X, Ints([3])], (1, 6, 5), "ReducerOptions", {"keepDims": False}, "float"
    ),
    "running sum": Case(
        "CUMSUM",
        [X, Ints(np.int32(1))],
        X,
        "CumsumOptions",
        {"exclusive": True, "reverse": True},
        "float",
    ),
    "pad": Case("PAD", [X, Ints([[0, 0], [1, 2], [0, 1], [0, 0]])], (1, 9, 6, 4), "PadOptions"),
    "pad with a number": Case(
        "PADV2",
        [X, Ints([[0, 0], [1, 2], [0, 1], [0, 0]]), np.float32(0.25)],
        (1, 9, 6, 4),
        "PadV2Options",
        {},
        "float",
    ),
    "mirrored": Case(
        "MIRROR_PAD",
        [X, Ints([[0, 0], [2, 1], [1, 2], [0, 0]])],
        (1, 9, 8, 4),
        "MirrorPadOptions",
        {"mode": 0},
    ),
    "mirrored with the edge": Case(
        "MIRROR_PAD",
        [X, Ints([[0, 0], [1, 1], [1, 0], [0, 0]])],
        (1, 8, 6, 4),
        "MirrorPadOptions",
        {"mode": 1},
    ),
    "concatenation": Case(
        "CONCATENATION", [X, (1, 6, 5, 2)], (1, 6, 5, 6), "ConcatenationOptions", {"axis": 3}
    ),
    "split": Case(
        "SPLIT", [Ints(np.int32(3)), X], (1, 6, 5, 2), "SplitOptions", {"numSplits": 2}, outputs=2
    ),
    "slice": Case(
        "SLICE", [X, Ints([0, 2, 0, 1]), Ints([1, 3, -1, 2])], (1, 3, 5, 2), "SliceOptions"
    ),
    "slice with steps": Case("STRIDED_SLICE", [X, *AT], (1, 3, 5, 4), "StridedSliceOptions", SLICE),
    "slice that drops an axis": Case(
        "STRIDED_SLICE",
        [X, *AT],
        (1, 5, 4),
        "StridedSliceOptions",
        {**SLICE, "shrinkAxisMask": 2, "beginMask": 4},
    ),
    "pack": Case("PACK", [(1, 4), (1, 4)], (1, 2, 4), "PackOptions", {"axis": 1, "valuesCount": 2}),
    "unpack": Case(
        "UNPACK", [(1, 2, 4)], (1, 4), "UnpackOptions", {"axis": 1, "num": 2}, outputs=2
    ),
    "gather": Case("GATHER", [X, Ints([2, 0, 2])], (1, 3, 5, 4), "GatherOptions", {"axis": 1}),
    "tile": Case("TILE", [X, Ints([1, 1, 2, 1])], (1, 6, 10, 4), "TileOptions"),
    "reverse": Case("REVERSE_V2", [X, Ints([1])], X, "ReverseV2Options", {}, "float"),
    "space to depth": Case(
        "SPACE_TO_DEPTH", [(1, 6, 4, 2)], (1, 3, 2, 8), "SpaceToDepthOptions", {"blockSize": 2}
    ),
    "depth to space": Case(
        "DEPTH_TO_SPACE", [(1, 3, 2, 8)], (1, 6, 4, 2), "DepthToSpaceOptions", {"blockSize": 2}
    ),
    "bilinear": Case(
        "RESIZE_BILINEAR",
        [X, HALF],
        (1, 12, 10, 4),
        "ResizeBilinearOptions",
        {"halfPixelCenters": True},
    ),
    "bilinear, odd sizes": Case(
        "RESIZE_BILINEAR",
        [X, Ints([13, 7])],
        (1, 13, 7, 4),
        "ResizeBilinearOptions",
        {"halfPixelCenters": True},
    ),
    "bilinear, corners": Case(
        "RESIZE_BILINEAR",
        [X, HALF],
        (1, 12, 10, 4),
        "ResizeBilinearOptions",
        {"alignCorners": True},
        "float",
    ),
    "bilinear, old": Case(
        "RESIZE_BILINEAR", [X, HALF], (1, 12, 10, 4), "ResizeBilinearOptions", {}, "float"
    ),
    "nearest": Case(
        "RESIZE_NEAREST_NEIGHBOR",
        [X, Ints([9, 12])],
        (1, 9, 12, 4),
        "ResizeNearestNeighborOptions",
        {},
    ),
    "nearest, halves": Case(
        "RESIZE_NEAREST_NEIGHBOR",
        [X, Ints([9, 12])],
        (1, 9, 12, 4),
        "ResizeNearestNeighborOptions",
        {"halfPixelCenters": True},
    ),
    "nearest, corners": Case(
        "RESIZE_NEAREST_NEIGHBOR",
        [X, HALF],
        (1, 12, 10, 4),
        "ResizeNearestNeighborOptions",
        {"alignCorners": True},
    ),
    "quantize again": Case("QUANTIZE", [X], X, "QuantizeOptions", {}, "int8", out=(0.0213, 4)),
    **{
        op.lower(): Case(op, [X], X, "", {}, "float")
        for op in ("ABS", "CEIL", "COS", "EXP", "FLOOR", "NEG", "ROUND", "SIGN", "SIN", "SQUARE")
    },
    "add many": Case("ADD_N", [X, Y, X], X, modes="float"),
    "best": Case(
        "ARG_MAX",
        [X, Ints(np.int32(3))],
        (1, 6, 5),
        "ArgMaxOptions",
        {"outputType": 2},
        "float",
        made="int32",
    ),
    "worst": Case(
        "ARG_MIN",
        [X, Ints(np.int32(1))],
        (1, 5, 4),
        "ArgMinOptions",
        {"outputType": 2},
        "float",
        made="int32",
    ),
    "best three": Case(
        "TOPK_V2",
        [(1, 7), Ints(np.int32(3))],
        (1, 3),
        "TopKV2Options",
        {},
        "float",
        None,
        2,
        "float32 int32",
    ),
    "broadcast": Case(
        "BROADCAST_TO", [(1, 1, 4), Ints([1, 3, 4])], (1, 3, 4), "BroadcastToOptions", {}, "float"
    ),
    "cast": Case(
        "CAST", [X], X, "CastOptions", {"inDataType": 0, "outDataType": 2}, "float", made="int32"
    ),
    "embedding": Case(
        "EMBEDDING_LOOKUP", [Ids((5,)), numbers(4, 3)], (5, 3), modes="float", made="float32"
    ),
    "gather of places": Case(
        "GATHER_ND", [X, Ints([[0, 1], [0, 3]])], (2, 5, 4), "GatherNdOptions", {}, "float"
    ),
    "one hot": Case(
        "ONE_HOT",
        [Ids((1, 3)), Ints(np.int32(5)), np.float32(2), np.float32(-1)],
        (1, 3, 5),
        "OneHotOptions",
        {"axis": -1},
        "float",
        made="float32",
    ),
    "choice": Case("SELECT", [Flags(X), X, Y], X, "SelectOptions", {}, "float"),
    "choice, broadcast": Case("SELECT_V2", [Flags(X), X, B4], X, "SelectV2Options", {}, "float"),
    "stateful filter": Case(
        "SVDF",
        [(1, 6), numbers(8, 6), numbers(8, 4), B4, State((1, 32))],
        (1, 4),
        "SVDFOptions",
        {"rank": 2, "fusedActivationFunction": 1},
        "float",
    ),
    **{
        op.lower(): Case(op, [Ids(X), Ids(Y)], X, "", {}, "float", made="bool")
        for op in ("EQUAL", "NOT_EQUAL", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL")
    },
    **{
        op.lower(): Case(op, [Flags(X), Flags(Y)], X, "", {}, "float", made="bool")
        for op in ("LOGICAL_AND", "LOGICAL_OR")
    },
    "logical_not": Case("LOGICAL_NOT", [Flags(X)], X, "", {}, "float", made="bool"),
}
