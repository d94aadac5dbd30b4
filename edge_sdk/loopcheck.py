# SPDX-License-Identifier: Apache-2.0
"""Whether a Loop does what a training graph may use it for: sums over slices of the batch. Pure.

Its turns are bounded by the rows of the batch, ``(rows of x + a constant) / a constant``; it
carries sums, each made by adding to the last and read by nothing else, so that nothing grows from
turn to turn; it gives out those sums alone; and no other graph is nested in its body.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_sdk.errors import RefusedError
from edge_sdk.graphview import GraphView, Nested, Operation, Stored, shown

_INT64 = 7
_LOOSE = 2  # inputs before the carried ones: trip count and condition


def check(graph: GraphView, node: Operation) -> Nested:
    """Return a Loop's body once its shape is proved.

    Raises: RefusedError.
    """
    bodies = node.bodies
    if len(bodies) != 1 or [a.name for a in node.attributes] != ["body"]:
        raise RefusedError(f"{node.label}: expected a body and no other attribute")
    body = bodies[0]
    sums = len(node.outputs)
    counts = (len(node.inputs), len(body.inputs), len(body.outputs))
    if counts != (_LOOSE + sums, _LOOSE + sums, 1 + sums):
        raise RefusedError(f"{node.label}: expected sums to go in and come out, and nothing else")
    if node.inputs[1]:
        raise RefusedError(f"{node.label}: expected no condition, got {shown(node.inputs[1])}")
    if body.sparse:
        raise RefusedError(f"{node.label}: expected no sparse_initializer, got {body.sparse}")
    _check_turns(graph, node)
    _check_sums(node, body)
    return body


def _check_turns(graph: GraphView, node: Operation) -> None:
    """Refuse more turns than the batch has rows."""
    makers = {name: maker for maker in graph.nodes for name in maker.outputs}
    divided = makers.get(node.inputs[0])
    rows = _number(graph.initializers, divided, "Div")
    added = makers.get(divided.inputs[0]) if divided is not None and rows is not None else None
    more = _number(graph.initializers, added, "Add")
    counted = makers.get(added.inputs[0]) if added is not None and more is not None else None
    is_bounded = rows is not None and more is not None and 0 <= more < rows
    if not is_bounded or counted is None or not _is_rows_of_x(counted):
        raise RefusedError(
            f"{node.label}: expected as many turns as slices of x, (rows + n - 1) / n of them"
        )


def _number(stored: Mapping[str, Stored], node: Operation | None, op: str) -> int | None:
    """Return the stored number that is the second input of `op`."""
    if node is None or (node.op, node.domain, len(node.inputs)) != (op, "", 2):
        return None
    tensor = stored.get(node.inputs[1])
    if tensor is None or tensor.dtype != _INT64 or tensor.elements != 1 or tensor.data is None:
        return None
    return int(np.frombuffer(tensor.data, "<i8")[0]) if len(tensor.data) == 8 else None


def _is_rows_of_x(node: Operation) -> bool:
    ends = {a.name: a.number for a in node.attributes}
    is_first = ends == {"start": 0, "end": 1}
    return (node.op, node.domain, node.inputs) == ("Shape", "", ("x",)) and is_first


def _check_sums(node: Operation, body: Nested) -> None:
    makers = {name: maker for maker in body.nodes for name in maker.outputs}
    readers = [name for maker in body.nodes for name in maker.inputs]
    readers += [port.name for port in body.outputs]
    for old, new in zip(body.inputs[_LOOSE:], body.outputs[1:], strict=True):
        maker = makers.get(new.name)
        is_added = maker is not None and (maker.op, maker.domain) == ("Add", "")
        if not is_added or maker is None or maker.inputs[0] != old.name:
            raise RefusedError(
                f"{node.label}: expected {shown(new.name)} to be {shown(old.name)} and something "
                "added to it"
            )
        if readers.count(old.name) != 1 or readers.count(new.name) != 1:
            raise RefusedError(f"{node.label}: expected nothing to read {shown(old.name)} but this")
