# SPDX-License-Identifier: Apache-2.0
"""If, Loop and Scan without control flow, where their course does not depend on the data.

A branch whose condition is fixed is put in the If's place; a body whose number of turns is fixed is
repeated. Conditions may be computed from stored tensors and from shapes, but for the batch: they
are evaluated for two sizes of it and must agree. Stored tensors of a body are shared by its turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from coordinator.compiler.names import fresh
from coordinator.compiler.runtime import session
from edge_sdk.errors import CompileError

MOST_TURNS = 1024
"""A longer loop makes a graph that no small board loads."""

_KINDS = ("If", "Loop", "Scan")
_BATCHES = (3, 5)


def unrolled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without If, Loop and Scan, or the same one if it has none.

    Raises: CompileError, naming the node whose course depends on the data.
    """
    if not any(node.op_type in _KINDS for node in proto.graph.node):
        return proto
    flat = onnx.ModelProto()
    flat.CopyFrom(proto)
    while (at := _first(flat.graph.node)) is not None:
        node = flat.graph.node[at]
        nodes = list(flat.graph.node)
        work = _Work(flat, nodes[:at])
        made = {"If": _branch, "Loop": _loop, "Scan": _scan}[node.op_type](work, node)
        flat.graph.initializer.extend(work.stored)
        del flat.graph.node[:]
        flat.graph.node.extend([*nodes[:at], *made, *nodes[at + 1 :]])
        del flat.graph.value_info[:]
    return flat


def _first(nodes: Iterable[onnx.NodeProto]) -> int | None:
    return next((i for i, node in enumerate(nodes) if node.op_type in _KINDS), None)


@dataclass
class _Work:
    """A model under rewriting: the nodes before the one at work, and what is added to it."""

    model: onnx.ModelProto
    before: list[onnx.NodeProto]
    stored: list[TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Learn which names are taken, and shapes."""
        inferred = shape_inference.infer_shapes(self.model, data_prop=True).graph
        values = (*inferred.input, *inferred.value_info)
        self.shapes = {v.name: _dims(v.type) for v in values}
        self.taken = {name for node in self.model.graph.node for name in node.output}
        self.taken |= {t.name for t in self.model.graph.initializer} | {v.name for v in values}
        self.shapes |= {t.name: list(t.dims) for t in self.model.graph.initializer}
        self.version = next(o.version for o in self.model.opset_import if not o.domain)

    def fresh(self, stem: str) -> str:
        """Return a name that nothing has."""
        return fresh(stem, self.taken)

    def store(self, stem: str, array: NDArray[Any]) -> str:
        """Add a stored tensor."""
        name = self.fresh(stem)
        self.stored.append(numpy_helper.from_array(array, name))
        return name

    def value(self, name: str, made: Iterable[onnx.NodeProto] = ()) -> NDArray[Any] | None:
        """Return what a tensor always is, or None where it depends on data or on the batch."""
        nodes = [*self.before, *made]
        name = _source(name, nodes)
        tensors = (*self.model.graph.initializer, *self.stored)
        found = [_evaluated(name, nodes, tensors, self, batch) for batch in _BATCHES]
        first, second = found
        if first is None or second is None or not np.array_equal(first, second):
            return None
        return first

    def axis_node(self, op: str, x: str, out: str, axis: int) -> onnx.NodeProto:
        """Return a Squeeze or Unsqueeze of one axis, as the model's opset spells it."""
        if self.version < 13:
            return helper.make_node(op, [x], [out], axes=[axis])
        axes = self.store("axes", np.array([axis], np.int64))
        return helper.make_node(op, [x, axes], [out])


def _source(name: str, nodes: list[onnx.NodeProto]) -> str:
    """Look past Identity nodes."""
    alias = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Identity"}
    while name in alias:
        name = alias[name]
    return name


def _dims(proto: onnx.TypeProto) -> list[int | None] | None:
    if not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else None for d in dims]


