# SPDX-License-Identifier: Apache-2.0
"""The training and evaluation graphs: forward with masters as inputs, loss, backward, optimizer.

What lies below the first trained layer stays as it was given, so onnxruntime keeps running it on
integer kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import coordinator.compiler.rewrites
import coordinator.compiler.rules  # noqa: F401  both fill their tables
from coordinator.compiler import joint
from coordinator.compiler.accumulate import accumulated, shared
from coordinator.compiler.channels import turn
from coordinator.compiler.dequant import (
    drop_requantize,
    quantize_late,
    quantized_master,
    unsigned,
)
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph, Node, Tensor, Value
from coordinator.compiler.inplace import start_products_from_sums
from coordinator.compiler.lanes import in_whole_lanes
from coordinator.compiler.losses import Learned, Loss
from coordinator.compiler.narrow import narrow
from coordinator.compiler.optim import Optimizer, Slot, is_plain, proximal
from coordinator.compiler.passes import drop_unused, rename, simplify
from coordinator.compiler.ranges import ROLE, SLOWED, step
from coordinator.compiler.rewrite import rewritten
from coordinator.compiler.vjp import RULES, SeveralRule, backward
from coordinator.compiler.weights import Rows, Weight
from edge_sdk.errors import CompileError

_INT8 = (np.dtype(np.int8), np.dtype(np.uint8))


@dataclass(frozen=True)
class Open:
    """A forward graph whose trained weights are inputs ``p.i`` and whose input is ``x``.

    Attributes:
        graph: ends in `logits` alone.
        logits: float32, what the loss reads.
        leaves: for each weight the tensor to differentiate by: the input, or its rounded form.
        params: name and shape of each weight.
        ranges: which of the leaves are ranges of activations.
    """

    graph: Graph
    logits: str
    leaves: tuple[str, ...]
    params: tuple[tuple[str, tuple[int, ...]], ...]
    ranges: frozenset[str] = frozenset()


def open_weights(graph: Graph, weights: Sequence[Weight], logits: str) -> Open:
    """Cut a forward graph down to what makes `logits` and turn the weights into inputs."""
    graph = drop_unused(replace(graph, outputs=(Value(logits),)))
    makers = {w.source: graph.producers.get(w.tensors[0]) for w in weights if w.rows}
    stale = {name for w in weights if w.quantized for name in w.tensors}
    nodes = tuple(n for n in graph.nodes if not stale.intersection(n.outputs))
    graph = replace(graph, nodes=nodes)
    clear = _clear_names(graph)
    graph = rename(graph, clear)
    logits = clear.get(logits, logits)
    e = Emit(graph)
    alias = _float_input(e, graph.inputs[0])
    leaves = []
    for i, weight in enumerate(weights):
        e.input(f"p.{i}", np.float32, weight.value.shape)
        leaf = quantized_master(e, f"p.{i}", weight.quantized) if weight.quantized else f"p.{i}"
        stands = leaf
        if weight.role == ROLE:
            stands = step(e, leaf, _number(graph, clear.get(weight.source, weight.source)))
        if weight.rows is not None:
            frozen = _frozen(e, graph.initializers, makers[weight.source], weight, clear)
            stands = _with_rows(e, frozen, leaf, weight.rows)
        alias |= {clear.get(name, name): stands for name in weight.tensors}
        leaves.append(leaf)
    logits = _float_logits(e, graph, alias.get(logits, logits))
    inputs = ["x", *(f"p.{i}" for i in range(len(weights)))]
    whole = _aliased(e.graph(outputs=[logits], inputs=inputs), alias)
    ready = simplify(_keeping(whole, leaves).sorted())
    spelled = rewritten(ready, leaves)
    ready = ready if spelled is ready else simplify(spelled)
    ready = quantize_late(drop_unused(drop_requantize(ready, leaves)), leaves)
    ready = replace(unsigned(ready), outputs=ready.outputs[:1]).inferred()
    ranges = {leaf for leaf, w in zip(leaves, weights, strict=True) if w.role == ROLE}
    params = tuple((w.name, w.value.shape) for w in weights)
    return Open(ready, logits, tuple(leaves), params, frozenset(ranges))


def train_graph(
    opened: Open,
    loss: Loss,
    optimizer: Optimizer,
    *,
    target: Value,
    is_proximal: bool,
    rows: int | None = None,
    rules: Mapping[str, SeveralRule] | None = None,
) -> tuple[Graph, list[Slot]]:
    """Return the graph of one training step and the optimizer's slots.

    Inputs x, y, lr, p.i, s.j and, if proximal, mu and a.i; outputs loss, p.i.next, s.j.next.
    With `rows`, gradients are those of so many rows at a time, summed up (`accumulate`). With
    `rules`, another back end's gradients, images stay as the model has them.
    """
    e = Emit(_laid_out(opened) if rules is None else opened.graph)
    e.input("y", target.dtype or np.float32, target.shape)
    e.input("lr")
    made = loss.learn(e, opened.logits, "y")
    made = made if rows is None else shared(e, made)
    is_step = is_plain(optimizer) and not is_proximal and rows is None  # gradients come as steps
    made = _stepping(e, made) if is_step else made
    grads = backward(e, {opened.logits: made.gradient}, opened.leaves, rules or RULES)
    grads |= {leaf: e.Mul(grads[leaf], e.const(SLOWED)) for leaf in opened.ranges}
    mean, gradients = made.loss, narrow(e, [grads[leaf] for leaf in opened.leaves])
    if rows is not None:
        e, (mean, *gradients) = accumulated(e, [mean, *gradients], rows)
    params = [f"p.{i}" for i in range(len(opened.params))]
    anchors = [f"a.{i}" for i in range(len(params))] if is_proximal else []
    slots = optimizer.slots(opened.params)
    states = [e.input(f"s.{j}", np.float32, slot.shape) for j, slot in enumerate(slots)]
    if is_proximal:
        for anchor, (_, shape) in zip(anchors, opened.params, strict=True):
            e.input(anchor, np.float32, shape)
        gradients = proximal(e, gradients, params, e.input("mu"), anchors)
    moved = (
        joint.plain_step(e, opened.params, gradients)
        if is_step
        else joint.step(e, optimizer, opened.params, gradients, states)
    )
    results = [mean, *moved.params, *moved.slots]
    names = ["loss", *(f"{name}.next" for name in (*params, *states))]
    order = ["x", "y", "lr", *params, *states, *(["mu", *anchors] if is_proximal else [])]
    shapes = {f"{p}.next": s for p, (_, s) in zip(params, opened.params, strict=True)}
    return _finished(e, results, names, order, shapes), slots


def _laid_out(opened: Open) -> Graph:
    """Lay images out as onnxruntime computes them quickest: frozen ones, then trained ones."""
    return turn(in_whole_lanes(opened.graph), opened.leaves)


def _stepping(e: Emit, made: Learned) -> Learned:
    """Multiply a loss's gradient by -lr: what comes back through the layers are steps."""
    scaled = e.Mul(made.gradient, e.Neg("lr"))
    return made._replace(gradient=e.declare(scaled, e.shape(made.gradient)))


