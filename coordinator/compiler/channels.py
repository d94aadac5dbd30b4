# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolutions as matrix products, and the layout they like: channels before examples.

onnxruntime runs a depthwise convolution whose weights are no constants window by window, and its
filter gradient has no quick formulation as another convolution. One product per channel does: rows
of the image are cut into blocks that overlap by the kernel, and a banded matrix made from the
filter takes each block [rows * width] to its outputs. Products with zeros are more, but they run at
the speed of a matrix product, forward and for both gradients.

For that, images stand as [channels, examples, ...] ("turned"). Pointwise convolutions are one
product of two matrices there, so tensors stay turned until an operator wants them as they were.
Figures: docs/adr/0008-depthwise-layers-are-banded-products.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph, Node
from coordinator.compiler.rules.conv import layer_of
from coordinator.compiler.rules.window import Layer, Window
from coordinator.compiler.vjp import differentiable_inputs

PER_PRODUCT, PER_COPY, PER_TAP, STRIDED = 0.03, 1.0, 0.72, 2.5
"""What a step costs, forward and backward, in ns of one core: a product in a banded matrix, an
element of a block, a tap of a convolution, and the factor that a convolution with strides takes."""

LARGEST = 2_000_000
"""The banded matrices of a layer hold no more numbers than this."""

_BY_ELEMENT = frozenset(
    {
        "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu",
        "Softplus", "Add", "Sub", "Mul", "Div", "Neg", "Identity", "QuantizeLinear",
        "DequantizeLinear",
    }
)  # fmt: skip


def turn(graph: Graph, trained: Iterable[str]) -> Graph:
    """Rewrite what depends on the `trained` tensors; every name that stays has its old meaning.

    Requires: nodes in topological order, shapes inferred. Ensures: the same outputs, up to the
    order of sums; nodes that no gradient passes are as they were.
    """
    return _Turning(graph, trained).run()


class Blocks(NamedTuple):
    """How rows are cut: `number` blocks, one every `step` rows, which make `out` rows each.

    A block is `before` rows of the previous one, its own `step` and `after` rows of the next.
    """

    number: int
    before: int
    step: int
    after: int
    out: int

    @property
    def rows(self) -> int:
        """Return how many rows a block holds."""
        return self.before + self.step + self.after


def blocks_of(layer: Layer) -> Blocks | None:
    """Choose the cheapest blocks of a depthwise layer; None where a convolution is cheaper."""
    w = layer.window
    taps = PER_TAP * w.taps * math.prod(w.out) * (STRIDED if max(w.strides) > 1 else 1.0)
    priced = [(_price(w, cut), cut) for cut in _cuts(w)]
    cost, cut = min(priced, default=(math.inf, None))
    if cut is None or cost > taps or layer.channels * math.prod(_sizes(w, cut)) > LARGEST:
        return None
    return cut


