# SPDX-License-Identifier: Apache-2.0
"""Forward model in, training bundle out, trained model back: the pipeline, in order.

The module is not called `build`, so that the package can export a function of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from coordinator.compiler.batch import free_batch
from coordinator.compiler.choose import select
from coordinator.compiler.explain import cost
from coordinator.compiler.graph import Graph, Value
from coordinator.compiler.headroom import widen
from coordinator.compiler.load import for_training, load
from coordinator.compiler.losses import Loss, from_name, logits_of
from coordinator.compiler.optim import Optimizer, sgd
from coordinator.compiler.passes import drop_identities, drop_unused
from coordinator.compiler.predict import predict_model
from coordinator.compiler.train import evaluate_graph, open_weights, train_graph
from coordinator.compiler.weights import Weight, find_weights
from edge_sdk.bundle import Bundle, pack
from edge_sdk.errors import CompileError
from edge_sdk.requantize import requantize
from edge_sdk.types import Params

_GRAPHS = {role: f"ort/{role}.onnx" for role in ("predict", "train", "evaluate")}
_DEFAULT = sgd(lr=0.05)


def build(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    loss: str,
    train: str | Sequence[str] = "all",
    optimizer: Optimizer = _DEFAULT,
    proximal: bool = False,
    headroom: float = 1.0,
    name: str | None = None,
    engines: Sequence[str] = ("onnx",),
) -> Bundle:
    """Compile a float32 or QDQ int8 ONNX model into a bundle that trains on stock onnxruntime.

    Args:
        model: path, bytes or ModelProto: one input [batch, ...], one output.
        loss: "cross_entropy" (class ids int64 [N]; output [N, C]), "mse" or "bce_logits" (float32
            targets of the output's shape). A last Softmax or Sigmoid is left to the loss.
        train: "all", "bias", "last:2" (layers with weights), a name, a glob such as "head.*", or a
            list of names and globs.
        optimizer: `sgd(lr=..)`, `momentum(0.9, lr=..)`, `adam(lr=..)`, or `chain(clip(1.0), ...)`.
        proximal: let devices be told to stay near the round's start (FedProx).
        headroom: factor by which an int8 model's range of logits is widened, so that training may
            make it surer than it was when its ranges were chosen; 1 leaves the model as it is.
        name: of the bundle; by default the file's or the graph's.
        engines: formats to write graphs for; "onnx" is the one there is.

    Returns: the same bytes for the same arguments.
    Raises: CompileError that names the node or weight in the way and says what to do.
    """
    _check(optimizer, engines)
    rule = from_name(loss)
    proto = free_batch(load(model))
    forward, logits = _forward(proto, rule)
    if headroom != 1.0:
        proto = widen(proto, forward, logits, headroom)
        forward, logits = _forward(proto, rule)
    weights = select(drop_unused(replace(forward, outputs=(Value(logits),))), train, logits)
    _check_finite(weights)
    opened = open_weights(forward, weights, logits)
    target = _target(opened.graph.outputs[0], rule)
    step, slots = train_graph(opened, rule, optimizer, target=target, is_proximal=proximal)
    measure = evaluate_graph(opened, rule, target=target)
    predict, patches = predict_model(proto, forward, weights)
    manifest = {
        "name": name or _name(model, proto),
        "loss": rule.name,
        "train": train if isinstance(train, str) else list(train),
        "optimizer": optimizer.spec,
        "lr": optimizer.lr,
        "proximal": proximal,
        "target": {"dtype": rule.target, "shape": list(target.shape or ())},
        "slots": [slot._asdict() | {"shape": list(slot.shape)} for slot in slots],
        "patches": patches,
    }
    members = {
        "params.bin": b"".join(w.value.astype("<f4").tobytes() for w in weights),
        _GRAPHS["predict"]: predict,
        _GRAPHS["train"]: _written(step),
        _GRAPHS["evaluate"]: _written(measure),
    }
    return pack(manifest | _described(forward, step, weights), members)


def export(bundle: Bundle, params: Params) -> bytes:
    """Return the inference model with trained values in it; int8 stays int8, rescaled.

    With the bundle's own `params()` the bytes are those of its predict graph.
    """
    return requantize(bundle, params)


def _check(optimizer: Optimizer, engines: Sequence[str]) -> None:
    if optimizer.lr is None:
        raise CompileError(
            f"expected an optimizer with a learning rate, got {optimizer.spec}: "
            "write chain(clip(1.0), sgd(lr=0.05))"
        )
    if tuple(engines) != ("onnx",):
        raise CompileError(
            f"expected engines=('onnx',), got {tuple(engines)!r}: no other is written yet"
        )


def _check_finite(weights: Sequence[Weight]) -> None:
    for weight in weights:
        if not np.isfinite(weight.value).all():
            raise CompileError(f"expected finite numbers in {weight.name!r}, got NaN or infinity")


def _forward(proto: onnx.ModelProto, rule: Loss) -> tuple[Graph, str]:
    """Return the forward graph and the tensor that the loss reads."""
    graph = Graph.from_model(for_training(proto))
    graph = drop_identities(replace(graph, inputs=tuple(map(_open, graph.inputs))))
    return graph, logits_of(graph, rule)


def _described(forward: Graph, step: Graph, weights: Sequence[Weight]) -> dict[str, Any]:
    """Return the part of the manifest that the graphs and weights tell by themselves."""
    total = sum(w.value.size for w in find_weights(forward))
    return {
        "format": "fedge-bundle/1",
        "producer": f"fedge {_version()}",
        "input": _port(forward, forward.inputs[0]),
        "output": _port(forward, _batched(forward.outputs[0])),
        "params": [{"name": w.name, "shape": list(w.value.shape)} for w in weights],
        "graphs": {"ort": _GRAPHS},
        "cost": cost(forward, step, weights, total),
    }


def _open(value: Value) -> Value:
    return replace(value, shape=(None, *(value.shape or ())[1:]))


def _batched(value: Value) -> Value:
    return value if value.shape is None else _open(value)


def _target(logits: Value, loss: Loss) -> Value:
    """Return dtype and shape of the targets that go with these logits."""
    shape = logits.shape
    if loss.name != "cross_entropy":
        if shape is None or None in shape[1:]:
            raise CompileError(f"expected a known output shape for {loss.name}, got {shape}")
        return Value("y", np.dtype(np.float32), (None, *shape[1:]))
    if shape is None or len(shape) != 2 or shape[1] is None or shape[1] < 2:
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


def _name(model: object, proto: onnx.ModelProto) -> str:
    if isinstance(model, str | Path):
        return Path(model).stem
    return proto.graph.name or "model"


def _version() -> str:
    try:
        return version("fedge")
    except PackageNotFoundError:
        return "0"


def _written(graph: Graph) -> bytes:
    data: bytes = graph.to_model().SerializeToString(deterministic=True)
    return data
