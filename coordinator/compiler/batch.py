# SPDX-License-Identifier: Apache-2.0
"""Any batch size: a model exported for a batch of one is freed of it and proved so.

Exports bake the batch into the input's shape and into the targets of Reshape nodes (`reshapes.py`).
Both are rewritten; anything else that holds on to a batch of one shows when three examples are run
together and one by one, and is refused by name.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from coordinator.compiler.graph import Value, from_type
from coordinator.compiler.reshapes import ADVICE, free_shapes
from coordinator.compiler.runtime import run, session
from edge_sdk.errors import CompileError


def free_batch(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with a symbolic first dimension of its input and output.

    Raises: CompileError when there is not one input and one output with a leading batch, when
        another dimension of the input is open, or when results depend on the rest of the batch.
    """
    value = _only(list(proto.graph.input), "input")
    _only(list(proto.graph.output), "output")
    dims = value.type.tensor_type.shape.dim
    if not dims:
        raise CompileError(f"expected an input [batch, ...], {value.name!r} has no dimensions")
    for at, dim in enumerate(dims[1:], 1):
        if dim.dim_value <= 0:
            raise CompileError(
                f"expected fixed sizes after the batch, dimension {at} of {value.name!r} is "
                f"{dim.dim_param or 'open'}: fix it (onnxruntime.tools.make_dynamic_shape_fixed)"
            )
    free = onnx.ModelProto()
    free.CopyFrom(proto)
    if dims[0].dim_value:
        free_shapes(free, dims[0].dim_value)
    _symbolic(free.graph.input[0])
    _symbolic(free.graph.output[0])
    _prove(free)
    return free


def _only(values: list[onnx.ValueInfoProto], what: str) -> onnx.ValueInfoProto:
    if len(values) != 1:
        names = [value.name for value in values]
        raise CompileError(
            f"expected one {what}, got {names}: cut the model down (onnx.utils.extract_model)"
        )
    return values[0]


def _symbolic(value: onnx.ValueInfoProto) -> None:
    dims = value.type.tensor_type.shape.dim
    if dims:
        dims[0].Clear()
        dims[0].dim_param = "N"


def _prove(proto: onnx.ModelProto) -> None:
    """Run three examples together and one by one: the rows must agree."""
    value = proto.graph.input[0]
    x = _sample(from_type(value.name, value.type))
    runs = _opened(proto)
    try:
        together, *alone = (run(runs, rows) for rows in (x, *np.split(x, len(x))))
    except Exception as error:  # the runtime raises bare C++ exceptions of many kinds
        raise CompileError(
            f"expected a model that runs on a batch of {len(x)}: {_cause(error)}; {ADVICE}"
        ) from error
    if together.shape[:1] != (len(x),) or any(row.shape[:1] != (1,) for row in alone):
        raise CompileError(
            f"expected an output of shape [batch, ...], {len(x)} examples gave "
            f"{list(together.shape)}: {ADVICE}"
        )
    rows = np.concatenate(alone).astype(np.float64)
    size = np.abs(rows[np.isfinite(rows)]).max(initial=0)
    slack = 1e-2 * (1 + size) if together.dtype.kind == "f" else 2
    if not np.allclose(together.astype(np.float64), rows, rtol=0, atol=slack, equal_nan=True):
        raise CompileError(
            f"expected each example's output to depend on that example alone, it depends on the "
            f"others in the batch: {ADVICE}"
        )


def _opened(proto: onnx.ModelProto) -> Any:
    try:
        return session(proto.SerializeToString())
    except Exception as error:  # the runtime raises bare C++ exceptions of many kinds
        raise CompileError(
            f"expected a model that onnxruntime loads: {_cause(error)}; export or quantize it again"
        ) from error


def _cause(error: Exception) -> str:
    """Return the node at which the runtime failed, or the end of what it says."""
    text = " ".join(str(error).split())
    node = re.search(r"running (\S+) node\. Name:'([^']*)'", text)
    return f"{node[1]} node {node[2]!r} fails" if node else text[-200:]


def _sample(value: Value) -> NDArray[Any]:
    """Return three seeded examples of an input's shape and dtype."""
    shape = (3, *(int(d or 1) for d in (value.shape or ())[1:]))
    rng = np.random.default_rng(0)
    dtype = np.dtype(value.dtype or np.float32)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype in (np.int8, np.uint8):
        ends = np.iinfo(dtype)
        return rng.integers(ends.min, ends.max, shape, dtype, endpoint=True)
    return rng.integers(0, 2, shape).astype(dtype)  # ids: the two that every table has
