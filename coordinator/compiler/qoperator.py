# SPDX-License-Identifier: Apache-2.0
"""int8 models in QOperator format, rewritten to QDQ: the one form that is trained.

QLinearConv(x, w, y's scale) says what DequantizeLinear, Conv and QuantizeLinear say in a row;
onnxruntime fuses the row to the same integer kernel. Dynamic quantization (MatMulInteger, Cast, Mul
by both scales) becomes a product of dequantized factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, version_converter

from coordinator.compiler.names import fresh
from edge_sdk.errors import CompileError

_MS = "com.microsoft"
_PER_AXIS = 13


class _Writer:
    """A graph being rewritten: its stored tensors by name, the nodes written so far."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.stored = {t.name: t for t in graph.initializer}
        self.taken = set(self.stored) | {v.name for v in graph.input}
        self.taken |= {name for node in graph.node for name in node.output}
        self.nodes: list[onnx.NodeProto] = []
        self.scales: dict[str, tuple[str, str]] = {}  # of tensors that are integers

    def fresh(self, stem: str) -> str:
        """Return a name that nothing has."""
        return fresh(stem, self.taken)

    def value(self, name: str, node: onnx.NodeProto) -> NDArray[Any]:
        """Return a stored tensor; raise CompileError for a computed one."""
        if name not in self.stored:
            raise CompileError(
                f"expected stored scales and zero points in {label(node)}, {name!r} is computed: "
                "quantize with quant_format=QuantFormat.QDQ"
            )
        array: NDArray[Any] = numpy_helper.to_array(self.stored[name])
        return array

    def store(self, stem: str, array: NDArray[Any]) -> str:
        """Store a tensor and return its name."""
        name = self.fresh(stem)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        self.stored[name] = tensor
        self.graph.initializer.append(tensor)
        return name

    def flat(self, name: str, node: onnx.NodeProto) -> str:
        """Return a scale or zero point of one element as a scalar."""
        if not name or name not in self.stored:
            return name
        array = self.value(name, node)
        return self.store(f"{name}.one", array.reshape(())) if array.shape == (1,) else name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Write a standard operator."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def real(self, node: onnx.NodeProto, at: int, axis: int | None = None) -> str:
        """Dequantize the input at `at`, whose scale and zero point follow it."""
        x, scale, zero = (node.input[i] if i < len(node.input) else "" for i in range(at, at + 3))
        return self.dequantized(node, (x, scale, zero), axis)

    def dequantized(
        self, node: onnx.NodeProto, quantized: tuple[str, str, str], axis: int | None = None
    ) -> str:
        """Dequantize (integers, scale, zero point); a zero point may be absent."""
        x, scale, zero = quantized[0], *(self.flat(name, node) for name in quantized[1:])
        single = scale not in self.stored or self.value(scale, node).ndim == 0
        if not single and axis is None:
            raise CompileError(f"expected one scale for {x!r} in {label(node)}, got several")
        many = {} if single else {"axis": axis}
        if not single and zero and self.value(zero, node).ndim == 0:
            spread = np.full(self.value(scale, node).shape, self.value(zero, node))
            zero = self.store(f"{zero}.each", spread)
        inputs = [x, scale, zero] if zero else [x, scale]
        return self.add("DequantizeLinear", inputs, self.fresh(f"{x}.real"), **many)

    def whole(self, node: onnx.NodeProto, real: str, scale: str, zero: str) -> None:
        """Quantize a result to the node's output."""
        scale, zero = self.flat(scale, node), self.flat(zero, node)
        out = node.output[0]
        self.add("QuantizeLinear", [real, scale, zero] if zero else [real, scale], out)
        self.scales[out] = (scale, zero)


def label(node: onnx.NodeProto) -> str:
    """Return how messages call a node."""
    return f"{node.op_type} node {node.name or node.output[0]!r}"


def to_qdq(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without QOperator nodes, or the same one if it has none.

    Requires: Constant nodes stored, no control flow.
    Raises: CompileError, naming a node of the format that is not rewritten.
    """
    if not any(_is_qoperator(node) for node in proto.graph.node):
        return proto
    plain = onnx.ModelProto()
    plain.CopyFrom(_with_axes(proto))
    writer = _Writer(plain.graph)
    nodes = _dynamic(writer, list(plain.graph.node))
    for node in nodes:
        rule = RULES.get(node.op_type)
        if rule is not None and (node.op_type != "MaxPool" or node.input[0] in writer.scales):
            rule(writer, node)
        elif _is_qoperator(node) and node.op_type != "DynamicQuantizeLinear":
            raise CompileError(
                f"expected int8 in QDQ format, {label(node)} is of QOperator format and is not "
                "among those that are rewritten: quantize with quant_format=QuantFormat.QDQ"
            )
        else:
            writer.nodes.append(node)
            _follow(writer, node)
    del plain.graph.node[:]
    plain.graph.node.extend(writer.nodes)
    return plain


def _with_axes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Bring a model to the opset at which scales may be per channel."""
    version = next((o.version for o in proto.opset_import if o.domain in {"", "ai.onnx"}), 0)
    if version >= _PER_AXIS:
        return proto
    try:
        return version_converter.convert_version(proto, _PER_AXIS)
    except Exception as error:  # the converter raises bare C++ exceptions of many kinds
        raise CompileError(
            f"expected a QOperator model of opset {_PER_AXIS} or newer, got {version}, which does "
            "not convert: quantize it again"
        ) from error


def _is_qoperator(node: onnx.NodeProto) -> bool:
    """Tell whether a node computes on integers and scales in one."""
    names = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantize", "QAttention",
             "QEmbed")  # fmt: skip
    return node.op_type.startswith(names) and node.domain in {"", "ai.onnx", _MS}


