# SPDX-License-Identifier: Apache-2.0
"""Whether a graph's inputs and outputs are exactly those that the manifest promises. Pure.

An output that nobody asked for could carry an example out; one of another shape, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edge_sdk.errors import RefusedError
from edge_sdk.graphview import GraphView, Port, shown
from edge_sdk.onnxschema import DTYPES

Shape = Sequence[int | None] | None
_INT8 = ("int8", "uint8")


class Wanted(NamedTuple):
    """What a port must be. `is_exact`: its shape is said in full, in the graph as well."""

    dtype: str
    shape: Shape
    is_exact: bool = True


def check(role: str, graph: GraphView, manifest: Mapping[str, Any]) -> None:
    """Check the inputs and outputs of the `predict`, `train` or `evaluate` graph.

    Raises: RefusedError.
    """
    makers = {"predict": _predict, "train": _train, "evaluate": _evaluate}
    inputs, outputs, optional = makers[role](manifest)
    _check_side("input", graph.inputs, inputs, ())
    _check_side("output", graph.outputs, outputs, optional)


Sides = tuple[dict[str, Wanted], dict[str, Wanted], tuple[str, ...]]


def _predict(manifest: Mapping[str, Any]) -> Sides:
    x, y = manifest["input"], manifest["output"]
    return (
        {x["name"]: Wanted(x["dtype"], x["shape"], is_exact=False)},
        {y["name"]: Wanted(y["dtype"], y["shape"], is_exact=False)},
        (),
    )


def _train(manifest: Mapping[str, Any]) -> Sides:
    params, slots = _tensors("p", manifest["params"]), _tensors("s", manifest["slots"])
    scalar = Wanted("float32", ())
    inputs = {**_examples(manifest), "lr": scalar, **params, **slots}
    if manifest["proximal"]:
        inputs |= {"mu": scalar, **_tensors("a", manifest["params"])}
    kept = {f"{name}.next": wanted for name, wanted in (params | slots).items()}
    return inputs, {"loss": scalar, **kept}, ()


def _evaluate(manifest: Mapping[str, Any]) -> Sides:
    inputs = {**_examples(manifest), **_tensors("p", manifest["params"])}
    outputs = {"loss": Wanted("float32", ()), "correct": Wanted("int64", ())}
    return inputs, outputs, ("correct",)


def _examples(manifest: Mapping[str, Any]) -> dict[str, Wanted]:
    x, y = manifest["input"], manifest["target"]
    dtype = "float32" if x["dtype"] in _INT8 else x["dtype"]
    return {
        "x": Wanted(dtype, x["shape"], is_exact=False),
        "y": Wanted(y["dtype"], y["shape"], is_exact=False),
    }


def _tensors(stem: str, table: Sequence[Mapping[str, Any]]) -> dict[str, Wanted]:
    return {f"{stem}.{i}": Wanted("float32", t["shape"]) for i, t in enumerate(table)}


def _check_side(
    side: str, ports: Sequence[Port], wanted: Mapping[str, Wanted], optional: Sequence[str]
) -> None:
    names = [port.name for port in ports]
    for name in names:
        if name not in wanted:
            raise RefusedError(f"{side} {shown(name)}: the manifest promises no such {side}")
    for name in wanted:
        if names.count(name) != 1 and not (name in optional and name not in names):
            raise RefusedError(
                f"{side} {shown(name)}: expected it once, got it {names.count(name)} times"
            )
    for port in ports:
        _check_port(side, port, wanted[port.name])


def _check_port(side: str, port: Port, wanted: Wanted) -> None:
    name = f"{side} {shown(port.name)}"
    if port.kind != "tensor":
        raise RefusedError(f"{name}: expected a tensor, got {port.kind or 'no type'}")
    dtype = DTYPES[port.dtype][0] if port.dtype in DTYPES else f"type number {port.dtype}"
    if dtype != wanted.dtype:
        raise RefusedError(f"{name}: expected {wanted.dtype}, got {dtype}")
    if not _fits(port.shape, wanted):
        says = "no shape" if port.shape is None else _spelled(port.shape)
        raise RefusedError(f"{name}: expected shape {_spelled(wanted.shape)}, got {says}")


def _fits(shape: Shape, wanted: Wanted) -> bool:
    if wanted.is_exact:
        return shape is not None and wanted.shape is not None and [*shape] == [*wanted.shape]
    if shape is None or wanted.shape is None:
        return True
    same = [a == b or a is None or b is None for a, b in zip(shape, wanted.shape, strict=False)]
    return len(shape) == len(wanted.shape) and all(same)


def _spelled(shape: Shape) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in shape or ())}]"
