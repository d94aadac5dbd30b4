# SPDX-License-Identifier: Apache-2.0
"""What a bundle's manifest may say, checked field by field before anything trusts it. Pure.

`check` walks the whole manifest; the first thing out of place is a BundleError of one line that
names the field, what was expected and what came. Cross references (a patch and the bytes it points
at, a slot and its parameter) are checked here too, so that later code can index without fear.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_sdk import fields as f
from edge_sdk.errors import BundleError

FORMAT = "fedge-bundle/2"
MAX_MANIFEST_BYTES = 4 << 20
MAX_VALUES = 100_000
"""Numbers, texts, lists and tables: about 32 a tensor, and each takes some 64 bytes once read."""
MAX_WHOLE_BYTES = 4 * f.MAX_NUMBERS  # of a member, with what it shares put in
LOSSES = ("cross_entropy", "mse", "bce_logits")
DTYPES = ("float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "int64", "bool")
ROLES = ("predict", "train", "evaluate")
FORMATS = ("onnx", "tflite")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def encode(manifest: Mapping[str, Any]) -> bytes:
    """Return canonical JSON: sorted keys, no spaces, UTF-8.

    Raises: BundleError when the manifest holds what JSON cannot say, such as NaN.
    """
    try:
        text = json.dumps(
            manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise BundleError(f"manifest: expected plain finite JSON values; {error}") from error
    return text.encode()


def decode(data: bytes) -> dict[str, Any]:
    """Read canonical JSON back.

    Raises: BundleError when the bytes are too many, not JSON, or not in the canonical form.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"manifest: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
    values = sum(map(data.count, (b",", b"[", b"{")))  # before they take memory
    if values > MAX_VALUES:
        raise BundleError(f"manifest: expected at most {MAX_VALUES} values, got {values}")
    try:
        manifest = json.loads(data)
        canonical = isinstance(manifest, dict) and encode(manifest) == data
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest: expected JSON, got something else: {error}") from error
    if not canonical:
        raise BundleError("manifest: expected canonical JSON (sorted keys, no spaces) of an object")
    found: dict[str, Any] = manifest
    return found


