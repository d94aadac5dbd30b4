# SPDX-License-Identifier: Apache-2.0
"""What LiteRT's own generated schema says about a file, and files made with it. Tests only."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edge_sdk.flatbuffer import Field, Schema
from edge_sdk.tflitefile import TfliteFile
from edge_sdk.tfliteschema import BUILTINS, DTYPES, ENUMS, OPTIONS

SOURCE = Path(schema.__file__).read_text(encoding="utf-8")
CODES = {
    "Bool": "?", "Int8": "b", "Uint8": "B", "Int16": "h", "Uint16": "H", "Int32": "i",
    "Uint32": "I", "Float32": "f", "Int64": "q", "Uint64": "Q", "Float64": "d",
}  # fmt: skip


def spelled(name: str) -> str:
    """Return a schema's name as its generated accessor has it: ``stride_w`` is ``StrideW``."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def fields_of(table: str) -> dict[int, tuple[str, str, str]]:
    """Return the fields of a generated class by slot: accessor, kind, default as written."""
    body = re.search(
        rf"^class {table}\(object\):\n(.*?)(?=^class |\Z)", SOURCE, re.MULTILINE | re.DOTALL
    )
    assert body
    found = {}
    head = r"^    def (\w+)\(self(?:, j)?\):\n        o = .*?Offset\((\d+)\)\)\n"
    pattern = head + r"(.*?)(?=^    # |^def |\Z)"
    for name, offset, code in re.findall(pattern, body[1], re.MULTILINE | re.DOTALL):
        if re.search(r"(Length|AsNumpy|IsNone)$", name):
            continue
        flags = re.findall(r"number_types\.(\w+)Flags", code)
        if "obj = " in code or "Table(" in code:
            kind = "table"
        elif "_tab.String" in code:
            kind = "string"
        else:
            kind = CODES[flags[0]]
        kind = "[" * ("Vector" in code) + kind
        default = re.findall(r"^        return (.*)$", code, re.MULTILINE)[-1]
        found[(int(offset) - 4) // 2] = (name, kind, default)
    return found


def agrees(table: str, ours: Schema) -> None:
    """Compare one of our tables, field by field."""
    theirs = fields_of(table)
    assert {i for i, field in enumerate(ours) if field} == set(theirs), table
    for i, (name, kind, default) in theirs.items():
        field = ours[i]
        assert isinstance(field, Field)
        assert (spelled(field.name), field.kind) == (name, kind), table
        if len(kind) == 1:
            assert float(field.default) == float({"True": 1, "False": 0}.get(default, default))


def compare(data: bytes, told: TfliteFile) -> None:
    """Compare everything that we read of a file with the generated object tree."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    assert told.version == model.version
    assert told.description == _text(model.description)
    assert len(told.buffers) == len(model.buffers or [])
    for i, theirs in enumerate(model.buffers or []):
        raw = theirs.data if theirs.data is not None else b""
        if theirs.size > 1 and theirs.offset > 1:
            raw = data[theirs.offset : theirs.offset + theirs.size]
        assert bytes(told.data(i)) == bytes(raw)
    assert len(told.subgraphs) == len(model.subgraphs)
    for ours, theirs in zip(told.subgraphs, model.subgraphs, strict=True):
        assert ours.name == _text(theirs.name)
        assert (ours.inputs, ours.outputs) == (_ints(theirs.inputs), _ints(theirs.outputs))
        for tensor, peer in zip(ours.tensors, theirs.tensors or [], strict=True):
            _compare_tensor(data, tensor, peer)
        for operator, peer in zip(ours.operators, theirs.operators or [], strict=True):
            _compare_operator(operator, peer, model.operatorCodes[peer.opcodeIndex])
    assert told.signatures == {
        _text(s.signatureKey): (
            s.subgraphIndex,
            {_text(t.name): t.tensorIndex for t in s.inputs or []},
            {_text(t.name): t.tensorIndex for t in s.outputs or []},
        )
        for s in model.signatureDefs or []
    }
    assert told.metadata == {_text(m.name): m.buffer for m in model.metadata or []}


def _compare_tensor(data: bytes, ours: Any, theirs: Any) -> None:
    assert ours.name == _text(theirs.name)
    assert ours.dtype == DTYPES[theirs.type][0]
    assert ours.shape == _ints(theirs.shape)
    free = _ints(theirs.shapeSignature) or ours.shape
    assert ours.signature_shape == tuple(None if d == -1 else d for d in free)
    assert (ours.buffer, ours.is_variable) == (theirs.buffer, theirs.isVariable)
    assert ours.has_rank == theirs.hasRank
    assert ours.sparsity == (theirs.sparsity is not None)
    q = theirs.quantization
    scale = np.array([] if q is None or q.scale is None else q.scale, np.float32)
    zeros = np.array([] if q is None or q.zeroPoint is None else q.zeroPoint, np.int64)
    np.testing.assert_array_equal(ours.scale, scale)
    assert ours.axis == (q.quantizedDimension if q else 0)
    if len(scale):
        np.testing.assert_array_equal(ours.zero_point, zeros)
        at, zero_at = ours.scale_offset, ours.zero_offset
        assert data[at : at + 4 * len(scale)] == struct.pack(f"<{len(scale)}f", *scale)
        assert data[zero_at : zero_at + 8 * len(zeros)] == struct.pack(f"<{len(zeros)}q", *zeros)
    else:
        assert (ours.scale_offset, ours.zero_offset) == (None, None)


def _compare_operator(ours: Any, theirs: Any, code: Any) -> None:
    name = BUILTINS[max(code.builtinCode, code.deprecatedBuiltinCode)]
    assert ours.op == (f"CUSTOM:{_text(code.customCode)}" if name == "CUSTOM" else name)
    assert ours.version == code.version
    assert ours.inputs == _ints(theirs.inputs)
    assert ours.outputs == _ints(theirs.outputs)
    assert ours.intermediates == _ints(theirs.intermediates)
    if theirs.builtinOptions is None:
        return
    name, fields, words = OPTIONS[theirs.builtinOptionsType]
    assert type(theirs.builtinOptions).__name__ == f"{name}OptionsT"
    for field in filter(None, fields):
        accessor = spelled(field.name)
        value = getattr(theirs.builtinOptions, accessor[0].lower() + accessor[1:])
        if field.kind[0] == "[":
            value = _ints(value)
        elif field.kind == "string":
            value = _text(value)
        elif field.name in words:
            value = ENUMS[words[field.name]][value]
        assert ours.options[field.name] == value


def _ints(values: Any) -> tuple[int, ...]:
    return () if values is None else tuple(np.asarray(values).tolist())


def _text(value: Any) -> str:
    return "" if value is None else value.decode()


# --- files of the tests' own ----------------------------------------------------------------------
def pack(model: Any) -> bytes:
    """Write a generated object tree as a file."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def tensor(name: str, shape: tuple[int, ...], code: int = 0, buffer: int = 0, **more: Any) -> Any:
    """Make a tensor; `scale`, `zero_point` and `axis` quantize it."""
    made = schema.TensorT()
    made.name, made.shape, made.type, made.buffer = name, list(shape), code, buffer
    if "scale" in more:
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale = list(more["scale"])
        made.quantization.zeroPoint = list(more["zero_point"])
        made.quantization.quantizedDimension = more.get("axis", 0)
    if "signature" in more:
        made.shapeSignature = list(more["signature"])
    return made


def model(op: str = "FULLY_CONNECTED", options: Any = None) -> Any:
    """Make a model of one operator: x [1, 4] and w [3, 4] int8 with three scales, make y."""
    made = schema.ModelT()
    made.version, made.description = 3, "of a test"
    code = schema.OperatorCodeT()
    code.builtinCode = BUILTINS.index(op)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = 2
    made.operatorCodes = [code]
    made.buffers = [schema.BufferT(), schema.BufferT()]
    made.buffers[1].data = list(range(12))
    graph = schema.SubGraphT()
    graph.name = "main"
    scales = {"scale": (0.5, 0.25, 1), "zero_point": (0, 0, 0)}
    graph.tensors = [
        tensor("x", (1, 4), signature=(-1, 4)),
        tensor("w", (3, 4), 9, 1, **scales),
        tensor("y", (1, 3)),
    ]
    graph.inputs, graph.outputs = [0], [2]
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 1, -1], [2]
    if options is not None:
        operator.builtinOptions = options
        operator.builtinOptionsType = getattr(
            schema.BuiltinOptions, type(options).__name__.removesuffix("T")
        )
    graph.operators = [operator]
    made.subgraphs = [graph]
    signature = schema.SignatureDefT()
    signature.signatureKey = "infer"
    signature.subgraphIndex = 0
    signature.inputs, signature.outputs = [schema.TensorMapT()], [schema.TensorMapT()]
    signature.inputs[0].name, signature.inputs[0].tensorIndex = "features", 0
    signature.outputs[0].name, signature.outputs[0].tensorIndex = "scores", 2
    made.signatureDefs = [signature]
    return made
