# SPDX-License-Identifier: Apache-2.0
"""A TFLite model as ONNX, without TensorFlow: the same inputs, outputs, dtypes and numbers.

What comes back goes through the compiler like any other model. Operators that no rule imports are
refused by name; sizes that the file computes from shapes are computed here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import onnx

import coordinator.compiler.tflite.ops  # noqa: F401  fills the table
from coordinator.compiler.graph import Graph
from coordinator.compiler.reshapes import free_shapes
from coordinator.compiler.runtime import session
from coordinator.compiler.tflite.forward import Forward, Origin, refusal
from coordinator.compiler.tflite.table import IMPORTS
from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import Operator, Subgraph, TfliteFile, read

_STATE = frozenset(
    {"ASSIGN_VARIABLE", "CALL_ONCE", "HASHTABLE", "HASHTABLE_FIND", "HASHTABLE_IMPORT",
     "HASHTABLE_LOOKUP", "HASHTABLE_SIZE", "READ_VARIABLE", "VAR_HANDLE"}
)  # fmt: skip
_CONTROL = frozenset({"CALL", "IF", "WHILE"})
_RANDOM = frozenset({"MULTINOMIAL", "RANDOM_STANDARD_NORMAL", "RANDOM_UNIFORM"})
_SPREADING = frozenset(
    {"ADD", "BATCH_TO_SPACE_ND", "CONV_2D", "DEPTHWISE_CONV_2D", "EXPAND_DIMS", "MUL", "QUANTIZE",
     "RELU", "RELU6", "RESHAPE", "SQUEEZE", "SUB"}
)  # fmt: skip
"""Operators that do not mind space being kept in the batch."""


@dataclass(frozen=True)
class Imported:
    """A model read from a TFLite file.

    Attributes:
        proto: QDQ or float ONNX; the input keeps its name, dtype and layout.
        origins: which constant tensor of the main subgraph an initializer is.
        steps: which tensors of the main subgraph a scale of an activation stands for.
        fixed: names in `steps` that TFLite's kernels take for granted: they must not change.
        subgraph: the number of the main subgraph.
    """

    proto: onnx.ModelProto
    origins: Mapping[str, Origin]
    steps: Mapping[str, tuple[int, ...]]
    fixed: frozenset[str]
    subgraph: int


def import_model(data: bytes, signature: str | None = None) -> Imported:
    """Read a TFLite model.

    Args:
        data: the file.
        signature: the one to import; by default ``serving_default``, else the first subgraph.

    Raises: CompileError with the operator or tensor in the way and what to do; BundleError for a
    file that is damaged.
    """
    file = read(data)
    number = _main(file, signature)
    f = Forward(file, file.subgraphs[number])
    f.begin()
    for op in f.graph.operators:
        _import(f, op)
    outputs, final = f.end()
    graph, names = _renamed(f.e.graph(outputs=outputs), final)
    proto = replace(graph, name=f.graph.name or "main").to_model()
    _free(proto, f.batch, frozenset(names.get(name, name) for name in f.free))
    steps = {name: tuple(tensors) for name, tensors in f.steps.items()}
    return Imported(proto, f.origins, steps, frozenset(f.fixed), number)


def _main(file: TfliteFile, signature: str | None) -> int:
    if signature is None:
        signature = "serving_default" if "serving_default" in file.signatures else None
    if signature is None:
        return 0
    if signature not in file.signatures:
        raise CompileError(
            f"expected one of the signatures {sorted(file.signatures)}, got {signature!r}"
        )
    number: int = file.signatures[signature][0]
    return number


def _import(f: Forward, op: Operator) -> None:
    _check(f, op)
    inputs = [i for i in op.inputs if i >= 0]
    spread = next((f.spread[i] for i in inputs if i in f.spread), None)
    if spread is not None and op.op not in _SPREADING:
        raise refusal(op, f, "it works on space that is kept in the batch: convert it anew")
    try:
        if inputs and all(f.known(i) is not None for i in inputs) and _is_foldable(f, op):
            _fold(f, op)
        else:
            IMPORTS[op.op](f, op)
    except CompileError:
        raise
    except Exception as error:  # whatever a rule meets where a file is not as converters write it
        line = " ".join(str(error).split())[:200]
        raise refusal(
            op, f, f"its inputs do not fit it ({line}): convert the model again"
        ) from error
    if spread is not None and op.op != "BATCH_TO_SPACE_ND":
        for i in op.outputs:
            f.spread.setdefault(i, spread)


def _check(f: Forward, op: Operator) -> None:
    """Raise CompileError for an operator that no rule imports."""
    if op.op in IMPORTS:
        return
    kind, _, name = op.op.partition(":")
    if name.startswith("Flex"):
        why = "a TensorFlow operator: convert with TFLITE_BUILTINS alone, without SELECT_TF_OPS"
    elif kind == "CUSTOM":
        why = "a custom operator: convert without allow_custom_ops, or cut the model before it"
    elif op.op in _STATE:
        why = "it keeps state between calls: convert the inference function alone, frozen"
    elif op.op in _CONTROL:
        why = "control flow: convert with unrolled loops (Keras: unroll=True) and no branches"
    elif op.op in _RANDOM:
        why = "it draws random numbers: convert the model for inference"
    else:
        why = "no rule imports it: convert with other operators, or export the model to ONNX"
    raise refusal(op, f, why)


def _is_foldable(f: Forward, op: Operator) -> bool:
    """Tell whether an operator of constants is arithmetic of sizes, not a layer of weights."""
    weights = [i for i in op.inputs if i >= 0 and f.is_weight(i) and f.is_stored(i)]
    quantized = any(f.is_quantized(i) for i in (*op.inputs, *op.outputs) if i >= 0)
    return op.op != "DEQUANTIZE" and not quantized and all(prod(f.shape(i)) == 1 for i in weights)


def _fold(f: Forward, op: Operator) -> None:
    """Compute an operator of constants, for the file's batch and for twice of it."""
    once = _computed(f, op, [f.known(i) for i in op.inputs])
    twice = _computed(f, op, [f.doubled(i) for i in op.inputs])
    for i, value, doubled in zip(op.outputs, once, twice, strict=True):
        f.know(i, value, doubled)


