# SPDX-License-Identifier: Apache-2.0
"""A recorder of builtin operators that knows the shape of everything it records.

The batch is free: in shapes it is the number `BATCH`, a prime larger than any true size, so that
every size is an ordinary integer and products, quotients and sums of sizes need no algebra. A size
that `BATCH` divides depends on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from coordinator.compiler.tflite.write import Model, Operator, Quantization, Tensor, write
from edge_sdk.errors import CompileError

BATCH = 2_147_483_647

Dims = tuple[int, ...]

_FEW = 32  # channels, up to which rows of pixels are padded as rows of numbers
_MOST_REDUCED = 4  # dimensions that every runtime's reductions take


def is_free(size: int) -> bool:
    """Tell whether a size depends on the batch."""
    return size != 0 and size % BATCH == 0


class Origin(NamedTuple):
    """The weight that a constant holds: transposed by `order` it has `shape`."""

    source: str
    order: Dims
    shape: Dims


class Tape:
    """Tensors and operators so far; tensors are called by their place, an int.

    Attributes:
        origins: the constants that hold weights which training changes.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.shapes: list[Dims] = []
        self._operators: list[Operator] = []
        self._constants: dict[Any, int] = {}
        self._made: dict[Any, int] = {}
        self.origins: dict[int, Origin] = {}
        self._open: set[int] = set()

    # -- tensors ----------------------------------------------------------------------------

    def input(self, name: str, dtype: str, shape: Dims) -> int:
        """Add a tensor that is fed."""
        return self._telling(self._tensor(name, dtype, shape))

    def const(
        self, value: Any, dtype: DTypeLike = np.float32, quantization: Quantization | None = None
    ) -> int:
        """Return a constant; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes(), quantization)
        if key not in self._constants:
            name = f"const.{len(self._constants)}"
            made = Tensor(name, str(array.dtype), array.shape, array, quantization)
            self._constants[key] = self._append(made, array.shape)
        return self._constants[key]

    def ints(self, *values: int) -> int:
        """Return a constant int32 vector."""
        return self.const(np.array(values, np.int32), np.int32)

    def data(self, tensor: int) -> NDArray[Any] | None:
        """Return a constant's value, None for what is made at run time."""
        return self.tensors[tensor].data

    def dtype(self, tensor: int) -> str:
        """Return a tensor's type."""
        return self.tensors[tensor].dtype

    def shape(self, tensor: int) -> Dims:
        """Return a tensor's shape."""
        return self.shapes[tensor]

    def weight(
        self,
        source: str,
        array: NDArray[Any],
        order: Dims,
        quantization: Quantization | None = None,
    ) -> int:
        """Return the constant that holds a weight, transposed by `order`: no other shares it."""
        key = (source, order, quantization)
        if key not in self._constants:
            turned = np.ascontiguousarray(array.transpose(order))
            name = f"weight.{len(self.origins)}"
            made = Tensor(name, str(array.dtype), turned.shape, turned, quantization)
            self._constants[key] = self._append(made, turned.shape)
            self.origins[self._constants[key]] = Origin(source, order, turned.shape)
        return self._constants[key]

    # -- operators --------------------------------------------------------------------------

    def add(
        self,
        op: str,
        inputs: Sequence[int],
        shape: Sequence[int],
        dtype: str | None = None,
        *,
        quantization: Quantization | None = None,
        **options: Any,
    ) -> int:
        """Record an operator with one output; the same operator on the same inputs is not repeated.

        `dtype` is the first input's unless told.
        """
        dtype = dtype or self.dtype(inputs[0])
        key = (op, tuple(inputs), dtype, quantization, repr(sorted(options.items())))
        if key not in self._made:
            out = self._tensor(f"{op.lower()}.{len(self._operators)}", dtype, tuple(shape))
            if quantization is not None:
                self.quantize(out, quantization)
            self._operators.append(Operator(op, tuple(inputs), (out,), options))
            self._made[key] = out
        return self._made[key]

    def split(self, x: int, axis: int, parts: int) -> list[int]:
        """Record a SPLIT into equal parts."""
        shape = list(self.shape(x))
        shape[axis] //= parts
        stem = f"split.{len(self._operators)}"
        outs = [self._tensor(f"{stem}.{i}", self.dtype(x), tuple(shape)) for i in range(parts)]
        at = self.const(axis, np.int32)
        self._operators.append(Operator("SPLIT", (at, x), tuple(outs), {"num": parts}))
        return outs

    def unary(self, op: str, x: int, **options: Any) -> int:
        """Record an operator whose output is as its input."""
        return self.add(op, [x], self.shape(x), **options)

    def binary(self, op: str, a: int, b: int, dtype: str | None = None, **options: Any) -> int:
        """Record an operator of two tensors that broadcast, last dimensions together."""
        return self.add(op, [a, b], broadcast(self.shape(a), self.shape(b)), dtype, **options)

    def mul(self, a: int, b: int, activation: str | None = None) -> int:
        """Record a product."""
        return self._arithmetic("MUL", a, b, activation)

    def plus(self, a: int, b: int, activation: str | None = None) -> int:
        """Record a sum."""
        return self._arithmetic("ADD", a, b, activation)

    def minus(self, a: int, b: int) -> int:
        """Record a difference."""
        return self._arithmetic("SUB", a, b, None)

    def over(self, a: int, b: int) -> int:
        """Record a quotient."""
        return self._arithmetic("DIV", a, b, None)

    def _arithmetic(self, op: str, a: int, b: int, activation: str | None) -> int:
        options = {} if activation is None else {"activation": activation}
        return self.binary(op, a, b, **options)

    def cast(self, x: int, dtype: str) -> int:
        """Record a CAST, if it is one."""
        if self.dtype(x) == dtype:
            return x
        data = self.data(x)
        if data is not None:
            return self.const(data, dtype)
        return self.add("CAST", [x], self.shape(x), dtype, from_type=self.dtype(x), to_type=dtype)

    def reshape(self, x: int, shape: Sequence[int]) -> int:
        """Record a RESHAPE; one size that depends on the batch is found at run time."""
        shape = tuple(shape)
        if shape == self.shape(x):
            return x
        data = self.data(x)
        if data is not None and x in self.origins:
            return self._reshaped(x, data, shape)
        if data is not None:
            return self.const(data.reshape(shape), data.dtype, self.tensors[x].quantization)
        free = [i for i, size in enumerate(shape) if is_free(size)]
        if len(free) > 1:
            raise CompileError(f"expected one free dimension in a shape, got {len(free)}")
        target = [-1 if i in free else size for i, size in enumerate(shape)]
        return self.add(
            "RESHAPE",
            [x, self.ints(*target)],
            shape,
            quantization=self.tensors[x].quantization,
            new_shape=tuple(target),
        )

    def _reshaped(self, x: int, data: NDArray[Any], shape: Dims) -> int:
        """Store a weight in another shape: its bytes are the same."""
        key = ("reshaped", x, shape)
        if key not in self._constants:
            old = self.tensors[x]
            name = f"weight.{len(self.origins)}"
            made = Tensor(name, old.dtype, shape, data.reshape(shape), old.quantization)
            self._constants[key] = self._append(made, shape)
            self.origins[self._constants[key]] = self.origins[x]
        return self._constants[key]

    def transpose(self, x: int, perm: Sequence[int]) -> int:
        """Record a TRANSPOSE, a RESHAPE where only dimensions of size 1 move."""
        perm = tuple(perm)
        if perm == tuple(range(len(perm))):
            return x
        shape = tuple(self.shape(x)[p] for p in perm)
        data = self.data(x)
        if data is not None and x not in self.origins:
            return self.const(data.transpose(perm), data.dtype)
        moving = [p for p in perm if self.shape(x)[p] != 1]
        if moving == sorted(moving):
            return self.reshape(x, shape)
        quantization = self.tensors[x].quantization
        return self.add("TRANSPOSE", [x, self.ints(*perm)], shape, quantization=quantization)

    def slice(
        self,
        x: int,
        begins: Sequence[int],
        sizes: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> int:
        """Record a SLICE, or a STRIDED_SLICE with steps above 1; free dimensions stay whole."""
        whole, rank = self.shape(x), len(self.shape(x))
        steps = tuple(steps or (1,) * rank)
        if tuple(sizes) == whole and set(steps) == {1}:
            return x
        if any(is_free(d) and (b or s != d) for b, s, d in zip(begins, sizes, whole, strict=True)):
            raise CompileError("expected slices to leave the batch whole")
        quantization = self.tensors[x].quantization
        if x in self._open:
            x = self.copy(x)
        if set(steps) == {1}:
            told = [-1 if is_free(d) else s for s, d in zip(sizes, whole, strict=True)]
            inputs = [x, self.ints(*begins), self.ints(*told)]
            return self._telling(self.add("SLICE", inputs, sizes, quantization=quantization))
        free = sum(1 << i for i, d in enumerate(whole) if is_free(d))
        ends = [
            0 if is_free(d) else b + (s - 1) * k + 1
            for b, s, k, d in zip(begins, sizes, steps, whole, strict=True)
        ]
        made = self.add(
            "STRIDED_SLICE",
            [x, self.ints(*begins), self.ints(*ends), self.ints(*steps)],
            sizes,
            quantization=quantization,
            begin_mask=free,
            end_mask=free,
            ellipsis_mask=0,
            new_axis_mask=0,
            shrink_axis_mask=0,
        )
        return self._telling(made)

    def _telling(self, tensor: int) -> int:
        """Remember what tells that it may have any size: no slice may read it (`write.SLICES`)."""
        if any(map(is_free, self.shape(tensor))):
            self._open.add(tensor)
        return tensor

    def pad(self, x: int, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> int:
        """Record a PAD; negative padding cuts off."""
        if any(min(pair) < 0 for pair in pairs):
            begins = [max(-b, 0) for b, _ in pairs]
            cut = [max(-b, 0) + max(-e, 0) for b, e in pairs]
            sizes = [d - c for d, c in zip(self.shape(x), cut, strict=True)]
            x = self.slice(x, begins, sizes)
            pairs = [(max(b, 0), max(e, 0)) for b, e in pairs]
        if not any(map(any, pairs)):
            return x
        if self._has_short_rows(x, pairs):
            return self._padded_flat(x, pairs, value)
        shape = [d + b + e for d, (b, e) in zip(self.shape(x), pairs, strict=True)]
        room = self.const(np.array(pairs, np.int32), np.int32)
        quantization = self.tensors[x].quantization
        if value or quantization is not None:
            filler = self.const(value, self.dtype(x), quantization)
            return self.add("PADV2", [x, room, filler], shape, quantization=quantization)
        return self.add("PAD", [x, room], shape)

    def _has_short_rows(self, x: int, pairs: Sequence[tuple[int, int]]) -> bool:
        """Tell whether pixels of few channels would be padded one by one, which XNNPACK does.

        LiteRT 2.3, 1 thread: [16, 96, 96, 3] takes 1.3 ms, as [16, 96, 288] 0.10.
        """
        shape = self.shape(x)
        is_image = len(shape) == 4 and not any(pairs[3]) and any(pairs[2])
        return is_image and shape[3] <= _FEW and not is_free(shape[2])

    def _padded_flat(self, x: int, pairs: Sequence[tuple[int, int]], value: float) -> int:
        first, height, width, channels = self.shape(x)
        flat = self.reshape(x, (first, height, width * channels))
        begin, end = pairs[2]
        made = self.pad(flat, [*pairs[:2], (begin * channels, end * channels)], value)
        return self.reshape(made, (*self.shape(made)[:2], width + begin + end, channels))

    def concat(self, xs: Sequence[int], axis: int) -> int:
        """Record a CONCATENATION."""
        if len(xs) == 1:
            return xs[0]
        shape = list(self.shape(xs[0]))
        axis %= len(shape)
        shape[axis] = sum(self.shape(x)[axis] for x in xs)
        quantization = self.tensors[xs[0]].quantization
        return self.add("CONCATENATION", xs, shape, quantization=quantization, axis=axis)

    def reduce(self, op: str, x: int, axes: Sequence[int], *, keep: bool) -> int:
        """Record a reduction such as SUM or MEAN."""
        if not axes:
            return x
        shape = self.shape(x)
        kept = [1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes]
        if len(shape) > _MOST_REDUCED:
            x, axes = self._merged(x, set(axes))
            shorter = [d for i, d in enumerate(self.shape(x)) if i not in axes]
            made = self.add(op, [x, self.ints(*axes)], shorter, keep_dims=False)
            return self.reshape(made, kept)
        return self.add(op, [x, self.ints(*axes)], kept, keep_dims=keep)

    def _merged(self, x: int, axes: set[int]) -> tuple[int, list[int]]:
        """Let neighbours that are summed, and neighbours that are not, be one dimension each."""
        sizes: list[int] = []
        summed: list[bool] = []
        for i, size in enumerate(self.shape(x)):
            if summed and summed[-1] == (i in axes):
                sizes[-1] *= size
            else:
                sizes.append(size)
                summed.append(i in axes)
        return self.reshape(x, sizes), [i for i, is_summed in enumerate(summed) if is_summed]

    def matmul(self, a: int, b: int, *, adj_x: bool = False, adj_y: bool = False) -> int:
        """Record a BATCH_MATMUL."""
        left, right = self.shape(a), self.shape(b)
        rows = left[-1] if adj_x else left[-2]
        columns = right[-2] if adj_y else right[-1]
        lead = broadcast(left[:-2], right[:-2])
        return self.add("BATCH_MATMUL", [a, b], (*lead, rows, columns), adj_x=adj_x, adj_y=adj_y)

    def dense(self, x: int, weights: int, bias: int = -1, activation: str = "NONE") -> int:
        """Record a FULLY_CONNECTED of x [rows, I] and weights [O, I]."""
        return self.add(
            "FULLY_CONNECTED",
            [x, weights, bias],
            (self.shape(x)[0], self.shape(weights)[0]),
            activation=activation,
            weights_format=0,
            keep_dims=False,
        )

    # -- the result -------------------------------------------------------------------------

    def rename(self, tensor: int, name: str) -> None:
        """Call a tensor by a port's name."""
        old = self.tensors[tensor]
        self.tensors[tensor] = Tensor(name, old.dtype, old.shape, old.data, old.quantization)

    def copy(self, x: int) -> int:
        """Record a RESHAPE that makes the same again: an output that nothing else is."""
        out = self._tensor(f"copy.{len(self._operators)}", self.dtype(x), self.shape(x))
        scheme = self.tensors[x].quantization
        if scheme is not None:
            self.quantize(out, scheme)
        target = [-1 if is_free(size) else size for size in self.shape(x)]
        options = {"new_shape": tuple(target)}
        self._operators.append(Operator("RESHAPE", (x, self.ints(*target)), (out,), options))
        return out

    def write(self, inputs: Sequence[int], outputs: Sequence[int], signature: str) -> bytes:
        """Return the file, without what no output needs."""
        needed, kept = {*outputs}, list[Operator]()
        for op in reversed(self._operators):
            if needed.intersection(op.outputs):
                kept.append(op)
                needed.update(op.inputs)
        kept.reverse()
        used = {*inputs, *outputs, *(i for op in kept for i in (*op.inputs, *op.outputs))} - {-1}
        order = sorted(used)
        place = {old: new for new, old in enumerate(order)} | {-1: -1}

        def at(old: Sequence[int]) -> tuple[int, ...]:
            return tuple(place[i] for i in old)

        operators = [Operator(o.op, at(o.inputs), at(o.outputs), o.options) for o in kept]
        tensors = [self.tensors[i] for i in order]
        return write(Model(tensors, operators, at(inputs), at(outputs), signature))

    def _tensor(self, name: str, dtype: str, shape: Dims) -> int:
        sizes = tuple(None if is_free(d) else d for d in shape)
        return self._append(Tensor(name, dtype, sizes), shape)

    def _append(self, tensor: Tensor, shape: Dims) -> int:
        self.tensors.append(tensor)
        self.shapes.append(tuple(shape))
        return len(self.tensors) - 1

    def quantize(self, tensor: int, quantization: Quantization) -> None:
        """Give a tensor of integers its scale."""
        old = self.tensors[tensor]
        self.tensors[tensor] = Tensor(old.name, old.dtype, old.shape, old.data, quantization)


def broadcast(a: Sequence[int], b: Sequence[int]) -> Dims:
    """Return the shape of two tensors together. Raises: CompileError where they do not fit."""
    rank = max(len(a), len(b))
    wide = [(1,) * (rank - len(s)) + tuple(s) for s in (a, b)]
    made = []
    for x, y in zip(*wide, strict=True):
        if x != y and 1 not in (x, y):
            raise CompileError(f"expected shapes that broadcast, got {tuple(a)} and {tuple(b)}")
        made.append(y if x == 1 else x)
    return tuple(made)


def elements(shape: Sequence[int]) -> int:
    """Return how many numbers a tensor holds."""
    return math.prod(shape)
