# SPDX-License-Identifier: Apache-2.0
"""How many axes each tensor of a TFLite graph has, proved from its inputs. Pure.

What a file says of the shapes between its operators is only what it says: a runtime reckons them
again. Here the ranks are reckoned from the graph's inputs and constants alone; one that cannot be
has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from edge_sdk.graphview import GraphView, Operation
from edge_sdk.onnxschema import DTYPES

_INTEGERS = {"int32": "<i4", "int64": "<i8"}
_MOST = 8  # axes; no runtime takes more

_AS_FIRST = """
  ABS CAST CEIL CONCATENATION COS CUMSUM DEQUANTIZE ELU EXP FLOOR GELU HARD_SWISH LEAKY_RELU LOG
  LOGICAL_NOT LOGISTIC LOG_SOFTMAX MIRROR_PAD NEG PAD PADV2 QUANTIZE RELU RELU6 RELU_0_TO_1
  RELU_N1_TO_1 REVERSE_V2 ROUND RSQRT SIGN SIN SLICE SOFTMAX SPLIT_V SQRT SQUARE TANH TILE
  TRANSPOSE ZEROS_LIKE
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
_REDUCE = ("MEAN", "REDUCE_ALL", "REDUCE_ANY", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "SUM")
_MORE = {"PACK": 1, "EXPAND_DIMS": 1, "ONE_HOT": 1, "UNPACK": -1, "ARG_MAX": -1, "ARG_MIN": -1}

Known = Mapping[str, int]
Rule = Callable[[GraphView, Known, Operation], "int | None"]


def of(graph: GraphView) -> dict[str, int]:
    """Return the ranks that are certain, by tensor."""
    known = {port.name: len(port.shape) for port in graph.inputs if port.shape is not None}
    known |= {name: len(stored.dims) for name, stored in graph.initializers.items()}
    for node in graph.nodes:
        rank = _RULES[node.op](graph, known, node) if node.op in _RULES and node.inputs else None
        if rank is not None and 0 <= rank <= _MOST:
            known.update(dict.fromkeys(node.outputs, rank))
    return known


def axes(graph: GraphView, name: str, rank: int | None) -> frozenset[int] | None:
    """Return the axes that a stored tensor names, each once; None if it does not or is not."""
    stored = graph.initializers.get(name)
    code = _INTEGERS.get(DTYPES[stored.dtype][0]) if stored and stored.dtype in DTYPES else None
    if stored is None or stored.data is None or code is None or rank is None:
        return None
    if stored.elements > _MOST:
        return None
    numbers = np.frombuffer(stored.data, code).tolist()
    if any(not -rank <= n < rank for n in numbers):
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


def _option(node: Operation, name: str) -> int:
    return next((a.number or 0 for a in node.attributes if a.name == name), 0)


def _as_first(_: GraphView, known: Known, node: Operation) -> int | None:
    return known.get(node.inputs[0])


def _as_second(_: GraphView, known: Known, node: Operation) -> int | None:
    return known.get(node.inputs[1]) if len(node.inputs) > 1 else None


def _as_widest(_: GraphView, known: Known, node: Operation) -> int | None:
    found = [known.get(name) for name in node.inputs]
    sure = [rank for rank in found if rank is not None]
    return max(sure) if len(sure) == len(found) else None


def _shaped(graph: GraphView, _: Known, node: Operation) -> int | None:
    at = _SHAPED_BY[node.op]
    return length(graph, node.inputs[at]) if len(node.inputs) == 2 else None


def _reduced(graph: GraphView, known: Known, node: Operation) -> int | None:
    rank = known.get(node.inputs[0])
    if rank is None or len(node.inputs) != 2:
        return None
    if _option(node, "keep_dims"):
        return rank
    gone = axes(graph, node.inputs[1], rank)
    return None if gone is None else rank - len(gone)


def _more(_: GraphView, known: Known, node: Operation) -> int | None:
    rank = known.get(node.inputs[0])
    return None if rank is None else rank + _MORE[node.op]


def _gathered(_: GraphView, known: Known, node: Operation) -> int | None:
    found = [known.get(name) for name in node.inputs]
    sure = [rank for rank in found if rank is not None]
    return sum(sure) - 1 - _option(node, "batch_dims") if len(sure) == len(found) == 2 else None


def _strided(_: GraphView, known: Known, node: Operation) -> int | None:
    rank = known.get(node.inputs[0])
    if rank is None or _option(node, "ellipsis_mask") or _option(node, "new_axis_mask"):
        return None
    return rank - (_option(node, "shrink_axis_mask") & 0xFF).bit_count()


def _dense(_: GraphView, known: Known, node: Operation) -> int | None:
    return known.get(node.inputs[0]) if _option(node, "keep_num_dims") else 2


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
