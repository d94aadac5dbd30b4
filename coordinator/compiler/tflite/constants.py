# SPDX-License-Identifier: Apache-2.0
"""The numbers of a TFLite file's constant tensors."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import Tensor

_READ = frozenset(
    {"bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint16",
     "uint32", "uint64", "uint8"}
)  # fmt: skip


def stored(tensor: Tensor, data: memoryview) -> NDArray[Any]:
    """Return a tensor's stored numbers; float16 becomes float32. Raises: CompileError."""
    if tensor.dtype not in _READ:
        raise CompileError(
            f"expected weights in float32, float16 or 8 bits, {tensor.name!r} is {tensor.dtype}: "
            "convert with int8 weights"
        )
    array = np.frombuffer(data, np.dtype(tensor.dtype).newbyteorder("<"))
    if array.size != prod(tensor.shape):
        raise CompileError(
            f"expected {prod(tensor.shape)} numbers in tensor {tensor.name!r}, its buffer has "
            f"{array.size}: convert the model again"
        )
    native = array.astype(np.float32) if array.dtype == np.float16 else array.astype(tensor.dtype)
    return native.reshape(tensor.shape)
