# SPDX-License-Identifier: Apache-2.0
"""Operators that repeat elements or trade channels for space."""

from __future__ import annotations

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
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
    """Nearest neighbour by whole factors: sum over the copies of each element."""
    x = n.inputs[0]
    nearest = n.attr("mode", "nearest") == "nearest" and not n.attr("axes")
    rounding = n.attr("nearest_mode", "round_prefer_floor")
    aligned = {"half_pixel": rounding.startswith("round"), "asymmetric": rounding == "floor"}.get(
        n.attr("coordinate_transformation_mode", "half_pixel"), False
    )
    pairs = zip(e.dims(n.outputs[0]), e.dims(x), strict=True)
    factors = [b and a and a / b for a, b in pairs]
    whole = all(f is None or (f and f == int(f)) for f in factors)
    if not (nearest and aligned and whole):
        raise CompileError(
            f"expected nearest-neighbour {n.label} by whole factors, got {dict(n.attributes)} from "
            f"{e.dims(x)} to {e.dims(n.outputs[0])}: train only tensors after it"
        )
    counts = [1 if f is None else int(f) for f in factors]
    return (_gathered(e, g, x, counts, copies_first=False),)


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
