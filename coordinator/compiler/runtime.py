# SPDX-License-Identifier: Apache-2.0
"""onnxruntime as the compiler's own calculator: quiet, and on one thread."""

from __future__ import annotations

import os
from typing import Any

from numpy.typing import NDArray


def session(model: bytes, *, optimize: bool = True) -> Any:
    """Return an InferenceSession on one thread that logs errors only."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # latched when the library loads
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(opened: Any, x: NDArray[Any]) -> NDArray[Any]:
    """Run a session of one input on `x` and return its first output."""
    output: NDArray[Any] = opened.run(None, {opened.get_inputs()[0].name: x})[0]
    return output
