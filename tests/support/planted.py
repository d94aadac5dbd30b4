# SPDX-License-Identifier: Apache-2.0
"""Bundles with something planted in a graph or manifest, sealed again as if all were well."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edge_sdk.bundle import Bundle, pack
from edge_sdk.errors import RefusedError
from edge_sdk.limits import Limits

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

    def changed(data: bytes, _: dict[str, Any]) -> bytes:
        if change is None:
            return data
        model = onnx.load_from_string(data)
        change(model)
        return bytes(model.SerializeToString(deterministic=True))

    return sealed_again(bundle, "onnx", role, changed, manifest=manifest, raw=raw)


def sealed_again(
    bundle: Bundle,
    format_: str,
    role: str,
    changed: Callable[[bytes, dict[str, Any]], bytes],
    *,
    manifest: Callable[[dict[str, Any]], object] | None = None,
    raw: Callable[[bytes], bytes] | None = None,
) -> Bundle:
    """Return the bundle with one graph as `changed` makes it of its bytes and the manifest."""
    table = copy.deepcopy(bundle.manifest)
    members = {name: bundle.member(name) for name in table.pop("members")}
    table.pop("spliced", None)
    name = table["graphs"][format_][role]
    members[name] = changed(members[name], table)
    if raw is not None:
        members[name] = raw(members[name])
    if manifest is not None:
        manifest(table)
    return pack(table, members)


def refusal(bundle: Bundle, limits: Limits | None = None) -> str:
    """Return the one line with which a device refuses a bundle."""
    with pytest.raises(RefusedError) as caught:
        bundle.check(limits)
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    return line


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