def evaluate_graph(opened: Open, loss: Loss, *, target: Value) -> Graph:
    """Return the graph that measures: inputs x, y, p.i; outputs loss and, with classes, correct."""
    e = Emit(opened.graph)
    e.input("y", target.dtype or np.float32, target.shape)
    made = loss.measure(e, opened.logits, "y")
    results = [made.loss] + ([made.correct] if made.correct else [])
    order = ["x", "y", *(f"p.{i}" for i in range(len(opened.params)))]
    return _finished(e, results, ["loss", "correct"][: len(results)], order, {})


def _finished(
    e: Emit, results: list[str], names: list[str], order: list[str], shapes: dict[str, Any]
) -> Graph:
    """Name the outputs, tidy the graph, and forget what only the compiler needed to know."""
    if len(set(results)) != len(results):
        results = [e.Identity(r) if r in results[:i] else r for i, r in enumerate(results)]
    graph = rename(e.graph(outputs=results, inputs=order), dict(zip(results, names, strict=True)))
    graph = start_products_from_sums(simplify(graph))
    outputs = tuple(
        replace(v, shape=shapes.get(v.name, v.shape if v.shape == () else None))
        if v.name in shapes or v.name in {"loss", "correct"}
        else v
        for v in graph.outputs
    )
    return replace(graph, outputs=outputs)