def _computed(f: Forward, op: Operator, values: list[Any]) -> list[Any]:
    part = Forward(f.file, Subgraph("", f.graph.tensors, (op,), (), op.outputs))
    for i, value in zip(op.inputs, values, strict=True):
        if value is not None:
            part.know(i, value)
    IMPORTS[op.op](part, op)
    known = [part.known(i) for i in op.outputs]
    if all(value is not None for value in known):
        return known
    names = [part.read(i) for i in op.outputs]
    graph = part.e.graph(outputs=[part.e.Identity(name) for name in names])
    runs = session(graph.to_model().SerializeToString(), optimize=False)
    return [np.asarray(value) for value in runs.run(None, {})]


def _free(proto: onnx.ModelProto, batch: int, kept: frozenset[str]) -> None:
    """Let a model of one input and one output take any batch."""
    if len(proto.graph.input) != 1 or len(proto.graph.output) != 1:
        return
    ends = [proto.graph.input[0], proto.graph.output[0]]
    dims = [value.type.tensor_type.shape.dim for value in ends]
    if not all(dims) or any(dim[0].dim_value != batch for dim in dims):
        return
    try:
        free_shapes(proto, batch, kept)
    except CompileError:
        raise
    except Exception as error:  # the runtime computes shapes, and raises bare C++ exceptions
        line = " ".join(str(error).split())[-200:]
        raise CompileError(
            f"expected shapes that fit each other, they do not ({line}): convert the model again"
        ) from error
    for dim in dims:
        dim[0].dim_param = "N"


def _renamed(graph: Graph, final: Mapping[str, str]) -> tuple[Graph, dict[str, str]]:
    """Give tensors their names in the file, as far as those are free, and drop what is unused.

    Returns: the graph, and the names by those they replace.
    """
    needed = {value.name for value in graph.outputs}
    kept = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    made = {n for node in kept for n in node.outputs}
    taken = made | {n for node in kept for n in node.inputs}
    names: dict[str, str] = {}
    for old, new in final.items():
        if old in made and new not in taken:
            names[old] = new
            taken.add(new)

    def named(value: Any) -> Any:
        return replace(value, name=names.get(value.name, value.name))

    nodes = tuple(
        replace(
            node,
            inputs=tuple(names.get(n, n) for n in node.inputs),
            outputs=tuple(names.get(n, n) for n in node.outputs),
        )
        for node in reversed(kept)
    )
    stored = {name: array for name, array in graph.initializers.items() if name in needed}
    outputs = tuple(map(named, graph.outputs))
    renamed = replace(graph, nodes=nodes, initializers=stored, outputs=outputs, values={})
    return renamed, names