_THROUGH = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def _follow(writer: _Writer, node: onnx.NodeProto) -> None:
    """Remember the scale of integers that a node makes or moves."""
    if node.op_type == "QuantizeLinear":
        zero = node.input[2] if len(node.input) > 2 else ""
        writer.scales[node.output[0]] = (node.input[1], zero)
    elif node.op_type in _THROUGH and node.input[0] in writer.scales:
        writer.scales[node.output[0]] = writer.scales[node.input[0]]


def _attributes(node: onnx.NodeProto, *without: str) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name not in without}


# --- the rules: write a node's meaning ------------------------------------------------------------
def _conv(w: _Writer, node: onnx.NodeProto) -> None:
    inputs = [w.real(node, 0), w.real(node, 3, axis=0)]
    if len(node.input) > 8 and node.input[8]:
        scales = w.value(node.input[1], node).reshape(-1)[0] * w.value(node.input[4], node)
        inputs.append(_bias(w, node, node.input[8], scales))
    real = w.add("Conv", inputs, w.fresh(f"{node.output[0]}.real"), **_attributes(node))
    w.whole(node, real, node.input[6], node.input[7])


def _bias(w: _Writer, node: onnx.NodeProto, name: str, scales: NDArray[Any]) -> str:
    """Dequantize an int32 bias by the scales of its product."""
    scales = scales.reshape(()) if scales.size == 1 else scales
    scale = w.store(f"{name}.scale", scales.astype(np.float32))
    zero = w.store(f"{name}.zero", np.zeros(scales.shape, np.int32))
    return w.dequantized(node, (name, scale, zero), 0)


def _matmul(w: _Writer, node: onnx.NodeProto) -> None:
    real = w.add("MatMul", [w.real(node, 0), w.real(node, 3, axis=_last(w, node.input[3]))],
                 w.fresh(f"{node.output[0]}.real"))  # fmt: skip
    w.whole(node, real, node.input[6], node.input[7])


def _last(w: _Writer, name: str) -> int | None:
    return len(w.stored[name].dims) - 1 if name in w.stored else None


def _gemm(w: _Writer, node: onnx.NodeProto) -> None:
    """QGemm (com.microsoft): the output is float where no scale is given for it."""
    given = [*node.input, *[""] * 9]
    attributes = _attributes(node)
    inputs = [w.real(node, 0), w.real(node, 3, axis=0 if attributes.get("transB") else 1)]
    if given[6]:
        factor = attributes.get("alpha", 1.0) * w.value(given[1], node).reshape(-1)[0]
        inputs.append(_bias(w, node, given[6], factor * w.value(given[4], node)))
    if not given[7]:
        w.add("Gemm", inputs, node.output[0], **attributes)
        return
    real = w.add("Gemm", inputs, w.fresh(f"{node.output[0]}.real"), **attributes)
    w.whole(node, real, given[7], given[8])


def _binary(op: str) -> Callable[[_Writer, onnx.NodeProto], None]:
    def apply(w: _Writer, node: onnx.NodeProto) -> None:
        given = [*node.input, ""]
        real = w.add(op, [w.real(node, 0), w.real(node, 3)], w.fresh(f"{node.output[0]}.real"))
        w.whole(node, real, given[6], given[7])

    return apply


def _unary(op: str) -> Callable[[_Writer, onnx.NodeProto], None]:
    def apply(w: _Writer, node: onnx.NodeProto) -> None:
        given, attributes = [*node.input, ""], _attributes(node, "channels_last", "opset")
        if any(a.name == "channels_last" and a.i for a in node.attribute):
            raise CompileError(f"expected channels first in {label(node)}, got channels_last=1")
        out = w.fresh(f"{node.output[0]}.real")
        w.whole(node, w.add(op, [w.real(node, 0)], out, **attributes), given[3], given[4])

    return apply


