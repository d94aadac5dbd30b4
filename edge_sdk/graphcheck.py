# SPDX-License-Identifier: Apache-2.0
"""Whether a device may run a bundle's graphs, judged before an engine sees them. Pure.

`check` passes, or raises a RefusedError of one line that names the graph, the node and the reason.
What it proves: only known operators without side effects; inputs and outputs as the manifest
promises, and no others; loops that sum up slices of the batch and nothing else; patches that write
weights and nothing else; an example reaches the outside only through new parameters, new optimizer
state and scalar metrics, and, where the manifest promises a clip, through the clip.
docs/reference/bundle-checks.md lists every check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from edge_sdk import clips, loopcheck, onnxfile, portcheck, reach, tensorcheck, tflitegraph
from edge_sdk.errors import BundleError, RefusedError
from edge_sdk.graphview import GraphView, Nested, Operation, shown
from edge_sdk.limits import Limits
from edge_sdk.onnxschema import STRING
from edge_sdk.operators import ALLOWED, TFLITE

T = TypeVar("T")
Member = Callable[[str], memoryview]
Allowed = Mapping[str, Collection[str]]
"""Operators that may run, by domain."""
_OTHER_FORMAT = b"ORTM"  # at byte 4: onnxruntime would read its own format instead of ONNX
_CONFIG = "ort_config"  # session options in a model's metadata
_NUMBERS = {"float", "floats", "int", "ints", "string", "strings", "tensor"}
_DTYPE_SETTINGS = {"to", "dtype", "output_dtype"}
_DECLARED = {
    "flops_step": ("max_flops_step", "floating-point operations to train on one example"),
    "bytes_update": ("max_update_bytes", "bytes of an update"),
}


def check(manifest: Mapping[str, Any], member: Member, size: int, limits: Limits) -> None:
    """Check the graphs that an engine would run, in every format that there is.

    Args:
        manifest: checked against its schema.
        member: the bytes of a member, by name.
        size: of the bundle, bytes.
        limits: what this device is ready to spend.

    Raises: RefusedError, one line, for the first thing that is not as it must be.
    """
    _check_declared(manifest, size, limits)
    for name in sorted(manifest["graphs"]):
        roles = manifest["graphs"][name]
        for role in sorted(roles):  # one at a time: a member that shares bytes is a copy
            at = role if name == "onnx" else f"{name} {role}"
            graph = _in(at, _read, name, role, member(roles[role]), limits)
            _in(at, _check_graph, name, role, graph, manifest)
            if role == "train":
                _check_memory(manifest, graph, limits)


def _in(at: str, run: Callable[..., T], *args: object) -> T:
    """Run a check; what it refuses names the graph."""
    try:
        return run(*args)
    except BundleError as error:
        raise RefusedError(f"{at} graph: {error}") from error


def _read(format_: str, role: str, data: memoryview, limits: Limits) -> GraphView:
    graph = _READERS[format_](data)
    if role != "predict":
        _check_is_all(graph)
    _check_model(graph, limits)
    _check_nodes(graph, _ALLOWED[format_], may_loop=role == "train")
    tensorcheck.check_stored(graph, limits)
    return graph


def _check_is_all(graph: GraphView) -> None:
    """Refuse a training or evaluation graph that has, or remembers, more than what is checked."""
    if graph.spare:
        raise RefusedError(f"expected no second subgraph, got {graph.spare}")
    if graph.state:
        raise RefusedError(f"{shown(min(graph.state))}: expected nothing kept from run to run")


def _check_graph(format_: str, role: str, graph: GraphView, manifest: Mapping[str, Any]) -> None:
    portcheck.check(role, graph, manifest)
    if role == "predict":
        tensorcheck.check_patches(manifest["patches"][format_], manifest["params"], graph)
    if role == "train":
        _check_flow(manifest, graph)


def _read_onnx(data: memoryview) -> GraphView:
    if bytes(data[4:8]) == _OTHER_FORMAT:
        raise RefusedError("expected ONNX, got onnxruntime's own format")
    return onnxfile.read(data)


_READERS = {"onnx": _read_onnx, "tflite": tflitegraph.read}
_ALLOWED: Mapping[str, Allowed] = {"onnx": ALLOWED, "tflite": {tflitegraph.DOMAIN: TFLITE}}


# --- what it costs ------------------------------------------------------------------------------
def _check_declared(manifest: Mapping[str, Any], size: int, limits: Limits) -> None:
    _check_limit("max_bundle_bytes", "bytes of bundle", size, limits)
    for name, splices in manifest["spliced"].items():
        whole = manifest["members"][name]["size"] + sum(s["size"] for s in splices)
        _check_limit("max_bundle_bytes", f"bytes for {name}, whole", whole, limits)
    for name, value in manifest["cost"].items():
        if isinstance(value, dict):
            continue
        limit, what = _DECLARED.get(name, ("", ""))
        if name.startswith("ram_"):
            limit, what = "max_ram_bytes", f"bytes of memory ({name})"
        if limit:
            _check_limit(limit, what, value, limits)
        if name == "bytes_update" and limits.max_bytes_per_day is not None:
            _check_limit("max_bytes_per_day", what, value, limits)


def _check_memory(manifest: Mapping[str, Any], train: GraphView, limits: Limits) -> None:
    """Count what training takes at the least, whatever the manifest declares."""
    params = sum(math.prod(p["shape"]) for p in manifest["params"])
    slots = sum(math.prod(s["shape"]) for s in manifest["slots"])
    anchors = params if manifest["proximal"] else 0
    stored = [train.initializers, *(b.initializers for n in train.nodes for b in n.bodies)]
    constants = sum(tensorcheck.nbytes(tensor) for part in stored for tensor in part.values())
    least = 4 * (2 * (params + slots) + anchors) + constants  # a step reads one set, writes another
    _check_limit("max_ram_bytes", "bytes of memory for weights and optimizer", least, limits)


def _check_limit(name: str, what: str, value: float, limits: Limits) -> None:
    most = getattr(limits, name)
    if value > most:
        raise RefusedError(f"needs {value:.0f} {what}, this device allows {name}={most}")


# --- what a graph is made of --------------------------------------------------------------------
def _check_model(graph: GraphView, limits: Limits) -> None:
    for what, count in graph.extras.items():
        if count:
            raise RefusedError(f"expected no {what}, got {count}")
    if _CONFIG in graph.metadata:
        raise RefusedError(f"expected no {_CONFIG} in its metadata: a device sets its own options")
    bodies = [body for node in graph.nodes for body in node.bodies]
    nodes = len(graph.nodes) + sum(len(body.nodes) for body in bodies)
    _check_limit("max_nodes", "nodes", nodes, limits)
    inner = (v for body in bodies for v in (*body.inputs, *body.outputs, *body.values))
    for value in (*graph.values, *inner):
        if value.kind not in {"tensor", ""} or value.dtype == STRING:
            kind = "strings" if value.dtype == STRING else value.kind
            raise RefusedError(
                f"value {shown(value.name)}: expected a tensor of numbers, got {kind}"
            )


def _check_nodes(graph: GraphView, allowed: Allowed, *, may_loop: bool) -> None:
    """Check each node by itself, and that each reads only what was made before, made once."""
    inputs = {port.name for port in graph.inputs}
    known = inputs | graph.initializers.keys()
    if len(known) != len(inputs) + len(graph.initializers):
        twice = sorted(inputs & graph.initializers.keys())
        raise RefusedError(f"input {shown(twice[0])}: it is stored as well")
    known |= graph.state
    _check_order(graph.nodes, known, set(known), allowed, graph if may_loop else None)
    for port in graph.outputs:
        if port.name not in known:
            raise RefusedError(f"output {shown(port.name)}: nothing makes it")


def _check_order(
    nodes: Sequence[Operation],
    known: set[str],
    taken: set[str],
    allowed: Allowed,
    loops: GraphView | None,
) -> None:
    """Check nodes one after the other.

    Args:
        nodes: in order.
        known: what they may read; learns what they make.
        taken: every name so far, those in bodies as well: none may mean two tensors.
        allowed: operators that may run, by domain.
        loops: the graph that they are, where it may hold Loops.
    """
    for node in nodes:
        if loops is not None and (node.op, node.domain) == ("Loop", ""):
            _check_body(node, loopcheck.check(loops, node), known, taken)
        else:
            _check_node(node, allowed)
        for name in node.inputs:
            if name and name not in known:
                raise RefusedError(f"{node.label}: reads {shown(name)}, which nothing made before")
        _take(node, filter(None, node.outputs), known, taken)


def _check_body(node: Operation, body: Nested, known: set[str], taken: set[str]) -> None:
    inside = set(known)
    _take(node, [*(port.name for port in body.inputs), *body.initializers], inside, taken)
    _check_order(body.nodes, inside, taken, ALLOWED, None)
    for port in body.outputs:
        if port.name not in inside:
            raise RefusedError(f"{node.label}: nothing makes {shown(port.name)} in its body")


def _take(node: Operation, names: Iterable[str], known: set[str], taken: set[str]) -> None:
    for name in names:
        if name in taken:
            raise RefusedError(f"{node.label}: makes {shown(name)}, which is there already")
        known.add(name)
        taken.add(name)


def _check_node(node: Operation, allowed: Allowed) -> None:
    if node.domain not in allowed:
        raise RefusedError(f"{node.label}: operators of {shown(node.domain)} may not run here")
    if node.op not in allowed[node.domain]:
        raise RefusedError(f"{node.label}: this operator is not among those that may run here")
    if not any(node.outputs):
        raise RefusedError(f"{node.label}: expected it to make something")
    if node.overload or node.is_placed:
        raise RefusedError(f"{node.label}: expected no overload and no placement on devices")
    for setting in node.attributes:
        what = f"{node.label}, attribute {shown(setting.name)}"
        if setting.kind not in _NUMBERS:
            raise RefusedError(f"{what}: expected numbers or a word, got {setting.kind}")
        if node.op == "Constant" and setting.kind in {"string", "strings"}:
            raise RefusedError(f"{what}: expected numbers, got strings")
        if setting.name in _DTYPE_SETTINGS and setting.number == STRING:
            raise RefusedError(f"{what}: expected a type of numbers, got strings")


# --- where an example may go --------------------------------------------------------------------
def _check_flow(manifest: Mapping[str, Any], train: GraphView) -> None:
    """Outputs are the promised ones already; new parameters must be steps from old ones, clipped.

    State may hold what was not clipped, as it stays on the device: then it counts as an example.
    """
    _check_steps(manifest, train)
    params = [f"p.{i}.next" for i in range(len(manifest["params"]))]
    for part in manifest["optimizer"]:
        if part[0] != "clip":
            continue
        limit = part[1] if len(part) == 2 else None
        if not isinstance(limit, int | float):
            raise RefusedError(f"expected a clip with its limit in the manifest, got {shown(part)}")
        stages = [c for c in clips.clips(train, limit) if len(c.reads) == len(params)]
        leaks = [_past(manifest, train, stage) for stage in stages] or [set(params)]
        if leak := min(leaks, key=len):
            raise RefusedError(
                f"output {min(leak)}: expected examples to reach it only through the clip at "
                f"{limit:g} that the manifest promises, there is another way"
            )


def _check_steps(manifest: Mapping[str, Any], train: GraphView) -> None:
    """Refuse a new parameter that does not come from the old one: it would be something else."""
    seen = {f"p.{i}": 1 << i for i in range(len(manifest["params"]))}
    for node in train.nodes:
        bits = 0
        for name in node.reads:
            bits |= seen.get(name, 0)
        seen |= dict.fromkeys(node.outputs, bits)
    for i in range(len(manifest["params"])):
        if not seen.get(f"p.{i}.next", 0) >> i & 1:
            raise RefusedError(
                f"output p.{i}.next: expected a step from p.{i}, it does not read it"
            )


def _past(manifest: Mapping[str, Any], train: GraphView, stage: clips.Clip) -> set[str]:
    """Return the new parameters that examples reach past a clip stage, in one step or several."""
    sources = {"x", "y"}
    while True:
        found = reach.reached(train.nodes, sources, stage.makes)
        states = range(len(manifest["slots"]))
        more = {f"s.{j}" for j in states if f"s.{j}.next" in found} - sources
        if not more:
            break
        sources |= more
    return {name for i in range(len(manifest["params"])) if (name := f"p.{i}.next") in found}