def _frozen(
    e: Emit,
    stored: Mapping[str, Tensor],
    maker: Node | None,
    weight: Weight,
    clear: Mapping[str, str],
) -> str:
    """Emit the values that a tensor has before training, of which only rows will learn."""
    if maker is None:
        return e.const(stored[clear.get(weight.source, weight.source)])
    inputs = [clear.get(name, name) for name in maker.inputs]
    (values,) = e.op(maker.op, inputs, domain=maker.domain, **maker.attributes)
    return values


def _with_rows(e: Emit, frozen: str, leaf: str, rows: Rows) -> str:
    """Put trained rows into their tensor."""
    at = e.const(np.array(rows.at, np.int64).reshape(-1, 1), np.int64)
    if rows.axis == 0:
        return e.ScatterND(frozen, at, leaf)
    perm = [rows.axis, *(i for i in range(e.rank(frozen)) if i != rows.axis)]
    back = [int(i) for i in np.argsort(perm)]
    turned = e.ScatterND(e.Transpose(frozen, perm=perm), at, e.Transpose(leaf, perm=perm))
    return e.Transpose(turned, perm=back)


def _clear_names(graph: Graph) -> dict[str, str]:
    """Return new names for tensors that have a name which the bundle's graphs reserve."""
    taken = {n for node in graph.nodes for n in (*node.inputs, *node.outputs)}
    taken |= set(graph.initializers) | {v.name for v in graph.inputs}
    fresh: dict[str, str] = {}
    for name in sorted(taken):
        if name in {"x", "y", "lr", "mu", "loss", "correct"} or name[:2] in {
            "p.",
            "s.",
            "a.",
            "g.",
        }:
            new = f"of.{name}"
            while new in taken:
                new = f"of.{new}"
            fresh[name] = new
    return fresh


def _float_input(e: Emit, value: Value) -> dict[str, str]:
    """Declare ``x``: an int8 model takes float32 here and quantizes it by its input's scale."""
    if value.dtype not in _INT8:
        return {value.name: e.input("x", value.dtype or np.float32, value.shape)}
    readers = [n for n in e.nodes if value.name in n.inputs]
    if not readers or any(n.kind != "DequantizeLinear" for n in readers):
        raise CompileError(
            f"expected DequantizeLinear to read the {value.dtype} input {value.name!r}: "
            "quantize in QDQ format"
        )
    e.input("x", np.float32, value.shape)
    return {value.name: e.QuantizeLinear("x", *readers[0].inputs[1:])}


def _float_logits(e: Emit, graph: Graph, logits: str) -> str:
    """Return logits as float32: an int8 output is dequantized by its own scale."""
    maker = graph.producers.get(logits)
    if maker is not None and maker.kind == "QuantizeLinear":
        return e.DequantizeLinear(logits, *maker.inputs[1:])
    if (e.dtype(logits) or np.float32) != np.float32:
        raise CompileError(f"expected a float32 output, {logits!r} is {e.dtype(logits)}")
    return logits


def _number(graph: Graph, name: str) -> float:
    return float(graph.initializers[name].reshape(()))


def _aliased(graph: Graph, alias: dict[str, str]) -> Graph:
    nodes = tuple(
        replace(n, inputs=tuple(alias.get(name, name) for name in n.inputs)) for n in graph.nodes
    )
    stored = {k: v for k, v in graph.initializers.items() if k not in alias}
    return replace(graph, nodes=nodes, initializers=stored)


def _keeping(graph: Graph, leaves: Sequence[str]) -> Graph:
    """Make the leaves outputs, so that no pass renames them."""
    made = [name for name in leaves if name in graph.producers]
    outputs = (*graph.outputs, *(graph.values.get(name, Value(name)) for name in made))
    return replace(graph, outputs=outputs)
