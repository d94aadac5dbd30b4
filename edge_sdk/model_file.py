# SPDX-License-Identifier: Apache-2.0
"""The model as a file beside the device, for an application that has an interpreter of its own.

The file is always whole: it holds one version or the next, after a power cut too. A new version is
written beside it and renamed over it. Nothing is ever written into the old file: an interpreter
that has it mapped into its memory, as LiteRT does, goes on with the version that it opened.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_sdk import files
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.params import unflatten
from edge_sdk.requantize import requantize

FORMATS = {".onnx": "onnx", ".tflite": "tflite"}
"""The format of a model file, by how its name ends."""


class ModelFile:
    """A path that holds the model which the device answers with.

    Raises: ConfigError when the name says no format, or its folder is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix not in FORMATS:
            raise ConfigError(
                f"model_file: expected a name that ends in {' or '.join(FORMATS)}, got {path}"
            )
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ConfigError(f"model_file: expected a file in a folder that exists, got {path}")
        self.format = FORMATS[self.path.suffix]
        files.sweep(self.path.parent, self.path.name)

    def put(self, bundle: Bundle, weights: bytes) -> None:
        """Make the file hold a bundle's model with these weights (flat little-endian float32).

        A file that does so already is left as it is.
        Raises: BundleError when the bundle has no model in the file's format; StoreError when the
        disk refuses, and the file is as it was.
        """
        params = unflatten(np.frombuffer(weights, "<f4").astype(np.float32), bundle.shapes)
        model = requantize(bundle, params, self.format)
        if not self._holds(model):
            files.write(self.path, model, mode=0o644)

    def _holds(self, model: bytes) -> bool:
        try:
            return self.path.stat().st_size == len(model) and self.path.read_bytes() == model
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(
                f"cannot read {self.path}: {error.strerror}; correct its rights"
            ) from error
