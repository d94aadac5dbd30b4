# SPDX-License-Identifier: Apache-2.0
"""The ONNX graph of a TFLite subgraph while it is being written, tensor by tensor.

TFLite keeps channels last, ONNX wants them first. A tensor is written in the layout that suits the
operator that makes it, and laid out the other way only when somebody reads it so: transposes stand
at the borders, not between layers. Integers become the QDQ form that the rest of the compiler
takes: each quantized activation is a QuantizeLinear and a DequantizeLinear with scalar scales, each
quantized weight a stored tensor behind DequantizeLinear.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.emit import Emit
from coordinator.compiler.tflite.constants import stored
from coordinator.compiler.tflite.layout import Layout, to_first, to_last
from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import Operator, Subgraph, Tensor, TfliteFile

OPSET = 20
"""The last at which onnxruntime's optimizer keeps the types of int8 training graphs straight."""

_INT8 = ("int8", "uint8")
_RAISED = 128
_STORED = (*_INT8, "int32", "float32")


class Origin(NamedTuple):
    """Which constant tensor an initializer is.

    Attributes:
        tensor: its number in the main subgraph.
        order: ``np.transpose(initializer, order)`` has the bytes of the tensor; None: as they are.
    """

    tensor: int
    order: tuple[int, ...] | None


class Spread(NamedTuple):
    """A tensor whose space TFLite keeps in its batch, to dilate a convolution; here it stays whole.

    Attributes:
        dilations: for each dimension of space.
        pads: that the convolution still owes, less what is cropped after it.
    """

    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]


