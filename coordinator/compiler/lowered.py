# SPDX-License-Identifier: Apache-2.0
"""A bundle's graphs as `.tflite` files: training, evaluation, and the model that predicts.

They are made of the same graphs as the ONNX ones, so that both engines compute the same; only the
gradients of convolutions and poolings are formulated anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from coordinator.compiler.graph import Graph, Value
from coordinator.compiler.losses import Loss
from coordinator.compiler.optim import Optimizer
from coordinator.compiler.predict import bias_patch, biases_of, fixed_patch, is_bias, patch_of
from coordinator.compiler.ranges import ROLE
from coordinator.compiler.tflite.gradients import TFLITE_RULES
from coordinator.compiler.tflite.lower import Kept, lower, lower_traced
from coordinator.compiler.train import Open, evaluate_graph, train_graph
from coordinator.compiler.weights import Weight
from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import TfliteFile, read

_SCALE = "\0scale"  # no tensor's name ends so


def lowered(
    opened: Open, loss: Loss, optimizer: Optimizer, *, target: Value, is_proximal: bool
) -> dict[str, bytes]:
    """Return the files that train and evaluate, by role. Raises: CompileError."""
    step, _ = train_graph(
        opened, loss, optimizer, target=target, is_proximal=is_proximal, rules=TFLITE_RULES
    )
    measure = evaluate_graph(opened, loss, target=target)
    return {"train": lower(step, "train"), "evaluate": lower(measure, "evaluate")}


def lowered_predict(graph: Graph, weights: Sequence[Weight]) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the file that predicts, and the patches that bring trained values into it.

    Args:
        graph: the forward model.
        weights: the chosen ones, in the manifest's order.
    """
    index = {w.source: i for i, w in enumerate(weights)}
    biases = [
        b
        for b in biases_of(graph)
        if {b.weight.source, b.layer.source, b.input_name} & index.keys()
    ]
    traced = {*index, *(b.weight.source for b in biases)}
    data, kept = lower_traced(graph, traced, "predict")
    file = read(data)
    followed = {b.weight.source for b in biases}
    patches = []
    for place, at in _places(file, kept):
        scales = {place.source: place.source + _SCALE}
        if place.source in followed:
            bias = next(b for b in biases if b.weight.source == place.source)
            rows = weights[index[place.source]].patch if place.source in index else {}
            patches.append(bias_patch(bias, index, at, scales) | rows)
        elif is_bias(weights[index[place.source]]):
            i = index[place.source]
            patches.append(fixed_patch(i, weights[i], at, scales))
        else:
            i = index[place.source]
            patches.append(_ordered(patch_of(i, weights[i], at, scales), place))
    _check(weights, patches)
    return data, patches


def _places(file: TfliteFile, kept: Sequence[Kept]) -> Iterator[tuple[Kept, dict[str, int]]]:
    """Yield what the file really has of the kept, with its offsets."""
    tensors = {t.name: t for t in file.subgraphs[0].tensors}
    for place in kept:
        tensor = tensors.get(place.tensor)
        if tensor is None:
            continue
        at = {place.source: file.buffers[tensor.buffer].offset}
        if tensor.scale_offset is not None:
            at[place.source + _SCALE] = tensor.scale_offset
            if place.order is None:
                at[place.source] = tensor.scale_offset
        yield place, at


def _ordered(patch: dict[str, Any], place: Kept) -> dict[str, Any]:
    order = list(place.order or ())
    if patch["kind"] == ROLE or order == sorted(order):
        return patch
    return {**patch, "order": order}


def _check(weights: Sequence[Weight], patches: Sequence[dict[str, Any]]) -> None:
    written = {patch["param"] for patch in patches}
    for i, weight in enumerate(weights):
        if i not in written:
            raise CompileError(
                f"expected {weight.name!r} to have a place in the .tflite file: "
                "build with engines=('onnx',)"
            )
