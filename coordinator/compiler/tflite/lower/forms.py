# SPDX-License-Identifier: Apache-2.0
"""Where each ONNX tensor is on the tape: in which order of dimensions, as floats or as int8.

ONNX images are [N, C, H, W], TFLite's [N, H, W, C]. A tensor is kept in the order in which it was
made and brought into another when a reader asks for it, so that a network of images runs channels
last from end to end and a Transpose costs nothing until somebody needs it. An *order* says which
ONNX dimension each stored dimension is: an image stored channels last has the order (0, 2, 3, 1).

A DequantizeLinear is as lazy: readers that work on integers take those, others make the floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.graph import Graph, Node, Value
from coordinator.compiler.tflite.tape import BATCH, Dims, Tape, elements, is_free
from coordinator.compiler.tflite.write import Quantization
from edge_sdk.errors import CompileError

Order = tuple[int, ...]

_LARGEST_SHAPE = 64  # only shapes and counts hold sizes that depend on the batch
_NARROW = {"int64": "int32", "float64": "float32"}


class Form(NamedTuple):
    """A tensor of the tape and its order."""

    tensor: int
    order: Order


@dataclass(frozen=True)
class Known:
    """A value known while lowering; sizes that depend on the batch are multiples of `BATCH`."""

    array: NDArray[Any]
    dtype: str


@dataclass(frozen=True)
class Stored:
    """A quantized constant: integers with scales and zero points along `axis`, or one of each."""

    levels: NDArray[Any]
    scale: NDArray[Any]
    zero_point: NDArray[Any]
    axis: int
    source: str = ""

    @property
    def floats(self) -> NDArray[Any]:
        """Return what it stands for."""
        ones = [1] * self.levels.ndim
        if self.scale.size > 1:
            ones[self.axis] = -1
        scale, zero = (v.reshape(ones if v.size > 1 else ()) for v in (self.scale, self.zero_point))
        whole = self.levels.astype(np.float32) - zero.astype(np.float32)
        return np.asarray(whole * scale, np.float32)


class Lowering:
    """A graph on its way to the tape.

    Attributes:
        tape: what is recorded so far.
        traced: stored weights that training changes: each keeps a place of its own in the file.
        done: nodes that another node's lowering has served.
    """

    def __init__(self, graph: Graph, traced: Iterable[str] = ()) -> None:
        self.graph, self.tape, self.traced = graph, Tape(), frozenset(traced)
        self.done: set[int] = set()
        self._floats: dict[str, dict[Order, int]] = {}
        self._integers: dict[str, dict[Order, int]] = {}
        self._known: dict[str, Known] = {}
        self._stored: dict[str, Stored] = {}
        self._shapes: dict[str, Dims] = {}
        self._batch = -1
        for name, array in graph.initializers.items():
            self.know(name, array, str(array.dtype))

    # -- what is known ----------------------------------------------------------------------

    def know(self, name: str, array: NDArray[Any], dtype: str) -> None:
        """Give a tensor a value."""
        self._known[name] = Known(np.asarray(array), dtype)
        self._shapes[name] = np.shape(array)

    def known(self, name: str) -> NDArray[Any] | None:
        """Return a value that is known, free sizes included."""
        return self._known[name].array if name in self._known else None

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return a value that does not depend on the batch."""
        if name in self._stored:
            return self._stored[name].floats
        value = self.known(name)
        return None if value is None or _has_free(value) else value

    def store(self, name: str, stored: Stored) -> None:
        """Let a tensor stand for a quantized constant."""
        self._stored[name] = stored
        self._shapes[name] = stored.levels.shape

    def stored(self, name: str) -> Stored | None:
        """Return the quantized constant that a tensor stands for."""
        return self._stored.get(name)

    def shape(self, name: str) -> Dims:
        """Return a shape in ONNX's order."""
        if name not in self._shapes:
            raise CompileError(f"expected tensor {name!r} to be made before it is read")
        return self._shapes[name]

    def rank(self, name: str) -> int:
        """Return the number of dimensions."""
        return len(self.shape(name))

    def dtype(self, name: str) -> str:
        """Return the type a tensor has on the tape."""
        if name in self._known:
            return _NARROW.get(self._known[name].dtype, self._known[name].dtype)
        forms = self._floats.get(name)
        return self.tape.dtype(next(iter(forms.values()))) if forms else "float32"

    # -- ports ------------------------------------------------------------------------------

    def feed(self, value: Value) -> int:
        """Add an input of the graph; int64 becomes int32 inside."""
        if value.shape is None or None in value.shape[1:] or value.dtype is None:
            raise CompileError(
                f"expected a known type and shape but for the batch of input {value.name!r}, got "
                f"{value.dtype} {value.shape}"
            )
        shape = tuple(BATCH if d is None else d for d in value.shape)
        port = self.tape.input(value.name, str(value.dtype), shape)
        if shape[:1] == (BATCH,) and self._batch < 0:
            whole = self.tape.add("SHAPE", [port], (len(shape),), "int32", to_type="int32")
            self._batch = self.tape.slice(whole, (0,), (1,))
        narrow = _NARROW.get(str(value.dtype), str(value.dtype))
        if narrow in {"int8", "uint8"}:
            self._feed_levels(value.name, port)
        else:
            self.put(value.name, self.tape.cast(port, narrow))
        return port

    def _feed_levels(self, name: str, port: int) -> None:
        """Take an input of integers by the scale of what dequantizes it; uint8 becomes int8."""
        readers = [n for n in self.graph.uses.get(name, ()) if n.kind == "DequantizeLinear"]
        scale = self.constant(readers[0].inputs[1]) if readers else None
        zero = self.constant(readers[0].input(2)) if readers and readers[0].input(2) else None
        if scale is None or scale.size != 1:
            raise CompileError(f"expected one scale for the integers of input {name!r}, got none")
        point = 0 if zero is None else int(zero.reshape(()))
        step = (float(scale.reshape(())),)
        source = readers[0].inputs[1] if readers[0].inputs[1] in self.traced else ""
        scheme = Quantization(step, (point,), 0, source)
        self.tape.quantize(port, scheme)
        if self.tape.dtype(port) == "uint8":
            scheme = replace(scheme, zero_point=(point - 128,))
            shape = self.tape.shape(port)
            port = self.tape.add("QUANTIZE", [port], shape, "int8", quantization=scheme)
        self.put_levels(name, port)

    def deliver(self, value: Value) -> int:
        """Return the tensor of an output of the graph, under its name."""
        wide = str(value.dtype or np.dtype(np.float32))
        tensor = self.levels(value.name) if "int8" in wide else self.get(value.name)
        scheme = self.tape.tensors[tensor].quantization
        if wide == "uint8" and scheme is not None:
            shifted = replace(scheme, zero_point=(scheme.zero_point[0] + 128,))
            shape = self.tape.shape(tensor)
            tensor = self.tape.add("QUANTIZE", [tensor], shape, "uint8", quantization=shifted)
        if wide == "int64":
            tensor = self.tape.cast(tensor, wide)
        is_port = self.tape.tensors[tensor].name in {
            *(v.name for v in self.graph.inputs), *(v.name for v in self.graph.outputs)
        }  # fmt: skip
        if is_port or self.tape.data(tensor) is not None:
            tensor = self.tape.copy(tensor)
        self.tape.rename(tensor, value.name)
        return tensor

    # -- forms ------------------------------------------------------------------------------

    def put(self, name: str, tensor: int, order: Order | None = None) -> None:
        """Say that `tensor` is the ONNX tensor `name`, its dimensions in `order`."""
        stored = self.tape.shape(tensor)
        order = order or tuple(range(len(stored)))
        self._floats.setdefault(name, {})[order] = tensor
        self._shapes[name] = _natural(stored, order)

    def put_levels(self, name: str, tensor: int, order: Order | None = None) -> None:
        """Say that the integers of `tensor`, by its quantization, stand for `name`."""
        stored = self.tape.shape(tensor)
        order = order or tuple(range(len(stored)))
        self._integers.setdefault(name, {})[order] = tensor
        self._shapes[name] = _natural(stored, order)

    def has_levels(self, name: str) -> bool:
        """Tell whether integers stand for a tensor."""
        return name in self._integers

    def levels(self, name: str, order: Order | None = None) -> int:
        """Return the integers that stand for a tensor, in an order."""
        return self._ordered(self._integers[name], order or tuple(range(self.rank(name))))

    def form(self, name: str) -> Form:
        """Return a tensor in the order in which it is at hand."""
        forms = self._floats.get(name)
        if not forms and name in self._integers:
            order, levels = next(iter(self._integers[name].items()))
            return Form(self._dequantized(name, levels, order), order)
        if not forms:
            return Form(self.get(name), tuple(range(self.rank(name))))
        order, tensor = next(iter(forms.items()))
        return Form(tensor, order)

    def level_form(self, name: str) -> Form:
        """Return the integers that stand for a tensor, in the order in which they are at hand."""
        order, tensor = next(iter(self._integers[name].items()))
        return Form(tensor, order)

    def get(self, name: str, order: Order | None = None) -> int:
        """Return a tensor in an order, ONNX's own by default."""
        order = order or tuple(range(self.rank(name)))
        if name in self._stored:
            return self._spread(self._stored[name], order)
        if name in self._known:
            if name in self.traced:
                return self.tape.weight(name, self._known[name].array, order)
            return self._constant(self._known[name], order)
        if name not in self._floats:
            if name not in self._integers:
                raise CompileError(f"expected tensor {name!r} to be made before it is read")
            at, levels = next(iter(self._integers[name].items()))
            self._dequantized(name, levels, at)
        return self._ordered(self._floats[name], order)

    def _spread(self, stored: Stored, order: Order) -> int:
        """Return the floats of a quantized constant; of a traced one they are made at run time."""
        if stored.source not in self.traced:
            return self.tape.const(stored.floats.transpose(order))
        scales = tuple(float(s) for s in stored.scale.reshape(-1))
        points = tuple(int(z) for z in np.broadcast_to(stored.zero_point.reshape(-1), len(scales)))
        scheme = Quantization(scales, points, order.index(stored.axis) if order else 0)
        levels = self.tape.weight(stored.source, stored.levels, order, scheme)
        return self.tape.add("DEQUANTIZE", [levels], self.tape.shape(levels), "float32")

    def _dequantized(self, name: str, levels: int, order: Order) -> int:
        made = self.tape.add("DEQUANTIZE", [levels], self.tape.shape(levels), "float32")
        self.put(name, made, order)
        return made

    def _ordered(self, forms: dict[Order, int], order: Order) -> int:
        if order not in forms:
            have, tensor = next(iter(forms.items()))
            perm = tuple(have.index(axis) for axis in order)
            forms[order] = self.tape.transpose(tensor, perm)
        return forms[order]

    def _constant(self, known: Known, order: Order) -> int:
        narrow = _NARROW.get(known.dtype, known.dtype)
        array = known.array.transpose(order)
        if not _has_free(array):
            if narrow == "int32":
                array = np.clip(array, -(2**31), 2**31 - 1)
            return self.tape.const(array, narrow)
        return self.tape.cast(self.sizes(array), narrow)

    def sizes(self, array: NDArray[Any]) -> int:
        """Record integers of which some depend on the batch: int32 in the array's shape."""
        numbers = array.astype(np.int64)
        free = np.vectorize(is_free, otypes=[bool])(numbers)
        factor = np.where(free, numbers // BATCH, 0)
        fixed = np.where(free, 0, numbers)
        made = self._batch
        if (factor != 1).any() or array.size > 1:
            made = self.tape.mul(made, self.tape.const(factor.reshape(-1), np.int32))
        if fixed.any():
            made = self.tape.plus(made, self.tape.const(fixed.reshape(-1), np.int32))
        return self.tape.reshape(made, array.shape)

    # -- element by element -----------------------------------------------------------------

    def each(self, op: str, node: Node, **options: Any) -> None:
        """Record an operator of one tensor that works on each element."""
        tensor, order = self.form(node.inputs[0])
        self.put(node.outputs[0], self.tape.unary(op, tensor, **options), order)

    def together(self, names: Sequence[str]) -> tuple[list[int], Order]:
        """Return tensors that broadcast, in one order."""
        rank = max(map(self.rank, names))
        order = self._common([n for n in names if self.rank(n) == rank], rank)
        return [self._beside(name, order) for name in names], order

    def _common(self, names: Sequence[str], rank: int) -> Order:
        natural = tuple(range(rank))
        moving = [n for n in names if n not in self._known and elements(self.shape(n)) != 1]
        orders = [self.form(n).order for n in moving]
        found = [order for order in orders if order != natural]
        with_batch = any(is_free(d) for n in moving for d in self.shape(n))
        if found and (with_batch or len(found) == len(orders)):
            return max(found, key=found.count)
        return natural

    def _beside(self, name: str, order: Order) -> int:
        rank = len(order)
        if elements(self.shape(name)) == 1:
            return self.get(name)
        if self.rank(name) == rank:
            return self.get(name, order)
        if order == tuple(range(rank)):
            return self.get(name)
        wide = self.tape.reshape(
            self.get(name), (*(1,) * (rank - self.rank(name)), *self.shape(name))
        )
        return self.tape.transpose(wide, order)


def _natural(stored: Dims, order: Order) -> Dims:
    sizes = [0] * len(stored)
    for size, axis in zip(stored, order, strict=True):
        sizes[axis] = size
    return tuple(sizes)


def _has_free(array: NDArray[Any]) -> bool:
    if array.dtype.kind != "i" or not 0 < array.size <= _LARGEST_SHAPE:
        return False
    return any(is_free(int(v)) for v in array.reshape(-1))
