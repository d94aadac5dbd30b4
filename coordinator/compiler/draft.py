# SPDX-License-Identifier: Apache-2.0
"""One selection of weights, compiled: the graphs and the manifest, ready to be packed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import onnx

from coordinator.compiler import shared
from coordinator.compiler.budget import AT_ONCE, MOST_ROWS, Cost, Way
from coordinator.compiler.choose import select
from coordinator.compiler.contribution import Examples, gradients
from coordinator.compiler.explain import cost
from coordinator.compiler.graph import Graph, Value
from coordinator.compiler.losses import Loss, classes_of
from coordinator.compiler.lowered import lowered, lowered_predict
from coordinator.compiler.memory import RUNTIME_BYTES, ByBatch, Held
from coordinator.compiler.optim import Optimizer, Slot
from coordinator.compiler.passes import drop_unused
from coordinator.compiler.predict import predict_model
from coordinator.compiler.ranges import ROLE, learn_ranges
from coordinator.compiler.recompute import arranged, copied
from coordinator.compiler.sparse import narrowed, sparse
from coordinator.compiler.tflite.source import Source
from coordinator.compiler.train import evaluate_graph, open_weights, train_graph
from coordinator.compiler.weights import Weight, find_weights
from coordinator.compiler.writeback import predict_file
from edge_sdk.bundle import Bundle, pack
from edge_sdk.errors import CompileError
from edge_sdk.manifest import FORMAT

_MEMBERS = {
    form: {role: f"{form}/{role}.{form}" for role in ("predict", "train", "evaluate")}
    for form in ("onnx", "tflite")
}
"""Names in the archive, by format and role."""


@dataclass(frozen=True)
class Task:
    """What is the same whichever weights are trained.

    Attributes:
        proto: the forward model; forward: the same, ready to be differentiated.
        logits: the tensor of `forward` that the loss reads.
        batch: rows of a step that the cost table must tell of, besides its usual ones.
        learns_ranges: train the steps of int8 activations, too.
        source: the .tflite file that the model came from.
        formats: what to write graphs in, "onnx" and "tflite".
        calibration: examples to tell by which channels contribute most.
    """

    proto: onnx.ModelProto
    forward: Graph
    logits: str
    loss: Loss
    optimizer: Optimizer
    is_proximal: bool
    batch: int | None = None
    learns_ranges: bool = False
    source: Source | None = None
    formats: tuple[str, ...] = ("onnx",)
    calibration: Examples | None = None

    @property
    def kept(self) -> Collection[str] | None:
        """Return the stored tensors that a device can write back; None for all."""
        return None if self.source is None else self.source.kept

    @property
    def reached(self) -> Graph:
        """Return what of the forward graph makes the logits."""
        return drop_unused(replace(self.forward, outputs=(Value(self.logits),)))


class Draft(NamedTuple):
    """A bundle but for its name and the rows of a step."""

    manifest: dict[str, Any]
    members: dict[str, bytes]

    @property
    def cost(self) -> Cost:
        """Return the manifest's cost table, where memory is told when asked for."""
        table: Cost = self.manifest["cost"]
        return table

    def packed(self, called: Mapping[str, Any], rows: int | None = None) -> Bundle:
        """Return the bundle; with `rows`, devices keep to so many a step."""
        told: ByBatch = self.cost["ram_train"]
        table = {**self.cost, "ram_train": dict(told)}
        table["ram_peak"] = RUNTIME_BYTES + told[str(MOST_ROWS if rows is None else rows)]
        table |= {} if rows is None else {"batch": rows}
        table |= {"unsized": told.unsized} if told.unsized else {}
        spans = shared.spans(self.members, [p["shape"] for p in self.manifest["params"]])
        return pack(self.manifest | {**called, "cost": table}, self.members, spans)


def draft(task: Task, train: str | Sequence[str], way: Way = AT_ONCE) -> Draft:
    """Compile a task that trains `train`, in a way. Raises: CompileError."""
    weights = _selected(task, train)
    given = task.forward
    if task.learns_ranges:
        task, ranges = _with_ranges(task, weights)
        weights = [*weights, *ranges]
    opened = open_weights(task.forward, weights, task.logits)
    target = _target(opened.graph.outputs[0], task.loss)
    step, slots = train_graph(
        opened,
        task.loss,
        task.optimizer,
        target=target,
        is_proximal=task.is_proximal,
        rows=way.rows,
    )
    step = arranged(step, task.batch or MOST_ROWS, again=way.again)
    measure = evaluate_graph(opened, task.loss, target=target)
    files: dict[str, dict[str, bytes]] = {}
    rewritten: dict[str, list[dict[str, Any]]] = {}
    if "onnx" in task.formats or task.source is None:
        predict, rewritten["onnx"] = predict_model(task.proto, task.forward, weights)
        files["onnx"] = {"predict": predict}
    if "onnx" in task.formats:
        files["onnx"] |= {"train": _written(step), "evaluate": _written(measure)}
    if task.source is not None:
        file, rewritten["tflite"] = predict_file(task.source, given, task.forward, weights)
        files["tflite"] = {"predict": file}
    elif "tflite" in task.formats:
        file, rewritten["tflite"] = lowered_predict(task.forward, weights)
        files["tflite"] = {"predict": file}
    if "tflite" in task.formats:
        files["tflite"] |= lowered(
            opened, task.loss, task.optimizer, target=target, is_proximal=task.is_proximal
        )
    graphs = {form: {role: _MEMBERS[form][role] for role in held} for form, held in files.items()}
    members = {"params.bin": b"".join(w.value.astype("<f4").tobytes() for w in weights)}
    members |= {_MEMBERS[form][role]: data for form in files for role, data in files[form].items()}
    total = sum(w.value.size for w in find_weights(task.forward))
    total += sum(w.value.size for w in weights if w.role == ROLE)
    table = cost(task.forward, step, weights, total)
    table |= {} if way.rows is None else {"micro_batch": way.rows}
    table |= {"recomputed": twice} if (twice := copied(step)) else {}
    manifest = {
        "format": FORMAT,
        "source": "onnx" if task.source is None else "tflite",
        "producer": f"fedge {_version()}",
        "loss": task.loss.name,
        "train": train if isinstance(train, str) else list(train),
        "optimizer": task.optimizer.spec,
        "lr": task.optimizer.lr,
        "proximal": task.is_proximal,
        "input": _port(task.forward, task.forward.inputs[0]),
        "output": _port(task.forward, _batched(task.forward.outputs[0])),
        "target": {"dtype": task.loss.target, "shape": list(target.shape or ())},
        "params": [{"name": w.name, "shape": list(w.value.shape)} for w in weights],
        "slots": [slot._asdict() | {"shape": list(slot.shape)} for slot in slots],
        "graphs": graphs,
        "patches": rewritten,
        "cost": table | {"ram_train": _ram(task, step, weights, slots, members)},
    }
    return Draft(manifest, members)


