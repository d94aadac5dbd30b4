# SPDX-License-Identifier: Apache-2.0
"""What is in a .tflite file, read without any runtime: tensors, operators, signatures. Pure.

Numbers are never copied: constants, scales and zero points stay views on the file, with their place
in it, so that they can be written over. Counts, sizes and indices are bounded and checked; tensors
have as many bytes as their shape needs, scales as many entries as their axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import BundleError
from edge_sdk.flatbuffer import Reader, Vector
from edge_sdk.tfliteschema import (
    BUFFER,
    DTYPES,
    ENUMS,
    IDENTIFIER,
    METADATA,
    MODEL,
    OPERATOR,
    OPERATOR_CODE,
    OPTIONS,
    OPTIONS_OF,
    QUANTIZATION,
    SECOND_OPTIONS,
    SIGNATURE,
    SUBGRAPH,
    TENSOR,
    TENSOR_MAP,
    VERSION,
    builtin,
)

MAX_BUFFERS = 100_000
MAX_TENSORS = 50_000  # of a subgraph
MAX_OPERATORS = 20_000  # of a subgraph
MAX_OTHERS = 1000  # subgraphs, operator codes, signatures, metadata
MAX_NUMBERS = 4096  # inputs, outputs, a list in options
MAX_RANK = 32
MAX_ELEMENTS = 1 << 31
ABSENT = -1
"""The index of an input that an operator does without."""

_NO_SCALES = np.zeros(0, "<f4")
_NO_ZEROS = np.zeros(0, "<i8")
_NO_OPTIONS: Mapping[str, Any] = {}
T = TypeVar("T")


class Buffer(NamedTuple):
    """Bytes `offset` to `offset + size` of the file; size 0: none."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a subgraph. It is a constant where its buffer has bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """As the file has it: a free dimension has the size that it was exported with, mostly 1."""
    signature_shape: tuple[int | None, ...]
    """The same with None for free dimensions."""
    buffer: int
    scale: NDArray[np.float32]
    """One for all, or one for each entry of `axis`; empty: it is not quantized."""
    zero_point: NDArray[np.int64]
    """As many as scales."""
    axis: int
    scale_offset: int | None
    """The byte of the file where the scales begin."""
    zero_offset: int | None
    is_variable: bool
    sparsity: bool
    """Whether its numbers are stored in a sparse form, which is not read."""
    details: str
    """What kind of quantization beyond scales it has: ``CustomQuantization`` or such, mostly ""."""
    has_rank: bool

    @property
    def elements(self) -> int:
        """How many numbers its shape makes."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes its numbers take."""
        return (self.elements * _BITS[self.dtype] + 7) // 8


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator; tensors by their index in the subgraph, `ABSENT` where there is none."""

    op: str
    """A builtin operator's name, or ``CUSTOM:name``."""
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    intermediates: tuple[int, ...]
    options: Mapping[str, Any]
    """By the schema's names: numbers, tuples, words such as ``SAME``, ``RELU6`` or ``int32``."""
    custom: Buffer
    """A custom operator's own options."""


@dataclass(frozen=True, slots=True)
class Subgraph:
    """Tensors and what is computed of them; inputs and outputs are indices of tensors."""

    name: str
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Signature(NamedTuple):
    """A named entry: the subgraph's index, and its tensors by the names that callers use."""

    subgraph: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TfliteFile:
    """The facts of a model."""

    version: int
    description: str
    subgraphs: tuple[Subgraph, ...]
    buffers: tuple[Buffer, ...]
    signatures: Mapping[str, Signature]
    metadata: Mapping[str, int]
    """Buffers by the names of what they hold."""
    content: memoryview = field(repr=False)

    def data(self, buffer: int) -> memoryview:
        """Return the bytes of a buffer, a view on the file."""
        start, size = self.buffers[buffer]
        return self.content[start : start + size]

    def users(self, buffer: int) -> tuple[tuple[int, int], ...]:
        """Return the tensors that have this buffer's bytes, as (subgraph, tensor).

        Buffers that the file stores at the same place are the same bytes.
        """
        place = self.buffers[buffer]
        same = {i for i, other in enumerate(self.buffers) if i == buffer or other == place}
        return tuple(
            (s, t)
            for s, subgraph in enumerate(self.subgraphs)
            for t, tensor in enumerate(subgraph.tensors)
            if place.size and tensor.buffer in same
        )


_BITS = dict(DTYPES.values())
_DETAILS = ("", "CustomQuantization", "BlockwiseQuantization", "MultiAxisQuantization")


