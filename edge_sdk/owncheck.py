# SPDX-License-Identifier: Apache-2.0
"""Whether a .tflite model that brings its own training, in signatures, may run here. Pure.

Such a model keeps its weights in variables and has entry points, ``train`` and the like, that read
and assign them. It may use variables where a bundle's graphs may not, as nothing of it leaves the
device by itself; what a training step does to the weights is the model's own affair. All else holds
as for a bundle: builtin operators from the list, numbers only, no more memory than this device
gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from edge_sdk import tflitefile
from edge_sdk.errors import BundleError, RefusedError
from edge_sdk.graphview import shown
from edge_sdk.limits import Limits
from edge_sdk.operators import TFLITE
from edge_sdk.tflitefile import Operator, Subgraph, TfliteFile

VARIABLES = frozenset({"VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE"})
"""Operators that such a model may use on top."""
_MADE_BY_SHAPE = {"FILL": 0, "BROADCAST_TO": 1}
_FLOAT32_BYTES = 4


def check(data: bytes | memoryview, limits: Limits) -> TfliteFile:
    """Return what is in a model, once it may run.

    Raises: RefusedError, one line that names what is not as it must be.
    """
    try:
        file = tflitefile.read(data)
    except BundleError as error:
        raise RefusedError(str(error)) from error
    if not file.signatures:
        raise RefusedError("expected signatures such as train and infer, got none: use build()")
    operators = sum(len(subgraph.operators) for subgraph in file.subgraphs)
    if operators > limits.max_nodes:
        raise RefusedError(
            f"needs {operators} nodes, this device allows max_nodes={limits.max_nodes}"
        )
    stored = sum(buffer.size for buffer in file.buffers)
    if stored > limits.max_ram_bytes:
        raise RefusedError(
            f"needs {stored} bytes of memory for constants, this device allows max_ram_bytes="
            f"{limits.max_ram_bytes}"
        )
    for number, subgraph in enumerate(file.subgraphs):
        _check_tensors(subgraph)
        for operator in subgraph.operators:
            _check_operator(file, number, operator)
            _check_made(file, subgraph, operator, limits)
    _check_starts(file)
    return file


def _check_tensors(subgraph: Subgraph) -> None:
    handles = {i for o in subgraph.operators if o.op == "VAR_HANDLE" for i in o.outputs}
    for i, tensor in enumerate(subgraph.tensors):
        what = f"tensor {shown(tensor.name)}"
        if tensor.sparsity or tensor.details:
            raise RefusedError(f"{what}: expected it dense, with plain scales")
        if tensor.dtype in {"string", "variant"} or (tensor.dtype == "resource") != (i in handles):
            raise RefusedError(f"{what}: expected numbers, got {tensor.dtype}")


def _check_operator(file: TfliteFile, number: int, operator: Operator) -> None:
    name = shown(operator.op)[1:-1]
    if operator.op not in TFLITE | VARIABLES:
        raise RefusedError(f"subgraph {number}: {name} is not among the operators that may run")
    if operator.op == "CALL_ONCE":
        start = operator.options["init_subgraph_index"]
        if not 0 < start < len(file.subgraphs):
            raise RefusedError(f"subgraph {number}: {name} calls subgraph {start}, there is none")


def _check_made(file: TfliteFile, subgraph: Subgraph, operator: Operator, limits: Limits) -> None:
    """Refuse to make a tensor of a stored shape that is beyond this device's memory."""
    at = _MADE_BY_SHAPE.get(operator.op)
    if at is None or at >= len(operator.inputs) or operator.inputs[at] < 0:
        return
    shape = subgraph.tensors[operator.inputs[at]]
    width = {"int32": 4, "int64": 8}.get(shape.dtype)
    if width is None or not file.buffers[shape.buffer].size:
        return
    data = file.data(shape.buffer)
    dims = [
        int.from_bytes(data[k : k + width], "little", signed=True)
        for k in range(0, len(data), width)
    ]
    if math.prod(dims) * _FLOAT32_BYTES > limits.max_ram_bytes:
        raise RefusedError(
            f"{operator.op}: makes {math.prod(dims)} numbers, this device allows max_ram_bytes="
            f"{limits.max_ram_bytes}"
        )


def _check_starts(file: TfliteFile) -> None:
    """Refuse calls that lead to themselves: a subgraph that sets variables up calls no other."""
    callers = Counter(
        number
        for number, subgraph in enumerate(file.subgraphs)
        for operator in subgraph.operators
        if operator.op == "CALL_ONCE"
    )
    for number in _started(file):
        if callers[number]:
            raise RefusedError(f"subgraph {number}: expected no CALL_ONCE in what is called once")


def _started(file: TfliteFile) -> Iterator[int]:
    for subgraph in file.subgraphs:
        for operator in subgraph.operators:
            if operator.op == "CALL_ONCE":
                yield operator.options["init_subgraph_index"]
