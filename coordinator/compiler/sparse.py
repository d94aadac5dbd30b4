# SPDX-License-Identifier: Apache-2.0
"""A share of a model's numbers, those that contribute most: whole output channels of its layers.

``"sparse:0.25"`` trains a quarter of all numbers, ``"sparse:0.25:last:3"`` a quarter of those in
the last three layers. A channel is what makes one output of a convolution or dense layer: its
filter and its number of the bias. The last layer is trained whole; so are biases that stand alone.
Layers whose channels cannot be told apart, or are quantized with one scale for all, are frozen.

What a channel contributes is, with examples to calibrate on, how much a small step on it would
lower the loss, by number: the squared norm of its gradient over its size (to first order; Lin et
al. 2022, "On-Device Training Under 256KB Memory", search by trial instead). Without examples, it
is its norm next to that of its layer's other channels. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.weights import Rows, Weight
from edge_sdk.errors import CompileError
from edge_sdk.types import Params

PREFIX = "sparse:"


class Sparse(NamedTuple):
    """What ``sparse:SHARE[:SELECTION]`` says."""

    share: float
    among: str


class _Layer(NamedTuple):
    """Tensors whose channels go together, and what each channel of theirs contributes."""

    weights: list[Weight]
    axes: list[int]
    value: NDArray[np.float64]

    @property
    def channels(self) -> int:
        return len(self.value)

    @property
    def numbers(self) -> int:
        """Return how many numbers one channel has."""
        return sum(w.value.size for w in self.weights) // self.channels


def sparse(train: str | Sequence[str]) -> Sparse | None:
    """Read a selection by share. Raises: CompileError for a share outside 0 to 1."""
    if not isinstance(train, str) or not train.startswith(PREFIX):
        return None
    text, _, among = train.removeprefix(PREFIX).partition(":")
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise CompileError(
            f"expected train='sparse:SHARE' with a share between 0 and 1, got {train!r}: "
            "write sparse:0.25, or sparse:0.25:last:3"
        )
    return Sparse(share, among or "all")


def narrowed(
    weights: Sequence[Weight], share: float, gradients: Params | None = None
) -> list[Weight]:
    """Return the channels that contribute most, up to a share of the numbers of `weights`.

    Args:
        weights: in topological order.
        share: of their numbers.
        gradients: by name of the weight; None to go by norms.

    Raises: CompileError when the last layer alone is more than that.
    """
    left = math.floor(share * sum(w.value.size for w in weights))
    layers, whole = _layers(weights)
    left -= sum(w.value.size for w in whole)
    if left < 0:
        least = sum(w.value.size for w in whole) / sum(w.value.size for w in weights)
        raise CompileError(
            f"expected a share that holds the last layer and the biases that stand alone, which "
            f"are trained whole: they are {least:.3f} of all"
        )
    priced = [_valued(layer, gradients) for layer in layers]
    chosen: dict[int, list[int]] = {}
    for _, i, k in sorted((-v, i, k) for i, p in enumerate(priced) for k, v in enumerate(p.value)):
        if priced[i].numbers <= left:
            left -= priced[i].numbers
            chosen.setdefault(i, []).append(k)
    made = {w.source: w for w in whole}
    for i, channels in chosen.items():
        layer, at = priced[i], tuple(sorted(channels))
        for weight, axis in zip(layer.weights, layer.axes, strict=True):
            rows = Rows(axis, layer.channels, at)
            made[weight.source] = weight if len(at) == layer.channels else weight.narrowed(rows)
    return [made[w.source] for w in weights if w.source in made]


def _layers(weights: Sequence[Weight]) -> tuple[list[_Layer], list[Weight]]:
    """Return the layers whose channels can be told apart, and what is trained whole."""
    last = max((w.layer for w in weights), default=0)
    whole = [w for w in weights if w.layer == last]
    groups: dict[int, list[Weight]] = {}
    for weight in weights:
        if weight.layer != last:
            groups.setdefault(id(weight.reader), []).append(weight)
    layers = []
    for found in groups.values():
        axes = [_axis(w) for w in found]
        heads = [w for w in found if w.role == "weight"]
        known = [a for a in axes if a is not None]
        counts = {w.value.shape[a] for w, a in zip(found, known, strict=False)}
        if len(heads) == 1 and len(known) == len(found) and len(counts) == 1:
            layers.append(_Layer(found, known, np.zeros(counts.pop())))
        elif all(w.role == "bias" for w in found):
            whole += found
    return layers, whole


def _axis(weight: Weight) -> int | None:
    """Return along which axis a tensor has one slice for each output channel of its layer."""
    node, rank, is_bias = weight.reader, weight.value.ndim, weight.role == "bias"
    if node.input(2 if is_bias else 1) not in weight.tensors:
        return None  # it reads something made of it
    axis = None
    if is_bias:
        axis = 0 if node.kind in {"Conv", "Gemm"} and rank == 1 else None
    elif node.kind == "Conv":
        axis = 0
    elif node.kind in {"Gemm", "MatMul"} and rank == 2:
        axis = 0 if node.attr("transB", 0) else 1
    scheme = weight.quantized
    return axis if scheme is None or scheme.axis == axis else None


def _valued(layer: _Layer, gradients: Params | None) -> _Layer:
    if gradients is None:
        weight, axis = next(
            (w, a) for w, a in zip(layer.weights, layer.axes, strict=True) if w.role == "weight"
        )
        norms = np.sqrt(_squares(weight.value, axis))
        return layer._replace(value=norms / max(float(norms.mean()), np.finfo(np.float64).tiny))
    pairs = zip(layer.weights, layer.axes, strict=True)
    total = sum((_squares(gradients[w.name], a) for w, a in pairs), np.zeros(layer.channels))
    return layer._replace(value=total / layer.numbers)


def _squares(values: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    others = tuple(i for i in range(values.ndim) if i != axis)
    found: NDArray[np.float64] = np.square(values, dtype=np.float64).sum(axis=others)
    return found
