# SPDX-License-Identifier: Apache-2.0
"""The messages of ONNX as tables: fields by number, element types, kinds of attribute. Pure.

From onnx.proto of ONNX 1.23. A field that is not here is refused by the reader, so that nothing in
a file goes unseen.
"""

from __future__ import annotations

from edge_sdk.protobuf import FIXED32, FIXED64, VARINT, Field, Schema

_INTS, _LONGS = "int32_data", "int64_data"
DTYPES: dict[int, tuple[str, int, str]] = {
    1: ("float32", 32, "float_data"),
    2: ("uint8", 8, _INTS),
    3: ("int8", 8, _INTS),
    4: ("uint16", 16, _INTS),
    5: ("int16", 16, _INTS),
    6: ("int32", 32, _INTS),
    7: ("int64", 64, _LONGS),
    9: ("bool", 8, _INTS),
    10: ("float16", 16, _INTS),
    11: ("float64", 64, "double_data"),
    12: ("uint32", 32, "uint64_data"),
    13: ("uint64", 64, "uint64_data"),
    16: ("bfloat16", 16, _INTS),
    17: ("float8e4m3fn", 8, _INTS),
    18: ("float8e4m3fnuz", 8, _INTS),
    19: ("float8e5m2", 8, _INTS),
    20: ("float8e5m2fnuz", 8, _INTS),
    21: ("uint4", 4, _INTS),
    22: ("int4", 4, _INTS),
}
"""Element types by their number in ONNX: name, bits, and which field holds them if not raw."""

STRING = 8


def _text(name: str) -> Field:
    return Field(name)


def _parts(name: str) -> Field:
    return Field(name, many=True)


MODEL: Schema = {
    1: Field("ir_version", VARINT),
    2: _text("producer_name"),
    3: _text("producer_version"),
    4: _text("domain"),
    5: Field("model_version", VARINT),
    6: _text("doc_string"),
    7: Field("graph"),
    8: _parts("opset_import"),
    14: _parts("metadata_props"),
    20: _parts("training_info"),
    25: _parts("functions"),
    26: _parts("configuration"),
}
GRAPH: Schema = {
    1: _parts("node"),
    2: _text("name"),
    5: _parts("initializer"),
    10: _text("doc_string"),
    11: _parts("input"),
    12: _parts("output"),
    13: _parts("value_info"),
    14: _parts("quantization_annotation"),
    15: _parts("sparse_initializer"),
    16: _parts("metadata_props"),
}
NODE: Schema = {
    1: _parts("input"),
    2: _parts("output"),
    3: _text("name"),
    4: _text("op_type"),
    5: _parts("attribute"),
    6: _text("doc_string"),
    7: _text("domain"),
    8: _text("overload"),
    9: _parts("metadata_props"),
    10: _parts("device_configurations"),
}
ATTRIBUTE: Schema = {
    1: _text("name"),
    2: Field("float", FIXED32),
    3: Field("int", VARINT),
    4: Field("string"),
    5: Field("tensor"),
    6: Field("graph"),
    7: Field("floats", FIXED32, many=True, packs=True),
    8: Field("ints", VARINT, many=True, packs=True),
    9: _parts("strings"),
    10: _parts("tensors"),
    11: _parts("graphs"),
    13: _text("doc_string"),
    14: Field("type_proto"),
    15: _parts("type_protos"),
    20: Field("type", VARINT),
    21: _text("ref_attr_name"),
    22: Field("sparse_tensor"),
    23: _parts("sparse_tensors"),
}
KINDS = {
    1: "float", 2: "int", 3: "string", 4: "tensor", 5: "graph", 6: "floats", 7: "ints",
    8: "strings", 9: "tensors", 10: "graphs", 11: "sparse_tensor", 12: "sparse_tensors",
    13: "type_proto", 14: "type_protos",
}  # fmt: skip
"""Kinds of attribute by their number in ONNX, named as the field that holds them."""
TENSOR: Schema = {
    1: Field("dims", VARINT, many=True, packs=True),
    2: Field("data_type", VARINT),
    3: Field("segment"),
    4: Field("float_data", FIXED32, many=True, packs=True),
    5: Field(_INTS, VARINT, many=True, packs=True),
    6: _parts("string_data"),
    7: Field(_LONGS, VARINT, many=True, packs=True),
    8: _text("name"),
    9: Field("raw_data"),
    10: Field("double_data", FIXED64, many=True, packs=True),
    11: Field("uint64_data", VARINT, many=True, packs=True),
    12: _text("doc_string"),
    13: _parts("external_data"),
    14: Field("data_location", VARINT),
    16: _parts("metadata_props"),
}
VALUE: Schema = {
    1: _text("name"),
    2: Field("type"),
    3: _text("doc_string"),
    4: _parts("metadata_props"),
}
TYPE: Schema = {
    1: Field("tensor"),
    4: Field("sequence"),
    5: Field("map"),
    6: _text("denotation"),
    7: Field("opaque"),
    8: Field("sparse_tensor"),
    9: Field("optional"),
}
TENSOR_TYPE: Schema = {1: Field("elem_type", VARINT), 2: Field("shape")}
SHAPE: Schema = {1: _parts("dim")}
DIMENSION: Schema = {1: Field("value", VARINT), 2: _text("param"), 3: _text("denotation")}
OPSET: Schema = {1: _text("domain"), 2: Field("version", VARINT)}
ENTRY: Schema = {1: _text("key"), 2: _text("value")}
TYPED = ("float_data", _INTS, _LONGS, "double_data", "uint64_data")
"""Where a tensor has its numbers if not in raw_data."""
WIRES = {field.name: field.wire for field in TENSOR.values()}
"""The wire type of each field of a tensor."""
