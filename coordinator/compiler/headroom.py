# SPDX-License-Identifier: Apache-2.0
"""Room for an int8 model to grow surer: a wider range for its logits.

A quantizer fits the range of the logits to what the model says before training. Trained on, logits
grow past it and are cut off: the loss then stops falling, and ties decide the class.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from coordinator.compiler.graph import Graph
from coordinator.compiler.names import fresh
from edge_sdk.errors import CompileError


class Widened(NamedTuple):
    """A model with a wider step, and what that step was called and is called now."""

    proto: onnx.ModelProto
    old: str
    new: str


def widen(
    proto: onnx.ModelProto,
    graph: Graph,
    logits: str,
    headroom: float,
    together: Sequence[Collection[str]] = (),
) -> Widened:
    """Return the model with the step between its logits' integers `headroom` times as large.

    Steps whose names are in one set of `together` stay equal, and change for all their users.

    Raises: CompileError for a headroom below 1, or a model whose logits are not quantized.
    """
    if not 1 <= headroom <= 64:
        raise CompileError(f"expected a headroom from 1 to 64, got {headroom!r}: 4 is usual")
    maker = graph.producers.get(logits)
    if maker is not None and maker.kind == "DequantizeLinear":
        maker = graph.producers.get(maker.inputs[0])
    if maker is None or maker.kind != "QuantizeLinear":
        raise CompileError("expected int8 logits for a headroom, they are float: leave it at 1")
    made, scale = maker.outputs[0], maker.inputs[1]
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    old = next(t for t in wide.graph.initializer if t.name == scale)
    step = numpy_helper.to_array(old) * np.float32(headroom)
    name = fresh(f"{made}.scale", {t.name for t in wide.graph.initializer})
    alike = {other for names in together if scale in names for other in names}
    wide.graph.initializer.append(numpy_helper.from_array(step.astype(np.float32), name))
    for node in wide.graph.node:
        reads = node.op_type == "DequantizeLinear" and node.input[0] == made
        if made in node.output or reads or alike.intersection(node.input[1:2]):
            node.input[1] = name
    return Widened(wide, scale, name)
