# SPDX-License-Identifier: Apache-2.0
"""A .tflite file as it was given, what it became in ONNX, and which of its numbers depend on which.

Kernels take some scales for granted: one before and after what only moves or pools numbers, 1/256
behind a softmax. What may learn, and what has to learn together, is read from the operators here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from coordinator.compiler.tflite.importer import Imported, import_model
from edge_sdk.errors import BundleError, CompileError
from edge_sdk.tflitefile import Operator, Tensor, TfliteFile, read
from edge_sdk.tfliteschema import IDENTIFIER

_JOINS = frozenset({"CONCATENATION", "MAXIMUM", "MINIMUM", "PACK", "PADV2", "SELECT", "SELECT_V2"})
"""Operators that want one scale for all their inputs, stored ones too."""

_ALIKE = _JOINS | {
    "AVERAGE_POOL_2D", "BATCH_TO_SPACE_ND", "BROADCAST_TO", "DEPTH_TO_SPACE", "EXPAND_DIMS",
    "GATHER", "GATHER_ND", "MAX_POOL_2D", "MIRROR_PAD", "PAD", "REDUCE_MAX", "REDUCE_MIN",
    "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "REVERSE_V2", "SLICE",
    "SPACE_TO_BATCH_ND", "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "SQUEEZE", "STRIDED_SLICE", "TILE",
    "TRANSPOSE", "UNPACK",
}  # fmt: skip
"""Operators that put out the integers they take in, or a mean of them, on one scale."""

_CLOSE = 1e-6  # up to which AVERAGE_POOL_2D takes scales as equal


@dataclass(frozen=True)
class Source:
    """A .tflite file as it was given, and what it became in ONNX.

    Attributes:
        data: the file; file: what is in it.
        imported: the ONNX model, and which tensor each of its names stands for.
    """

    data: bytes
    file: TfliteFile
    imported: Imported

    @property
    def proto(self) -> onnx.ModelProto:
        """The model in ONNX."""
        return self.imported.proto

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the main subgraph."""
        return self.file.subgraphs[self.imported.subgraph].tensors

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators of the main subgraph."""
        return self.file.subgraphs[self.imported.subgraph].operators

    @property
    def kept(self) -> frozenset[str]:
        """Names of stored tensors that have bytes, and a scale, of their own in the file."""
        joined = {t for op in self.operators if joins_stored(self, op) for t in op.inputs}
        origins = self.imported.origins
        return frozenset(name for name, origin in origins.items() if origin.tensor not in joined)

    @cached_property
    def alike(self) -> Mapping[int, frozenset[int]]:
        """Which activations have one scale because an operator wants it so, by each of them."""
        classes: dict[int, frozenset[int]] = {}
        for op in self.operators:
            if op.op in _ALIKE:
                for names in _equal(self, [*op.inputs, *op.outputs]):
                    joined = frozenset[int]().union(*(classes.get(t, {t}) for t in names))
                    classes |= dict.fromkeys(joined, joined)
        return classes

    def with_alike(self, tensors: Iterable[int]) -> frozenset[int]:
        """Return tensors, and all that have their scales from necessity."""
        return frozenset[int]().union(*(self.alike.get(t, {t}) for t in tensors))

    @property
    def together(self) -> list[frozenset[str]]:
        """Names of activation scales in sets that have to stay equal."""
        steps = self.imported.steps
        classes = {self.with_alike(tensors) for tensors in steps.values()}
        sets = [frozenset(n for n in steps if found.intersection(steps[n])) for found in classes]
        return sorted(sets, key=sorted)

    @property
    def fixed(self) -> frozenset[str]:
        """Names of activation scales that must stay: kernels, or stored tensors, count on them."""
        joined = {t for op in self.operators if joins_stored(self, op) for t in op.outputs}
        steps = self.imported.steps
        return self.imported.fixed | {name for name in steps if joined.intersection(steps[name])}

    def widened(self, scale: str, wide: str, factor: float) -> Source:
        """Return the same with an activation's scale times `factor`, called `wide` from now on."""
        data = bytearray(self.data)
        steps = dict(self.imported.steps)
        tensors = self.with_alike(steps[scale])
        for at in {scale_at(self.tensors[t]) for t in tensors}:
            step = np.frombuffer(data, "<f4", 1, at) * np.float32(factor)
            data[at : at + 4] = step.astype("<f4").tobytes()
        steps = {name: ts for name, ts in steps.items() if not tensors.intersection(ts)}
        imported = replace(self.imported, steps=steps | {wide: tuple(sorted(tensors))})
        made = bytes(data)
        return replace(self, data=made, file=read(made), imported=imported)


def source_of(model: str | Path | bytes | onnx.ModelProto) -> Source | None:
    """Read and import a model that is a .tflite file, given as a path or bytes; else return None.

    Raises: CompileError for what is damaged or cannot be imported.
    """
    name = "these bytes"
    if isinstance(model, str | Path):
        path = Path(model)
        if path.suffix != ".tflite":
            return None
        name, model = path.name, _bytes(path)
    elif not isinstance(model, bytes) or model[4:8] != IDENTIFIER:
        return None
    try:
        file = read(model)
    except BundleError as error:
        raise CompileError(
            f"expected a TFLite model, {name} is not one, or is damaged: export it again ({error})"
        ) from error
    imported = import_model(model)
    if imported.subgraph:
        raise CompileError(
            "expected the model to train to be the file's first, which is what runtimes run, "
            f"serving_default is number {imported.subgraph}: convert it alone"
        )
    return Source(model, file, imported)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CompileError(
            f"expected a model at {path}: {error.strerror}; correct the path"
        ) from error


def joins_stored(source: Source, op: Operator) -> bool:
    """Tell whether an operator wants the scale of a stored tensor to be that of others."""
    stored = [t for t in op.inputs if t >= 0 and is_stored(source, t)]
    return op.op in _JOINS and any(len(source.tensors[t].scale) for t in stored)


def is_stored(source: Source, t: int) -> bool:
    """Tell whether a tensor is a constant of the file."""
    return source.file.buffers[source.tensors[t].buffer].size > 0


def _equal(source: Source, tensors: Iterable[int]) -> list[list[int]]:
    """Return computed 8-bit tensors in lists of those with one scale and zero point."""
    lists: list[list[int]] = []
    for t in tensors:
        if t < 0 or is_stored(source, t) or not _is_activation(source.tensors[t]):
            continue
        own = next((found for found in lists if _is_close(source, found[0], t)), None)
        if own is None:
            lists.append([t])
        else:
            own.append(t)
    return lists


def _is_activation(tensor: Tensor) -> bool:
    return tensor.dtype in {"int8", "uint8"} and len(tensor.scale) == 1


def _is_close(source: Source, a: int, b: int) -> bool:
    one, other = source.tensors[a], source.tensors[b]
    same = one.dtype == other.dtype and one.zero_point[0] == other.zero_point[0]
    return bool(same and abs(one.scale[0] - other.scale[0]) <= _CLOSE)


def scale_at(tensor: Tensor) -> int:
    """Return where a tensor's scales begin in the file. Raises: CompileError when it has none."""
    if tensor.scale_offset is None:
        raise CompileError(f"expected a scale for {tensor.name!r}: quantize the model again")
    return tensor.scale_offset