def read(data: bytes | bytearray | memoryview) -> TfliteFile:
    """Read a serialized model.

    Raises: BundleError when it is not one, is damaged, or is beyond the bounds.
    """
    view = memoryview(data)
    return _File(Reader(view.cast("B") if view.format != "B" else view)).read()


class _File:
    """One file while it is read."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.buffers: tuple[Buffer, ...] = ()
        self.codes: tuple[tuple[str, int], ...] = ()

    def read(self) -> TfliteFile:
        reader = self.reader
        model = reader.table(reader.root(IDENTIFIER, "model"), MODEL, "model")
        if model["version"] != VERSION:
            raise BundleError(f"model: expected schema version {VERSION}, got {model['version']}")
        if "external_buffers" in model or "external_buffer_groups" in model:
            raise BundleError("model: expected its numbers inside the file, it has external ones")
        self.buffers = self._several(model, "buffers", MAX_BUFFERS, self._buffer)
        self.codes = self._several(model, "operator_codes", MAX_OTHERS, self._code)
        subgraphs = self._several(model, "subgraphs", MAX_OTHERS, self._subgraph)
        if not subgraphs:
            raise BundleError("model: expected a subgraph, got none")
        signatures = self._several(
            model, "signature_defs", MAX_OTHERS, lambda at, i: self._signature(at, i, subgraphs)
        )
        found = TfliteFile(
            version=model["version"],
            description=reader.text(model, "description", "model"),
            subgraphs=subgraphs,
            buffers=self.buffers,
            signatures=_unique(signatures, "signatures"),
            metadata=_unique(
                self._several(model, "metadata", MAX_OTHERS, self._metadata), "metadata"
            ),
            content=reader.data,
        )
        reader.check_apart("model")
        return found

    def _several(
        self, message: Mapping[str, Any], name: str, most: int, read: Callable[[int, int], T]
    ) -> tuple[T, ...]:
        places = self.reader.tables(message, name, most, "model")
        return tuple(read(at, i) for i, at in enumerate(places))

    def _buffer(self, at: int, i: int) -> Buffer:
        what = f"buffer {i}"
        found = self.reader.table(at, BUFFER, what)
        inline: Vector | None = found.get("data")
        # a size of 0 or 1 there is what a writer leaves that has put nothing outside
        if found["size"] <= 1 or found["offset"] <= 1:
            return Buffer(inline.start, inline.length) if inline and inline.length else Buffer(0, 0)
        if inline is not None and inline.length:
            raise BundleError(f"{what}: expected its bytes in one place, got two")
        outside = self.reader.outside(found["offset"], found["size"], what)
        return Buffer(outside.start, outside.length)

    def _code(self, at: int, i: int) -> tuple[str, int]:
        what = f"operator code {i}"
        found = self.reader.table(at, OPERATOR_CODE, what)
        codes = found["builtin_code"], found["deprecated_builtin_code"]
        name = builtin(*codes)
        if name is None:
            raise BundleError(f"{what}: expected a known builtin operator, got {max(codes)}")
        custom = self.reader.text(found, "custom_code", what)
        if name == "CUSTOM":
            name = f"CUSTOM:{custom}"
        return name, found["version"]

    # --- subgraphs ------------------------------------------------------------------------------
    def _subgraph(self, at: int, i: int) -> Subgraph:
        reader, what = self.reader, f"subgraph {i}"
        found = reader.table(at, SUBGRAPH, what)
        tensors = self._several(
            found, "tensors", MAX_TENSORS, lambda at, k: self._tensor(at, f"{what}, tensor {k}")
        )
        operators = self._several(
            found,
            "operators",
            MAX_OPERATORS,
            lambda at, k: self._operator(at, len(tensors), f"{what}, operator {k}"),
        )
        return Subgraph(
            name=reader.text(found, "name", what),
            tensors=tensors,
            operators=operators,
            inputs=self._indices(found, "inputs", len(tensors), what),
            outputs=self._indices(found, "outputs", len(tensors), what),
        )

    def _indices(
        self,
        message: Mapping[str, Any],
        name: str,
        count: int,
        what: str,
        *,
        least: int = 0,
    ) -> tuple[int, ...]:
        found: tuple[int, ...] = self.reader.numbers(message, name, MAX_NUMBERS, what)
        if found and not (least <= min(found) and max(found) < count):
            raise BundleError(f"{what}: expected {name} among {count} tensors, got another index")
        return found

    def _tensor(self, at: int, what: str) -> Tensor:
        reader = self.reader
        found = reader.table(at, TENSOR, what)
        name = reader.text(found, "name", what)
        if found["type"] not in DTYPES:
            raise BundleError(f"{what}: expected a known element type, got {found['type']}")
        if found["external_buffer"]:
            raise BundleError(f"{what}: expected its numbers inside the file, it has external ones")
        if found["buffer"] >= len(self.buffers):
            raise BundleError(
                f"{what}: expected one of {len(self.buffers)} buffers, got {found['buffer']}"
            )
        shape = reader.numbers(found, "shape", MAX_RANK, what)
        if min(shape, default=0) < 0 or max(math.prod(shape), *shape, 0) > MAX_ELEMENTS:
            raise BundleError(f"{what}: expected 0 to {MAX_ELEMENTS} numbers, got shape {shape}")
        scale, zeros, axis, details = self._quantization(found, shape, what)
        tensor = Tensor(
            name=name,
            dtype=DTYPES[found["type"]][0],
            shape=shape,
            signature_shape=self._signature_shape(found, shape, what),
            buffer=found["buffer"],
            scale=reader.array(scale) if scale else _NO_SCALES,
            zero_point=reader.array(zeros) if zeros else _NO_ZEROS,
            axis=axis,
            scale_offset=scale.start if scale else None,
            zero_offset=zeros.start if zeros else None,
            is_variable=found["is_variable"],
            sparsity="sparsity" in found,
            details=details,
            has_rank=found["has_rank"],
        )
        self._check_size(tensor, what)
        _check_numbers(tensor, what)
        return tensor

    def _check_size(self, tensor: Tensor, what: str) -> None:
        size = self.buffers[tensor.buffer].size
        if size and _BITS[tensor.dtype] and not tensor.sparsity and size != tensor.nbytes:
            raise BundleError(
                f"{what}: expected {tensor.nbytes} bytes of {tensor.dtype}, as its shape says, "
                f"got {size}"
            )

    def _signature_shape(
        self, found: Mapping[str, Any], shape: tuple[int, ...], what: str
    ) -> tuple[int | None, ...]:
        signature = self.reader.numbers(found, "shape_signature", MAX_RANK, what)
        if not signature:
            return shape
        fits = [s in {-1, d} for s, d in zip(signature, shape, strict=False)]
        if len(signature) != len(shape) or not all(fits):
            raise BundleError(f"{what}: expected a shape signature like {shape}, got {signature}")
        return tuple(None if s == -1 else s for s in signature)

    def _quantization(
        self, tensor: Mapping[str, Any], shape: tuple[int, ...], what: str
    ) -> tuple[Vector | None, Vector | None, int, str]:
        if "quantization" not in tensor:
            return None, None, 0, ""
        found = self.reader.table(tensor["quantization"], QUANTIZATION, what)
        if found["details_type"] >= len(_DETAILS):
            raise BundleError(f"{what}: expected a known kind of quantization")
        details, axis = _DETAILS[found["details_type"]], found["quantized_dimension"]
        scale, zeros = (found.get(n) or None for n in ("scale", "zero_point"))
        if scale is None or not scale.length:
            return None, None, axis, details
        if zeros is None or zeros.length != scale.length:
            raise BundleError(
                f"{what}: expected as many zero points as scales, {scale.length}, "
                f"got {zeros.length if zeros else 0}"
            )
        if not 0 <= axis < max(len(shape), 1):
            raise BundleError(f"{what}: expected its quantized axis in {shape}, got {axis}")
        if scale.length > 1 and (not shape or scale.length != shape[axis]):
            raise BundleError(
                f"{what}: expected one scale, or one for each entry of axis {axis} of {shape}, "
                f"got {scale.length}"
            )
        return scale, zeros, axis, details

    # --- operators ------------------------------------------------------------------------------
    def _operator(self, at: int, tensors: int, what: str) -> Operator:
        reader = self.reader
        found = reader.table(at, OPERATOR, what)
        if found["opcode_index"] >= len(self.codes):
            raise BundleError(
                f"{what}: expected one of {len(self.codes)} operator codes, "
                f"got {found['opcode_index']}"
            )
        op, version = self.codes[found["opcode_index"]]
        what = f"{what} ({op!a})"
        inputs, outputs, intermediates = (
            self._indices(found, name, tensors, what, least=ABSENT)
            for name in ("inputs", "outputs", "intermediates")
        )
        has_second = found["builtin_options_2_type"] or "builtin_options_2" in found
        if has_second and op not in SECOND_OPTIONS:
            raise BundleError(f"{what}: expected no options of the second kind")
        return Operator(
            op=op,
            version=version,
            inputs=inputs,
            outputs=outputs,
            intermediates=intermediates,
            options=self._options(op, found, what),
            custom=self._custom(found, what),
        )

    def _custom(self, found: Mapping[str, Any], what: str) -> Buffer:
        inline: Vector | None = found.get("custom_options")
        start, size = found["large_custom_options_offset"], found["large_custom_options_size"]
        if start > 1 and size > 1:
            outside = self.reader.outside(start, size, what)
            return Buffer(outside.start, outside.length)
        return Buffer(inline.start, inline.length) if inline is not None else Buffer(0, 0)

    def _options(self, op: str, found: Mapping[str, Any], what: str) -> Mapping[str, Any]:
        code, expected = found["builtin_options_type"], OPTIONS_OF.get(op)
        if code and code not in OPTIONS:
            raise BundleError(f"{what}: expected known options, got number {code}")
        if "builtin_options" in found and not code:
            raise BundleError(f"{what}: expected options of some type, got options without one")
        if expected is not None and OPTIONS[expected][1] and code not in {0, expected}:
            wanted, got = OPTIONS[expected][0], OPTIONS[code][0]
            raise BundleError(f"{what}: expected {wanted}Options, got {got}Options")
        table = code or expected
        if table is None:
            return _NO_OPTIONS
        _, schema, words = OPTIONS[table]
        if "builtin_options" not in found:
            read: dict[str, Any] = {f.name: f.default for f in schema if f and len(f.kind) == 1}
        else:
            read = self.reader.table(found["builtin_options"], schema, what)
        for f in schema:
            if f is not None:
                read[f.name] = self._option(read, f.name, f.kind, words.get(f.name), what)
        return read or _NO_OPTIONS

    def _option(
        self, read: Mapping[str, Any], name: str, kind: str, words: str | None, what: str
    ) -> Any:
        if kind == "string":
            return self.reader.text(read, name, what)
        if kind[0] == "[":
            return self.reader.numbers(read, name, MAX_NUMBERS, what)
        if words is None:
            return read[name]
        if not 0 <= read[name] < len(ENUMS[words]):
            raise BundleError(f"{what}: expected a known {name}, got {read[name]}")
        return ENUMS[words][read[name]]

    # --- what else a model has ------------------------------------------------------------------
    def _signature(self, at: int, i: int, subgraphs: tuple[Subgraph, ...]) -> tuple[str, Signature]:
        reader, what = self.reader, f"signature {i}"
        found = reader.table(at, SIGNATURE, what)
        index = found["subgraph_index"]
        if index >= len(subgraphs):
            raise BundleError(f"{what}: expected one of {len(subgraphs)} subgraphs, got {index}")
        count = len(subgraphs[index].tensors)
        inputs, outputs = (
            _unique(
                self._several(found, side, MAX_NUMBERS, lambda at, _: self._named(at, count, what)),
                f"{what}, {side}",
            )
            for side in ("inputs", "outputs")
        )
        return reader.text(found, "signature_key", what), Signature(index, inputs, outputs)

    def _named(self, at: int, count: int, what: str) -> tuple[str, int]:
        found = self.reader.table(at, TENSOR_MAP, what)
        if found["tensor_index"] >= count:
            raise BundleError(
                f"{what}: expected one of {count} tensors, got {found['tensor_index']}"
            )
        return self.reader.text(found, "name", what), found["tensor_index"]

    def _metadata(self, at: int, i: int) -> tuple[str, int]:
        what = f"metadata {i}"
        found = self.reader.table(at, METADATA, what)
        if found["buffer"] >= len(self.buffers):
            raise BundleError(f"{what}: expected one of {len(self.buffers)} buffers")
        return self.reader.text(found, "name", what), found["buffer"]


def _check_numbers(tensor: Tensor, what: str) -> None:
    if not np.isfinite(tensor.scale).all():
        raise BundleError(f"{what}: expected finite scales")
    if not tensor.dtype.startswith(("int", "uint")) or not tensor.zero_point.size:
        return
    bits, signed = _BITS[tensor.dtype], tensor.dtype.startswith("int")
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    least, most = int(tensor.zero_point.min()), int(tensor.zero_point.max())
    if least < low or most > high:
        raise BundleError(
            f"{what}: expected zero points of {tensor.dtype}, {low} to {high}, "
            f"got {least if least < low else most}"
        )


def _unique(pairs: Iterable[tuple[str, T]], what: str) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise BundleError(f"{what}: expected different names, got {name[:80]!a} twice")
        found[name] = value
    return found
