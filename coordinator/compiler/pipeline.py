# SPDX-License-Identifier: Apache-2.0
"""Forward model in, training bundle out, trained model back: the pipeline, in order.

The module is not called `build`, so that the package can export a function of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from coordinator.compiler.batch import free_batch
from coordinator.compiler.budget import AT_ONCE, SHARES, Cost, Way, budget, choose, ways
from coordinator.compiler.choose import selections
from coordinator.compiler.contribution import Examples
from coordinator.compiler.draft import Draft, Task, draft
from coordinator.compiler.graph import Graph, Value
from coordinator.compiler.headroom import widen
from coordinator.compiler.load import for_training, load
from coordinator.compiler.losses import Loss, from_name, logits_of
from coordinator.compiler.optim import Optimizer, sgd
from coordinator.compiler.passes import drop_identities
from coordinator.compiler.tflite.source import source_of
from coordinator.compiler.tflite.unshare import restored
from edge_sdk.bundle import Bundle
from edge_sdk.errors import CompileError
from edge_sdk.requantize import requantize
from edge_sdk.types import Params

_DEFAULT = sgd(lr=0.05)
MOST_MICRO = 1 << 20
"""Rows at a time; more would be a slip of the pen."""


def build(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    loss: str,
    train: str | Sequence[str] | None = None,
    optimizer: Optimizer = _DEFAULT,
    proximal: bool = False,
    headroom: float = 1.0,
    ranges: str = "fixed",
    name: str | None = None,
    engines: Sequence[str] = ("onnx",),
    max_ram: str | int | None = None,
    max_bytes_per_update: str | int | None = None,
    max_flops: float | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    recompute: bool | None = None,
    calibration: Examples | None = None,
) -> Bundle:
    """Compile a float32 or int8 model, ONNX or TFLite, into a bundle that trains on stock runtimes.

    Args:
        model: path, bytes or ModelProto: one input [batch, ...], one output. ONNX in QDQ or
            QOperator format where it is int8; or a .tflite file.
        loss: "cross_entropy" (class ids int64 [N]; output [N, C]), "mse" or "bce_logits" (float32
            targets of the output's shape). A last Softmax or Sigmoid is left to the loss.
        train: "all", "bias", "last:2" (layers with weights), a name, a glob such as "head.*", or a
            list of names and globs; or "sparse:0.25", the output channels that contribute most, up
            to a quarter of all numbers ("sparse:0.25:last:3": of the last three layers). By default
            "all", or under a limit the widest that keeps it.
        optimizer: `sgd(lr=..)`, `momentum(0.9, lr=..)`, `adam(lr=..)`, or `chain(clip(1.0), ...)`.
        proximal: let devices be told to stay near the round's start (FedProx).
        headroom: factor by which an int8 model's range of logits is widened, so that training may
            make it surer than it was when its ranges were chosen; 1 leaves the model as it is.
        ranges: "learned" trains the ranges of an int8 model's activations with its weights, so that
            they follow what training changes (docs/explain/int8.md); "fixed" keeps the model's.
        name: of the bundle; by default the file's or the graph's.
        engines: formats to write training graphs in: "onnx" for onnxruntime, "tflite" for LiteRT
            and tflite-runtime, or both.
        max_ram: what training may add to a process with numpy and onnxruntime loaded, "24MiB" or
            bytes, as predicted (docs/explain/memory.md).
        max_bytes_per_update: what a round may send, "8KiB" or bytes, as estimated for the default
            codec.
        max_flops: floating-point operations to train on one example.
        batch: rows of a step that have to fit in `max_ram`; by default the most that do, of 4 to
            32. With `max_ram` devices train on no more rows a step than that.
        micro_batch: compute a step's gradient from so many rows at a time and sum them up: the same
            step for any batch, in the memory of a small one. By default all rows at once, or as
            few at a time as `max_ram` demands.
        recompute: compute activations again for the backward pass instead of keeping them, where
            that saves memory: the same step, about an eighth slower. By default only where
            `max_ram` demands it.
        calibration: examples (x, y) that tell by their gradients which channels contribute most;
            without, channels are taken by their norms.

    Returns: the same bytes for the same arguments.
    Raises: CompileError that names the node or weight in the way, or the nearest limits that would
    do, and says what to do; ConfigError for a limit that is none.
    """
    _check(optimizer, engines, ranges)
    limits = budget(max_ram, max_bytes_per_update, max_flops, batch)
    rule = from_name(loss)
    source = source_of(model)
    proto = free_batch(load(source.proto if source else model))
    forward, logits = _forward(proto, rule)
    if headroom != 1.0:
        together = source.together if source else ()
        proto, old, new = widen(proto, forward, logits, headroom, together)
        source = source.widened(old, new, headroom) if source else None
        forward, logits = _forward(proto, rule)
    learns = ranges == "learned"
    formats = tuple(engines)
    task = Task(proto, forward, logits, rule, optimizer, proximal, batch, learns, source, formats)
    task = replace(task, calibration=calibration)
    called = {"name": name or _name(model, proto)}
    way = Way(_micro(micro_batch), bool(recompute))
    may_slice = formats == ("onnx",)
    if not may_slice and way != AT_ONCE:
        raise CompileError(
            "expected engines=('onnx',) with micro_batch or recompute: TFLite runs operators in "
            "the file's order, has no loop over slices here, and merges nothing to work around"
        )
    if limits.is_open:
        return draft(task, "all" if train is None else train, way).packed(called)
    options = _options(task, train)
    drafts: dict[tuple[str, Way], Draft] = {}

    def price(spelled: str, way: Way) -> Cost | None:
        try:
            drafts[spelled, way] = draft(task, options.get(spelled, spelled), way)
        except CompileError:
            if spelled in options:
                raise
            return None  # a share that does not hold what is trained whole
        return drafts[spelled, way].cost

    is_told = limits.ram is None or not may_slice
    told = [way] if is_told else ways(micro_batch, recompute, batch)
    may_share = train is None and (limits.update is not None or calibration is not None)
    chosen = choose(list(options), price, limits, told, SHARES if may_share else ())
    return drafts[chosen.train, chosen.way].packed(called, rows=chosen.rows)


def export(bundle: Bundle, params: Params) -> bytes:
    """Return the inference model with trained values in it; int8 stays int8, rescaled.

    It is in the format of the model that the bundle was built from: ONNX, or the original .tflite
    file with other numbers in it. With the bundle's own `params()` the bytes are those of its
    predict graph; of a .tflite file, those of the file.
    """
    source = bundle.manifest["source"]
    model = requantize(bundle, params, source)
    is_as_built = model == bundle.graph(source, "predict")
    return restored(model) if source == "tflite" and is_as_built else model


def _check(optimizer: Optimizer, engines: Sequence[str], ranges: str) -> None:
    if ranges not in {"fixed", "learned"}:
        raise CompileError(f"expected ranges fixed or learned, got {ranges!r}")
    if optimizer.lr is None:
        raise CompileError(
            f"expected an optimizer with a learning rate, got {optimizer.spec}: "
            "write chain(clip(1.0), sgd(lr=0.05))"
        )
    if isinstance(engines, str) or not engines or set(engines) - {"onnx", "tflite"}:
        raise CompileError(
            f"expected engines out of 'onnx' and 'tflite', got {engines!r}: "
            "write engines=('onnx', 'tflite') for both"
        )


def _micro(rows: int | None) -> int | None:
    is_number = isinstance(rows, int) and not isinstance(rows, bool)
    if rows is not None and not (is_number and 1 <= rows <= MOST_MICRO):
        raise CompileError(f"expected a micro_batch of 1 to {MOST_MICRO} rows, got {rows!r}")
    return rows


def _options(task: Task, train: str | Sequence[str] | None) -> dict[str, str | Sequence[str]]:
    """Return the selections that a budget may choose from, by how they are spelled."""
    if train is None:
        return {spelled: spelled for spelled in selections(task.reached, task.logits, task.kept)}
    return {train if isinstance(train, str) else ", ".join(train): train}


def _forward(proto: onnx.ModelProto, rule: Loss) -> tuple[Graph, str]:
    """Return the forward graph and the tensor that the loss reads."""
    graph = Graph.from_model(for_training(proto))
    graph = drop_identities(replace(graph, inputs=tuple(map(_open, graph.inputs))))
    return graph, logits_of(graph, rule)


def _open(value: Value) -> Value:
    return replace(value, shape=(None, *(value.shape or ())[1:]))


def _name(model: object, proto: onnx.ModelProto) -> str:
    if isinstance(model, str | Path):
        return Path(model).stem
    return proto.graph.name or "model"
