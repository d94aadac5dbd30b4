# SPDX-License-Identifier: Apache-2.0
"""What moves numbers: reshape, transpose, slice, split, join, pad, repeat, resize."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from coordinator.compiler.graph import Node
from coordinator.compiler.tflite.lower.forms import Lowering, Order
from coordinator.compiler.tflite.lower.table import lowers, refused
from coordinator.compiler.tflite.tape import Dims, elements, is_free


def constant(low: Lowering, n: Node, index: int) -> list[int]:
    """Return an input as known integers; sizes may depend on the batch."""
    value = low.known(n.input(index))
    if value is None:
        raise refused(n, f"has an input {n.input(index)!r} that is not constant")
    return [int(v) for v in np.asarray(value).reshape(-1)]


def moved(low: Lowering, n: Node, tensor: int, order: Order | None = None) -> None:
    """Keep what was made of a tensor: integers stay integers."""
    if low.tape.tensors[tensor].quantization is not None:
        low.put_levels(n.outputs[0], tensor, order)
    else:
        low.put(n.outputs[0], tensor, order)


def source(low: Lowering, name: str) -> tuple[int, Order]:
    """Return a tensor as it is at hand, integers if they stand for it."""
    return low.level_form(name) if low.has_levels(name) else low.form(name)


def source_in(low: Lowering, name: str, order: Order | None = None) -> int:
    """Return a tensor in an order, integers if they stand for it."""
    return low.levels(name, order) if low.has_levels(name) else low.get(name, order)


@lowers("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(low: Lowering, n: Node) -> None:
    shape = _target(low, n)
    name = n.inputs[0]
    tensor, order = source(low, name)
    kept = [a for a in order if low.shape(name)[a] != 1]
    if kept != sorted(kept):
        if _keeps_order(low, n, tensor, order, shape):
            return
        tensor = source_in(low, name)
    moved(low, n, low.tape.reshape(tensor, shape))


def _keeps_order(low: Lowering, n: Node, tensor: int, order: Order, shape: Dims) -> bool:
    """Serve a reshape that only adds or drops dimensions of size 1."""
    old = [(a, low.shape(n.inputs[0])[a]) for a in range(len(order))]
    kept = [a for a, size in old if size != 1]
    new = [a for a, size in enumerate(shape) if size != 1]
    if [low.shape(n.inputs[0])[a] for a in kept] != [shape[a] for a in new]:
        return False
    now = dict(zip(kept, new, strict=True))
    ones = [a for a, size in enumerate(shape) if size == 1]
    made: Order = (*(now[a] for a in order if a in now), *ones)
    moved(low, n, low.tape.reshape(tensor, [shape[a] for a in made]), made)
    return True


def _target(low: Lowering, n: Node) -> Dims:
    old = low.shape(n.inputs[0])
    if n.kind == "Flatten":
        axis = n.attr("axis", 1)
        axis = axis + len(old) if axis < 0 else axis
        return (math.prod(old[:axis]), math.prod(old[axis:]))
    if n.kind == "Reshape":
        return _reshaped(n, old, constant(low, n, 1))
    axes = constant(low, n, 1) if n.input(1) else []
    if n.kind == "Squeeze":
        gone = {a % len(old) for a in axes} or {i for i, d in enumerate(old) if d == 1}
        return tuple(d for i, d in enumerate(old) if i not in gone)
    rank = len(old) + len(axes)
    places, rest = {a % rank for a in axes}, iter(old)
    return tuple(1 if i in places else next(rest) for i in range(rank))


def _reshaped(n: Node, old: Dims, told: Sequence[int]) -> Dims:
    zeros = not n.attr("allowzero", 0)
    shape = [old[i] if d == 0 and zeros else d for i, d in enumerate(told)]
    if -1 in shape:
        rest = math.prod(d for d in shape if d != -1)
        shape[shape.index(-1)] = math.prod(old) // rest if rest else 0
    if math.prod(shape) != math.prod(old):
        raise refused(n, "mixes the batch with other dimensions")
    return tuple(shape)


@lowers("Transpose")
def _transpose(low: Lowering, n: Node) -> None:
    """Say that the same numbers have another order."""
    tensor, order = source(low, n.inputs[0])
    perm = n.attr("perm") or tuple(reversed(range(len(order))))
    back = [tuple(perm).index(a) for a in range(len(perm))]
    moved(low, n, tensor, tuple(back[a] for a in order))


@lowers("Slice")
def _slice(low: Lowering, n: Node) -> None:
    name = n.inputs[0]
    whole = low.shape(name)
    starts, ends = constant(low, n, 1), constant(low, n, 2)
    axes = constant(low, n, 3) if n.input(3) else list(range(len(starts)))
    steps = constant(low, n, 4) if n.input(4) else [1] * len(starts)
    begins, sizes, jumps = [0] * len(whole), list(whole), [1] * len(whole)
    turned = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at, size = axis % len(whole), whole[axis % len(whole)]
        first, end_, jump = _span(n, slice(start, end, step), size)
        if jump < 0:
            turned.append(at)
        begins[at], jumps[at] = first, abs(jump)
        sizes[at] = size if is_free(size) else max(-(-(end_ - first) // abs(jump)), 0)
    tensor, order = source(low, name)
    t = low.tape
    made = t.slice(tensor, *([v[a] for a in order] for v in (begins, sizes, jumps)))
    for axis in turned:
        made = t.add("REVERSE_V2", [made, t.ints(order.index(axis))], t.shape(made))
    moved(low, n, made, order)


def _span(n: Node, cut: slice, size: int) -> tuple[int, int, int]:
    """Return first and end of a slice, from low to high whatever its direction, and its step."""
    if is_free(size):
        if cut.start == 0 and cut.stop >= size and cut.step == 1:
            return 0, size, 1
        raise refused(n, "slices the batch")
    if cut.stop < -size and cut.step < 0:
        cut = slice(cut.start, None, cut.step)
    indices = range(*cut.indices(size))
    if not indices:
        return 0, 0, 1
    if cut.step < 0:
        return indices[-1], indices[0] + 1, cut.step
    return indices[0], indices[-1] + 1, cut.step


@lowers("Split")
def _split(low: Lowering, n: Node) -> None:
    tensor, order = source(low, n.inputs[0])
    t = low.tape
    at = order.index(n.attr("axis", 0) % len(order))
    whole = t.shape(tensor)
    if n.input(1):
        sizes = constant(low, n, 1)
    else:
        each = -(-whole[at] // len(n.outputs))
        sizes = [min(each, whole[at] - i * each) for i in range(len(n.outputs))]
    begin = 0
    for name, size in zip(n.outputs, sizes, strict=True):
        begins, parts = [0] * len(whole), list(whole)
        begins[at], parts[at] = begin, size
        made = t.slice(tensor, begins, parts)
        if t.tensors[made].quantization is not None:
            low.put_levels(name, made, order)
        else:
            low.put(name, made, order)
        begin += size


@lowers("Concat")
def _concat(low: Lowering, n: Node) -> None:
    tensors, order = low.together(n.inputs)
    if any(low.tape.shape(t) == () or elements(low.tape.shape(t)) == 1 for t in tensors):
        order = tuple(range(low.rank(n.inputs[0])))
        tensors = [low.get(name) for name in n.inputs]
    axis = order.index(n.attr("axis") % len(order))
    low.put(n.outputs[0], low.tape.concat(tensors, axis), order)


@lowers("Pad")
def _pad(low: Lowering, n: Node) -> None:
    if n.attr("mode", "constant") != "constant":
        raise refused(n, f"pads by {n.attr('mode')}")
    tensor, order = low.form(n.inputs[0])
    rank, pads = len(order), constant(low, n, 1)
    axes = [a % rank for a in constant(low, n, 3)] if n.input(3) else list(range(rank))
    pairs = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        pairs[axis] = (pads[i], pads[i + len(axes)])
    value = low.constant(n.input(2)) if n.input(2) else None
    if n.input(2) and value is None:
        raise refused(n, "pads by a value that is not constant")
    filler = 0.0 if value is None else float(value.reshape(()))
    low.put(n.outputs[0], low.tape.pad(tensor, [pairs[a] for a in order], filler), order)


@lowers("Expand")
def _expand(low: Lowering, n: Node) -> None:
    shape = np.broadcast_shapes(low.shape(n.inputs[0]), tuple(constant(low, n, 1)))
    t = low.tape
    tensor, order = low.form(n.inputs[0])
    if len(order) != len(shape):
        tensor, order = low.get(n.inputs[0]), tuple(range(len(shape)))
        tensor = t.reshape(tensor, (1,) * (len(shape) - low.rank(n.inputs[0])) + t.shape(tensor))
    target = tuple(shape[a] for a in order)
    if target == t.shape(tensor):
        low.put(n.outputs[0], tensor, order)
        return
    is_open = any(map(is_free, target))
    sizes = low.sizes(np.array(target, np.int64)) if is_open else t.ints(*target)
    low.put(n.outputs[0], t.add("BROADCAST_TO", [tensor, sizes], target), order)


@lowers("ConstantOfShape")
def _constant_of_shape(low: Lowering, n: Node) -> None:
    shape = tuple(constant(low, n, 0))
    value = n.attr("value")
    filler = np.zeros(1, np.float32) if value is None else np.asarray(value)
    if not any(map(is_free, shape)):
        low.know(n.outputs[0], np.full(shape, filler.reshape(-1)[0]), str(filler.dtype))
        return
    t = low.tape
    inputs = [low.sizes(np.array(shape, np.int64)), t.const(filler.reshape(()), filler.dtype)]
    low.put(n.outputs[0], t.add("FILL", inputs, shape, str(filler.dtype)))


@lowers("EyeLike")
def _eye(low: Lowering, n: Node) -> None:
    shape = low.shape(n.inputs[0])
    if any(map(is_free, shape)):
        raise refused(n, "depends on the batch")
    low.know(n.outputs[0], np.eye(shape[0], shape[1], n.attr("k", 0), np.float32), "float32")


@lowers("Tile")
def _tile(low: Lowering, n: Node) -> None:
    tensor, order = low.form(n.inputs[0])
    repeats = constant(low, n, 1)
    told = [repeats[a] for a in order]
    t = low.tape
    shape = [d * r for d, r in zip(t.shape(tensor), told, strict=True)]
    if any(map(is_free, told)):
        raise refused(n, "repeats as often as the batch says")
    low.put(n.outputs[0], t.add("TILE", [tensor, t.ints(*told)], shape), order)


@lowers("Resize", "Upsample")
def _resize(low: Lowering, n: Node) -> None:
    rank, name = low.rank(n.inputs[0]), n.inputs[0]
    if rank not in (3, 4):
        raise refused(n, f"has {rank} dimensions")
    shape = low.shape(name)
    if n.input(3):
        sizes = constant(low, n, 3)
    else:
        scales = low.constant(n.input(2) or n.input(1))
        if scales is None:
            raise refused(n, "has scales that are not constant")
        factors = scales.reshape(-1)
        sizes = [d if is_free(d) else int(d * f) for d, f in zip(shape, factors, strict=True)]
        exact = (f * d == s for d, f, s in zip(shape[2:], factors[2:], sizes[2:], strict=True))
        if not all(exact):
            raise refused(n, f"has scales {factors.tolist()}, which cut a pixel")
    if len(sizes) != rank or tuple(sizes[:2]) != shape[:2]:
        raise refused(n, "resizes batch or channels")
    if n.attr("antialias", 0):
        raise refused(n, "smooths as it resizes")
    mode, where = n.attr("mode", "nearest"), n.attr("coordinate_transformation_mode", "half_pixel")
    half, align = where == "half_pixel", where == "align_corners"
    is_whole = all(b % a == 0 for a, b in zip(shape[2:], sizes[2:], strict=True))
    if mode == "nearest":
        floors = n.attr("nearest_mode", "round_prefer_floor") == "floor"
        if not (is_whole and (half or (where == "asymmetric" and floors))):
            raise refused(n, "resizes to the nearest in a way that TFLite does not")
        op, half, align = "RESIZE_NEAREST_NEIGHBOR", False, False  # the same where sizes divide
    elif mode == "linear" and where in {"half_pixel", "align_corners", "asymmetric"}:
        op = "RESIZE_BILINEAR"
    else:
        raise refused(n, f"resizes by {mode}, {where}")
    _resized(low, n, op, [1] * (4 - rank) + sizes[2:], half=half, align=align)


def _resized(low: Lowering, n: Node, op: str, size: list[int], *, half: bool, align: bool) -> None:
    from coordinator.compiler.tflite.lower.windows import image, put_image

    t, x = low.tape, image(low, n.inputs[0])
    shape = (t.shape(x)[0], *size, t.shape(x)[3])
    made = t.add(op, [x, t.ints(*size)], shape, half_pixel=half, align=align)
    put_image(low, n.outputs[0], made, low.rank(n.inputs[0]))


@lowers("DepthToSpace", "SpaceToDepth")
def _depth(low: Lowering, n: Node) -> None:
    t, b = low.tape, n.attr("blocksize")
    x = low.get(n.inputs[0], (0, 2, 3, 1))
    batch, height, width, channels = t.shape(x)
    if n.kind == "SpaceToDepth":
        shape = (batch, height // b, width // b, channels * b * b)
        made = t.add("SPACE_TO_DEPTH", [x], shape, block=b)
    else:
        if n.attr("mode", "DCR") != "DCR":
            raise refused(n, "has mode CRD")
        shape = (batch, height * b, width * b, channels // (b * b))
        made = t.add("DEPTH_TO_SPACE", [x], shape, block=b)
    low.put(n.outputs[0], made, (0, 2, 3, 1))


@lowers("Shape", "Size")
def _sizes(low: Lowering, n: Node) -> None:
    shape = low.shape(n.inputs[0])
    if n.kind == "Size":
        low.know(n.outputs[0], np.array(elements(shape), np.int64), "int64")
        return
    cut = shape[n.attr("start", 0) : n.attr("end", len(shape))]
    low.know(n.outputs[0], np.array(cut, np.int64), "int64")


@lowers("Trilu")
def _trilu(low: Lowering, n: Node) -> None:
    """Keep one side of the diagonal: a product with ones there and zeros elsewhere."""
    shape = low.shape(n.inputs[0])[-2:]
    if any(map(is_free, shape)):
        raise refused(n, "cuts a matrix as large as the batch")
    shift = constant(low, n, 1)[0] if n.input(1) else 0
    side = np.triu if n.attr("upper", 1) else np.tril
    mask = low.tape.const(side(np.ones(shape, np.float32), shift))
    low.put(n.outputs[0], low.tape.mul(low.get(n.inputs[0]), mask))
