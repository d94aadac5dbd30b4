# SPDX-License-Identifier: Apache-2.0
"""Models to measure: a recipe of `models/` by its name, or anybody's ONNX file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError

LOSSES = {"dscnn": "cross_entropy", "resnet8": "cross_entropy", "mobilenet": "cross_entropy"}
LOSSES |= {"autoencoder": "mse", "har": "cross_entropy"}
"""The recipes that can be measured, and the loss that each is trained with."""


def model(name: str) -> Any:
    """Return a recipe's ModelProto, or read the ONNX file of that path.

    Raises: ConfigError when there is neither.
    """
    if name in LOSSES:
        return recipe(name).build()
    if not Path(name).is_file():
        raise ConfigError(f"expected one of {', '.join(LOSSES)} or an ONNX file, got {name!r}")
    import onnx

    return onnx.load_model(name)


def examples(bundle: Bundle, rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return `rows` random examples of the shapes and types that a bundle trains on."""
    rng, target = np.random.default_rng(0), bundle.manifest["target"]
    x = rng.standard_normal((rows, *bundle.manifest["input"]["shape"][1:]), np.float32)
    if target["dtype"] == "int64":
        return x, rng.integers(0, bundle.manifest["output"]["shape"][-1], rows)
    return x, rng.random((rows, *target["shape"][1:]), np.float32)


def recipe(name: str) -> ModuleType:
    """Load `models/<name>/build.py`: beside the packages in a checkout, inside them in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "models", package / "demo" / "recipes"):
        file = folder / name / "build.py"
        if file.exists():
            return _module(f"fedge_recipe_{name}", file)
    raise ConfigError(f"models/{name}/build.py is not here: run from a checkout, or give a file")


def _module(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
