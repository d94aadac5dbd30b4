# SPDX-License-Identifier: Apache-2.0
"""Models to measure: a recipe of `models/` by its name, or anybody's ONNX or TFLite file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.recipes import recipe
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError

LOSSES = {"dscnn": "cross_entropy", "resnet8": "cross_entropy", "mobilenet": "cross_entropy"}
LOSSES |= {"autoencoder": "mse", "har": "cross_entropy", "digits": "cross_entropy"}
"""The recipes that can be measured, and the loss that each is trained with."""


def model(name: str) -> Any:
    """Return a recipe's ModelProto, or that of an ONNX file; a .tflite file stays a path.

    Raises: ConfigError when there is neither.
    """
    if name in LOSSES:
        return recipe(name).build()
    if not Path(name).is_file():
        raise ConfigError(
            f"expected one of {', '.join(LOSSES)} or an ONNX or TFLite file, got {name!r}"
        )
    if name.endswith(".tflite"):
        return Path(name)
    import onnx

    return onnx.load_model(name)


def examples(bundle: Bundle, rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return `rows` random examples of the shapes and types that a bundle trains on."""
    rng, target = np.random.default_rng(0), bundle.manifest["target"]
    x = rng.standard_normal((rows, *bundle.manifest["input"]["shape"][1:]), np.float32)
    if target["dtype"] == "int64":
        return x, rng.integers(0, math.prod(bundle.manifest["output"]["shape"][1:]), rows)
    return x, rng.random((rows, *target["shape"][1:]), np.float32)
