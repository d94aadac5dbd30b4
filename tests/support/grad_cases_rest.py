# SPDX-License-Identifier: Apache-2.0
"""Settings for the operators beyond those that everyday networks use."""

from __future__ import annotations

from typing import Any

import numpy as np
from check_grads import Case
from grad_draws import RNG, F, ints, normal, positive, spaced, unary


def small(*shape: int) -> np.ndarray:
    """Return values in [-0.8, 0.8]."""
    return RNG.uniform(-0.8, 0.8, shape).astype(F)


def nonzero(*shape: int) -> np.ndarray:
    """Return values whose size lies in [0.5, 2]."""
    return (positive(*shape) * np.sign(normal(*shape))).astype(F)


CURVES = [
    *unary("Tan", small),
    *unary("Asin", small),
    *unary("Acos", small),
    *unary("Atanh", small),
    *unary("Sinh", normal),
    *unary("Cosh", normal),
    *unary("Asinh", normal),
    *unary("Acosh", lambda *s: 1 + positive(*s)),
    Case("Celu", (spaced(3, 4),), {}, batch=(0,), evaluator="ort", eps=0.01),
    Case("Celu", (spaced(2, 5),), {"alpha": 0.8}, batch=(0,), evaluator="ort", eps=0.01),
    *unary("ThresholdedRelu", spaced, {}, {"alpha": 0.3}),
    *unary("Shrink", spaced, {}, {"lambd": 0.3, "bias": 0.2}),
    Case("Mod", (spaced(3, 4), nonzero(3, 4)), {"fmod": 1}, (0, 1), batch=(0, 1)),
    Case("Mod", (spaced(3, 4), positive(4)), {"fmod": 1}, (0, 1), batch=(0,)),
]


def _rows(*shape: int, high: int, low: int = 0) -> np.ndarray:
    return RNG.integers(low, high, shape)


def _places(*shape: int, high: int) -> np.ndarray:
    """Return indices of which no two in a row are equal."""
    rows = [RNG.permutation(high)[: shape[-1]] for _ in range(int(np.prod(shape[:-1])))]
    return np.array(rows).reshape(shape)


_INTO = np.array([[0, 2], [1, 0], [2, 1]])
_HOW = ("none", "add", "mul", "max", "min")

