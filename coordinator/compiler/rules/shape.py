# SPDX-License-Identifier: Apache-2.0
"""Operators that move or repeat elements: each gradient moves them back, or sums the repeats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.scatter import scatter_rows
from coordinator.compiler.vjp import Grads, reshape_like, unbroadcast, vjp, vjp_several
from edge_sdk.errors import CompileError

_FAR = 2**31 - 1
"""An end beyond every axis."""


@vjp("Identity")
def _identity(_e: Emit, _n: Node, g: str) -> Grads:
    return (g,)


@vjp("Cast")
def _cast(e: Emit, n: Node, g: str) -> Grads:
    """From float to float; the walk never enters a cast to integers."""
    source, target = e.dtype(n.inputs[0]), e.dtype(n.outputs[0])
    return (g if source == target or source is None else e.Cast(g, to=source),)


@vjp("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(e: Emit, n: Node, g: str) -> Grads:
    return (reshape_like(e, g, n.inputs[0]),)


@vjp("Transpose")
def _transpose(e: Emit, n: Node, g: str) -> Grads:
    perm = n.attr("perm") or tuple(reversed(range(e.rank(n.inputs[0]))))
    return (e.Transpose(g, perm=[int(i) for i in np.argsort(perm)]),)


@vjp("Expand")
def _expand(e: Emit, n: Node, g: str) -> Grads:
    return (unbroadcast(e, g, n.inputs[0]),)


@vjp("Concat")
def _concat(e: Emit, n: Node, g: str) -> Grads:
    axis = n.attr("axis") % e.rank(n.outputs[0])
    sizes = [e.dims(x)[axis] for x in n.inputs]
    wanted = [e.needs(x) for x in n.inputs]
    if None not in sizes and sum(wanted) == 1:  # one slice is cheaper than a split
        which = wanted.index(True)
        start = sum(s for s in sizes[:which] if s is not None)
        end = start + (sizes[which] or 0)
        part = e.Slice(g, e.ints(start), e.ints(end), e.ints(axis))
        return tuple(part if i == which else None for i in range(len(wanted)))
    if None in sizes:
        widths = e.Concat(*[_size_along(e, x, axis) for x in n.inputs], axis=0)
    else:
        widths = e.ints(*[s for s in sizes if s is not None])
    return e.Split(g, widths, outputs=len(n.inputs), axis=axis)


def _size_along(e: Emit, x: str, axis: int) -> str:
    return e.Shape(x, start=axis, end=axis + 1)


@vjp_several("Split")
def _split(e: Emit, n: Node, upstream: Grads) -> Grads:
    """Join the parts again; a part that nobody used contributes zeros."""
    parts = [
        e.ConstantOfShape(e.size(out), value=np.zeros(1, np.float32)) if g is None else g
        for out, g in zip(n.outputs, upstream, strict=True)
    ]
    return (e.Concat(*parts, axis=n.attr("axis", 0)),)


@vjp("Gather")
def _gather(e: Emit, n: Node, g: str) -> Grads:
    """Add each gathered row's gradient to the row it came from."""
    x, indices = n.inputs
    axis = n.attr("axis", 0) % e.rank(x)
    index, dim = e.value(indices), e.dims(x)[axis]
    if index is not None and index.ndim == 0 and dim is not None:
        at = int(index) % dim
        return (_padded(e, e.Unsqueeze(g, e.ints(axis)), [(axis, at, dim - at - 1)]),)
    return (scatter_rows(e, g, indices, x, axis),)


def _padded(e: Emit, g: str, pads: Sequence[tuple[int, int, int]]) -> str:
    """Pad with zeros: (axis, before, after) each."""
    pads = [pad for pad in pads if pad[1] or pad[2]]
    if not pads:
        return g
    amounts = e.ints(*[b for _, b, _ in pads], *[a for _, _, a in pads])
    return e.Pad(g, amounts, None, e.ints(*[axis for axis, _, _ in pads]))


@vjp("Slice")
def _slice(e: Emit, n: Node, g: str) -> Grads:
    """Pad where steps are 1 and sizes are known; otherwise scatter along each axis in turn."""
    x = n.inputs[0]
    starts, ends = e.value(n.inputs[1]), e.value(n.inputs[2])
    if starts is None or ends is None:
        raise CompileError(
            f"expected constant starts and ends in {n.label}, got computed tensors: "
            "export the model with fixed slices"
        )
    axes = _constant(e, n, 3, range(len(starts)))
    steps = _constant(e, n, 4, [1] * len(starts))
    pads = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = axis % e.rank(x)
        dim = e.dims(x)[at]
        if dim is None or step != 1:
            g = _scatter_slice(e, g, x, at, slice_of(int(start), int(end), step))
        else:
            first, stop, _ = slice_of(int(start), int(end), 1).indices(dim)
            pads.append((at, first, dim - max(stop, first)))
    return (_padded(e, g, pads),)