def _cuts(w: Window) -> Iterator[Blocks]:
    """Yield the ways to cut an image: whole, or into blocks that overlap a neighbour only."""
    yield Blocks(1, 0, w.size[0], 0, w.out[0])
    before, stride = w.begins[0], w.strides[0]
    for out in range(1, w.out[0] // 2 + 1):
        step = out * stride
        after = max((out - 1) * stride + w.extents[0] - step - before, 0)
        if before + after <= step:
            number = max(-(-w.out[0] // out), -(-w.size[0] // step))
            yield Blocks(number, before, step, after, out)


def _sizes(w: Window, cut: Blocks) -> tuple[int, int]:
    """Return how many elements a block takes and makes."""
    return cut.rows * math.prod(w.size[1:]), cut.out * math.prod(w.out[1:])


def _price(w: Window, cut: Blocks) -> float:
    ins, outs = _sizes(w, cut)
    copies = PER_COPY * ins if cut.number > 1 else 0.0
    return cut.number * (PER_PRODUCT * ins * outs + copies)


class _Turning:
    """One walk over a graph: `turned` maps a tensor to the name of its turned form."""

    def __init__(self, graph: Graph, trained: Iterable[str]) -> None:
        self.graph, self.e = graph, Emit(replace(graph, nodes=()))
        self.turned: dict[str, str] = {}
        self.missing: set[str] = set()
        self.reached = set(trained)

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if self.reached.intersection(differentiable_inputs(node)):
                self.reached.update(node.outputs)
            if not (self.reached.intersection(node.outputs) and self._lowered(node)):
                for name in node.inputs:
                    self._restore(name)
                self.e.nodes.append(node)
        for value in self.graph.outputs:
            self._restore(value.name)
        outputs = [value.name for value in self.graph.outputs]
        made = self.e.graph(outputs=outputs, inputs=[v.name for v in self.graph.inputs])
        return replace(made, outputs=self.graph.outputs)

    def _lowered(self, node: Node) -> bool:
        """Emit a node in turned form, or return False."""
        if node.kind == "Conv" and self._is_known(node):
            layer = layer_of(self.e, node)
            if layer.is_depthwise and layer.filters == layer.channels:
                cut = blocks_of(layer)
                return cut is not None and self._depthwise(node, layer, cut)
            if layer.group == 1 and layer.window.is_plain and node.inputs[0] in self.turned:
                return self._pointwise(node, layer)
        if node.kind == "GlobalAveragePool" and node.inputs[0] in self.turned:
            axes = self.e.ints(*range(2, self.e.rank(node.inputs[0])))
            return self._keep(node, self.e.ReduceMean(self.turned[node.inputs[0]], axes))
        return node.kind in _BY_ELEMENT and self._by_element(node)

    def _is_known(self, node: Node) -> bool:
        x, y = self.e.shape(node.inputs[0]), self.e.shape(node.outputs[0])
        return None not in (self.e.static(node.inputs[1]), x, y) and None not in (x or ())[1:]

    def _by_element(self, node: Node) -> bool:
        """Serve operators whose other inputs are turned too, or the same for every element."""
        x, *others = node.inputs
        full = [n for n in (x, *others) if n and self.e.shape(n) not in {(), (1,)}]
        if not full or any(n not in self.turned for n in full):
            return False
        if len({self.e.rank(n) for n in full}) != 1:
            return False  # what broadcasts from fewer dimensions would meet others
        inputs = [self.turned.get(n, n) for n in node.inputs]
        (made,) = self.e.op(node.op, inputs, domain=node.domain, **node.attributes)
        return self._keep(node, made)

    def _pointwise(self, node: Node, layer: Layer) -> bool:
        e = self.e
        flat = e.Reshape(self.turned[node.inputs[0]], e.ints(layer.channels, -1))
        matrix = e.Reshape(node.inputs[1], e.ints(layer.filters, layer.channels))
        bias = node.input(2) and e.Reshape(node.input(2), e.ints(layer.filters, 1))
        made = e.Gemm(matrix, flat, bias)
        return self._keep(node, e.Reshape(made, e.ints(layer.filters, -1, *layer.window.out)))

    def _depthwise(self, node: Node, layer: Layer, cut: Blocks) -> bool:
        e, w, channels = self.e, layer.window, layer.channels
        ins, outs = _sizes(w, cut)
        taps = e.Reshape(node.inputs[1], e.ints(channels, w.taps))
        banded = e.Reshape(e.Gemm(taps, _bands(e, w, cut)), e.ints(channels, ins, outs))
        made = e.MatMul(_cut(e, self._turn(node.inputs[0]), w, cut), banded)
        made = e.Reshape(made, e.ints(channels, -1, cut.number * cut.out, *w.out[1:]))
        if cut.number * cut.out != w.out[0]:
            made = e.Slice(made, e.ints(0), e.ints(w.out[0]), e.ints(2))
        if node.input(2):
            made = e.Add(made, e.Reshape(node.input(2), e.ints(channels, 1, *[1] * len(w.out))))
        return self._keep(node, made)

    def _keep(self, node: Node, made: str) -> bool:
        """Remember the turned form of a node's output; the plain one is made when asked for."""
        self.turned[node.outputs[0]] = made
        self.missing.add(node.outputs[0])
        return True

    def _turn(self, name: str) -> str:
        if name not in self.turned:
            self._restore(name)
            self.turned[name] = self.e.Transpose(name, perm=_exchange(self.e.rank(name)))
        return self.turned[name]

    def _restore(self, name: str) -> None:
        """Make sure that a tensor exists as it was."""
        if name in self.missing:
            self.missing.remove(name)
            value = self.graph.values[name]
            perm = _exchange(len(value.shape or ()))
            self.e.op("Transpose", [self.turned[name]], outputs=(name,), perm=perm)
            self.e.declare(name, value.shape)


def _exchange(rank: int) -> list[int]:
    return [1, 0, *range(2, rank)]


def _bands(e: Emit, w: Window, cut: Blocks) -> str:
    """Return [taps, ins * outs] of 0 and 1: which tap takes which input of a block to which output.

    It is the convolution of every one-element image with every one-tap filter. onnxruntime computes
    it once, when it loads the graph, so that a bundle need not carry it.
    """
    ins, _ = _sizes(w, cut)
    image = e.EyeLike(e.ConstantOfShape(e.ints(ins, ins)))
    taps = e.EyeLike(e.ConstantOfShape(e.ints(w.taps, w.taps)))
    begin = w.begins[0] - cut.before
    end = max((cut.out - 1) * w.strides[0] + w.extents[0] - cut.rows - begin, 0)
    found = e.Conv(
        e.Reshape(image, e.ints(ins, 1, cut.rows, *w.size[1:])),
        e.Reshape(taps, e.ints(w.taps, 1, *w.kernel)),
        strides=w.strides,
        dilations=w.dilations,
        pads=(begin, *w.begins[1:], end, *w.ends[1:]),
    )
    rank = len(w.kernel)
    if e.dims(found)[2:] != (cut.out, *w.out[1:]):
        axes = e.ints(*range(2, rank + 2))
        found = e.Slice(found, e.ints(*[0] * rank), e.ints(cut.out, *w.out[1:]), axes)
    pairs = e.Reshape(found, e.ints(ins, w.taps, -1))
    return e.Reshape(e.Transpose(pairs, perm=[1, 0, 2]), e.ints(w.taps, -1))


def _cut(e: Emit, x: str, w: Window, cut: Blocks) -> str:
    """Cut turned images [C, N, rows, ...] into blocks [C, N * number, block]."""
    channels, width = e.dims(x)[0] or 0, math.prod(w.size[1:])
    whole = e.ints(channels, -1, cut.rows * width)
    if cut.number == 1:
        return e.Reshape(x, whole)
    spare = cut.number * cut.step - w.size[0]
    x = e.Pad(x, e.ints(0, spare), None, e.ints(2)) if spare else x
    own = e.Reshape(x, e.ints(channels, -1, cut.number, cut.step * width))
    sizes = [n * width for n in (cut.after, cut.step - cut.after - cut.before, cut.before)]
    parts = dict(zip((n for n in range(3) if sizes[n]), _split(e, own, sizes), strict=True))
    joined = list(parts.values())
    if cut.before:
        last = e.Slice(parts[2], e.ints(0), e.ints(cut.number - 1), e.ints(2))
        joined.insert(0, e.Pad(last, e.ints(1, 0), None, e.ints(2)))
    if cut.after:
        first = e.Slice(parts[0], e.ints(1), e.ints(cut.number), e.ints(2))
        joined.append(e.Pad(first, e.ints(0, 1), None, e.ints(2)))
    return e.Reshape(e.Concat(*joined, axis=3) if len(joined) > 1 else own, whole)


def _split(e: Emit, x: str, sizes: list[int]) -> tuple[str, ...]:
    """Split the last axis; parts of no size are left out."""
    kept = [size for size in sizes if size]
    return (x,) if len(kept) == 1 else e.Split(x, e.ints(*kept), outputs=len(kept), axis=3)
