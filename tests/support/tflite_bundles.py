# SPDX-License-Identifier: Apache-2.0
"""Bundles whose graphs are .tflite files: those of an ONNX bundle, lowered, and changed at will."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import tflite_oracle
from ai_edge_litert import schema_py_generated as schema
from planted import sealed_again

from coordinator.compiler.graph import Graph
from coordinator.compiler.tflite.lower import lower
from edge_sdk import tflitefile
from edge_sdk.bundle import Bundle, pack
from edge_sdk.tflitefile import TfliteFile
from edge_sdk.tfliteschema import BUILTINS

Change = Callable[["Editable"], object]


def lowered(bundle: Bundle) -> Bundle:
    """Return a bundle of the same model in TFLite alone."""
    manifest = copy.deepcopy(bundle.manifest)
    del manifest["members"]
    manifest.pop("spliced", None)
    roles = {role: f"tflite/{role}.tflite" for role in ("predict", "train", "evaluate")}
    members = {"params.bin": bundle.member("params.bin")}
    for role, name in roles.items():
        model = onnx.load_from_string(bundle.graph("onnx", role))
        members[name] = lower(Graph.from_model(model))
    predict = tflitefile.read(members[roles["predict"]])
    manifest["graphs"], manifest["source"] = {"tflite": roles}, "tflite"
    manifest["patches"] = {"tflite": patches(predict, bundle)}
    return pack(manifest, members)


def patches(predict: TfliteFile, bundle: Bundle) -> list[dict[str, Any]]:
    """Find the float32 masters in a lowered graph, by what they hold."""
    found = []
    for i, master in enumerate(bundle.params().values()):
        orders = itertools.permutations(range(master.ndim))
        written = {o: np.ascontiguousarray(master.transpose(o)).tobytes() for o in orders}
        for b, (offset, _) in enumerate(predict.buffers):
            for order, data in written.items():
                if bytes(predict.data(b)) == data:
                    one = {"param": i, "kind": "float32", "offset": offset, "order": list(order)}
                    found.append(one)
                    break
            else:
                continue
            break
        else:
            raise AssertionError(f"parameter {i} is not in the graph")
    return found


class Editable:
    """A .tflite file taken apart, to be written again with something planted in it."""

    def __init__(self, data: bytes) -> None:
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
        self.graph = self.model.subgraphs[0]
        for side in ("inputs", "outputs"):
            setattr(self.graph, side, list(getattr(self.graph, side)))

    def index(self, name: str) -> int:
        """Return a tensor's place."""
        return [t.name.decode() for t in self.graph.tensors].index(name)

    def rename(self, name: str, other: str) -> int:
        """Call a tensor otherwise."""
        at = self.index(name)
        self.graph.tensors[at].name = other.encode()
        return at

    def tensor(self, name: str, like: str | None = None, stored: Any = None) -> int:
        """Add a tensor: a float32 scalar, or one like another, or a constant."""
        made = schema.TensorT()
        made.name, made.hasRank, made.shape = name.encode(), True, []
        if like is not None:
            other = self.graph.tensors[self.index(like)]
            made.shape, made.shapeSignature = other.shape, other.shapeSignature
            made.type = other.type
        if stored is not None:
            array = np.asarray(stored)
            made.shape, made.buffer = list(array.shape), len(self.model.buffers)
            made.type = {"float32": 0, "int32": 2}[str(array.dtype)]
            self.model.buffers.append(schema.BufferT())
            self.model.buffers[-1].data = [*array.tobytes()]
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def add(self, op: str, inputs: list[int], output: int, at: int | None = None) -> int:
        """Add an operator without options, at the end if not told where."""
        made = schema.OperatorT()
        made.opcodeIndex = self._code(op)
        made.inputs, made.outputs = inputs, [output]
        self.graph.operators.insert(len(self.graph.operators) if at is None else at, made)
        return output

    def _code(self, op: str) -> int:
        codes = self.model.operatorCodes
        found = [c.builtinCode for c in codes]
        if BUILTINS.index(op) in found and op != "CUSTOM":
            return found.index(BUILTINS.index(op))
        code = schema.OperatorCodeT()
        code.builtinCode = BUILTINS.index(op)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        codes.append(code)
        return len(codes) - 1

    def sum_of_x(self, name: str = "leak") -> int:
        """Add a scalar that holds examples."""
        x = self.index("x")
        axes = np.arange(len(self.graph.tensors[x].shape), dtype=np.int32)
        over = self.tensor(f"axes of {name}", stored=axes)
        return self.add("SUM", [x, over], self.tensor(name))

    def maker(self, name: str) -> Any:
        """Return the operator that makes a tensor."""
        at = self.index(name)
        return next(o for o in self.graph.operators if at in o.outputs)

    def makers(self, op: str) -> list[Any]:
        """Return all operators of a kind."""
        codes = [c.builtinCode for c in self.model.operatorCodes]
        return [o for o in self.graph.operators if BUILTINS[codes[o.opcodeIndex]] == op]

    def done(self) -> bytes:
        """Write the file."""
        return tflite_oracle.pack(self.model)


def planted_tflite(
    bundle: Bundle,
    role: str = "train",
    change: Change | None = None,
    *,
    manifest: Callable[[dict[str, Any]], object] | None = None,
    raw: Callable[[bytes], bytes] | None = None,
) -> Bundle:
    """Return the bundle with one graph changed, in parts or as bytes, or its manifest changed."""

    def changed(data: bytes, table: dict[str, Any]) -> bytes:
        if change is None:
            return data
        graph = Editable(data)
        change(graph)
        data = graph.done()
        if role == "predict":  # whose bytes lie elsewhere now
            table["patches"]["tflite"] = patches(tflitefile.read(data), bundle)
        return data

    return sealed_again(bundle, "tflite", role, changed, manifest=manifest, raw=raw)
