# SPDX-License-Identifier: Apache-2.0
"""The few layers that the recipes of this folder are written in: ONNX nodes and seeded He weights.

A recipe loads this file by its path, so that nothing here needs to be installed.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPSET, IR_VERSION = 18, 9  # what onnxruntime 1.22, the oldest we support, reads
FOLDER = Path("build") / "models"


class Net:
    """A network under construction: each layer returns the name of its output.

    `x` is the name of the input, float32 `[batch, *shape]`. Weights are He normal from `seed` and
    biases are zero, so the same call makes the same file on any machine.
    """

    def __init__(self, name: str, shape: Sequence[int], *, seed: int = 0) -> None:
        self.name, self.shape, self.x = name, tuple(shape), "x"
        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def conv(
        self,
        x: str,
        name: str,
        shape: Sequence[int],
        *,
        stride: int = 1,
        pads: Sequence[int],
        group: int = 1,
    ) -> str:
        """Convolve with a filter `[out, in / group, *kernel]` and add a bias."""
        weight = self._weight(f"{name}.weight", shape, math.prod(shape[1:]))
        attributes = {
            "kernel_shape": list(shape[2:]),
            "strides": [stride] * len(shape[2:]),
            "pads": list(pads) * 2,
            "group": group,
        }
        return self.op("Conv", [x, weight, self._bias(name, shape[0])], name, **attributes)

    def dense(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """Multiply by a weight `[outputs, inputs]` and add a bias."""
        weight = self._weight(f"{name}.weight", (outputs, inputs), inputs)
        return self.op("Gemm", [x, weight, self._bias(name, outputs)], name, transB=1)

    def relu(self, x: str) -> str:
        """Clamp at zero."""
        return self.op("Relu", [x], f"{x}.relu")

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add any node with one output."""
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def model(self, output: str, shape: Sequence[int]) -> onnx.ModelProto:
        """Finish: the checked model whose output is `output`, `[batch, *shape]`."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [helper.make_tensor_value_info(self.x, TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", *shape])],
            self._weights,
        )
        opset = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="fedge models"
        )
        onnx.checker.check_model(made, full_check=True)
        return made

    def _weight(self, name: str, shape: Sequence[int], fan_in: int) -> str:
        scale = np.float32(math.sqrt(2.0 / fan_in))
        return self._keep(name, self._rng.standard_normal(tuple(shape), np.float32) * scale)

    def _bias(self, name: str, size: int) -> str:
        return self._keep(f"{name}.bias", np.zeros(size, np.float32))

    def _keep(self, name: str, value: np.ndarray) -> str:
        self._weights.append(numpy_helper.from_array(value, name))
        return name


def size_of(model: onnx.ModelProto) -> int:
    """Return how many weights a model holds."""
    return sum(math.prod(w.dims) for w in model.graph.initializer)


def write(model: onnx.ModelProto, path: Path) -> Path:
    """Save a model, its folder included, and return where it went."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def script(build: Callable[..., onnx.ModelProto], name: str) -> None:
    """Run a recipe from the command line: ``python build.py [FOLDER]``."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    model = build()
    path = write(model, folder / f"{name}.onnx")
    print(f"{path}: {size_of(model):,} weights, {path.stat().st_size:,} bytes")
