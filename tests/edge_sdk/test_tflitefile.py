# SPDX-License-Identifier: Apache-2.0
"""The .tflite reader agrees with LiteRT's schema on sound files; on others, a BundleError only."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tflite_oracle as oracle
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import flatbuffer, tfliteschema
from edge_sdk.errors import BundleError
from edge_sdk.flatbuffer import Reader
from edge_sdk.tflitefile import TfliteFile, read
from edge_sdk.tfliteschema import BUILTINS, OPTIONS, OPTIONS_OF

MODELS = sorted((Path(__file__).parents[1] / "compiler/tflite/models").glob("*.tflite"))
NAMES = ("kws_ref_model", "pretrainedResnet", "pretrainedResnet_quant", "vww_96_int8")


def conv() -> Any:
    options = schema.Conv2DOptionsT()
    options.padding, options.strideW, options.strideH = 1, 2, 3
    options.fusedActivationFunction = 3
    return options


SMALL = oracle.pack(oracle.model("CONV_2D", conv()))


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_what_litert_reads(shared: Path, name: str) -> None:
    data = (shared / "models" / f"{name}.tflite").read_bytes()
    oracle.compare(data, read(data))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_it_reads_files_of_tensorflow_s_converter_as_litert_does(path: Path) -> None:
    data = path.read_bytes()
    oracle.compare(data, read(data))


def test_a_small_file_in_all_its_parts() -> None:
    told = read(SMALL)
    oracle.compare(SMALL, told)
    (graph,) = told.subgraphs
    (operator,) = graph.operators
    assert (operator.op, operator.version, operator.inputs) == ("CONV_2D", 2, (0, 1, -1))
    assert operator.options == {
        "padding": "VALID", "stride_w": 2, "stride_h": 3, "fused_activation_function": "RELU6",
        "dilation_w_factor": 1, "dilation_h_factor": 1, "quantized_bias_type": "float32",
    }  # fmt: skip
    x, w, _ = graph.tensors
    assert (x.shape, x.signature_shape, x.dtype) == ((1, 4), (None, 4), "float32")
    assert (w.scale.dtype, w.zero_point.dtype, w.axis) == (np.float32, np.int64, 0)
    assert bytes(told.data(w.buffer)) == bytes(range(12))
    assert SMALL[told.buffers[1].offset :][:12] == bytes(range(12))
    assert told.users(1) == ((0, 1),)
    assert told.users(0) == ()
    assert told.signatures["infer"] == (0, {"features": 0}, {"scores": 2})


def test_nothing_is_copied() -> None:
    writable = bytearray(SMALL)
    told = read(memoryview(writable))
    w = told.subgraphs[0].tensors[1]
    writable[told.buffers[1].offset] = 77
    assert told.data(1)[0] == 77
    assert w.scale_offset is not None
    struct.pack_into("<f", writable, w.scale_offset, 8.0)
    assert w.scale[0] == 8


def test_an_updated_file_is_what_litert_reads_too() -> None:
    """The offsets are those of the bytes that a runtime reads."""
    w = read(SMALL).subgraphs[0].tensors[1]
    assert w.zero_offset is not None
    patched = bytearray(SMALL)
    struct.pack_into("<q", patched, w.zero_offset + 8, -5)
    peer = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytes(patched), 0))
    assert list(peer.subgraphs[0].tensors[1].quantization.zeroPoint) == [0, -5, 0]


# --- the tables -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("Model", tfliteschema.MODEL),
        ("OperatorCode", tfliteschema.OPERATOR_CODE),
        ("SubGraph", tfliteschema.SUBGRAPH),
        ("Tensor", tfliteschema.TENSOR),
        ("QuantizationParameters", tfliteschema.QUANTIZATION),
        ("Operator", tfliteschema.OPERATOR),
        ("Buffer", tfliteschema.BUFFER),
        ("Metadata", tfliteschema.METADATA),
        ("TensorMap", tfliteschema.TENSOR_MAP),
        ("SignatureDef", tfliteschema.SIGNATURE),
    ],
)
def test_the_tables_are_litert_s_own(name: str, ours: flatbuffer.Schema) -> None:
    oracle.agrees(name, ours)


@pytest.mark.parametrize("code", OPTIONS)
def test_the_options_are_litert_s_own(code: int) -> None:
    name, ours, _ = OPTIONS[code]
    assert getattr(schema.BuiltinOptions, f"{name}Options") == code
    oracle.agrees(f"{name}Options", ours)


def test_the_numbers_are_litert_s_own() -> None:
    def members(kind: type) -> dict[str, int]:
        return {k: v for k, v in vars(kind).items() if k[0] != "_" and isinstance(v, int)}

    assert {name: i for i, name in enumerate(BUILTINS)} == members(schema.BuiltinOperator)
    dtypes = {code: name for code, (name, _) in tfliteschema.DTYPES.items()}
    theirs = {v: k.lower().replace("8_", "8") for k, v in members(schema.TensorType).items()}
    assert dtypes == theirs
    assert members(schema.BuiltinOptions).keys() - {"NONE"} == {
        f"{name}Options" for name, _, _ in OPTIONS.values()
    }
    words = {
        "padding": schema.Padding,
        "activation": schema.ActivationFunctionType,
        "weights_format": schema.FullyConnectedOptionsWeightsFormat,
        "kernel_type": schema.LSTMKernelType,
        "mirror": schema.MirrorPadMode,
        "combiner": schema.CombinerType,
        "lsh": schema.LSHProjectionType,
    }
    for name, kind in words.items():
        assert {w: i for i, w in enumerate(tfliteschema.ENUMS[name])} == members(kind)


def test_an_operator_without_options_has_the_defaults() -> None:
    told = read(oracle.pack(oracle.model("CONV_2D")))
    options = told.subgraphs[0].operators[0].options
    assert (options["dilation_w_factor"], options["padding"]) == (1, "SAME")
    told = read(oracle.pack(oracle.model("VAR_HANDLE")))
    assert told.subgraphs[0].operators[0].options == {"container": "", "shared_name": ""}
    assert read(oracle.pack(oracle.model("TANH"))).subgraphs[0].operators[0].options == {}


@pytest.mark.parametrize("op", sorted(OPTIONS_OF))
def test_options_of_every_operator(op: str) -> None:
    """Options are filled with something that is not their default, and come back."""
    name, fields, words = OPTIONS[OPTIONS_OF[op]]
    made = getattr(schema, f"{name}OptionsT")()
    for field in filter(None, fields):
        accessor = oracle.spelled(field.name)
        value: Any = {"[": [3, 1], "s": "name", "?": not field.default, "f": 1.5}.get(
            field.kind[0], 1 if field.name in words else 7
        )
        setattr(made, accessor[0].lower() + accessor[1:], value)
    data = oracle.pack(oracle.model(op, made))
    oracle.compare(data, read(data))


def test_custom_operators_keep_their_name() -> None:
    made = oracle.model("CUSTOM")
    made.operatorCodes[0].customCode = "FlexReluGrad"
    made.subgraphs[0].operators[0].customOptions = [1, 2, 3]
    data = oracle.pack(made)
    operator = read(data).subgraphs[0].operators[0]
    assert operator.op == "CUSTOM:FlexReluGrad"
    assert data[operator.custom.offset :][: operator.custom.size] == b"\1\2\3"


def test_codes_of_old_and_new_writers() -> None:
    made = oracle.model("ADD")
    made.operatorCodes[0].builtinCode, made.operatorCodes[0].deprecatedBuiltinCode = 0, 3
    assert read(oracle.pack(made)).subgraphs[0].operators[0].op == "CONV_2D"
    made.operatorCodes[0].builtinCode, made.operatorCodes[0].deprecatedBuiltinCode = 150, 127
    assert read(oracle.pack(made)).subgraphs[0].operators[0].op == "GELU"


def test_weights_beside_the_flatbuffer() -> None:
    """Large models have them after the tables, by offset and size."""
    made = oracle.model()
    made.buffers[1].data, made.buffers[1].offset, made.buffers[1].size = None, 4, 12
    size = len(oracle.pack(made))
    made.buffers[1].offset = size
    data = oracle.pack(made) + b"abcdefghijkl"
    assert len(data) == size + 12
    told = read(data)
    oracle.compare(data, told)
    assert bytes(told.data(1)) == b"abcdefghijkl"
    with pytest.raises(BundleError, match="buffer 1: expected its bytes to end by"):
        read(data[:-1])
    made.buffers[1].offset = 40  # over the tables
    with pytest.raises(BundleError, match="two overlap"):
        read(oracle.pack(made))
    made.buffers[1].data = list(range(12))
    with pytest.raises(BundleError, match="in one place"):
        read(oracle.pack(made))
    made.buffers[1].offset = made.buffers[1].size = 1  # as writers leave it
    assert read(oracle.pack(made)).buffers[1].size == 12


def test_tensors_that_share_a_constant() -> None:
    made = oracle.model()
    made.subgraphs[0].tensors.append(oracle.tensor("twin", (12,), 9, 1))
    assert read(oracle.pack(made)).users(1) == ((0, 1), (0, 3))


# --- what is refused, and why ---------------------------------------------------------------------
def spoil(change: Callable[[Any], None]) -> bytes:
    made = oracle.model()
    change(made)
    return oracle.pack(made)


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(made: Any) -> None:
        *way, last = path.split(".")
        for part in way:
            made = made[int(part)] if part.isdigit() else getattr(made, part)
        setattr(made, last, value)

    return change


TENSOR = "subgraphs.0.tensors.1"
OPERATOR = "subgraphs.0.operators.0"


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("version", 4, "expected schema version 3, got 4"),
        ("subgraphs", [], "expected a subgraph"),
        ("operatorCodes.0.builtinCode", 5000, "operator code 0: expected a known builtin operator"),
        ("operatorCodes.0.builtinCode", 127, "expected a known builtin operator, got 127"),
        ("operatorCodes.0.deprecatedBuiltinCode", -3, "expected a known builtin operator"),
        (f"{OPERATOR}.opcodeIndex", 1, "expected one of 1 operator codes, got 1"),
        (f"{OPERATOR}.inputs", [0, 3], "expected inputs among 3 tensors"),
        (f"{OPERATOR}.inputs", [-2], "expected inputs among 3 tensors"),
        (f"{OPERATOR}.outputs", [99], "expected outputs among 3 tensors"),
        (f"{OPERATOR}.intermediates", [99], "expected intermediates among 3 tensors"),
        ("subgraphs.0.inputs", [-1], "expected inputs among 3 tensors"),
        ("subgraphs.0.outputs", [3], "expected outputs among 3 tensors"),
        (f"{TENSOR}.type", 99, "expected a known element type, got 99"),
        (f"{TENSOR}.buffer", 2, "expected one of 2 buffers, got 2"),
        (f"{TENSOR}.externalBuffer", 1, "it has external ones"),
        (f"{TENSOR}.shape", [3, -4], "expected 0 to 2147483648 numbers"),
        (f"{TENSOR}.shape", [1 << 20] * 9, "expected 0 to 2147483648 numbers"),
        (f"{TENSOR}.shape", [1] * 33, "expected at most 32 of shape, got 33"),
        (f"{TENSOR}.shape", [3, 5], "expected 15 bytes of int8"),
        (f"{TENSOR}.shapeSignature", [-1, 3], "expected a shape signature like (3, 4)"),
        (f"{TENSOR}.shapeSignature", [-1], "expected a shape signature like (3, 4)"),
        (f"{TENSOR}.quantization.zeroPoint", [0], "as many zero points as scales, 3, got 1"),
        (f"{TENSOR}.quantization.zeroPoint", None, "as many zero points as scales, 3, got 0"),
        (f"{TENSOR}.quantization.quantizedDimension", 1, "one for each entry of axis 1"),
        (f"{TENSOR}.quantization.quantizedDimension", 2, "expected its quantized axis in (3, 4)"),
        (f"{TENSOR}.quantization.detailsType", 9, "expected a known kind of quantization"),
        (f"{OPERATOR}.builtinOptionsType", 127, "expected known options, got number 127"),
        (f"{OPERATOR}.builtinOptionsType", 1, "expected FullyConnectedOptions, got Conv2DOptions"),
        (f"{OPERATOR}.builtinOptions2Type", 1, "expected no options of the second kind"),
        (f"{OPERATOR}.largeCustomOptionsOffset", 1 << 40, None),
        ("signatureDefs.0.subgraphIndex", 1, "signature 0: expected one of 1 subgraphs, got 1"),
        ("signatureDefs.0.inputs.0.tensorIndex", 3, "expected one of 3 tensors, got 3"),
        ("externalBufferGroups", [], "it has external ones"),
    ],
)
def test_each_oddity_has_its_reason(path: str, value: Any, reason: str | None) -> None:
    data = spoil(_set(path, value))
    if reason is None:
        read(data)
        return
    with pytest.raises(BundleError) as caught:
        read(data)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_come_once() -> None:
    made = oracle.model()
    made.signatureDefs.append(made.signatureDefs[0])
    with pytest.raises(BundleError, match="signatures: expected different names, got 'infer'"):
        read(oracle.pack(made))
    made = oracle.model()
    made.signatureDefs[0].inputs *= 2
    with pytest.raises(BundleError, match="inputs: expected different names"):
        read(oracle.pack(made))


def test_options_out_of_range() -> None:
    options = conv()
    options.padding = 2
    with pytest.raises(BundleError, match="expected a known padding, got 2"):
        read(oracle.pack(oracle.model("CONV_2D", options)))
    softmax = schema.SoftmaxOptionsT()
    softmax.beta = float("nan")
    with pytest.raises(BundleError, match="expected a finite beta"):
        read(oracle.pack(oracle.model("SOFTMAX", softmax)))
    made = oracle.model("CONV_2D", conv())
    made.subgraphs[0].operators[0].builtinOptionsType = 0
    with contextlib.suppress(BundleError):
        read(oracle.pack(made))


def test_other_files() -> None:
    for data in (b"", b"\0" * 7, b"\x08\0\0\0ONNX", b"\0\0\0\0TFL3", b"\xff\xff\xff\x7fTFL3"):
        with pytest.raises(BundleError, match="expected"):
            read(data)


# --- damage ---------------------------------------------------------------------------------------
def survives(data: bytes, most: int = 1 << 20) -> TfliteFile | None:
    """Read it, or fail as promised: in one line, and in bounded memory."""
    tracemalloc.start()
    told, reason = None, ""
    try:
        told = read(data)
    except BundleError as error:
        reason = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "\n" not in reason
    assert len(reason) < 1000
    assert peak < most
    return told


def raw(name: str, shared: Path) -> bytes:
    return (shared / "models" / f"{name}.tflite").read_bytes()


@given(st.floats(0, 1))
@settings(deadline=None)
def test_truncated_files(share: float) -> None:
    survives(SMALL[: int(share * len(SMALL))])


@given(st.data())
@settings(deadline=None)
def test_flipped_bits(draw: st.DataObject) -> None:
    spoilt = bytearray(SMALL)
    for at in draw.draw(st.lists(st.integers(0, len(SMALL) - 1), min_size=1, max_size=8)):
        spoilt[at] ^= 1 << draw.draw(st.integers(0, 7))
    survives(bytes(spoilt))


@given(st.integers(0, 1 << 12), st.binary(max_size=24), st.booleans())
@settings(deadline=None)
def test_bytes_put_in_or_written_over(at: int, junk: bytes, over: bool) -> None:
    at %= len(SMALL)
    survives(SMALL[:at] + junk + SMALL[at + len(junk) * over :])


@given(st.integers(0, len(SMALL) // 4 - 1), st.integers(0, len(SMALL) // 4 - 1))
@settings(deadline=None)
def test_offsets_that_point_elsewhere(at: int, target: int) -> None:
    """Any word as an offset, forward, back (as a huge one) or at itself."""
    spoilt = bytearray(SMALL)
    struct.pack_into("<I", spoilt, 4 * at, (4 * target - 4 * at) & 0xFFFFFFFF)
    survives(bytes(spoilt))


@given(st.integers(0, len(SMALL) // 4 - 1), st.sampled_from([0, 1, -1, 1 << 31, 1 << 30, 1 << 16]))
@settings(deadline=None)
def test_words_of_any_size(at: int, word: int) -> None:
    spoilt = bytearray(SMALL)
    struct.pack_into("<I", spoilt, 4 * at, word & 0xFFFFFFFF)
    survives(bytes(spoilt))


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_noise(data: bytes) -> None:
    survives(data)
    survives(b"\x08\0\0\0TFL3" + data)


def test_every_byte_of_a_small_file_flipped() -> None:
    for at in range(len(SMALL)):
        spoilt = bytearray(SMALL)
        spoilt[at] ^= 0xFF
        with contextlib.suppress(BundleError):
            read(bytes(spoilt))


@pytest.mark.parametrize("name", NAMES)
def test_damaged_models(shared: Path, name: str) -> None:
    """Bits flipped in the tables of real models, whose weights are most of the file."""
    data = raw(name, shared)
    parts = {b.offset: b.size for b in read(data).buffers if b.size > 64}
    draw = np.random.default_rng(5)
    places = np.setdiff1d(
        np.arange(len(data)), np.concatenate([np.arange(a, a + n) for a, n in parts.items()])
    )
    refused = 0
    for _ in range(100):
        spoilt = bytearray(data)
        for at in draw.choice(places, size=draw.integers(1, 5)):
            spoilt[at] ^= 1 << int(draw.integers(8))
        refused += survives(bytes(spoilt)) is None
    assert refused > 10


# --- bombs ----------------------------------------------------------------------------------------
class Words:
    """A file made word by word."""

    def __init__(self) -> None:
        self.words: list[int] = [0, int.from_bytes(b"TFL3", "little")]

    def here(self) -> int:
        return 4 * len(self.words)

    def add(self, *words: int) -> int:
        at = self.here()
        self.words += words
        return at

    def slots(self, *offsets: int) -> int:
        """Add a table's slots."""
        sizes = [4 + 2 * len(offsets), 4 * (1 + sum(map(bool, offsets))), *offsets]
        sizes += [0] * (len(sizes) % 2)
        return self.add(*(a | b << 16 for a, b in zip(sizes[::2], sizes[1::2], strict=True)))

    def table(self, slots: int, *fields: int) -> int:
        at = self.here()
        return self.add(at - slots, *fields)

    def point(self, at: int, target: int) -> None:
        self.words[at // 4] = target - at

    def done(self, root: int) -> bytes:
        self.words[0] = root
        return b"".join(struct.pack("<I", w & 0xFFFFFFFF) for w in self.words)


def test_one_subgraph_a_thousand_times_over() -> None:
    """Offsets that all lead to the same place are followed so often and no more."""
    made = Words()
    one = made.slots(4)
    model = made.slots(4, 0, 8, 0, 12)
    root = made.table(model, 3, 0, 0)
    many = made.add(900, *[0] * 900)
    made.point(root + 8, many)
    subgraph = made.table(one, 0)
    for i in range(900):
        made.point(many + 4 + 4 * i, subgraph)
    tensors = made.add(3000, *[0] * 3000)
    made.point(subgraph + 4, tensors)
    tensor = made.table(made.slots(), 0)
    for i in range(3000):
        made.point(tensors + 4 + 4 * i, tensor)
    buffers = made.add(1, 0)
    made.point(root + 12, buffers)
    made.point(buffers + 4, made.table(made.slots(), 0))
    data = made.done(root)
    assert len(data) < 20_000
    tracemalloc.start()
    with pytest.raises(BundleError, match="too much of the same"):
        read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_points_at_itself() -> None:
    made = Words()
    root = made.table(made.slots(4, 0, 8), 3, 0)
    made.point(root + 8, root + 8)
    with pytest.raises(BundleError, match="expected an offset at byte"):
        read(made.done(root))
    made.point(root + 8, root)  # back
    with pytest.raises(BundleError, match="expected an offset at byte"):
        read(made.done(root))
    made.words[root // 4] = 0  # a table that is its own slots
    with pytest.raises(BundleError, match="expected"):
        read(made.done(root))


def test_counts_are_no_promise() -> None:
    made = Words()
    root = made.table(made.slots(4, 0, 8), 3, 0)
    made.point(root + 8, made.add(0xFFFFFFFF, 0))
    with pytest.raises(BundleError, match="expected subgraphs to end by byte"):
        read(made.done(root))


def test_fields_of_the_future_are_not_overlooked() -> None:
    made = Words()
    root = made.table(made.slots(4, *[0] * 9, 8), 3, 0)
    with pytest.raises(BundleError, match="expected known fields, got number 10"):
        read(made.done(root))


def test_the_reader_s_own_bounds() -> None:
    strings = [flatbuffer.Field("name", "string")]
    made = Words()
    root = made.table(made.slots(4), 0)
    made.point(root + 4, made.add(1 << 15, *[0x61616161] * (1 << 13), 0))
    reader = Reader(memoryview(made.done(root)))
    found = reader.table(reader.root(b"TFL3", "it"), strings, "it")
    with pytest.raises(BundleError, match="expected at most 16384 bytes of name"):
        reader.text(found, "name", "it")
    made.words[-1] = 0x61
    with pytest.raises(BundleError, match="end with a zero byte"):
        Reader(memoryview(made.done(root))).table(root, strings, "it")
    latin = Words()
    root = latin.table(latin.slots(4), 0)
    latin.point(root + 4, latin.add(2, 0xE9E9))
    reader = Reader(memoryview(latin.done(root)))
    with pytest.raises(BundleError, match="expected name in UTF-8"):
        reader.text(reader.table(root, strings, "it"), "name", "it")


def test_what_reading_takes(shared: Path, figure: Callable[..., None]) -> None:
    for name in NAMES:
        data = raw(name, shared)
        tracemalloc.start()
        read(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20
        figure(f"reading {name}.tflite, peak KiB", round(peak / 1024, 1), "< 1024")