GATHER = [
    Case("GatherElements", (normal(3, 5), _rows(3, 2, high=5)), {"axis": 1}, batch=(0, 1)),
    Case("GatherElements", (normal(4, 3), _rows(2, 3, low=-4, high=4)), {}, fixed=(1,)),
    Case("GatherND", (normal(3, 4, 2), _rows(5, 2, high=3)), {}, fixed=(1,)),
    Case("GatherND", (normal(3, 4, 2), _rows(3, 2, 1, high=4)), {"batch_dims": 1}, batch=(0, 1)),
    Case("GatherND", (normal(2, 3, 4), _rows(2, 3, 1, high=4)), {"batch_dims": 2}, batch=(0, 1)),
    *[
        Case(
            "ScatterElements",
            (spaced(3, 5, gap=0.3), _places(3, 2, high=5), spaced(3, 2, gap=0.3, shift=0.2)),
            {"axis": 1, "reduction": how},
            wrt=(0, 2),
            batch=(0, 1, 2),
            evaluator="ort",
            eps=0.02,
        )
        for how in _HOW
    ],
    Case(
        "ScatterElements",
        (normal(4, 3), ints(1, -1, 0)[None], normal(1, 3)),
        {"reduction": "add"},
        wrt=(0, 2),
        fixed=(1,),
    ),
    *[
        Case(
            "ScatterND",
            (spaced(4, 3, gap=0.3), _INTO, spaced(3, gap=0.3, shift=0.2)),
            {"reduction": how},
            wrt=(0, 2),
            fixed=(1,),
            evaluator="ort",
            eps=0.02,
        )
        for how in _HOW
    ],
    Case("ScatterND", (normal(4, 3), ints(2, 0)[:, None], normal(2, 3)), {}, (0, 2), (1,)),
    Case("TopK", (spaced(3, 6), ints(2)), {}, (0,), (1,), (0,), outputs=2),
    Case(
        "TopK", (spaced(3, 6, 2), ints(3)), {"axis": 1, "largest": 0}, (0,), (1,), (0,), outputs=2
    ),
    Case("Compress", (normal(3, 4), np.array([True, False, True])), {"axis": 1}, (0,), (1,), (0,)),
    Case("Compress", (normal(3, 4), np.array([True, False, True])), {}, (0,), (1,)),
    Case("Compress", (normal(3, 4), np.array([False, True, True, True])), {"axis": 1}, batch=(0,)),
    Case(
        "MaxUnpool",
        (normal(1, 1, 2, 2), np.array([[[[0, 3], [8, 15]]]])),
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        evaluator="ort",
        eps=0.5,
    ),
    Case(
        "MaxUnpool",
        (normal(1, 2, 3), np.array([[[1, 2, 5], [7, 9, 10]]])),
        {"kernel_shape": [2], "strides": [2]},
        fixed=(1,),
        evaluator="ort",
        eps=0.5,
    ),
    Case("OneHot", (ints(0, 2, 1), np.array(4), normal(2)), {}, (2,), (1,), (0,)),
    Case("OneHot", (_rows(2, 3, high=3), np.array(3), normal(2)), {"axis": 1}, (2,), (1,), (0,)),
    Case("ReverseSequence", (normal(4, 3, 2), ints(4, 1, 2)), {"time_axis": 0, "batch_axis": 1}),
    Case(
        "ReverseSequence",
        (normal(3, 4), ints(2, 4, 1)),
        {"time_axis": 1, "batch_axis": 0},
        batch=(0, 1),
    ),
    Case("Range", (np.array(0.3, F), np.array(2.2, F), np.array(0.5, F)), {}, (0, 2), (1,)),
    Case("Range", (np.array(1.3, F), np.array(-2.2, F), np.array(-0.8, F)), {}, (0, 2)),
]


def _einsum(equation: str, *shapes: tuple[int, ...], batch: tuple[int, ...] = (0,)) -> Case:
    wrt = tuple(range(len(shapes)))
    return Case("Einsum", tuple(normal(*s) for s in shapes), {"equation": equation}, wrt, (), batch)


EINSUM = [
    _einsum("bij,jk->bik", (2, 3, 4), (4, 5)),
    _einsum("bhid, bhjd -> bhij", (2, 2, 3, 4), (2, 2, 5, 4), batch=(0, 1)),
    _einsum("...ij,...jk", (2, 3, 4), (2, 4, 5), batch=(0, 1)),
    _einsum("...i,i->...", (2, 3, 4), (4,)),
    _einsum("bi,bj->", (2, 3), (2, 4), batch=()),
    _einsum("bij->ji", (2, 3, 4), batch=()),
    _einsum("i,j,k->ijk", (2,), (3,), (4,)),
    _einsum("ii->i", (3, 3), batch=()),
    _einsum("iji,j->j", (3, 2, 3), (2,), batch=()),
    _einsum("ij,ji", (3, 4), (4, 3), batch=()),
    _einsum("...ij,...jk->...ik", (2, 3, 4), (1, 4, 5)),
]


def _p_pool(*shape: int, **attributes: Any) -> Case:
    return Case(
        "LpPool", (nonzero(*shape),), attributes, batch=(0,), evaluator="ort", eps=0.01,
        tolerance=4e-3,
    )  # fmt: skip


