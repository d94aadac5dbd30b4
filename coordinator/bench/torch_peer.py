# SPDX-License-Identifier: Apache-2.0
"""The rival of `fedge bench step`: torch in eager mode, as its users train.

It loads no onnx: `plan.py` left the model as plain data. The layers are those of `torch.nn.
functional`, bound to their weights once, so that a step calls them and nothing else of ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from coordinator.bench.child import answer, serve

Layer = Callable[..., Any]


def main() -> None:
    """``python -m coordinator.bench.torch_peer FOLDER THREADS``: serve steps until the end."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    plan = json.loads((folder / "plan.json").read_text())
    with np.load(folder / "weights.npz") as archive:
        stored = {name: torch.from_numpy(archive[name]) for name in archive.files}
    try:
        step = stepper(plan, stored)
    except NotImplementedError as error:
        answer({"error": str(error)})
        return
    serve(step, folder, torch.from_numpy)


def stepper(plan: dict[str, Any], stored: dict[str, Any]) -> Callable[[Any, Any], float]:
    """Return a training step: forward, loss, backward, SGD; only what is trained needs a gradient.

    Raises: NotImplementedError for an operator that this rival has no layer for.
    """
    if missing := set(plan["trains"]) - set(stored):
        raise NotImplementedError(f"torch has no weight {min(missing)!r}: measured without it")
    weights = {n: torch.nn.Parameter(stored[n].clone()) for n in plan["trains"]}
    known = {**stored, **weights}
    calls = [(_layer(node), node, *_operands(node, known)) for node in plan["nodes"]]
    optimizer = torch.optim.SGD(weights.values(), lr=plan["lr"], momentum=plan["decay"])
    lossy = functional.cross_entropy if plan["loss"] == "cross_entropy" else functional.mse_loss

    def step(x: Any, y: Any) -> float:
        values = {plan["input"]: x}
        for layer, node, names, fixed in calls:
            values[node["out"]] = layer(*[values[name] for name in names], *fixed)
        loss = lossy(values[plan["output"]], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def _operands(node: dict[str, Any], known: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Split a node's inputs into tensors to come and weights at hand, which come last."""
    names = [name for name in node["in"] if name and name not in known]
    return names, [known[name] for name in node["in"] if name in known]


def _layer(node: dict[str, Any]) -> Layer:
    op, attributes = node["op"], node["attributes"]
    if op == "Conv":
        return _conv(attributes)
    if op == "Gemm" and attributes.get("transB") and not attributes.get("transA"):
        linear: Layer = functional.linear
        return linear
    if op in {"MaxPool", "AveragePool"}:
        return _pool(op, attributes)
    if op not in PLAIN:
        raise NotImplementedError(f"torch has no layer here for {op}: measured without it")
    return PLAIN[op]


PLAIN: dict[str, Layer] = {
    "Add": torch.add,
    "Flatten": lambda x: torch.flatten(x, 1),
    "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True),
    "Relu": functional.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


def _conv(attributes: dict[str, Any]) -> Layer:
    rank = len(attributes["kernel_shape"])
    begins, ends = _pads(attributes, rank)
    convolve = {1: functional.conv1d, 2: functional.conv2d}[rank]
    stride = attributes.get("strides", [1] * rank)
    dilation = attributes.get("dilations", [1] * rank)
    group = attributes.get("group", 1)
    if begins == ends:
        return lambda x, w, b=None: convolve(x, w, b, stride, begins, dilation, group)
    around = [pad for pair in zip(reversed(begins), reversed(ends), strict=True) for pad in pair]
    return lambda x, w, b=None: convolve(
        functional.pad(x, around), w, b, stride, 0, dilation, group
    )


def _pool(op: str, attributes: dict[str, Any]) -> Layer:
    kernel = attributes["kernel_shape"]
    begins, ends = _pads(attributes, len(kernel))
    if begins != ends or attributes.get("ceil_mode") or attributes.get("count_include_pad"):
        raise NotImplementedError(f"torch has no layer here for this {op}: measured without it")
    kind = "max_pool" if op == "MaxPool" else "avg_pool"
    pool = getattr(functional, f"{kind}{len(kernel)}d")
    stride = attributes.get("strides", [1] * len(kernel))
    return lambda x: pool(x, kernel, stride, begins)


def _pads(attributes: dict[str, Any], rank: int) -> tuple[list[int], list[int]]:
    if attributes.get("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
        raise NotImplementedError("torch has no layer here for auto_pad: measured without it")
    pads = attributes.get("pads", [0] * 2 * rank)
    return pads[:rank], pads[rank:]


if __name__ == "__main__":
    main()
