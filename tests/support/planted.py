# SPDX-License-Identifier: Apache-2.0
"""Bundles with something planted in a graph or manifest, sealed again as if all were well."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, helper

from edge_sdk.bundle import Bundle, pack

Change = Callable[[onnx.ModelProto], object]


def planted(
    bundle: Bundle,
    role: str = "train",
    change: Change | None = None,
    *,
    manifest: Callable[[dict[str, Any]], object] | None = None,
    raw: Callable[[bytes], bytes] | None = None,
) -> Bundle:
    """Return the bundle with one graph changed, as a model or as bytes, or its manifest changed."""
    table = copy.deepcopy(bundle.manifest)
    members = {name: bundle.member(name) for name in table.pop("members")}
    name = table["graphs"]["onnx"][role]
    if change is not None:
        model = onnx.load_from_string(members[name])
        change(model)
        members[name] = model.SerializeToString(deterministic=True)
    if raw is not None:
        members[name] = raw(members[name])
    if manifest is not None:
        manifest(table)
    return pack(table, members)


def node(op: str, inputs: list[str], outputs: list[str], **options: Any) -> Change:
    """Add a node at the end."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(op, inputs, outputs, **options))

    return change


def output(name: str, shape: list[int | None] | None, dtype: int = TensorProto.FLOAT) -> Change:
    """Declare an output."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.output.append(helper.make_tensor_value_info(name, dtype, shape))

    return change


def both(*changes: Change) -> Change:
    """Make several changes."""

    def change(model: onnx.ModelProto) -> None:
        for each in changes:
            each(model)

    return change


def maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """Return the node that makes a tensor."""
    return next(n for n in model.graph.node if name in n.output)


def port(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    """Return an input or output."""
    return next(v for v in (*model.graph.input, *model.graph.output) if v.name == name)
