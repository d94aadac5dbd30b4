# SPDX-License-Identifier: Apache-2.0
"""float32 to int8, for the recipes whose models are shipped quantized.

A recipe loads this file by its path, so that nothing here needs to be installed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from layers import write

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

BATCH = 16


def quantize(model: onnx.ModelProto, x: NDArray[np.float32]) -> onnx.ModelProto:
    """Return the int8 QDQ form: weights per channel, activations from the range that `x` gives."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        """Hand the calibration rows over, one batch at a time."""

        def __init__(self) -> None:
            self._batches = self._cut()

        def _cut(self) -> Iterator[dict[str, NDArray[np.float32]]]:
            for start in range(0, len(x), BATCH):
                yield {"x": x[start : start + BATCH]}

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._batches, None)

    model = onnx.ModelProto.FromString(model.SerializeToString())
    # There is nothing to fuse or to infer here: say so, or every run prints advice to do it.
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory() as folder:
        source, made = write(model, Path(folder) / "float.onnx"), Path(folder) / "int8.onnx"
        quantize_static(
            source,
            made,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load_model(made)