def _evaluated(
    name: str, nodes: list[onnx.NodeProto], stored: Iterable[TensorProto], work: _Work, batch: int
) -> NDArray[Any] | None:
    """Compute a tensor from stored ones and shapes, an unknown dimension being `batch`."""
    tensors = {t.name: t for t in stored}
    if name in tensors:
        array: NDArray[Any] = numpy_helper.to_array(tensors[name])
        return array
    makers = {out: node for node in nodes for out in node.output if out}
    part: dict[int, onnx.NodeProto] = {}
    todo = [name]
    while todo:
        asked = todo.pop()
        if asked in tensors or not asked:
            continue
        node = makers.get(asked)
        if node is None or node.op_type in _KINDS:
            return None
        if node.op_type == "Shape":
            shape = work.shapes.get(node.input[0])
            if shape is None:
                return None
            sizes = np.array([batch if d is None else d for d in shape], np.int64)
            ends = {a.name: a.i for a in node.attribute}
            sizes = sizes[ends.get("start", 0) : ends.get("end", len(sizes))]
            tensors[asked] = numpy_helper.from_array(sizes, asked)
        elif id(node) not in part:
            part[id(node)] = node
            todo += node.input
    ordered = [node for node in nodes if id(node) in part]
    return _run(name, ordered, tensors, work.model)


def _run(
    name: str,
    nodes: list[onnx.NodeProto],
    tensors: Mapping[str, TensorProto],
    model: onnx.ModelProto,
) -> NDArray[Any] | None:
    if name in tensors:
        array: NDArray[Any] = numpy_helper.to_array(tensors[name])
        return array
    read = {asked for node in nodes for asked in node.input}
    graph = helper.make_graph(
        nodes,
        "part",
        [],
        [onnx.ValueInfoProto(name=name)],
        [tensors[r] for r in read & set(tensors)],
    )
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    result: NDArray[Any] = session(part.SerializeToString(), optimize=False).run([name], {})[0]
    return result


# --- bodies ---------------------------------------------------------------------------------------
def _body(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    return next(a.g for a in node.attribute if a.name == name)


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} node {node.name or node.output[0]!r}"


def _adopted(work: _Work, body: onnx.GraphProto) -> dict[str, str]:
    """Move a body's stored tensors out of it, once; return their names outside."""
    names = {}
    for tensor in body.initializer:
        names[tensor.name] = work.fresh(tensor.name)
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = names[tensor.name]
        work.stored.append(copy)
    return names


def _turn(
    work: _Work, body: onnx.GraphProto, names: dict[str, str], tag: str
) -> list[onnx.NodeProto]:
    """Copy a body's nodes, `names` telling what its names are outside; it learns the new ones."""
    made = []
    for node in body.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = work.fresh(f"{node.name}{tag}") if node.name else ""
        copy.input[:] = [names.get(name, name) for name in node.input]
        fresh = {name: work.fresh(f"{name}{tag}") for name in node.output if name}
        names.update(fresh)
        copy.output[:] = [fresh.get(name, "") for name in node.output]
        for attribute in copy.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _recall(attribute.g, names)
        made.append(copy)
    return made