def _selected(task: Task, train: str | Sequence[str]) -> list[Weight]:
    """Return the weights of a selection, or the channels of them that contribute most."""
    part = sparse(train)
    among = train if part is None else part.among
    weights = select(task.reached, among, task.logits, task.kept)
    _check_finite(weights)
    if part is None:
        return weights
    if task.calibration is None:
        return narrowed(weights, part.share)
    opened = open_weights(task.forward, weights, task.logits)
    target = _target(opened.graph.outputs[0], task.loss)
    found = gradients(opened, task.loss, target, weights, task.calibration)
    return narrowed(weights, part.share, found)


def _with_ranges(task: Task, weights: Sequence[Weight]) -> tuple[Task, list[Weight]]:
    source = task.source
    proto, forward, ranges = learn_ranges(
        task.proto,
        task.forward,
        task.reached,
        weights,
        fixed=source.fixed if source else (),
        together=source.together if source else (),
    )
    return replace(task, proto=proto, forward=forward), ranges


def _ram(
    task: Task,
    step: Graph,
    weights: Sequence[Weight],
    slots: Sequence[Slot],
    members: Mapping[str, bytes],
) -> ByBatch:
    """Return what training adds to memory, by rows of a step."""
    held = Held(
        members=shared.stored_bytes(members, [w.value.shape for w in weights]),
        params=sum(4 * w.value.size for w in weights),
        slots=sum(4 * int(np.prod(s.shape, dtype=np.int64)) for s in slots),
        example=sum(map(_row_bytes, step.inputs[:2])),
        is_proximal=task.is_proximal,
    )
    return ByBatch(step, held, task.batch or MOST_ROWS)


def _row_bytes(value: Value) -> int:
    """Return the size of one row of an input; an unknown dimension counts as 1."""
    row = [d or 1 for d in (value.shape or ())[1:]]
    dtype = value.dtype or np.dtype(np.float32)
    return int(np.prod(row, dtype=np.int64)) * dtype.itemsize


def _check_finite(weights: Sequence[Weight]) -> None:
    for weight in weights:
        if not np.isfinite(weight.value).all():
            raise CompileError(f"expected finite numbers in {weight.name!r}, got NaN or infinity")


def _batched(value: Value) -> Value:
    return value if value.shape is None else replace(value, shape=(None, *value.shape[1:]))


def _target(logits: Value, loss: Loss) -> Value:
    """Return dtype and shape of the targets that go with these logits."""
    shape = logits.shape
    if loss.name != "cross_entropy":
        if shape is None or None in shape[1:]:
            raise CompileError(f"expected a known output shape for {loss.name}, got {shape}")
        return Value("y", np.dtype(np.float32), (None, *shape[1:]))
    if classes_of(shape) is None:
        raise CompileError(
            f"expected an output of shape [N, C] with C of at least 2 for cross_entropy, got "
            f"{list(shape or ())}: end the model in a Flatten, or use bce_logits for one output"
        )
    return Value("y", np.dtype(np.int64), (None,))


def _port(graph: Graph, value: Value) -> dict[str, Any]:
    """Describe an input or output, with its scale where it is quantized."""
    scale = zero = None
    maker = graph.producers.get(value.name)
    readers = [n for n in graph.uses.get(value.name, ()) if n.kind == "DequantizeLinear"]
    node = maker if maker is not None and maker.kind == "QuantizeLinear" else None
    node = node or (readers[0] if readers and maker is None else None)
    if node is not None and node.inputs[1] in graph.initializers:
        scale = float(graph.initializers[node.inputs[1]].reshape(-1)[0])
        zero = int(graph.initializers.get(node.input(2), np.zeros(1)).reshape(-1)[0])
    shape = list(value.shape) if value.shape is not None else [None]
    return {
        "name": value.name,
        "dtype": str(value.dtype or np.dtype(np.float32)),
        "shape": shape,
        "scale": scale,
        "zero_point": zero,
    }


def _version() -> str:
    try:
        return version("fedge")
    except PackageNotFoundError:
        return "0"


def _written(graph: Graph) -> bytes:
    data: bytes = graph.to_model().SerializeToString(deterministic=True)
    return data
