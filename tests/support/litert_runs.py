# SPDX-License-Identifier: Apache-2.0
"""Runs `.tflite` files for tests: by LiteRT here, by tflite-runtime in its own environment."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_CHILD = """
import sys, numpy as np
from tflite_runtime.interpreter import Interpreter
for name in sys.argv[1:]:
    feeds = dict(np.load(name + ".npz"))
    runs = Interpreter(model_path=name)
    for port in runs.get_input_details():
        runs.resize_tensor_input(port["index"], feeds[port["name"]].shape)
    runs.allocate_tensors()
    for port in runs.get_input_details():
        runs.set_tensor(port["index"], feeds[port["name"]])
    runs.invoke()
    made = {p["name"]: runs.get_tensor(p["index"]) for p in runs.get_output_details()}
    np.savez(name + ".out.npz", **made)
"""


def litert(model: bytes, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a file once; every input is resized to what is fed."""
    from ai_edge_litert.interpreter import Interpreter

    runs: Any = Interpreter(model_content=model)
    for port in runs.get_input_details():
        runs.resize_tensor_input(port["index"], feeds[port["name"]].shape)
    runs.allocate_tensors()
    for port in runs.get_input_details():
        runs.set_tensor(port["index"], feeds[port["name"]])
    runs.invoke()
    return {p["name"]: runs.get_tensor(p["index"]) for p in runs.get_output_details()}


def old_python() -> str:
    """Return a Python that has tflite-runtime; skip where there is none."""
    named = os.environ.get("FEDGE_TFLITE_PYTHON")
    if named:
        return named
    if importlib.util.find_spec("tflite_runtime"):
        return sys.executable
    pytest.skip("FEDGE_TFLITE_PYTHON names no Python with tflite-runtime 2.14 and numpy below 2")


def tflite_runtime(
    models: Mapping[str, tuple[bytes, Mapping[str, np.ndarray]]], folder: Path
) -> dict[str, dict[str, np.ndarray]]:
    """Run files once each by tflite-runtime, in one process of its own."""
    python = old_python()
    for name, (model, feeds) in models.items():
        (folder / name).write_bytes(model)
        np.savez(folder / f"{name}.npz", **feeds)
    paths = [str(folder / name) for name in models]
    subprocess.run([python, "-c", _CHILD, *paths], check=True, capture_output=True, timeout=110)
    return {name: dict(np.load(folder / f"{name}.out.npz")) for name in models}