def _recall(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename what a nested body reads from outside it."""
    own = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    own |= {name for node in graph.node for name in node.output}
    outer = {old: new for old, new in names.items() if old not in own}
    for node in graph.node:
        node.input[:] = [outer.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _recall(attribute.g, outer)
    for value in graph.output:
        value.name = outer.get(value.name, value.name)


def _copies(sources: Iterable[str], targets: Iterable[str]) -> list[onnx.NodeProto]:
    pairs = zip(sources, targets, strict=False)  # last outputs may be left out
    return [helper.make_node("Identity", [a], [b]) for a, b in pairs if b]


def _branch(work: _Work, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    condition = work.value(node.input[0])
    if condition is None:
        raise CompileError(
            f"expected a fixed condition in {_label(node)}, it depends on the data: "
            "export the model in eval mode, with fixed structure"
        )
    body = _body(node, "then_branch" if condition.reshape(-1)[0] else "else_branch")
    names = _adopted(work, body)
    made = _turn(work, body, names, "")
    results = [names.get(v.name, v.name) for v in body.output]
    return [*made, *_copies(results, node.output)]


def _loop(work: _Work, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    most = _trips(work, node)
    body = _body(node, "body")
    going = True if not node.input[1] else work.value(node.input[1])
    shared = _adopted(work, body)
    states = list(node.input[2:])
    made: list[onnx.NodeProto] = []
    rows: list[list[str]] = []
    ins = [v.name for v in body.input]
    for turn in range(most):
        if going is None:
            raise CompileError(
                f"expected a fixed number of turns in {_label(node)}, its condition depends on "
                "the data: export the model with fixed structure"
            )
        if not np.any(going):
            break
        counter = work.store(f"{ins[0]}.{turn}", np.array(turn, np.int64))
        always = work.store(f"{ins[1]}.{turn}", np.ones((), np.bool_))
        names = shared | dict(zip(ins, (counter, always, *states), strict=True))
        made += _turn(work, body, names, f".{turn}")
        goes, *rest = [names.get(v.name, v.name) for v in body.output]
        states, row = rest[: len(states)], rest[len(states) :]
        rows.append(row)
        if most > MOST_TURNS and (turn == MOST_TURNS or _source(goes, made) == always):
            raise CompileError(
                f"expected at most {MOST_TURNS} turns in {_label(node)}, it has no end"
            )
        going = work.value(goes, made)
    return [*made, *_copies(states, node.output[: len(states)]),
            *_stacked(work, node, rows, len(states))]  # fmt: skip


def _trips(work: _Work, node: onnx.NodeProto) -> int:
    """Return the most turns that a Loop may take."""
    if not node.input[0]:
        return MOST_TURNS + 1
    most = work.value(node.input[0])
    if most is None:
        raise CompileError(
            f"expected a fixed number of turns in {_label(node)}, it depends on the data or on "
            "the batch: export the model with fixed structure"
        )
    if int(most.reshape(-1)[0]) > MOST_TURNS:
        raise CompileError(
            f"expected at most {MOST_TURNS} turns in {_label(node)}, got {int(most.reshape(-1)[0])}"
        )
    return int(most.reshape(-1)[0])


def _stacked(
    work: _Work, node: onnx.NodeProto, rows: list[list[str]], states: int
) -> list[onnx.NodeProto]:
    """Stack what each turn gave to the scan outputs."""
    axes = _ints(node, "scan_output_axes") or [0] * len(node.output)
    ways = _ints(node, "scan_output_directions") or [0] * len(node.output)
    made = []
    for i, out in enumerate(node.output[states:]):
        if not out:
            continue
        if not rows:
            raise CompileError(f"expected at least one turn in {_label(node)}, it takes none")
        parts = [work.fresh(f"{row[i]}.row") for row in rows]
        made += [work.axis_node("Unsqueeze", row[i], part, axes[i])
                 for row, part in zip(rows, parts, strict=True)]  # fmt: skip
        ordered = parts[::-1] if ways[i] else parts
        made.append(helper.make_node("Concat", ordered, [out], axis=axes[i]))
    return made


def _ints(node: onnx.NodeProto, name: str) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == name), [])


def _scan(work: _Work, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    body = _body(node, "body")
    count = next(a.i for a in node.attribute if a.name == "num_scan_inputs")
    states, scanned = list(node.input[:-count]), list(node.input[-count:])
    axes = _ints(node, "scan_input_axes") or [0] * count
    ways = _ints(node, "scan_input_directions") or [0] * count
    shape = work.shapes.get(scanned[0])
    length = shape[axes[0]] if shape else None
    if length is None or length > MOST_TURNS:
        raise CompileError(
            f"expected a known length of at most {MOST_TURNS} in {_label(node)}, got "
            f"{length}: give the model's input a fixed length"
        )
    made: list[onnx.NodeProto] = []
    columns = []
    for name, axis, way in zip(scanned, axes, ways, strict=True):
        parts = _cut(work, made, name, axis, length)
        columns.append(parts[::-1] if way else parts)
    shared = _adopted(work, body)
    rows: list[list[str]] = []
    for turn, now in enumerate(zip(*columns, strict=True)):
        names = shared | dict(zip((v.name for v in body.input), (*states, *now), strict=True))
        made += _turn(work, body, names, f".{turn}")
        results = [names.get(v.name, v.name) for v in body.output]
        states, row = results[: len(states)], results[len(states) :]
        rows.append(row)
    return [*made, *_copies(states, node.output[: len(states)]),
            *_stacked(work, node, rows, len(states))]  # fmt: skip


def _cut(work: _Work, made: list[onnx.NodeProto], name: str, axis: int, length: int) -> list[str]:
    """Cut a tensor into its rows along an axis."""
    slabs = [work.fresh(f"{name}.slab") for _ in range(length)]
    rows = [work.fresh(f"{name}.row") for _ in range(length)]
    ones = [1] * length
    if work.version < 13:
        made.append(helper.make_node("Split", [name], slabs, axis=axis, split=ones))
    else:
        sizes = work.store("ones", np.array(ones, np.int64))
        made.append(helper.make_node("Split", [name, sizes], slabs, axis=axis))
    made += [work.axis_node("Squeeze", a, b, axis) for a, b in zip(slabs, rows, strict=True)]
    return rows
