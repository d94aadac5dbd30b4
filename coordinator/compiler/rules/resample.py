# SPDX-License-Identifier: Apache-2.0
"""Operators that repeat elements or trade channels for space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.runtime import session
from coordinator.compiler.vjp import Grads, reshape_like, vjp
from edge_sdk.errors import CompileError


@vjp("Tile")
def _tile(e: Emit, n: Node, g: str) -> Grads:
    """Sum over the copies: [r0 * d0, r1 * d1, ..] is [r0, d0, r1, d1, ..]."""
    x, repeats = n.inputs[0], e.value(n.inputs[1])
    if repeats is None:
        raise CompileError(f"expected constant repeats in {n.label}, got a computed tensor")
    factors = [int(r) for r in repeats]
    return (_gathered(e, g, x, factors, copies_first=True),)


def _gathered(e: Emit, g: str, x: str, factors: list[int], *, copies_first: bool) -> str:
    """Sum the copies of each element, which lie a whole `x` apart or side by side."""
    dims = e.dims(x)
    if dims.count(None) > 1:
        raise CompileError(f"expected at most one unknown dimension in {x!r}, got {dims}")
    sizes = [-1 if dim is None else dim for dim in dims]
    pairs = zip(factors, sizes, strict=True)
    split = [part for f, d in pairs for part in ((f, d) if copies_first else (d, f))]
    first = 0 if copies_first else 1
    axes = [2 * i + first for i, factor in enumerate(factors) if factor > 1]
    if not axes:
        return g
    summed = e.ReduceSum(e.Reshape(g, e.ints(*split)), e.ints(*axes), keepdims=0)
    return reshape_like(e, summed, x)


@vjp("Resize")
def _resize(e: Emit, n: Node, g: str) -> Grads:
    """Go back along one axis after the other; by whole factors, sum the copies of each element."""
    x, factors = n.inputs[0], _copies(e, n)
    if factors is not None:
        return (_gathered(e, g, x, factors, copies_first=False),)
    if n.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise CompileError(
            f"expected {n.label} of whole images, got tf_crop_and_resize: crop first"
        )
    if n.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise CompileError(f"expected {n.label} that stretches: export it with fixed scales")
    for axis, (before, after) in enumerate(zip(e.dims(x), e.dims(n.outputs[0]), strict=True)):
        scale = _scale(e, n, axis)
        if before is None or after is None:
            if scale not in {None, 1.0}:
                raise CompileError(f"expected known sizes in {n.label}, got {e.dims(x)}")
        elif before != after or scale not in {None, 1.0}:
            g = _along(e, g, axis, _matrix(n, before, after, scale))
    return (g,)


def _copies(e: Emit, n: Node) -> list[int] | None:
    """Return how often nearest neighbour repeats each element; None for all other resizing."""
    nearest = n.attr("mode", "nearest") == "nearest" and not n.attr("axes")
    rounding = n.attr("nearest_mode", "round_prefer_floor")
    aligned = {"half_pixel": rounding.startswith("round"), "asymmetric": rounding == "floor"}.get(
        n.attr("coordinate_transformation_mode", "half_pixel"), False
    )
    pairs = zip(e.dims(n.outputs[0]), e.dims(n.inputs[0]), strict=True)
    factors = [b and a and a / b for a, b in pairs]
    exact = all(_scale(e, n, i) in {None, 1.0 if f is None else f} for i, f in enumerate(factors))
    whole = all(f is None or (f and f == int(f)) for f in factors)
    if not (nearest and aligned and whole and exact):
        return None
    return [1 if f is None else int(f) for f in factors]


def _scale(e: Emit, n: Node, axis: int) -> float | None:
    """Return the factor that a node names for an axis; None where it follows from the sizes."""
    if not n.input(2):
        return None
    scales = e.value(n.inputs[2])
    if scales is None:
        raise CompileError(f"expected constant scales in {n.label}, got a computed tensor")
    rank = e.rank(n.inputs[0])
    axes = [a % rank for a in n.attr("axes") or range(rank)]
    return float(scales[axes.index(axis)]) if axis in axes else 1.0


def _matrix(n: Node, before: int, after: int, scale: float | None) -> NDArray[np.float32]:
    """Return the matrix [after, before] that resizes one axis: what becomes of the unit vectors."""
    e = Emit()
    eye = np.eye(before, dtype=np.float32).reshape(before, 1, 1, before)
    kept = {k: v for k, v in n.attributes.items() if k != "axes"}
    scales = None if scale is None else e.const([1, 1, 1, scale])
    sizes = e.ints(before, 1, 1, after) if scale is None else None
    y = e.op("Resize", [e.const(eye), None, scales, sizes], **kept)[0]
    model = e.graph(outputs=[y]).to_model().SerializeToString()
    rows: NDArray[np.float32] = session(model, optimize=False).run([y], {})[0]
    return rows.reshape(before, after).T


def _along(e: Emit, g: str, axis: int, matrix: NDArray[np.float32]) -> str:
    """Multiply one axis by the transpose of a matrix [after, before]."""
    rank = e.rank(g)
    if axis == rank - 1:
        return e.MatMul(g, e.const(matrix))
    if axis == rank - 2:
        return e.MatMul(e.const(matrix.T), g)
    perm = [*range(rank)]
    perm[axis], perm[-1] = perm[-1], perm[axis]
    return e.Transpose(e.MatMul(e.Transpose(g, perm=perm), e.const(matrix)), perm=perm)


@vjp("DepthToSpace")
def _depth_to_space(e: Emit, n: Node, g: str) -> Grads:
    block, mode = n.attr("blocksize"), n.attr("mode", "DCR")
    back = e.SpaceToDepth(g, blocksize=block)
    if mode == "DCR":
        return (back,)
    channels, height, width = _image(e, n)
    split = e.Reshape(back, e.ints(-1, block * block, channels // block**2, height, width))
    return (reshape_like(e, e.Transpose(split, perm=[0, 2, 1, 3, 4]), n.inputs[0]),)


def _image(e: Emit, n: Node) -> tuple[int, int, int]:
    channels, height, width = e.dims(n.inputs[0])[1:]
    if channels is None or height is None or width is None:
        raise CompileError(f"expected known sizes in {n.label}, got {e.dims(n.inputs[0])}")
    return channels, height, width


@vjp("SpaceToDepth")
def _space_to_depth(e: Emit, n: Node, g: str) -> Grads:
    return (e.DepthToSpace(g, blocksize=n.attr("blocksize"), mode="DCR"),)


@vjp("CumSum")
def _cumulative(e: Emit, n: Node, g: str) -> Grads:
    """Each element adds to all that follow: sum from the other end."""
    turned = 1 - n.attr("reverse", 0)
    return (e.CumSum(g, n.inputs[1], exclusive=n.attr("exclusive", 0), reverse=turned),)


@vjp("Trilu")
def _triangle(e: Emit, n: Node, g: str) -> Grads:
    return (e.Trilu(g, n.input(1) or e.const(0, np.int64), upper=n.attr("upper", 1)),)
