# SPDX-License-Identifier: Apache-2.0
"""Networks that the onnx package carries, opset 9, for one example: brought to 13, they learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from forward_models import Steps
from onnx import numpy_helper, version_converter

from coordinator.compiler import adam, build
from edge_sdk.errors import CompileError
from edge_sdk.limits import Limits

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def network(name: str) -> onnx.ModelProto:
    """Read one, with weights drawn in place of the nodes that make constants of their shapes."""
    path = LIGHT / f"light_{name}.onnx"
    if not path.exists():
        pytest.skip(f"this onnx package does not carry {path.name}")
    model, rng = onnx.load(path), np.random.default_rng(0)
    graph = model.graph
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    readers = {x: (n.op_type, i) for n in graph.node for i, x in enumerate(n.input)}
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(shapes[node.input[0]].tolist())
        is_scale = readers[node.output[0]] in {("BatchNormalization", 1), ("BatchNormalization", 4)}
        drawn = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        value = drawn if len(shape) > 1 else np.full(shape, float(is_scale))
        graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    model.ir_version = 8
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params"), [("shufflenet", 1_393_320), ("inception_v1", 6_998_552)]
)
def test_a_network_of_224_pixels_learns(name: str, params: int) -> None:
    model = version_converter.convert_version(network(name), 13)
    bundle = build(model, loss="cross_entropy", optimizer=adam(lr=1e-3))
    bundle.check(Limits(max_ram_bytes=1 << 31, max_update_bytes=1 << 26))
    assert bundle.manifest["cost"]["trainable"] == params
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    run, y = Steps(bundle), np.array([3, 5])
    losses = [run.step(x, y) for _ in range(6)]
    assert min(losses) < 0.5 * losses[0], losses


@pytest.mark.slow
def test_one_that_ends_in_a_single_pixel_learns_as_it_is() -> None:
    model = version_converter.convert_version(network("squeezenet"), 13)
    bundle = build(model, loss="cross_entropy", optimizer=adam(lr=1e-3))
    assert bundle.manifest["output"]["shape"] == [None, 1000, 1, 1]
    assert bundle.manifest["target"] == {"dtype": "int64", "shape": [None]}
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    run, y = Steps(bundle), np.array([3, 5])
    losses = [run.step(x, y) for _ in range(6)]
    # Its random last ReLU leaves few classes alive: what matters is that all of it moves.
    assert losses == sorted(losses, reverse=True), losses
    assert losses[-1] < losses[0] - 0.3


def test_opset_9_is_too_old() -> None:
    with pytest.raises(CompileError, match=r"opset 11 or newer, got 9: .*convert_version"):
        build(network("squeezenet"), loss="cross_entropy")
