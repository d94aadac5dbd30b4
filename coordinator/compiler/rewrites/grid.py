# SPDX-License-Identifier: Apache-2.0
"""GridSample and AffineGrid (Jaderberg et al. 2015): the corners around each point, gathered.

Both the image and the points get gradients: the corners' places are flat, their weights are not.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rewrite import rewrite
from edge_sdk.errors import CompileError

_Tap = tuple[str, str]  # the place along an axis as int64, and its weight, both [N, points]


@rewrite("GridSample")
def _grid_sample(e: Emit, n: Node) -> tuple[str, ...]:
    x, grid = n.inputs
    size, out = e.dims(x)[2:], e.dims(grid)[1:-1]
    channels, mode = e.dims(x)[1], n.attr("mode", "linear").removeprefix("bi")
    if channels is None or None in size or None in out or mode == "cubic":
        raise CompileError(
            f"expected {n.label} of known sizes, linear or nearest, got {mode} from {e.dims(x)} "
            f"to {e.dims(grid)}: train only tensors after it"
        )
    sizes = [s for s in size if s is not None]
    points = math.prod(o for o in out if o is not None)
    flat = e.Reshape(x, e.ints(-1, channels, math.prod(sizes)))
    flat = e.declare(flat, (e.dims(x)[0], channels, math.prod(sizes)))
    spots = e.Reshape(grid, e.ints(-1, points, len(sizes)))
    spots = e.declare(spots, (e.dims(x)[0], points, len(sizes)))
    taps = [_taps(e, n, spots, axis, sizes) for axis in range(len(sizes))]
    total = None
    for corner in itertools.product(*taps):
        value = _corner(e, flat, corner, sizes, channels)
        total = value if total is None else e.Add(total, value)
    shape = [channels, *(o for o in out if o is not None)]
    return (e.declare(e.Reshape(total, e.ints(-1, *shape)), (e.dims(x)[0], *shape)),)


def _taps(e: Emit, n: Node, spots: str, axis: int, sizes: list[int]) -> list[_Tap]:
    """Return the one or two places along an axis that a point sees, with their weights."""
    size, aligned = sizes[axis], n.attr("align_corners", 0)
    padding, mode = n.attr("padding_mode", "zeros"), n.attr("mode", "linear")
    u = e.Gather(spots, e.const(len(sizes) - 1 - axis, np.int64), axis=2)  # x comes first
    slope = (size - 1) / 2 if aligned else size / 2
    at = e.Add(e.Mul(u, e.const(slope)), e.const((size - 1) / 2))
    if mode == "nearest":
        at = e.Round(at)
    if padding == "border":
        at = e.Clip(at, e.const(0.0), e.const(size - 1.0))
    elif padding == "reflection":
        at = _reflected(e, at, *((0.0, size - 1.0) if aligned else (-0.5, float(size))))
    if mode == "nearest":
        return [_tap(e, at, None, size, padding)]
    low = e.Floor(at)
    share = e.Sub(at, low)
    return [
        _tap(e, low, e.Sub(e.const(1.0), share), size, padding),
        _tap(e, e.Add(low, e.const(1.0)), share, size, padding),
    ]


def _reflected(e: Emit, at: str, low: float, span: float) -> str:
    """Fold a coordinate into [low, low + span]."""
    if not span:
        return e.Mul(at, e.const(0.0))
    away = e.Abs(e.Sub(at, e.const(low)))
    turns = e.Floor(e.Mul(away, e.const(0.5 / span)))
    rest = e.Sub(away, e.Mul(turns, e.const(2 * span)))
    return e.Add(e.Min(rest, e.Sub(e.const(2 * span), rest)), e.const(low))


def _tap(e: Emit, place: str, weight: str | None, size: int, padding: str) -> _Tap:
    inside = e.Clip(place, e.const(0.0), e.const(size - 1.0))
    index = e.Cast(inside, to=np.int64)
    if padding != "zeros" and weight is not None:
        return index, weight
    seen = e.Cast(e.Equal(inside, place), to=np.float32)
    return index, seen if weight is None else e.Mul(weight, seen)


def _corner(e: Emit, flat: str, corner: tuple[_Tap, ...], sizes: list[int], channels: int) -> str:
    """Return what one corner of each point contributes: [N, C, points]."""
    index, weight = corner[0]
    for (place, share), size in zip(corner[1:], sizes[1:], strict=True):
        index = e.Add(e.Mul(index, e.const(size, np.int64)), place)
        weight = e.Mul(weight, share)
    rows = e.Unsqueeze(index, e.ints(1))
    known = e.dims(rows)
    rows = e.declare(e.Expand(rows, e.ints(1, channels, 1)), (known[0], channels, known[2]))
    return e.Mul(e.GatherElements(flat, rows, axis=2), e.Unsqueeze(weight, e.ints(1)))


@rewrite("AffineGrid")
def _affine_grid(e: Emit, n: Node) -> tuple[str, ...]:
    """Multiply each place of the output by theta [N, d, d + 1]."""
    theta, sizes = n.inputs
    known = e.value(sizes)
    out = e.dims(n.outputs[0])[1:-1] if known is None else tuple(int(s) for s in known[2:])
    if not out or None in out:
        raise CompileError(f"expected {n.label} of known sizes, got {e.dims(n.outputs[0])}")
    shape = [s for s in out if s is not None]
    axes = [_places(s, aligned=bool(n.attr("align_corners", 0))) for s in shape]
    mesh = np.meshgrid(*axes, indexing="ij")
    homogeneous = np.stack([*reversed(mesh), np.ones(shape)], -1).reshape(-1, len(shape) + 1)
    turned = e.Transpose(theta, perm=[0, 2, 1])
    grid = e.MatMul(e.const(homogeneous), turned)
    target = e.Reshape(grid, e.ints(-1, *shape, len(shape)))
    return (e.declare(target, (e.dims(theta)[0], *shape, len(shape))),)


def _places(size: int, *, aligned: bool) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if aligned:
        return np.linspace(-1, 1, size)
    return (2 * np.arange(size) + 1) / size - 1