def slice_of(start: int, end: int, step: int) -> slice:
    """Write ONNX's start, end and step as a Python slice: an end before the beginning is open."""
    far = 2**31 - 2
    open_end = step < 0 and end < -far
    return slice(start, None if open_end else end, step)


def _constant(e: Emit, n: Node, index: int, default: Sequence[int]) -> list[int]:
    value = e.value(n.input(index))
    if value is None and n.input(index):
        raise CompileError(f"expected a constant input {index} in {n.label}, got a computed tensor")
    return list(default) if value is None else [int(v) for v in value]


def _scatter_slice(e: Emit, g: str, x: str, axis: int, part: slice) -> str:
    """Send the gradient of x[..., part, ...] along one axis back to its places."""
    dim = e.dims(x)[axis]
    if dim is not None:
        return scatter_rows(e, g, e.ints(*range(*part.indices(dim))), x, axis)
    size = e.Reshape(_size_along(e, x, axis), e.ints())
    every = e.Range(e.const(0, np.int64), size, e.const(1, np.int64))
    stop = part.stop if part.stop is not None else -(2**62)
    rows = e.Slice(every, e.ints(part.start), e.ints(stop), e.ints(0), e.ints(part.step))
    return scatter_rows(e, g, rows, x, axis)


@vjp("Pad")
def _pad(e: Emit, n: Node, g: str) -> Grads:
    """Cut off what was added (negative pads); reflected and repeated edges add up."""
    mode = n.attr("mode", "constant")
    if mode == "constant":
        pads = e.value(n.inputs[1])
        if pads is not None and min(pads, default=0) >= 0:
            return (_cut_off(e, n, g, pads),)
        back = e.Neg(n.inputs[1]) if pads is None else e.const(-pads, np.int64)
        return (e.Pad(g, back, None, n.input(3)),)
    pads = e.value(n.inputs[1])
    if pads is None:
        raise CompileError(f"expected constant pads in {n.label}, got a computed tensor")
    x, half = n.inputs[0], len(pads) // 2
    axes = [axis % e.rank(x) for axis in _constant(e, n, 3, range(half))]
    for axis, before, after in zip(axes, pads[:half], pads[half:], strict=True):
        if before or after:
            g = _folded(e, n, g, axis, (int(before), int(after)))
    return (g,)


def _cut_off(e: Emit, n: Node, g: str, pads: NDArray[np.int64]) -> str:
    """Slice what a pad kept: a tenth of the time that a negative Pad takes (onnxruntime 1.32)."""
    axes = _constant(e, n, 3, range(len(pads) // 2))
    before, after = pads[: len(axes)], pads[len(axes) :]
    rows = [(a, int(b), int(-f) or _FAR) for a, b, f in zip(axes, before, after, strict=True)]
    rows = [row for row in rows if row[1:] != (0, _FAR)]
    if not rows:
        return g
    starts, ends = e.ints(*[row[1] for row in rows]), e.ints(*[row[2] for row in rows])
    return e.Slice(g, starts, ends, e.ints(*[row[0] for row in rows]))


def _folded(e: Emit, n: Node, g: str, axis: int, pad: tuple[int, int]) -> str:
    """Add the copies that a reflect, edge or wrap pad made along one axis to their originals."""
    dim, mode = e.dims(n.inputs[0])[axis], n.attr("mode")
    if dim is None or min(pad) < 0:
        raise CompileError(
            f"expected known sizes and pads >= 0 in {n.label} of mode {mode!r}: "
            "give the input a fixed shape, or pad with a constant"
        )
    rows = np.arange(dim)
    copies = {
        "reflect": lambda: np.pad(rows, pad, "reflect"),
        "edge": lambda: np.pad(rows, pad, "edge"),
        "wrap": lambda: np.pad(rows, pad, "wrap"),
    }[mode]()
    return scatter_rows(e, g, e.ints(*copies), n.inputs[0], axis)


@vjp_several("Dropout")
def _dropout(e: Emit, n: Node, upstream: Grads) -> Grads:
    """Pass the gradient where the mask kept the element, scaled as the element was."""
    g = upstream[0]
    training = e.value(n.input(2)) if n.input(2) else np.zeros((), np.bool_)
    ratio = e.value(n.input(1)) if n.input(1) else np.float32(0.5)
    if training is None or ratio is None:
        raise CompileError(f"expected a constant ratio and mode in {n.label}, got computed tensors")
    if g is None or not training or not ratio:
        return (g,)
    mask = e.Cast(e.output(n, 1), to=np.float32)
    return (e.Mul(g, e.Mul(mask, e.const(1.0 / (1.0 - float(ratio))))),)
