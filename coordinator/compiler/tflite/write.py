# SPDX-License-Identifier: Apache-2.0
"""Writes `.tflite` files with the `flatbuffers` package alone: one subgraph of builtin operators.

The schema's numbers that are needed stand here as tables: operator codes, and the fields of the
options tables in the order of their ids. Same model, same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import CompileError

SCHEMA_VERSION = 3
_IDENTIFIER = b"TFL3"
_ALIGN = 16

TYPES = {
    "float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7,
    "int8": 9,
}  # fmt: skip
"""numpy's names to the schema's TensorType."""

PADDINGS = {"SAME": 0, "VALID": 1}
ACTIVATIONS = {"NONE": 0, "RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}

_ACT, _PAD, _INT, _BOOL, _FLOAT = "activation", "padding", "int", "bool", "float"
_TYPE, _INTS = "type", "ints"
_BINARY = (("activation", _ACT),)
_CODED = {_ACT: ACTIVATIONS, _PAD: PADDINGS, _TYPE: TYPES}

OPTIONS: dict[str, tuple[int, tuple[tuple[str, str], ...]]] = {
    "Conv2D": (1, (
        ("padding", _PAD), ("stride_w", _INT), ("stride_h", _INT), ("activation", _ACT),
        ("dilation_w", _INT), ("dilation_h", _INT),
    )),
    "DepthwiseConv2D": (2, (
        ("padding", _PAD), ("stride_w", _INT), ("stride_h", _INT), ("multiplier", _INT),
        ("activation", _ACT), ("dilation_w", _INT), ("dilation_h", _INT),
    )),
    "Pool2D": (5, (
        ("padding", _PAD), ("stride_w", _INT), ("stride_h", _INT), ("filter_w", _INT),
        ("filter_h", _INT), ("activation", _ACT),
    )),
    "FullyConnected": (8, (("activation", _ACT), ("weights_format", _INT), ("keep_dims", _BOOL))),
    "Softmax": (9, (("beta", _FLOAT),)),
    "Concatenation": (10, (("axis", _INT), ("activation", _ACT))),
    "Add": (11, _BINARY),
    "ResizeBilinear": (15, (("_0", _INT), ("_1", _INT), ("align", _BOOL), ("half_pixel", _BOOL))),
    "Reshape": (17, (("new_shape", _INTS),)),
    "SpaceToDepth": (19, (("block", _INT),)),
    "Mul": (21, _BINARY),
    "Pad": (22, ()),
    "Gather": (23, (("axis", _INT), ("batch_dims", _INT))),
    "Transpose": (26, ()),
    "Reducer": (27, (("keep_dims", _BOOL),)),
    "Sub": (28, _BINARY),
    "Div": (29, _BINARY),
    "StridedSlice": (32, (
        ("begin_mask", _INT), ("end_mask", _INT), ("ellipsis_mask", _INT), ("new_axis_mask", _INT),
        ("shrink_axis_mask", _INT),
    )),
    "Exp": (33, ()),
    "Split": (35, (("num", _INT),)),
    "LogSoftmax": (36, ()),
    "Cast": (37, (("from_type", _TYPE), ("to_type", _TYPE))),
    "Dequantize": (38, ()),
    "MaximumMinimum": (39, ()),
    "ArgMax": (40, (("to_type", _TYPE),)),
    "Less": (41, ()),
    "Neg": (42, ()),
    "PadV2": (43, ()),
    "Greater": (44, ()),
    "GreaterEqual": (45, ()),
    "LessEqual": (46, ()),
    "Slice": (48, ()),
    "TransposeConv": (49, (
        ("padding", _PAD), ("stride_w", _INT), ("stride_h", _INT), ("activation", _ACT),
    )),
    "Tile": (51, ()),
    "Equal": (53, ()),
    "NotEqual": (54, ()),
    "Shape": (55, (("to_type", _TYPE),)),
    "Pow": (56, ()),
    "Pack": (59, (("count", _INT), ("axis", _INT))),
    "LogicalOr": (60, ()),
    "OneHot": (61, (("axis", _INT),)),
    "LogicalAnd": (62, ()),
    "LogicalNot": (63, ()),
    "Square": (66, ()),
    "Fill": (68, ()),
    "ResizeNearestNeighbor": (74, (("align", _BOOL), ("half_pixel", _BOOL))),
    "LeakyRelu": (75, (("alpha", _FLOAT),)),
    "SquaredDifference": (76, ()),
    "Abs": (78, ()),
    "ReverseV2": (81, ()),
    "AddN": (82, ()),
    "GatherNd": (83, ()),
    "Cos": (84, ()),
    "Quantize": (89, ()),
    "HardSwish": (91, ()),
    "DepthToSpace": (94, (("block", _INT),)),
    "SelectV2": (98, ()),
    "BatchMatMul": (101, (("adj_x", _BOOL), ("adj_y", _BOOL))),
    "Cumsum": (102, (("exclusive", _BOOL), ("reverse", _BOOL))),
    "BroadcastTo": (104, ()),
    "FloorMod": (72, ()),
    "VarHandle": (111, (("container", "text"), ("shared_name", "text"))),
    "ReadVariable": (112, ()),
    "AssignVariable": (113, ()),
}  # fmt: skip
"""Options table to its number in the union and its fields, in the order of their ids."""

OPERATORS: dict[str, tuple[int, str, int]] = {
    "ADD": (0, "Add", 1),
    "AVERAGE_POOL_2D": (1, "Pool2D", 1),
    "CONCATENATION": (2, "Concatenation", 1),
    "CONV_2D": (3, "Conv2D", 1),
    "DEPTHWISE_CONV_2D": (4, "DepthwiseConv2D", 1),
    "DEPTH_TO_SPACE": (5, "DepthToSpace", 1),
    "DEQUANTIZE": (6, "Dequantize", 1),
    "FLOOR": (8, "", 1),
    "FULLY_CONNECTED": (9, "FullyConnected", 1),
    "LOGISTIC": (14, "", 1),
    "MAX_POOL_2D": (17, "Pool2D", 1),
    "MUL": (18, "Mul", 1),
    "RELU": (19, "", 1),
    "RELU_N1_TO_1": (20, "", 1),
    "RELU6": (21, "", 1),
    "RESHAPE": (22, "Reshape", 1),
    "RESIZE_BILINEAR": (23, "ResizeBilinear", 1),
    "SOFTMAX": (25, "Softmax", 1),
    "SPACE_TO_DEPTH": (26, "SpaceToDepth", 1),
    "TANH": (28, "", 1),
    "PAD": (34, "Pad", 1),
    "GATHER": (36, "Gather", 1),
    "TRANSPOSE": (39, "Transpose", 1),
    "MEAN": (40, "Reducer", 1),
    "SUB": (41, "Sub", 1),
    "DIV": (42, "Div", 1),
    "STRIDED_SLICE": (45, "StridedSlice", 1),
    "EXP": (47, "Exp", 1),
    "SPLIT": (49, "Split", 1),
    "LOG_SOFTMAX": (50, "LogSoftmax", 1),
    "CAST": (53, "Cast", 1),
    "PRELU": (54, "", 1),
    "MAXIMUM": (55, "MaximumMinimum", 1),
    "ARG_MAX": (56, "ArgMax", 1),
    "MINIMUM": (57, "MaximumMinimum", 1),
    "LESS": (58, "Less", 1),
    "NEG": (59, "Neg", 1),
    "PADV2": (60, "PadV2", 1),
    "GREATER": (61, "Greater", 1),
    "GREATER_EQUAL": (62, "GreaterEqual", 1),
    "LESS_EQUAL": (63, "LessEqual", 1),
    "SLICE": (65, "Slice", 1),
    "SIN": (66, "", 1),
    "TRANSPOSE_CONV": (67, "TransposeConv", 1),
    "TILE": (69, "Tile", 1),
    "EQUAL": (71, "Equal", 1),
    "NOT_EQUAL": (72, "NotEqual", 1),
    "LOG": (73, "", 1),
    "SUM": (74, "Reducer", 1),
    "SQRT": (75, "", 1),
    "RSQRT": (76, "", 1),
    "SHAPE": (77, "Shape", 1),
    "POW": (78, "Pow", 1),
    "REDUCE_PROD": (81, "Reducer", 1),
    "REDUCE_MAX": (82, "Reducer", 1),
    "PACK": (83, "Pack", 1),
    "LOGICAL_OR": (84, "LogicalOr", 1),
    "ONE_HOT": (85, "OneHot", 1),
    "LOGICAL_AND": (86, "LogicalAnd", 1),
    "LOGICAL_NOT": (87, "LogicalNot", 1),
    "REDUCE_MIN": (89, "Reducer", 1),
    "SQUARE": (92, "Square", 1),
    "FILL": (94, "Fill", 1),
    "FLOOR_MOD": (95, "FloorMod", 1),
    "RESIZE_NEAREST_NEIGHBOR": (97, "ResizeNearestNeighbor", 1),
    "LEAKY_RELU": (98, "LeakyRelu", 1),
    "SQUARED_DIFFERENCE": (99, "SquaredDifference", 1),
    "ABS": (101, "Abs", 1),
    "CEIL": (104, "", 1),
    "REVERSE_V2": (105, "ReverseV2", 1),
    "ADD_N": (106, "AddN", 1),
    "GATHER_ND": (107, "GatherNd", 1),
    "COS": (108, "Cos", 1),
    "ELU": (111, "", 1),
    "QUANTIZE": (114, "Quantize", 1),
    "ROUND": (116, "", 1),
    "HARD_SWISH": (117, "HardSwish", 1),
    "SELECT_V2": (123, "SelectV2", 1),
    "BATCH_MATMUL": (126, "BatchMatMul", 1),
    "CUMSUM": (128, "Cumsum", 1),
    "BROADCAST_TO": (130, "BroadcastTo", 2),
    "VAR_HANDLE": (142, "VarHandle", 1),
    "READ_VARIABLE": (143, "ReadVariable", 1),
    "ASSIGN_VARIABLE": (144, "AssignVariable", 1),
}
"""Operator to its code, its options table and the lowest version that a runtime registers."""

SLICES = frozenset({"SLICE", "STRIDED_SLICE"})
"""Operators whose outputs must tell that a dimension is free, and whose inputs must not."""

INT8_VERSIONS = {
    "ADD": 2, "AVERAGE_POOL_2D": 2, "CONCATENATION": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2, "FULLY_CONNECTED": 4, "MAX_POOL_2D": 2, "MEAN": 2, "MUL": 2, "PAD": 2,
    "TRANSPOSE": 2, "SLICE": 2, "SOFTMAX": 2, "PADV2": 2,
}  # fmt: skip
"""The version in which an operator learned int8."""


@dataclass(frozen=True)
class Quantization:
    """Scales and zero points: one, or one for each index of `axis`.

    Attributes:
        source: what the scale is called where training changes it; not written.
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int = 0
    source: str = ""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the subgraph; `shape` has None where any size does, written as 1 and -1.

    Attributes:
        data: of a constant.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    data: NDArray[Any] | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Operator:
    """A builtin operator: places of its inputs (-1: absent) and outputs, options by name."""

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """One subgraph with one signature, whose ports are called as their tensors are."""

    tensors: Sequence[Tensor]
    operators: Sequence[Operator]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    signature: str = "serving_default"
    description: str = "fedge"


