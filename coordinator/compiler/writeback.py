# SPDX-License-Identifier: Apache-2.0
"""What training may change of the .tflite file that a model came from, as byte ranges of that file.

A device predicts with the original file, trained tensors written over their old bytes: weights in
the file's own layout, their scales, int32 biases on the scales that their kernels demand, and the
ranges of activations that learned. Which tensor follows which is read from the file's operators,
not from the ONNX graph that was trained. The file differs from what was given in one case: where a
constant that training touches has another tensor as a user, it is given bytes of its own
(`unshare`, which also undoes it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from coordinator.compiler.graph import Graph
from coordinator.compiler.ranges import ROLE
from coordinator.compiler.tflite.source import Source, is_stored, joins_stored, scale_at
from coordinator.compiler.tflite.unshare import unshared
from coordinator.compiler.weights import Weight
from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import Tensor, read

_BIASED = {
    "CONV_2D": (0, 1, 2),
    "CONV_3D": (0, 1, 2),
    "DEPTHWISE_CONV_2D": (0, 1, 2),
    "FULLY_CONNECTED": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
}
"""Operators whose int32 bias has the scale of input times weight, and the places of the three."""

Patch = dict[str, Any]


class _Bias(NamedTuple):
    """An int32 bias with the input and the weight of its kernel, as tensors of the file."""

    bias: int
    input: int
    weight: int


def predict_file(
    source: Source, before: Graph, graph: Graph, weights: Sequence[Weight]
) -> tuple[bytes, list[Patch]]:
    """Return the .tflite file that a device predicts with, and its patches for the manifest.

    Args:
        source: where the model came from.
        before: the forward graph with the scales' names of the import.
        graph: the same as it is trained, where ranges may have names of their own.
        weights: the trained ones, in the manifest's order.

    Raises: CompileError when a trained tensor is not one of the file.
    """
    tensors = {i: _origin(source, w) for i, w in enumerate(weights) if w.role != ROLE}
    ranges = {i: _shared_by(source, before, graph, w) for i, w in enumerate(weights)}
    biases = _followers(source, set(tensors.values()), {t for ts in ranges.values() for t in ts})
    own = sorted({*tensors.values(), *(b.bias for b in biases)})
    data = unshared(source.data, _to_copy(source, own))
    source = replace(source, data=data, file=read(data))
    writing = _Writing(source, weights, tensors, ranges)
    followed = {b.bias for b in biases}
    patches = [writing.weight(graph, i, t) for i, t in tensors.items() if t not in followed]
    patches += [p for i in ranges for p in writing.range(i)]
    patches += [writing.bias(b) for b in biases]
    _check_scales(source, patches, ranges.values())
    return data, patches


class _Writing:
    """Makes patches of one file: `tensors` and `ranges` say what each trained weight is in it."""

    def __init__(
        self,
        source: Source,
        weights: Sequence[Weight],
        tensors: Mapping[int, int],
        ranges: Mapping[int, Sequence[int]],
    ) -> None:
        self.source, self.weights, self.ranges = source, weights, ranges
        self.param = {t: i for i, t in tensors.items()}
        self.input = {t: i for i, ts in ranges.items() for t in ts}

    def weight(self, graph: Graph, i: int, t: int) -> Patch:
        """Return the patch of a trained constant, after a look at the bytes that it replaces."""
        weight, tensor = self.weights[i], self.source.tensors[t]
        order = self.source.imported.origins[weight.source].order
        stored = graph.initializers[weight.source]
        laid_out = stored if order is None else np.transpose(stored, order)
        here = self.source.file.data(tensor.buffer)
        is_half = tensor.dtype == "float16"
        laid_out = laid_out.astype("<f2") if is_half else np.ascontiguousarray(laid_out)
        if laid_out.tobytes() != here:
            raise CompileError(
                f"expected {weight.name!r} as the .tflite file has it, the import changed it: "
                "leave it out of train"
            )
        patch: Patch = {
            "param": i,
            "kind": "float16" if is_half else "float32",
            "offset": self._offset(t),
        }
        if weight.quantized is not None:
            patch |= self._quantized(weight, t)
        if order is not None and weight.value.ndim:
            patch["order"] = list(order)
        return patch | weight.patch

    def range(self, i: int) -> list[Patch]:
        """Return the patches of a learned range: one for each tensor that it stands for."""
        tensors = self.source.tensors
        places = sorted({scale_at(tensors[t]) for t in self.ranges[i]})
        return [{"param": i, "kind": ROLE, "offset": at} for at in places]

    def bias(self, found: _Bias) -> Patch:
        """Return the patch of an int32 bias, trained or frozen, that follows what moved."""
        bias, weight, x = (self.source.tensors[t] for t in (found.bias, found.weight, found.input))
        if len(bias.scale) != len(weight.scale):
            raise CompileError(
                f"expected as many scales for bias {bias.name!r} as for its weight, got "
                f"{len(bias.scale)} and {len(weight.scale)}: quantize the model again"
            )
        patch: Patch = {
            "param": self.param.get(found.bias),
            "kind": "bias",
            "offset": self._offset(found.bias),
            "scale_offset": scale_at(bias),
            "scales": len(bias.scale),
            "input_scale": float(x.scale[0]),
        }
        if found.bias not in self.param:
            patch["shape"] = list(bias.shape)
        else:
            patch |= self.weights[self.param[found.bias]].patch
        if found.input in self.input:
            patch["input"] = self.input[found.input]
        if found.weight in self.param:
            return {**patch, "weight": self.param[found.weight]}
        return {**patch, "weight_scale": [float(s) for s in weight.scale]}

    def _quantized(self, weight: Weight, t: int) -> Patch:
        tensor, scheme = self.source.tensors[t], weight.quantized
        if scheme is None or tensor.dtype not in {"int8", "uint8"}:
            raise CompileError(
                f"expected 8 bits or floats in {tensor.name!r}, got {tensor.dtype} "
                "that no kernel's bias is: leave it out of train"
            )
        points = [int(z) for z in scheme.zero_point]
        return {
            "kind": "quantized",
            "dtype": tensor.dtype,
            "scale_offset": scale_at(tensor),
            "scales": len(tensor.scale),
            "axis": scheme.axis,
            "zero_point": points[0] if len(set(points)) == 1 else points,
        }

    def _offset(self, t: int) -> int:
        return self.source.file.buffers[self.source.tensors[t].buffer].offset


def _origin(source: Source, weight: Weight) -> int:
    """Return the tensor of the file that a weight is."""
    origin = source.imported.origins.get(weight.source)
    if origin is None:
        raise CompileError(
            f"expected weights that the .tflite file stores in floats or 8 bits, {weight.name!r} "
            "is computed, or in another type: leave it out of train"
        )
    for op in source.operators:
        if joins_stored(source, op) and origin.tensor in op.inputs:
            raise CompileError(
                f"expected weights whose scale may change, {op.op} wants that of {weight.name!r} "
                "to equal its other inputs': leave it out of train"
            )
    return origin.tensor


def _shared_by(source: Source, before: Graph, graph: Graph, weight: Weight) -> tuple[int, ...]:
    """Return the tensors of the file whose range a parameter is, none for a weight."""
    if weight.role != ROLE:
        return ()
    made = {n.outputs[0] for n in graph.nodes if n.input(1) == weight.source}
    names = dict.fromkeys(n.inputs[1] for n in before.nodes if n.outputs[0] in made)
    found = [t for name in names for t in source.imported.steps.get(name, ())]
    return tuple(sorted(source.with_alike(found)))


def _followers(source: Source, trained: set[int], ranged: set[int]) -> list[_Bias]:
    """Return the int32 biases that are trained, or whose weight or input is."""
    found: dict[int, _Bias] = {}
    for op in source.operators:
        places = _BIASED.get(op.op)
        if places is None or len(op.inputs) <= max(places):
            continue
        x, w, b = (int(op.inputs[n]) for n in places)
        if b < 0 or source.tensors[b].dtype != "int32" or not len(source.tensors[b].scale):
            continue
        if not {w, b} & trained and not {x, w} & ranged:
            continue
        if not is_stored(source, w):
            raise CompileError(
                f"expected stored weights beside the int32 bias of {op.op}, they are computed: "
                "train another selection"
            )
        if found.setdefault(b, _Bias(b, x, w)) != _Bias(b, x, w):
            raise CompileError(
                f"expected bias {source.tensors[b].name!r} to belong to one operator, it belongs "
                "to several: train another selection"
            )
    return list(found.values())


def _to_copy(source: Source, own: Sequence[int]) -> list[tuple[int, int]]:
    """Return which of the tensors to be written need a copy, so that each has its own bytes."""
    main, copied = source.imported.subgraph, list[tuple[int, int]]()
    for t in own:
        users = source.file.users(source.tensors[t].buffer)
        others = [(s, u) for s, u in users if (s, u) != (main, t) and (s, u) not in copied]
        if others:
            copied.append((main, t))
    return copied


def _check_scales(
    source: Source, patches: Sequence[Patch], ranges: Iterable[Sequence[int]]
) -> None:
    """Raise where a scale that would be written belongs to a tensor that keeps its own."""
    written = {p["offset" if p["kind"] == ROLE else "scale_offset"] for p in patches if _scaled(p)}
    main = source.file.subgraphs[source.imported.subgraph]
    users: dict[int, list[Tensor]] = {}
    for subgraph in source.file.subgraphs:
        for tensor in subgraph.tensors:
            if tensor.scale_offset is not None and tensor.scale_offset in written:
                users.setdefault(tensor.scale_offset, []).append(tensor)
    moved = [[id(main.tensors[t]) for t in together] for together in ranges]
    for found in users.values():
        if len(found) > 1 and not any({*map(id, found)} <= {*together} for together in moved):
            names = ", ".join(repr(tensor.name) for tensor in found)
            raise CompileError(
                f"expected scales of their own for {names}, the file stores one for all: convert "
                "the model again"
            )


def _scaled(patch: Patch) -> bool:
    return "scale_offset" in patch or patch["kind"] == ROLE
