# SPDX-License-Identifier: Apache-2.0
"""How many axes each tensor of a TFLite graph has, proved from its inputs. Pure.

What a file says of the shapes between its operators is only what it says: a runtime reckons them
again. Here the ranks are reckoned from the graph's inputs and constants alone; one that cannot be
has none. Vectors have a length as well where it is certain: those that say a shape say a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from edge_sdk.graphview import GraphView, Operation
from edge_sdk.onnxschema import DTYPES

_INTEGERS = {"int32": "<i4", "int64": "<i8"}
_MOST = 8  # axes; no runtime takes more

_AS_FIRST = """
  ABS BATCH_TO_SPACE_ND CAST CEIL CONCATENATION COS CUMSUM DEQUANTIZE ELU EXP FLOOR GELU HARD_SWISH
  L2_NORMALIZATION LEAKY_RELU LOG LOGICAL_NOT LOGISTIC LOG_SOFTMAX MIRROR_PAD NEG PAD PADV2 QUANTIZE
  RELU RELU6 RELU_0_TO_1 RELU_N1_TO_1 REVERSE_V2 ROUND RSQRT SIGN SIN SLICE SOFTMAX
  SPACE_TO_BATCH_ND SPLIT_V SQRT SQUARE TANH TILE TRANSPOSE ZEROS_LIKE
"""
_AS_WIDEST = """
  ADD ADD_N ATAN2 BATCH_MATMUL DIV EQUAL FLOOR_DIV FLOOR_MOD GREATER GREATER_EQUAL LESS LESS_EQUAL
  LOGICAL_AND LOGICAL_OR MAXIMUM MINIMUM MUL NOT_EQUAL POW PRELU SELECT_V2 SQUARED_DIFFERENCE SUB
"""
_FOUR = """
  AVERAGE_POOL_2D CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE MAX_POOL_2D RESIZE_BILINEAR
  RESIZE_NEAREST_NEIGHBOR SPACE_TO_DEPTH TRANSPOSE_CONV