def write(model: Model) -> bytes:
    """Return the file. Raises: CompileError for an operator or type that is not in the tables."""
    b: Any = flatbuffers.Builder(1 << 16)
    buffers = [_buffer(b, None)]
    places = []
    for tensor in model.tensors:
        places.append(len(buffers) if tensor.data is not None else 0)
        if tensor.data is not None:
            buffers.append(_buffer(b, tensor.data))
    codes = _codes(model)
    root = _table(
        b,
        [
            ("u32", SCHEMA_VERSION),
            ("ref", _vector(b, [_code(b, *code) for code in codes])),
            ("ref", _vector(b, [_subgraph(b, model, places, codes)])),
            ("ref", b.CreateString(model.description)),
            ("ref", _vector(b, buffers)),
            None,
            None,
            ("ref", _vector(b, [_signature(b, model)])),
        ],
    )
    b.Finish(root, file_identifier=_IDENTIFIER)
    data: bytearray = b.Output()
    return bytes(data)


def _codes(model: Model) -> list[tuple[str, int]]:
    return sorted({(op.op, _version(model, op)) for op in model.operators})


def _version(model: Model, op: Operator) -> int:
    if op.op not in OPERATORS:
        raise CompileError(f"expected a builtin operator, got {op.op}: add it to write.OPERATORS")
    used = {model.tensors[i].dtype for i in (*op.inputs[:1], *op.outputs) if i >= 0}
    lowest = OPERATORS[op.op][2]
    if op.op == "FULLY_CONNECTED" and op.options.get("keep_dims"):
        lowest = 5
    return INT8_VERSIONS.get(op.op, lowest) if "int8" in used else lowest


