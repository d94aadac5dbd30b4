# SPDX-License-Identifier: Apache-2.0
"""A forward model as a rival can run it: its nodes as plain data, its weights as arrays, its file.

A rival's process must not pay for loading onnx, so the model is read here, before it starts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.compiler.graph import Graph, Node


def write(
    model: Any, loss: str, trains: Sequence[str], *, lr: float, decay: float, folder: Path
) -> None:
    """Leave `plan.json`, `weights.npz` and `model.onnx` in `folder`; `trains` names weights."""
    graph = Graph.from_model(model)
    plan = {
        "input": graph.inputs[0].name,
        "output": graph.outputs[0].name,
        "nodes": [_node(node) for node in graph.nodes],
        "loss": loss,
        "trains": list(trains),
        "lr": lr,
        "decay": decay,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    arrays: dict[str, Any] = dict(graph.initializers)
    np.savez(folder / "weights.npz", **arrays)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _node(node: Node) -> dict[str, Any]:
    plain = {name: _plain(value) for name, value in node.attributes.items()}
    return {"op": node.kind, "in": list(node.inputs), "out": node.outputs[0], "attributes": plain}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | np.ndarray):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