NORMS = [
    _p_pool(2, 3, 5, 4, kernel_shape=[2, 2]),
    _p_pool(2, 3, 6, 5, kernel_shape=[3, 2], strides=[2, 2], p=1),
    _p_pool(2, 3, 6, 6, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0], p=3),
    _p_pool(2, 2, 7, kernel_shape=[2], dilations=[2], p=2),
    _p_pool(2, 2, 7, kernel_shape=[3], strides=[2], auto_pad="SAME_UPPER"),
    *[
        Case("LRN", (normal(*shape),), setting, batch=(0,), evaluator="ort", eps=0.01)
        for shape, setting in (
            ((2, 5, 3, 2), {"size": 3, "alpha": 0.9}),
            ((2, 5, 3, 2), {"size": 5, "alpha": 2.0, "beta": 0.5, "bias": 2.0}),
            ((3, 4, 2, 2), {"size": 1, "alpha": 0.5}),
        )
    ],
    *[
        Case(op, (make(3, 4, 2), ints(*axes)), {"keepdims": keep}, (0,), (1,), (0,))
        for op, make in (("ReduceL1", nonzero), ("ReduceLogSum", positive), ("ReduceProd", nonzero))
        for axes, keep in (((1,), 0), ((-1, 1), 1))
    ],
    Case("ReduceProd", (np.array([[2, 0, 3], [0, 0, 1]], F), ints(1)), {"keepdims": 0}, (0,), (1,)),
    Case("ReduceProd", (positive(2, 3),), {"noop_with_empty_axes": 1}, batch=(0,)),
    Case("ReduceLogSum", (positive(2, 3),), {"keepdims": 0}),
]  # fmt: skip

FRAMES = [
    Case("Col2Im", (normal(2, 8, 12), ints(4, 5), ints(2, 2)), {}, (0,), (1, 2), (0,), eps=0.5),
    Case(
        "Col2Im",
        (normal(2, 12, 2), ints(5, 5), ints(2, 3)),
        {"pads": [0, 1, 0, 1], "strides": [3, 3], "dilations": [1, 2]},
        (0,),
        (1, 2),
        (0,),
        eps=0.5,
        evaluator="ort",
    ),
    Case("CenterCropPad", (normal(2, 5, 4), ints(3, 7)), {"axes": [1, 2]}, (0,), (1,), (0,)),
    Case("CenterCropPad", (normal(3, 4), ints(6, 3)), {}, (0,), (1,)),
    Case("CastLike", (normal(2, 3), np.array(0, np.float64)), {}, (0,), (1,), (0,)),
    Case(
        "CastLike", (normal(2, 3), np.array(1, F)), {}, (0,), (1,), (0,), evaluator="ort", eps=0.5
    ),
]


def _resize(*tail: np.ndarray | None, shape: tuple[int, ...] = (2, 3, 3, 4), **kind: Any) -> Case:
    inputs = (normal(*shape), None, *tail)
    fixed = tuple(range(2, len(inputs)))
    batch = (0,) if len(tail) == 1 else ()  # sizes name the batch, scales do not
    return Case("Resize", inputs, kind, (0,), fixed, batch, eps=0.5, evaluator="ort")


_SCALES = np.array([1, 1, 2, 2.5], F)

RESIZE = [
    _resize(_SCALES, mode="linear"),
    _resize(_SCALES, mode="linear", coordinate_transformation_mode="align_corners"),
    _resize(_SCALES, mode="linear", coordinate_transformation_mode="asymmetric"),
    _resize(_SCALES, mode="cubic"),
    _resize(_SCALES, mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1),
    _resize(_SCALES, mode="nearest", nearest_mode="ceil"),
    _resize(np.array([1, 1, 0.6, 0.5], F), mode="linear", antialias=1),
    _resize(np.array([1, 1, 0.6, 0.5], F), mode="nearest"),
    _resize(None, ints(2, 3, 5, 7), mode="linear", coordinate_transformation_mode="align_corners"),
    _resize(None, ints(2, 3, 2, 3), mode="cubic"),
    _resize(np.array([1, 1, 1.5], F), shape=(2, 3, 5), mode="linear"),
    _resize(np.array([1, 2], F), shape=(2, 3), mode="nearest", nearest_mode="round_prefer_ceil"),
]


def _dynamically(*shape: int) -> Case:
    """Quantize dynamically and dequantize: to be differentiated as the identity."""

    def build(e: Any, x: str) -> str:
        return e.DequantizeLinear(*e.DynamicQuantizeLinear(x, outputs=3))

    return Case(
        "DynamicQuantizeLinear", (normal(*shape),), build=build, meaning=lambda x: x, batch=(0,)
    )


DYNAMIC = [_dynamically(3, 4), _dynamically(2, 3, 2)]

REST = [*CURVES, *GATHER, *EINSUM, *NORMS, *FRAMES, *RESIZE, *DYNAMIC]