def _code(b: Any, op: str, version: int) -> int:
    code = OPERATORS[op][0]
    return _table(b, [("i8", min(code, 127)), None, ("i32", version), ("i32", code)])


def _subgraph(b: Any, model: Model, places: list[int], codes: list[tuple[str, int]]) -> int:
    told = {*model.inputs, *model.outputs}
    told |= {o.outputs[0] for o in model.operators if o.op in SLICES}
    tensors = [_tensor(b, t, places[i], tells=i in told) for i, t in enumerate(model.tensors)]
    index = {code: i for i, code in enumerate(codes)}
    operators = [_operator(b, op, index[op.op, _version(model, op)]) for op in model.operators]
    return _table(
        b,
        [
            ("ref", _vector(b, tensors)),
            ("ref", _numbers(b, model.inputs)),
            ("ref", _numbers(b, model.outputs)),
            ("ref", _vector(b, operators)),
            ("ref", b.CreateString("main")),
        ],
    )


def _tensor(b: Any, tensor: Tensor, buffer: int, *, tells: bool) -> int:
    """Write a tensor; few tell that a dimension is free.

    Runtimes reckon the sizes between operators again whenever a port is resized. But SLICE waits
    for its numbers, and all that follows with it, where its input tells that it may have any size,
    and newer ones insist on the size of an output that does not.
    """
    if tensor.dtype not in TYPES:
        raise CompileError(f"expected a type out of {', '.join(TYPES)}, got {tensor.dtype}")
    shape = _numbers(b, [1 if d is None else d for d in tensor.shape])
    free = tells and None in tensor.shape
    signature = _numbers(b, [-1 if d is None else d for d in tensor.shape]) if free else None
    name = b.CreateString(tensor.name)
    quantization = _quantization(b, tensor.quantization) if tensor.quantization else None
    return _table(
        b,
        [
            ("ref", shape),
            ("i8", TYPES[tensor.dtype]),
            ("u32", buffer),
            ("ref", name),
            ("ref", quantization) if quantization is not None else None,
            None,
            None,
            ("ref", signature) if signature is not None else None,
            ("bool", True),
        ],
    )


