# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors that a graph stores are what they claim, and patches hit weights alone. Pure.

A device writes new weights over bytes of the predict graph; each of those ranges must be exactly
the raw data of one stored tensor, or the rest of the graph could be rewritten after its check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_sdk.errors import RefusedError
from edge_sdk.graphview import GraphView, Operation, Stored, shown
from edge_sdk.limits import Limits
from edge_sdk.manifest import whole_shape
from edge_sdk.onnxschema import DTYPES, STRING

_SHAPE_INPUT = {"ConstantOfShape": 0, "Expand": 1, "FILL": 0, "BROADCAST_TO": 1}
_INTEGERS = {6: "<i4", 7: "<i8"}
_WRITES = {"float16": "float16", "float32": "float32", "range": "float32", "bias": "int32"}
"""What a kind of patch writes at its offset; a quantized one says it itself."""
_CODES = {name: code for code, (name, _, _) in DTYPES.items()}


def nbytes(tensor: Stored) -> int:
    """Return the bytes of a tensor's numbers, from its dims and its element type."""
    return (tensor.elements * DTYPES[tensor.dtype][1] + 7) // 8


def check_stored(graph: GraphView, limits: Limits) -> None:
    """Check every tensor of a graph: dense numbers, all of them in the file.

    Raises: RefusedError.
    """
    bodies = [body for node in graph.nodes for body in node.bodies]
    stored = dict(graph.initializers)
    for body in bodies:  # its names are its own: the order of nodes is checked before
        stored |= body.initializers
    for tensor in stored.values():
        _check_tensor(tensor)
    for node in (*graph.nodes, *(node for body in bodies for node in body.nodes)):
        for attribute in node.attributes:
            for tensor in attribute.tensors:
                _check_tensor(tensor, f"{node.label}, attribute {shown(attribute.name)}")
        _check_made(stored, node, limits)


def check_patches(patches: Sequence[Mapping[str, Any]], params: Any, predict: GraphView) -> None:
    """Check that each patch writes one whole stored tensor, of the type it says.

    Args:
        patches: of the predict graph's format.
        params: the manifest's parameters.
        predict: the graph.

    Raises: RefusedError.
    """
    places: dict[int, list[Stored]] = {}
    for tensor in predict.initializers.values():
        if tensor.data:
            places.setdefault(tensor.offset, []).append(tensor)
    shapes = [p["shape"] for p in params]
    for i, patch in enumerate(patches):
        shape = patch["shape"] if patch["param"] is None else shapes[patch["param"]]
        dtype = _WRITES.get(patch["kind"]) or patch["dtype"]
        whole = math.prod(whole_shape(patch, shape))
        _check_place(f"patches[{i}]", places.get(patch["offset"], []), dtype, whole)
        if "scale_offset" in patch:
            found = places.get(patch["scale_offset"], [])
            _check_place(f"patches[{i}] scale", found, "float32", patch["scales"])


def _check_tensor(tensor: Stored, where: str = "") -> None:
    what = f"{where or 'tensor'} {shown(tensor.name)}" if tensor.name else where or "a tensor"
    if tensor.is_external:
        raise RefusedError(f"{what}: expected its numbers inside the bundle, it has external data")
    if tensor.dtype == STRING:
        raise RefusedError(f"{what}: expected numbers, got strings")
    if tensor.dtype not in DTYPES:
        raise RefusedError(f"{what}: expected a known element type, got number {tensor.dtype}")
    if not _is_whole(tensor):
        raise RefusedError(
            f"{what}: expected {tensor.elements} numbers of {DTYPES[tensor.dtype][0]} as its dims "
            "say, the file holds another amount"
        )


def _is_whole(tensor: Stored) -> bool:
    _, bits, field = DTYPES[tensor.dtype]
    if tensor.data is not None:
        return not tensor.typed and len(tensor.data) == nbytes(tensor)
    per_number = 2 if bits == 4 else 1  # a number of the field holds two
    counts = {name: count for name, count in tensor.typed.items() if count}
    return counts == ({field: math.ceil(tensor.elements / per_number)} if tensor.elements else {})


def _check_made(stored: Mapping[str, Stored], node: Operation, limits: Limits) -> None:
    """Refuse to make a tensor of a stored shape that is beyond this device's memory."""
    at = _SHAPE_INPUT.get(node.op)
    shape = stored.get(node.inputs[at]) if at is not None and at < len(node.inputs) else None
    if shape is None or shape.data is None or shape.dtype not in _INTEGERS:
        return
    size = math.prod(int(d) for d in np.frombuffer(shape.data, _INTEGERS[shape.dtype]))
    if size > limits.max_ram_bytes:
        raise RefusedError(
            f"{node.label}: makes {size} numbers, this device allows max_ram_bytes="
            f"{limits.max_ram_bytes}"
        )


def _check_place(field: str, found: Sequence[Stored], dtype: str, numbers: int) -> None:
    """Check all tensors that have their numbers at a place: TFLite's may share them."""
    if not found:
        raise RefusedError(f"{field}: expected the place of a stored tensor, got other bytes")
    for stored in found:
        if (stored.dtype, stored.elements) != (_CODES[dtype], numbers):
            raise RefusedError(
                f"{field}: expected {numbers} numbers of {dtype} in {shown(stored.name)}, it holds "
                f"{stored.elements} of {DTYPES[stored.dtype][0]}"
            )