class Forward:
    """A graph being written.

    Attributes:
        e: adds operators.
        origins: the constant tensor behind each initializer that may be trained.
        steps: the tensors whose quantization each scale of an activation stands for.
        fixed: those of them that TFLite's kernels take for granted.
        padded: tensors that are another one, padded, until somebody reads them so.
        spread: tensors between SPACE_TO_BATCH_ND and BATCH_TO_SPACE_ND.
        free: what a Reshape makes that is right for any batch.
    """

    def __init__(self, file: TfliteFile, graph: Subgraph) -> None:
        self.file, self.graph = file, graph
        self.e = Emit(opset=OPSET)
        self.origins: dict[str, Origin] = {}
        self.steps: dict[str, list[int]] = {}
        self.fixed: set[str] = set()
        self.padded: dict[int, tuple[int, tuple[tuple[int, int], ...]]] = {}
        self.spread: dict[int, Spread] = {}
        self.free: set[str] = set()
        self.names = _names(graph)
        self._known: dict[int, NDArray[Any]] = {}
        self._values: dict[int, dict[Layout, str]] = {}
        self._integers: dict[int, dict[Layout, str]] = {}
        self._scales: dict[int, str] = {}
        self._zeros: dict[tuple[str, int], str] = {}
        self._stored: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._doubled: dict[int, NDArray[Any]] = {}
        self._same: dict[int, int] = {}
        self._final: dict[str, str] = {}
        self._fed: set[int] = set()  # int8 inputs that nobody has read as they are

    # -- asking -----------------------------------------------------------------------------

    def tensor(self, i: int) -> Tensor:
        """Return what the file says of a tensor."""
        return self.graph.tensors[i]

    def shape(self, i: int) -> tuple[int, ...]:
        """Return a tensor's shape for the batch that the file was converted for.

        What is known of the graph so far counts more than the file, which may have left sizes open.
        """
        value = self.known(i)
        if value is not None:
            return value.shape
        for layout, name in self._values.get(i, {}).items():
            dims = self.e.static(name)
            if dims is not None:
                order = to_last(len(dims)) if layout == "first" else range(len(dims))
                return tuple(dims[n] for n in order)
        return self.tensor(i).shape

    def sizes(self, i: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return a tensor's shape for the file's batch and for twice of it."""
        shape = self.shape(i)
        if self.known(i) is not None or shape[:1] != (self.batch,):
            return shape, shape
        return shape, (2 * shape[0], *shape[1:])

    def rank(self, i: int) -> int:
        """Return a tensor's number of dimensions."""
        return len(self.shape(i))

    def is_quantized(self, i: int) -> bool:
        """Tell whether a tensor's integers stand for real numbers."""
        t = self.tensor(i)
        return bool(len(t.scale)) and t.dtype in (*_INT8, "int16", "int32")

    def known(self, i: int) -> NDArray[Any] | None:
        """Return the stored or computed value of a constant tensor, integers as they are."""
        if i not in self._known and i >= 0:
            i = self._same.get(i, i)
            t = self.tensor(i)
            if i not in self._known and self.file.buffers[t.buffer].size and not t.is_variable:
                if t.sparsity:
                    raise CompileError(
                        f"expected dense weights, {t.name!r} is stored sparse: convert the model "
                        "without sparsity"
                    )
                self._known[i] = stored(t, self.file.data(t.buffer))
        return self._known.get(i)

    def doubled(self, i: int) -> NDArray[Any] | None:
        """Return what a constant that was computed from the batch's size is for twice of it."""
        return self._doubled.get(i, self.known(i))

    @property
    def batch(self) -> int:
        """Return the batch that the file was converted for."""
        shape = self.tensor(self.graph.inputs[0]).shape if self.graph.inputs else ()
        return shape[0] if shape else 1

    def is_weight(self, i: int) -> bool:
        """Tell whether a tensor is constant numbers, float or quantized, not sizes or indices."""
        t = self.tensor(i)
        is_float = t.dtype in {"float16", "float32"}
        return self.known(i) is not None and (is_float or self.is_quantized(i))

    def is_stored(self, i: int) -> bool:
        """Tell whether a constant is in the file, not computed here."""
        i = self._same.get(i, i)
        return bool(self.file.buffers[self.tensor(i).buffer].size)

    def numbers(self, i: int, op: Operator) -> tuple[int, ...]:
        """Return a constant of integers (axes, sizes); raise CompileError where it is computed."""
        value = self.known(i)
        if value is None:
            raise refusal(
                op, self, f"{self.names[i]!r} is computed while running: convert with fixed sizes"
            )
        return tuple(int(n) for n in value.reshape(-1))

    def axes(self, i: int, op: Operator, rank: int) -> tuple[int, ...]:
        """Return constant axes, none negative."""
        return tuple(n % rank for n in self.numbers(i, op))

    def layout(self, *tensors: int, rank: int) -> Layout:
        """Return the layout in which operands can be read with the fewest transposes."""
        made = [self._values[i] for i in tensors if i in self._values and self.rank(i) == rank]
        if rank < 3 or not made or all("last" in layouts for layouts in made):
            return "last"
        return "first"

    # -- reading ----------------------------------------------------------------------------

    def read(self, i: int, layout: Layout = "last") -> str:
        """Return the name of a tensor's numbers: float32 where they are quantized."""
        if i in self.padded:
            self._pad(i)
        if i not in self._values:
            return self._constant(i, layout)
        values = self._values[i]
        if layout == "last" and i in self._fed:
            self._fed.discard(i)
            values["last"] = self.again(i, values["last"])
        if layout not in values:
            order = to_first(self.rank(i)) if layout == "first" else to_last(self.rank(i))
            value = next(iter(values.values()))
            self._put(i, self.turned(value, order), layout)
        return values[layout]

    def operand(self, i: int, layout: Layout, rank: int) -> str:
        """Return a tensor's numbers so that they broadcast over one of `rank` in that layout."""
        missing = rank - self.rank(i)
        if layout == "last" or (prod(self.shape(i)) == 1 and self.known(i) is not None):
            return self.read(i)
        shape = (1,) * missing + self.shape(i)
        if self.is_weight(i):
            return self.weight(i, to_first(rank), shape)
        if not missing:
            return self.read(i, layout)
        return self.transposed(self.e.Reshape(self.read(i), self.e.ints(*shape)), to_first(rank))

    def turned(self, value: str, order: tuple[int, ...]) -> str:
        """Emit a change of layout: a Reshape where no number has to move, whatever the batch."""
        dims = self.e.static(value)
        if len(order) == 4 and dims is not None:
            moved = [n for n in order[1:] if dims[n] != 1]
            if moved == sorted(moved):
                return self.e.Reshape(value, self.e.ints(*(dims[n] for n in order)))
        return self.transposed(value, order)

    def transposed(self, value: str, order: tuple[int, ...]) -> str:
        """Emit a transposition, unless it is none."""
        if order == tuple(range(len(order))):
            return value
        return self.e.Transpose(value, perm=order)

    def weight(
        self, i: int, order: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> str:
        """Return a tensor's numbers transposed by `order`, stored so where they are constant.

        A second reader that wants another order gets a Transpose of what the first one stored.

        Args:
            i: the tensor.
            order: of its dimensions, or of those of `shape`.
            shape: what its numbers are seen as.
        """
        dims = shape or self.shape(i)
        order = order or tuple(range(len(dims)))
        if not self.is_weight(i):
            value = self.read(i)
            value = value if shape is None else self.e.Reshape(value, self.e.ints(*shape))
            return self.transposed(value, order)
        i = self._same.get(i, i)
        if i not in self._stored:
            self._stored[i] = (self._store(i, order, dims), order)
            return self._stored[i][0]
        value, first = self._stored[i]
        at = self.e.static(value) or ()
        if first == order and at == tuple(dims[n] for n in order):
            return value
        if len(first) > 1:
            value = self.transposed(value, tuple(int(n) for n in np.argsort(first)))
        value = self.e.Reshape(value, self.e.ints(*dims))
        return self.transposed(value, order)

    def computed(self, value: NDArray[Any]) -> str:
        """Emit numbers that were computed here: behind an Expand nobody takes them for weights."""
        one = value.reshape(-1)[0]
        start = one if (value == one).all() else value
        return self.e.Expand(self.e.const(start), self.e.ints(*value.shape))

    # -- writing ----------------------------------------------------------------------------

    def write(self, i: int, value: str, layout: Layout = "last") -> None:
        """Say that a tensor's numbers are `value`, rounded to its lattice where it has one."""
        t = self.tensor(i)
        if t.dtype == "int16" and self.is_quantized(i):
            raise CompileError(
                f"expected activations in 8 bits or float32, {t.name!r} is int16: convert with "
                "int8 activations"
            )
        self._values[i] = {}
        if not self.is_quantized(i):
            self._final.setdefault(value, self.names[i])
            self._values[i][layout] = value
            return
        is_output = i in self.graph.outputs
        self._final.setdefault(value, f"{self.names[i]}.real" if is_output else self.names[i])
        self._put(i, value, layout)

    def again(self, i: int, value: str) -> str:
        """Return moved numbers of a tensor, rounded once more: integer kernels ask for the pair."""
        if not self.is_quantized(i):
            return value
        scale, zero = self.scale(i), self._inner(i)
        return self.e.DequantizeLinear(self.e.QuantizeLinear(value, scale, zero), scale, zero)

    def know(self, i: int, value: NDArray[Any], doubled: NDArray[Any] | None = None) -> None:
        """Say that a tensor is constant, or, with `doubled`, what it is for twice the batch."""
        self._known[i] = value
        if doubled is not None and not np.array_equal(value, doubled):
            self._doubled[i] = doubled

    def same(self, i: int, other: int) -> None:
        """Say that a tensor is another one, dequantized or not: a constant stays a weight."""
        self._same[i] = self._same.get(other, other)

    def share(self, *tensors: int) -> None:
        """Let tensors of one lattice share their scale, which TFLite wants equal."""
        quantized = [t for t in tensors if self.is_quantized(t) and self.known(t) is None]
        first, *rest = quantized or [-1]
        for i in rest:
            a, b = self.tensor(first), self.tensor(i)
            equal = np.array_equal(a.scale, b.scale) and np.array_equal(a.zero_point, b.zero_point)
            if equal and i not in self._scales and a.dtype == b.dtype:
                self._scales[i] = self.scale(first)
                self.steps[self._scales[i]].append(i)

    def fix(self, i: int) -> None:
        """Say that the kernel takes a tensor's quantization for granted: it must not learn."""
        if self.is_quantized(i):
            self.fixed.add(self.scale(i))

    def scale(self, i: int) -> str:
        """Return the name of an activation's scale."""
        if i not in self._scales:
            t = self.tensor(i)
            if len(t.scale) != 1:
                raise CompileError(
                    f"expected one scale for activation {t.name!r}, got {len(t.scale)}: convert "
                    "with activations quantized per tensor"
                )
            name = self.e.initializer(f"{self.names[i]}.scale", t.scale.reshape(()))
            self._scales[i] = name
            self.steps[name] = [i]
        return self._scales[i]

    def zero(self, i: int) -> str:
        """Return the name of an activation's zero point.

        Inside the graph int8 is held as uint8, its zero point 128 higher: the same numbers.
        onnxruntime on x86 does so by itself, but not for a tensor that several operators read.
        """
        t = self.tensor(i)
        point = int(t.zero_point[0]) if len(t.zero_point) else 0
        if t.dtype == "int8" and i not in self.graph.inputs and i not in self.graph.outputs:
            return self._point("uint8", point + _RAISED)
        return self._point(t.dtype, point)

    def begin(self) -> None:
        """Declare the graph's inputs."""
        for i in self.graph.inputs:
            t = self.tensor(i)
            open_at = [n for n, d in enumerate(t.signature_shape or t.shape) if d is None]
            if any(open_at[1:]) or (open_at and open_at != [0]):
                raise CompileError(
                    f"expected fixed sizes after the batch, dimension {open_at[-1]} of input "
                    f"{t.name!r} is open: convert the model with a fixed input shape"
                )
            if t.dtype == "int16" and self.is_quantized(i):
                raise CompileError(
                    f"expected an input in 8 bits or float32, {t.name!r} is int16: convert with "
                    "int8 activations"
                )
            value = self.e.input(self.names[i], t.dtype, t.shape)
            if self.is_quantized(i):
                self._integers[i] = {"last": value}
                value = self.e.DequantizeLinear(value, self.scale(i), self.zero(i))
                self._fed |= {i} if t.dtype == "int8" else set()
            self._values[i] = {"last": value}

    def end(self) -> tuple[list[str], dict[str, str]]:
        """Return the graph's outputs and the names that tensors get in the end."""
        outputs = []
        final = dict(self._final)
        for i in self.graph.outputs:
            value = self.read(i)
            if self.is_quantized(i) and i in self._integers:
                value = self._integers[i]["last"]
            name = self.names[i]
            if value != name:
                is_free = value in {n.outputs[0] for n in self.e.nodes} and value not in outputs
                if not is_free:
                    value = self.e.Identity(value)
                taken = [v for v, n in final.items() if n == name and v != value]
                final |= dict.fromkeys(taken, f"{name}.real")
                final[value] = name
            outputs.append(value)
        return outputs, final

    # -- inside -----------------------------------------------------------------------------

    def _point(self, dtype: str, point: int) -> str:
        key = (dtype, point)
        if key not in self._zeros:
            array = np.array(point, dtype)
            self._zeros[key] = self.e.initializer(f"zero.{dtype}.{point}", array)
        return self._zeros[key]

    def _inner(self, i: int) -> str:
        """Return the zero point of a tensor where the graph reads it, inputs and outputs too."""
        t = self.tensor(i)
        if t.dtype == "int8":
            return self._point("uint8", int(t.zero_point[0]) + _RAISED)
        return self.zero(i)

    def _put(self, i: int, value: str, layout: Layout) -> None:
        if self.is_quantized(i):
            is_turned_input = i in self.graph.inputs
            scale = self.scale(i)
            zero = self._inner(i) if is_turned_input else self.zero(i)
            whole = self.e.QuantizeLinear(value, scale, zero)
            self._integers.setdefault(i, {})[layout] = whole
            value = self.e.DequantizeLinear(whole, scale, zero)
        self._values[i][layout] = value

    def _constant(self, i: int, layout: Layout) -> str:
        value = self.known(i)
        if value is None:
            t = self.tensor(i)
            raise CompileError(
                f"expected tensor {t.name!r} to be stored or made by an operator, it is neither: "
                "convert the model again"
            )
        if self.is_weight(i) and self.is_stored(i):
            return self.weight(i, to_first(self.rank(i)) if layout == "first" else None)
        if self.is_quantized(i):
            t = self.tensor(i)
            value = (value - t.zero_point[0]).astype(np.float32) * t.scale[0]
        twice = self._doubled.get(i)
        if twice is not None and (value == value.reshape(-1)[:1]).all():
            pairs = zip(value.shape, twice.shape, strict=True)
            value = value.reshape(-1)[0] * np.ones(
                [a if a == b else 1 for a, b in pairs], value.dtype
            )
        elif twice is not None and value.dtype == np.float32:
            raise CompileError(
                f"expected constants for any batch, {self.names[i]!r} holds for {self.batch}: "
                "convert the model with a fixed batch of 1"
            )
        if value.dtype == np.float32 and value.size > 1:
            return self.computed(
                value if layout == "last" else value.transpose(to_first(value.ndim))
            )
        if layout == "first":
            value = np.transpose(value, to_first(value.ndim))
        return self.e.const(value, value.dtype)

    def _store(self, i: int, order: tuple[int, ...], dims: tuple[int, ...]) -> str:
        """Store a constant and return the name of its numbers."""
        t, array = self.tensor(i), self.known(i)
        if array is None or array.dtype.name not in _STORED:
            raise CompileError(
                f"expected weights in float32, float16 or 8 bits, {t.name!r} is {t.dtype}: "
                "convert with int8 weights"
            )
        name = self.names[i]
        array = np.ascontiguousarray(array.reshape(dims).transpose(order))
        self.e.initializer(name, array)
        kept = "float32" if t.dtype == "float16" else t.dtype
        if kept == array.dtype.name and self.file.buffers[t.buffer].size:
            back = tuple(int(n) for n in np.argsort(order))
            self.origins[name] = Origin(i, None if back == tuple(range(len(back))) else back)
        if not self.is_quantized(i):
            return name
        if len(t.scale) == 1:
            scale = self.e.initializer(f"{name}.scale", t.scale.reshape(()))
            point = int(t.zero_point[0]) if len(t.zero_point) else 0
            zero = None if t.dtype == "int32" else self._point(t.dtype, point)
            return self.e.DequantizeLinear(name, scale, zero)
        along = order.index(t.axis + len(dims) - len(t.shape))
        scale = self.e.initializer(f"{name}.scale", t.scale.copy())
        points = np.broadcast_to(t.zero_point if len(t.zero_point) else 0, t.scale.shape)
        zero = None if t.dtype == "int32" else self.e.const(points, t.dtype)
        return self.e.DequantizeLinear(name, scale, zero, axis=along)

    def _pad(self, i: int) -> None:
        source, amounts = self.padded.pop(i)
        layout = self.layout(source, rank=len(amounts))
        order = to_first(len(amounts)) if layout == "first" else tuple(range(len(amounts)))
        before, after = ([amounts[n][side] for n in order] for side in (0, 1))
        self.share(i, source)
        value = self.e.Pad(self.read(source, layout), self.e.ints(*before, *after))
        self.write(i, value, layout)


def refusal(op: Operator, f: Forward, why: str) -> CompileError:
    """Return the error for an operator that cannot be imported, with its name and the reason."""
    made = next((f.names[i] for i in op.outputs if i >= 0), "")
    return CompileError(f"expected operators that can be imported, {op.op} ({made!r}): {why}")


def _names(graph: Subgraph) -> list[str]:
    """Give each tensor a name of its own."""
    taken: set[str] = set()
    names = []
    for i, tensor in enumerate(graph.tensors):
        name = tensor.name or f"tensor.{i}"
        if name in taken or name.startswith("g."):
            name = f"{name}.{i}"
        taken.add(name)
        names.append(name)
    return names