"""
_SHAPED_BY = {"RESHAPE": 1, "BROADCAST_TO": 1, "FILL": 0}
_VECTORS = {"ADD", "DIV", "FLOOR_DIV", "MAXIMUM", "MINIMUM", "MUL", "SUB"}
_REDUCE = ("MEAN", "REDUCE_ALL", "REDUCE_ANY", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "SUM")
_MORE = {"PACK": 1, "EXPAND_DIMS": 1, "ONE_HOT": 1, "UNPACK": -1, "ARG_MAX": -1, "ARG_MIN": -1}


def of(graph: GraphView) -> dict[str, int]:
    """Return the ranks that are certain, by tensor."""
    known = _Known(graph)
    for node in graph.nodes:
        if node.op in _RULES and node.inputs:
            rank = _RULES[node.op](known, node)
            if rank is not None and 0 <= rank <= _MOST:
                known.ranks.update(dict.fromkeys(node.outputs, rank))
            if rank == 1 and (length := _length_made(known, node)) is not None:
                known.lengths.update(dict.fromkeys(node.outputs, length))
    return known.ranks


def axes(graph: GraphView, name: str, rank: int | None) -> frozenset[int] | None:
    """Return the axes that a stored tensor names, each once; None if it does not or is not."""
    numbers = _numbers(graph, name)
    if numbers is None or rank is None or any(not -rank <= n < rank for n in numbers):
        return None
    found = frozenset(n % rank for n in numbers)
    return found if len(found) == len(numbers) else None


def length(graph: GraphView, name: str) -> int | None:
    """Return how many numbers a stored vector of integers has."""
    stored = graph.initializers.get(name)
    is_known = stored is not None and stored.dtype in DTYPES and len(stored.dims) == 1
    if stored is None or not is_known or DTYPES[stored.dtype][0] not in _INTEGERS:
        return None
    return stored.elements


def _numbers(graph: GraphView, name: str) -> list[int] | None:
    """Return the few integers that are stored under a name."""
    stored = graph.initializers.get(name)
    code = _INTEGERS.get(DTYPES[stored.dtype][0]) if stored and stored.dtype in DTYPES else None
    if stored is None or stored.data is None or code is None or stored.elements > _MOST:
        return None
    return [int(n) for n in np.frombuffer(stored.data, code)]


class _Known:
    """What is certain of a graph so far."""

    def __init__(self, graph: GraphView) -> None:
        self.graph = graph
        self.ranks = {p.name: len(p.shape) for p in graph.inputs if p.shape is not None}
        self.ranks |= {name: len(stored.dims) for name, stored in graph.initializers.items()}
        self.lengths: dict[str, int] = {}

    def length(self, name: str) -> int | None:
        """Return how many numbers a vector has."""
        made = self.lengths.get(name)
        return length(self.graph, name) if made is None else made

    def count(self, name: str) -> int | None:
        """Return how many numbers a vector or a scalar has."""
        return 1 if self.ranks.get(name) == 0 else self.length(name)


Rule = Callable[[_Known, Operation], "int | None"]


def _length_made(known: _Known, node: Operation) -> int | None:
    """Return the length of the vector that a node makes."""
    if node.op == "SHAPE":
        return known.ranks.get(node.inputs[0])
    if node.op in {"RESHAPE", "SLICE"}:
        told = _numbers(known.graph, node.inputs[-1])
        return told[0] if told is not None and len(told) == 1 and told[0] > 0 else None
    counts = [known.count(name) for name in node.inputs]
    sure = [count for count in counts if count is not None]
    if len(sure) != len(counts):
        return None
    if node.op == "CONCATENATION":
        return sum(sure)
    if node.op == "PACK":
        return len(sure)
    is_broadcast = node.op in _VECTORS and {*sure} <= {1, max(sure)}
    return max(sure) if is_broadcast or node.op == "CAST" else None


def _option(node: Operation, name: str) -> int:
    return next((a.number or 0 for a in node.attributes if a.name == name), 0)


def _as_first(known: _Known, node: Operation) -> int | None:
    return known.ranks.get(node.inputs[0])


def _as_second(known: _Known, node: Operation) -> int | None:
    return known.ranks.get(node.inputs[1]) if len(node.inputs) > 1 else None


def _as_widest(known: _Known, node: Operation) -> int | None:
    found = [known.ranks.get(name) for name in node.inputs]
    sure = [rank for rank in found if rank is not None]
    return max(sure) if len(sure) == len(found) else None


def _shaped(known: _Known, node: Operation) -> int | None:
    return known.length(node.inputs[_SHAPED_BY[node.op]]) if len(node.inputs) == 2 else None


def _reduced(known: _Known, node: Operation) -> int | None:
    rank = known.ranks.get(node.inputs[0])
    if rank is None or len(node.inputs) != 2:
        return None
    if _option(node, "keep_dims"):
        return rank
    gone = axes(known.graph, node.inputs[1], rank)
    return None if gone is None else rank - len(gone)


def _more(known: _Known, node: Operation) -> int | None:
    rank = known.ranks.get(node.inputs[0])
    return None if rank is None else rank + _MORE[node.op]


def _gathered(known: _Known, node: Operation) -> int | None:
    found = [known.ranks.get(name) for name in node.inputs]
    sure = [rank for rank in found if rank is not None]
    return sum(sure) - 1 - _option(node, "batch_dims") if len(sure) == len(found) == 2 else None


def _strided(known: _Known, node: Operation) -> int | None:
    rank = known.ranks.get(node.inputs[0])
    if rank is None or _option(node, "ellipsis_mask") or _option(node, "new_axis_mask"):
        return None
    return rank - (_option(node, "shrink_axis_mask") & 0xFF).bit_count()


def _dense(known: _Known, node: Operation) -> int | None:
    return known.ranks.get(node.inputs[0]) if _option(node, "keep_num_dims") else 2


def _table(words: Collection[str], rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(words, rule)


_RULES: dict[str, Rule] = {
    **_table(_AS_FIRST.split(), _as_first),
    **_table(_AS_WIDEST.split(), _as_widest),
    **_table(_FOUR.split(), lambda *_: 4),
    **_table(_REDUCE, _reduced),
    **_table(_MORE, _more),
    **_table(_SHAPED_BY, _shaped),
    "FULLY_CONNECTED": _dense,
    "GATHER": _gathered,
    "SHAPE": lambda *_: 1,
    "SPLIT": _as_second,
    "STRIDED_SLICE": _strided,
}