def _quantization(b: Any, q: Quantization) -> int:
    scale = b.CreateNumpyVector(np.array(q.scale, "<f4"))
    zero = b.CreateNumpyVector(np.array(q.zero_point, "<i8"))
    fields = [None, None, ("ref", scale), ("ref", zero), None, None, ("i32", q.axis)]
    return _table(b, fields)


def _operator(b: Any, op: Operator, code: int) -> int:
    table = OPERATORS[op.op][1]
    if op.options and not table:
        raise CompileError(f"expected no options of {op.op}, it has no {sorted(op.options)}")
    kind, options = (0, None) if not table else _options(b, table, op)
    inputs, outputs = _numbers(b, op.inputs), _numbers(b, op.outputs)
    return _table(
        b,
        [
            ("u32", code),
            ("ref", inputs),
            ("ref", outputs),
            ("u8", kind),
            ("ref", options) if options is not None else None,
        ],
    )


def _options(b: Any, table: str, op: Operator) -> tuple[int, int]:
    number, names = OPTIONS[table]
    unknown = set(op.options) - {name for name, _ in names}
    if unknown:
        raise CompileError(f"expected options of {op.op}, it has no {sorted(unknown)}")
    fields = [_option(b, kind, op.options.get(name)) for name, kind in names]
    return number, _table(b, fields)


def _option(b: Any, kind: str, value: Any) -> tuple[str, Any] | None:
    if value is None:
        return None
    if kind == _INTS:
        return "ref", _numbers(b, value)
    if kind == "text":
        return "ref", b.CreateString(value)
    if kind in _CODED:
        return "i8", _CODED[kind][value]
    return {_BOOL: "bool", _FLOAT: "f32", _INT: "i32"}[kind], value


def _signature(b: Any, model: Model) -> int:
    inputs = _vector(b, [_port(b, model, i) for i in model.inputs])
    outputs = _vector(b, [_port(b, model, i) for i in model.outputs])
    key = b.CreateString(model.signature)
    return _table(b, [("ref", inputs), ("ref", outputs), ("ref", key), None, ("u32", 0)])


def _port(b: Any, model: Model, index: int) -> int:
    return _table(b, [("ref", b.CreateString(model.tensors[index].name)), ("u32", index)])


def _buffer(b: Any, data: NDArray[Any] | None) -> int:
    if data is None:
        return _table(b, [])
    raw = np.ascontiguousarray(data)
    flat = np.frombuffer(raw.astype(raw.dtype.newbyteorder("<")).tobytes(), np.uint8)
    b.StartVector(1, flat.size, _ALIGN)
    b.head -= flat.size
    b.Bytes[b.head : b.head + flat.size] = flat.tobytes()
    return _table(b, [("ref", b.EndVector())])


def _table(b: Any, fields: Sequence[tuple[str, Any] | None]) -> int:
    """Write a table; a None field is absent, the others stand whatever their value."""
    adders: dict[str, Any] = {
        "i8": b.PrependInt8,
        "u8": b.PrependUint8,
        "bool": b.PrependBool,
        "i32": b.PrependInt32,
        "u32": b.PrependUint32,
        "f32": b.PrependFloat32,
        "ref": b.PrependUOffsetTRelative,
    }
    b.StartObject(len(fields))
    for slot, entry in enumerate(fields):
        if entry is not None:
            adders[entry[0]](entry[1])
            b.Slot(slot)
    return int(b.EndObject())


def _vector(b: Any, offsets: Sequence[int]) -> int:
    b.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    return int(b.EndVector())


def _numbers(b: Any, values: Sequence[int]) -> int:
    if not values:
        b.StartVector(4, 0, 4)
        return int(b.EndVector())
    return int(b.CreateNumpyVector(np.array(values, "<i4")))
