# SPDX-License-Identifier: Apache-2.0
"""The ONNX reader agrees with `onnx` on sound files and raises BundleError, only, on all others."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc

import numpy as np
import onnx
import pytest
from hand_bundles import mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_sdk import onnxfile, onnxschema, protobuf
from edge_sdk.errors import BundleError
from edge_sdk.graphview import GraphView
from edge_sdk.protobuf import Reader, Span, signed

BUNDLE = mlp(momentum=True, quantized=True)
MODELS = [BUNDLE.member(f"onnx/{role}.onnx") for role in ("predict", "train", "evaluate")]


def read(data: bytes) -> GraphView:
    return onnxfile.read(memoryview(data))


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


@pytest.mark.parametrize("data", MODELS, ids=["predict", "train", "evaluate"])
def test_it_reads_what_onnx_reads(data: bytes) -> None:
    told, model = read(data), onnx.load_from_string(data)
    graph = model.graph
    assert [(n.op, n.inputs, n.outputs) for n in told.nodes] == [
        (n.op_type, tuple(n.input), tuple(n.output)) for n in graph.node
    ]
    for ports, values in ((told.inputs, graph.input), (told.outputs, graph.output)):
        for port, value in zip(ports, values, strict=True):
            tensor = value.type.tensor_type
            dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
            assert (port.name, port.dtype) == (value.name, tensor.elem_type)
            assert port.shape == (tuple(dims) if tensor.HasField("shape") else None)
    for proto in graph.initializer:
        stored = told.initializers[proto.name]
        assert (stored.dtype, stored.dims) == (proto.data_type, tuple(proto.dims))
        assert stored.data is not None
        assert bytes(stored.data) == proto.raw_data
        at = stored.offset
        assert data[at : at + len(stored.data)] == proto.raw_data
    assert dict(told.opsets) == {o.domain: o.version for o in model.opset_import}


TABLES = {
    "MODEL": onnx.ModelProto,
    "GRAPH": onnx.GraphProto,
    "NODE": onnx.NodeProto,
    "ATTRIBUTE": onnx.AttributeProto,
    "TENSOR": onnx.TensorProto,
    "VALUE": onnx.ValueInfoProto,
    "TYPE": onnx.TypeProto,
    "TENSOR_TYPE": onnx.TypeProto.Tensor,
    "SHAPE": onnx.TensorShapeProto,
    "DIMENSION": onnx.TensorShapeProto.Dimension,
    "OPSET": onnx.OperatorSetIdProto,
    "ENTRY": onnx.StringStringEntryProto,
}
WIRE_TYPES = {1: 1, 2: 5, 3: 0, 4: 0, 5: 0, 9: 2, 11: 2, 12: 2, 14: 0}  # by protobuf's field types


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_onnx_s_own(name: str) -> None:
    table = getattr(onnxschema, name)
    for said in TABLES[name].DESCRIPTOR.fields:
        assert table[said.number].wire == WIRE_TYPES[said.type], said.name
    known = {f.number for f in TABLES[name].DESCRIPTOR.fields}
    assert table.keys() <= known


def test_dtypes_are_onnx_s_own() -> None:
    for code, (name, bits, fields) in onnxschema.DTYPES.items():
        dtype = helper.tensor_dtype_to_np_dtype(code)
        assert dtype.name.replace("_", "") in {name, f"{name}fn"}
        assert bits == 4 or dtype.itemsize * 8 == bits
        assert helper.tensor_dtype_to_field(code) == fields


@pytest.mark.parametrize("code", sorted(onnxschema.DTYPES))
def test_a_tensor_of_any_type_and_form_is_whole(code: int) -> None:
    from edge_sdk import tensorcheck
    from edge_sdk.limits import Limits

    plain = helper.make_tensor("typed", code, [3], [1, 0, 1])
    raw = numpy_helper.from_array(numpy_helper.to_array(plain), "raw")
    assert raw.HasField("raw_data")
    graph = helper.make_graph([], "g", [], [], [plain, raw])
    told = read(helper.make_model(graph).SerializeToString())
    assert (told.initializers["raw"].data is None, told.initializers["typed"].data) == (False, None)
    tensorcheck.check_stored(told, Limits())


# --- damage -------------------------------------------------------------------------------------
def survives(data: bytes) -> None:
    """Read it, or fail as promised."""
    with contextlib.suppress(BundleError):
        read(data)


@given(st.sampled_from(MODELS), st.floats(0, 1))
@settings(deadline=None)
def test_truncated_files(data: bytes, share: float) -> None:
    survives(data[: int(share * len(data))])


@given(st.sampled_from(MODELS), st.data())
@settings(deadline=None)
def test_flipped_bits(data: bytes, draw: st.DataObject) -> None:
    spoilt = bytearray(data)
    for at in draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
        spoilt[at] ^= 1 << draw.draw(st.integers(0, 7))
    survives(bytes(spoilt))


@given(st.sampled_from(MODELS), st.integers(0, 1 << 12), st.binary(max_size=24), st.booleans())
@settings(deadline=None)
def test_bytes_put_in_or_written_over(data: bytes, at: int, junk: bytes, over: bool) -> None:
    at %= len(data)
    survives(data[:at] + junk + data[at + len(junk) * over :])


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_noise(data: bytes) -> None:
    survives(data)
    survives(field(7, data))
    survives(field(7, field(1, data)))
    survives(field(7, field(1, field(5, data))))
    survives(field(7, field(5, data)))
    survives(field(7, field(11, field(2, data))))


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_read_as_written(value: int) -> None:
    raw = varint(value)
    reader = Reader(memoryview(raw))
    assert reader.numbers([Span(0, len(raw))], 1, "n") == [value]
    assert struct.unpack("<q", struct.pack("<Q", value)) == (signed(value),)


TENSOR = field(2, 1) + field(8, b"w")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "expected a graph, got none"),
        (field(99, b""), "expected known fields, got number 99"),
        (b"\x3b", "expected graph as wire type 2, got 3"),
        (b"\x3a\xff\xff\xff\xff\x0f", "expected graph to end by byte"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "expected a number"),
        (b"\x3a" + b"\xff" * 20, "expected a number that ends"),
        (b"\x3a\x80\x00", "in its shortest form"),
        (b"\xba\x00" + b"\x00", "in its shortest form"),
        (field(7, b"") * 2, "expected graph once"),
        (field(7, b"") + field(8, field(1, b"a")) * 2, "expected operator set 'a' once"),
        (field(7, field(1, field(3, b"\xff"))), "expected UTF-8"),
        (field(7, field(1, field(3, b"n" * 5000))), "expected at most 4096 bytes"),
        (field(7, field(1, field(5, field(1, b"a")))), "with a known type"),
        (field(7, field(1, field(5, field(20, 2) + field(21, b"r")))), "a value of its own"),
        (
            field(7, field(1, field(5, field(20, 2) + field(6, b"")))),
            "expected int alone, got graph",
        ),
        (field(7, field(1, field(5, field(20, 2)) * 65)), "expected at most 64 of attribute"),
        (field(7, field(1, b"") * 20_001), "expected at most 20000 of node"),
        (field(7, field(5, TENSOR) * 2), "got a name twice"),
        (field(7, field(5, TENSOR + field(1, 1 << 32))), "expected at most 2147483648 numbers"),
        (field(7, field(5, TENSOR + field(1, 0) + field(1, 2**64 - 1))), "expected at most"),
        (field(7, field(5, TENSOR + field(1, 1 << 20) * 9)), "expected at most 2147483648 numbers"),
        (field(7, field(5, TENSOR + field(1, 1) * 33)), "expected at most 32 numbers"),
        (field(7, field(5, TENSOR + field(1, varint(1) * 33))), "expected at most 32 numbers"),
        (field(7, field(5, TENSOR + field(4, b"123"))), "expected whole numbers of 4 bytes"),
        (field(7, field(5, TENSOR + field(3, b""))), "got a segment"),
        (field(7, field(11, field(2, field(1, b"") + field(4, b"")))), "expected one type"),
    ],
)
def test_each_oddity_has_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match="expected") as caught:
        read(data)
    assert reason in str(caught.value)


def test_a_dimension_is_a_size_or_a_name() -> None:
    def shaped(dim: bytes) -> bytes:
        return field(7, field(11, field(2, field(1, field(2, field(1, dim))))))

    assert read(shaped(field(1, 3))).inputs[0].shape == (3,)
    assert read(shaped(field(2, b"N"))).inputs[0].shape == (None,)
    assert read(shaped(b"")).inputs[0].shape == (None,)
    for wrong in (field(1, 3) + field(2, b"N"), field(1, 2**64 - 1)):
        with pytest.raises(BundleError, match="dimension"):
            read(shaped(wrong))


def test_a_graph_of_too_many_parts_is_left_early() -> None:
    metadata = field(7, field(1, field(1, b"")) * 2)
    with pytest.raises(BundleError, match="too many parts"):
        Reader(memoryview(metadata), most=0).message(Span(0, 4), onnxschema.MODEL, "model")
    names = field(7, field(1, field(1, b"") * 9_000) * 30)
    with pytest.raises(BundleError, match="too many parts"):
        read(names)
    assert protobuf.MAX_FIELDS < 9_000 * 30


def test_bombs_take_no_memory() -> None:
    weights = numpy_helper.from_array(np.zeros(4 << 20, np.float32), "w")
    graph = helper.make_graph([], "g", [], [], [weights])
    whole = helper.make_model(graph).SerializeToString()
    bomb = field(7, field(5, TENSOR + field(1, 1 << 30)))
    typed = field(7, field(5, field(2, 6) + field(5, b"\x01" * (4 << 20))))
    files = (whole, bomb, typed, whole[:-1000])
    tracemalloc.start()
    for data in files:
        survives(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_functions_and_the_like_are_counted_and_not_entered() -> None:
    graph = helper.make_graph([], "g", [], [])
    model = helper.make_model(graph)
    model.functions.add().name = "f"
    model.training_info.add()
    model.graph.sparse_initializer.add()
    told = read(model.SerializeToString())
    assert {k for k, n in told.extras.items() if n} == {
        "functions",
        "training_info",
        "sparse_initializer",
    }


def test_types_other_than_tensors_are_named() -> None:
    inner = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    ports = [
        helper.make_value_info("s", helper.make_sequence_type_proto(inner)),
        helper.make_value_info("o", helper.make_optional_type_proto(inner)),
    ]
    told = read(helper.make_model(helper.make_graph([], "g", ports, [])).SerializeToString())
    assert [p.kind for p in told.inputs] == ["sequence", "optional"]
