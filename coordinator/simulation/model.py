# SPDX-License-Identifier: Apache-2.0
"""What stands in for a model and its training: a bundle of 160 numbers and a seeded function.

Everything around is real: the bundle's bytes, weights, deltas, codecs, digests. Only no graph is
run: a model that opens answers zeros, and a training moves the weights as its seed says.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edge_sdk.bundle import Bundle, pack
from edge_sdk.errors import BundleError
from edge_sdk.limits import Limits
from edge_sdk.local import Runtime
from edge_sdk.model import Model
from edge_sdk.params import count
from edge_sdk.samples import Layout, Samples
from edge_sdk.trainer import Feed
from edge_sdk.types import Array

INPUTS, CLASSES = 15, 10
SHAPES = {"w": (INPUTS, CLASSES), "b": (CLASSES,)}
SIZE = count(SHAPES)
TOO_LARGE = 1e4
"""How much a broken training moves each number: no task takes that."""


@functools.cache
def tiny() -> Bundle:
    """Return the bundle of every simulation."""
    port = {"dtype": "float32", "scale": None, "zero_point": None}
    onnx = {role: f"onnx/{role}.onnx" for role in ("predict", "train", "evaluate")}
    manifest: dict[str, Any] = {
        "format": "fedge-bundle/2",
        "source": "onnx",
        "name": "pretend",
        "producer": "fedge simulate",
        "loss": "cross_entropy",
        "train": "all",
        "optimizer": [["sgd", {"lr": 0.1}]],
        "lr": 0.1,
        "proximal": False,
        "input": {**port, "name": "x", "shape": [None, INPUTS]},
        "output": {**port, "name": "y", "shape": [None, CLASSES]},
        "target": {"dtype": "int64", "shape": [None]},
        "params": [{"name": name, "shape": list(shape)} for name, shape in SHAPES.items()],
        "slots": [],
        "graphs": {"onnx": onnx},
        "patches": {"onnx": []},
        "cost": {"params": SIZE, "trainable": SIZE, "bytes_dense": 4 * SIZE},
    }
    members = {name: role.encode() for role, name in onnx.items()}
    members["params.bin"] = np.linspace(-1, 1, SIZE, dtype="<f4").tobytes()
    return pack(manifest, members)


class Pretence(Runtime):
    """A `Runtime` that runs nothing, and holds as many examples as it is told."""

    def __init__(self, examples: int) -> None:
        self._examples = examples

    def check(self, bundle: Bundle, limits: Limits) -> None:
        """Pass every bundle: there are no graphs to look at."""

    def open(
        self, bundle: Bundle, weights: bytes, version: int, *, engine: str, threads: int
    ) -> Model:
        """Open weights that fit and are finite. Raises: BundleError."""
        del engine, threads
        flat = np.frombuffer(weights, "<f4")
        if flat.size != SIZE or not np.isfinite(flat).all():
            raise BundleError("the weights are not of this bundle")
        digest, feed = hashlib.sha256(weights).hexdigest(), Feed(bundle.manifest)
        return Model(version, bundle.digest, digest, _Zeros(), feed, (None, INPUTS))

    def newest(self, ring: Samples, most: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return no examples: there are none to try a model on."""
        del ring, most
        return np.empty((0, INPUTS), np.float32), np.empty(0, np.int64)

    def peak_kib(self) -> int:
        """Return nothing: a simulated board has no memory of its own."""
        return 0

    def ring(self, path: Path, capacity: int, layout: dict[str, Any]) -> Samples:
        """Return a ring that never changes."""
        return cast("Samples", _Ring(path, self._examples, Layout(**layout, capacity=capacity)))


class _Zeros:
    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.zeros((len(x), CLASSES), np.float32)


class _Ring:
    def __init__(self, path: Path, total: int, layout: Layout) -> None:
        self.path, self.total, self.layout = path, total, layout

    def __len__(self) -> int:
        return self.total

    def close(self) -> None:
        """Nothing is open."""


def train(weights: Array, seed: tuple[int, ...], luck: float) -> Array:
    """Return the delta of a training: towards zero, with a noise; now and then a broken one."""
    if luck < 0.02:
        return np.full(SIZE, np.nan if luck < 0.004 else TOO_LARGE, np.float32)
    noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(SIZE, np.float32)
    return np.float32(0.05) * noise - np.float32(0.1) * weights