def _concat(w: _Writer, node: onnx.NodeProto) -> None:
    parts = [w.real(node, at) for at in range(2, len(node.input), 3)]
    real = w.add("Concat", parts, w.fresh(f"{node.output[0]}.real"), **_attributes(node))
    w.whole(node, real, node.input[0], node.input[1])


def _max_pool(w: _Writer, node: onnx.NodeProto) -> None:
    """A MaxPool of integers: their scale is that of its input."""
    scale, zero = w.scales[node.input[0]]
    real = w.dequantized(node, (node.input[0], scale, zero))
    out = w.fresh(f"{node.output[0]}.real")
    w.whole(node, w.add("MaxPool", [real], out, **_attributes(node)), scale, zero)


RULES: dict[str, Callable[[_Writer, onnx.NodeProto], None]] = {
    "MaxPool": _max_pool,
    "QGemm": _gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearAveragePool": _unary("AveragePool"),
    "QLinearConcat": _concat,
    "QLinearConv": _conv,
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearLeakyRelu": _unary("LeakyRelu"),
    "QLinearMatMul": _matmul,
    "QLinearMul": _binary("Mul"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearSoftmax": _unary("Softmax"),
}
"""What is rewritten, by operator; dynamic quantization is found by its pattern."""


# --- dynamic quantization -------------------------------------------------------------------------
def _dynamic(w: _Writer, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Replace Mul(Cast(MatMulInteger(x, w)), Mul(scale of x, scale of w)) by a real product."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    makers = {name: node for node in nodes for name in node.output}
    gone: set[int] = set()
    ends: dict[int, onnx.NodeProto] = {}
    for node in nodes:
        if node.op_type not in {"ConvInteger", "MatMulInteger"}:
            continue
        cast = _sole(readers, node.output[0], "Cast")
        end = _sole(readers, cast.output[0], "Mul") if cast is not None else None
        scales = _scales(makers, cast, end)
        if cast is None or end is None or scales is None:
            raise CompileError(
                f"expected {label(node)} to be cast to float and multiplied by the scales of both "
                "of its inputs: quantize with quant_format=QuantFormat.QDQ"
            )
        gone |= {id(node), id(cast)}
        ends[id(end)] = node
        makers[f"{node.output[0]}.scales"] = makers[scales]
    kept: list[onnx.NodeProto] = []
    for node in nodes:
        if id(node) in ends:
            product = ends[id(node)]
            both = makers[f"{product.output[0]}.scales"]
            kept += _product(w, product, both, node.output[0], makers)
        elif id(node) not in gone:
            kept.append(node)
    return kept


def _sole(readers: dict[str, list[onnx.NodeProto]], name: str, op: str) -> onnx.NodeProto | None:
    found = readers.get(name, [])
    return found[0] if len(found) == 1 and found[0].op_type == op else None


def _scales(
    makers: dict[str, onnx.NodeProto], cast: onnx.NodeProto | None, end: onnx.NodeProto | None
) -> str | None:
    """Return the product of both scales, by which the cast result is multiplied."""
    if cast is None or end is None:
        return None
    other = next((name for name in end.input if name != cast.output[0]), "")
    maker = makers.get(other)
    return other if maker is not None and maker.op_type == "Mul" else None


def _product(
    w: _Writer,
    node: onnx.NodeProto,
    both: onnx.NodeProto,
    out: str,
    makers: dict[str, onnx.NodeProto],
) -> list[onnx.NodeProto]:
    """Write a product of dequantized factors."""
    x, weight = node.input[:2]
    zeros = [*node.input[2:], "", ""][:2]
    dynamic = makers.get(x)
    if dynamic is None or dynamic.op_type != "DynamicQuantizeLinear":
        raise CompileError(f"expected DynamicQuantizeLinear to make the input of {label(node)}")
    stored = [name for name in both.input if name in w.stored]
    if dynamic.output[1] not in both.input or len(stored) != 1 or weight not in w.stored:
        raise CompileError(
            f"expected the scales of {label(node)} to be that of DynamicQuantizeLinear and a "
            "stored one: quantize with quant_format=QuantFormat.QDQ"
        )
    w.nodes, before = [], w.nodes
    real = w.dequantized(node, (x, dynamic.output[1], zeros[0]))
    axis = 0 if node.op_type == "ConvInteger" else _last(w, weight)
    factor = w.dequantized(node, (weight, _vector(w, stored[0], node), zeros[1]), axis)
    op = "Conv" if node.op_type == "ConvInteger" else "MatMul"
    w.add(op, [real, factor], out, **_attributes(node))
    w.nodes, made = before, w.nodes
    return made


def _vector(w: _Writer, name: str, node: onnx.NodeProto) -> str:
    """Return a scale that may be shaped to broadcast over channels as a scalar or a vector."""
    array = w.value(name, node)
    if array.ndim <= 1:
        return name
    return w.store(f"{name}.flat", array.reshape(-1) if array.size > 1 else array.reshape(()))