def check(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Check a manifest against the members (name to byte count) that came with it.

    Raises: BundleError naming the first field that is missing, unknown, of another type, out of
    bounds, or at odds with another field.
    """
    if manifest.get("format") != FORMAT:
        f.fail("format", repr(FORMAT), manifest.get("format"), "upgrade fedge or rebuild")
    f.fields(_MANIFEST)("", manifest)
    _check_members(manifest["members"], sizes)
    sizes = _whole(manifest["spliced"], sizes)
    f.ROWS("cost.batch", manifest["cost"].get("batch", 1))
    _check_params(manifest, sizes)
    _check_graphs(manifest, sizes)
    shapes = [p["shape"] for p in manifest["params"]]
    for name, patches in manifest["patches"].items():
        _check_patches(name, patches, shapes, sizes[manifest["graphs"][name]["predict"]])


_PORT = f.fields(
    {
        "name": f.TEXT,
        "dtype": f.one_of(*DTYPES),
        "shape": f.OPEN_SHAPE,
        "scale": f.or_null(f.SCALE),
        "zero_point": f.or_null(f.LEVEL),
    }
)
_MEMBER = f.fields(
    {
        "sha256": f.claim("64 hex digits", lambda v: isinstance(v, str) and bool(_SHA256.match(v))),
        "size": f.COUNT,
    }
)
_CUT = f.fields({"axis": f.INDEX, "of": f.SIZE, "at": f.list_of(f.SIZE, f.MAX_NUMBERS)})
_FLOAT = f.fields(
    {"param": f.INDEX, "kind": f.ANY, "offset": f.OFFSET, "order": f.ORDER, "rows": _CUT},
    optional=("order", "rows"),
)
_WIDTHS = {"float16": 2, "float32": 4, "range": 4}
_PATCH: dict[str, f.Check] = {
    "float16": _FLOAT,
    "float32": _FLOAT,
    "range": f.fields({"param": f.INDEX, "kind": f.ANY, "offset": f.OFFSET}),
    "quantized": f.fields(
        {
            "param": f.INDEX,
            "kind": f.ANY,
            "dtype": f.one_of("int8", "uint8"),
            "offset": f.OFFSET,
            "scale_offset": f.OFFSET,
            "scales": f.COUNT,
            "axis": f.or_null(f.INDEX),
            "zero_point": f.either(f.list_of(f.LEVEL, f.MAX_NUMBERS), f.LEVEL),
            "order": f.ORDER,
            "rows": _CUT,
        },
        optional=("order", "rows"),
    ),
    "bias": f.fields(
        {
            "param": f.or_null(f.INDEX),
            "kind": f.ANY,
            "shape": f.SHAPE,
            "offset": f.OFFSET,
            "scale_offset": f.OFFSET,
            "scales": f.COUNT,
            "input_scale": f.SCALE,
            "input": f.INDEX,
            "weight": f.INDEX,
            "weight_scale": f.list_of(f.SCALE, f.MAX_NUMBERS),
            "rows": _CUT,
        },
        optional=("input", "weight", "weight_scale", "shape", "rows"),
    ),
}


def _formats(inner: f.Check) -> f.Check:
    return f.fields(dict.fromkeys(FORMATS, inner), optional=FORMATS)


def _patch(field: str, value: Any) -> None:
    kind = value.get("kind") if isinstance(value, dict) else value
    if not isinstance(kind, str) or kind not in _PATCH:
        f.fail(f"{field}.kind", f"one of {', '.join(_PATCH)}", kind)
    _PATCH[kind](field, value)


_MANIFEST: dict[str, f.Check] = {
    "format": f.TEXT,
    "source": f.one_of(*FORMATS),
    "name": f.TEXT,
    "producer": f.TEXT,
    "loss": f.one_of(*LOSSES),
    "train": f.ANY,
    "optimizer": f.list_of(f.list_of(f.ANY, 3), 16),
    "lr": f.claim("a learning rate from 0", lambda v: f.is_number(v) and v >= 0),
    "proximal": f.FLAG,
    "input": _PORT,
    "output": _PORT,
    "target": f.fields({"dtype": f.one_of("int64", "float32"), "shape": f.OPEN_SHAPE}),
    "params": f.list_of(f.fields({"name": f.TEXT, "shape": f.SHAPE})),
    "slots": f.list_of(f.fields({"name": f.TEXT, "param": f.or_null(f.INDEX), "shape": f.SHAPE})),
    "graphs": _formats(f.fields(dict.fromkeys(ROLES, f.TEXT), optional=("train", "evaluate"))),
    "patches": _formats(f.list_of(_patch)),
    "cost": f.table_of(f.either(f.NUMBER, f.table_of(f.NUMBER))),
    "members": f.table_of(_MEMBER),
    "spliced": f.table_of(
        f.list_of(
            f.fields({"at": f.OFFSET, "member": f.TEXT, "offset": f.OFFSET, "size": f.OFFSET})
        )
    ),
}


def _check_members(members: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    if members.keys() != sizes.keys():
        f.fail("members", f"{sorted(sizes)} as in the archive", sorted(members))
    for name, size in sizes.items():
        if members[name]["size"] != size:
            f.fail(f"members.{name}.size", str(size), members[name]["size"], "fetch it again")


def _whole(
    spliced: Mapping[str, list[Mapping[str, Any]]], sizes: Mapping[str, int]
) -> Mapping[str, int]:
    """Return the sizes of whole members, once their splices are known to fit."""
    whole = dict(sizes)
    for name, splices in spliced.items():
        if name not in sizes or name == "params.bin":
            f.fail(f"spliced.{name}", "a graph of this bundle", name)
        begun = gone = 0
        for i, splice in enumerate(splices):
            field, end = f"spliced.{name}[{i}]", splice["offset"] + splice["size"]
            if end > sizes.get(splice["member"], 0):
                f.fail(field, "bytes that a member stores", splice)
            if not begun <= splice["at"] - gone <= sizes[name]:
                f.fail(f"{field}.at", "places in order, within the member", splice["at"])
            begun, gone = splice["at"] - gone, gone + splice["size"]
        whole[name] += gone
    if max(whole.values(), default=0) > MAX_WHOLE_BYTES:
        f.fail("spliced", f"members of at most {MAX_WHOLE_BYTES} bytes", max(whole.values()))
    return whole


def _check_params(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    params = manifest["params"]
    numbers = sum(math.prod(p["shape"]) for p in params)
    if not params or len({p["name"] for p in params}) != len(params):
        f.fail("params", "at least one, each name once", [p["name"] for p in params])
    if sizes.get("params.bin") != 4 * numbers:
        f.fail("params", f"{sizes.get('params.bin')} bytes as in params.bin", 4 * numbers)
    for i, slot in enumerate(manifest["slots"]):
        if slot["param"] is not None and slot["param"] >= len(params):
            f.fail(f"slots[{i}].param", f"an index below {len(params)}", slot["param"])
    state = sum(math.prod(slot["shape"]) for slot in manifest["slots"])
    if state > 2 * f.MAX_NUMBERS:
        f.fail("slots", f"at most {2 * f.MAX_NUMBERS} numbers in all", state)


def _check_graphs(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    graphs, source = manifest["graphs"], manifest["source"]
    if source not in graphs or graphs.keys() != manifest["patches"].keys():
        f.fail("graphs", f"{source}, and the same formats as in patches", sorted(graphs))
    if not any("train" in roles for roles in graphs.values()):
        f.fail("graphs", "a training graph in at least one format", graphs)
    for name, roles in graphs.items():
        if ("train" in roles) != ("evaluate" in roles):
            f.fail(f"graphs.{name}", "train and evaluate, both or neither", sorted(roles))
        for role, member in roles.items():
            if member not in sizes:
                f.fail(f"graphs.{name}.{role}", f"one of {sorted(sizes)}", member)


def _check_patches(
    name: str, patches: list[Mapping[str, Any]], shapes: list[list[int]], end: int
) -> None:
    """Check the patches of one format; `end`: the size of its predict graph, bytes."""
    weights = {p["param"]: p["scales"] for p in patches if p["kind"] == "quantized"}
    ranges = {p["param"] for p in patches if p["kind"] == "range"}
    spans: list[tuple[int, int, int]] = []
    for i, patch in enumerate(patches):
        field = f"patches.{name}[{i}]"
        if patch["param"] is not None and patch["param"] >= len(shapes):
            f.fail(f"{field}.param", f"an index below {len(shapes)}", patch["param"])
        if "weight" in patch and weights.get(patch["weight"]) not in {1, patch["scales"]}:
            f.fail(f"{field}.weight", "a quantized parameter with as many scales", patch["weight"])
        if "input" in patch and patch["input"] not in ranges:
            f.fail(f"{field}.input", "a parameter that is a range", patch["input"])
        spans += [(a, b, i) for a, b in _spans(field, patch, shapes)]
    spans.sort()
    for (_, before, _), (start, _, i) in itertools.pairwise(spans):
        if start < before:
            f.fail(f"patches.{name}[{i}]", "bytes that no other patch writes", start)
    if spans and max(b for _, b, _ in spans) > end:
        furthest = max(b for _, b, _ in spans)
        f.fail(f"patches.{name}", f"bytes within the predict graph ({end})", furthest)


def _spans(field: str, patch: Mapping[str, Any], shapes: list[list[int]]) -> list[tuple[int, int]]:
    kind, param = patch["kind"], patch["param"]
    if param is None and "shape" not in patch:
        f.fail(f"{field}.shape", "a shape, as no parameter gives one", None)
    shape = patch["shape"] if param is None else shapes[param]
    if "rows" in patch:
        _check_rows(f"{field}.rows", patch["rows"], shape)
        shape = whole_shape(patch, shape)
    at, numbers = patch["offset"], math.prod(shape)
    order = patch.get("order", range(len(shape)))
    if sorted(order) != list(range(len(shape))):
        f.fail(f"{field}.order", f"each axis of {shape} once", order)
    if kind == "range" and numbers != 1:
        f.fail(f"{field}.param", "a parameter of one number", shape)
    if kind in _WIDTHS:
        return [(at, at + _WIDTHS[kind] * numbers)]
    scales = patch["scales"]
    if kind == "quantized":
        _check_quantized(field, patch, shape)
        width = 1
    else:
        _check_bias(field, patch, shape)
        width = 4
    scale_at = patch["scale_offset"]
    return [(at, at + width * numbers), (scale_at, scale_at + 4 * scales)]


def whole_shape(patch: Mapping[str, Any], shape: Sequence[int]) -> list[int]:
    """Return the shape of the tensor that a patch writes to, of which a parameter may be rows."""
    rows = patch.get("rows")
    return [rows["of"] if rows and i == rows["axis"] else d for i, d in enumerate(shape)]


def _check_rows(field: str, rows: Mapping[str, Any], shape: list[int]) -> None:
    at, axis = rows["at"], rows["axis"]
    if axis >= len(shape) or shape[axis] != len(at):
        f.fail(f"{field}.at", f"an index for each along axis {axis} of {shape}", at)
    if at != sorted(set(at)) or (at and at[-1] >= rows["of"]):
        f.fail(f"{field}.at", f"indices below {rows['of']}, rising", at)


def _check_quantized(field: str, patch: Mapping[str, Any], shape: list[int]) -> None:
    """Check scales and zero points; `shape`: of the whole tensor, also where rows of it learn."""
    axis, rows = patch["axis"], patch.get("rows")
    if rows and axis != rows["axis"]:
        f.fail(f"{field}.axis", f"{rows['axis']}, so that each row has a scale of its own", axis)
    if axis is not None and axis >= len(shape):
        f.fail(f"{field}.axis", f"an axis of {shape}", axis)
    scales = 1 if axis is None else shape[axis]
    if patch["scales"] != scales:
        f.fail(f"{field}.scales", f"{scales}, one for each of axis {axis}", patch["scales"])
    info = np.iinfo(patch["dtype"])
    points = patch["zero_point"]
    points = points if isinstance(points, list) else [points]
    learning = len(rows["at"]) if rows else scales
    if len(points) not in {1, learning} or not all(info.min <= z <= info.max for z in points):
        f.fail(f"{field}.zero_point", f"1 or {learning} values of {patch['dtype']}", points)


def _check_bias(field: str, patch: Mapping[str, Any], shape: list[int]) -> None:
    if ("weight" in patch) == ("weight_scale" in patch):
        f.fail(f"{field}.weight", "weight or weight_scale, one of the two", patch.get("weight"))
    scales, rows = patch["scales"], patch.get("rows")
    if rows and patch["param"] is None:
        f.fail(f"{field}.rows", "no rows, as no parameter has them", rows["at"])
    if scales not in {1, math.prod(shape)}:
        f.fail(f"{field}.scales", f"1 or {math.prod(shape)}", scales)
    if "weight_scale" in patch and len(patch["weight_scale"]) not in {1, scales}:
        f.fail(f"{field}.weight_scale", f"1 or {scales} numbers", len(patch["weight_scale"]))
