# SPDX-License-Identifier: Apache-2.0
"""A training step, ours and torch's: same weights, batches, optimizer and threads, in turn.

Each runs in a process of its own, so that the peak of memory is honest. No time is given before the
losses of the first ten steps agree. Repetitions alternate, so that a busy machine is as unkind to
the one as to the other, and what is compared are medians.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from coordinator.bench import plan, recipes
from coordinator.bench.child import BATCHES, Child, started
from coordinator.compiler import build, momentum
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError, EngineError
from edge_sdk.params import count

LR, DECAY = 0.001, 0.9
AGREE = 1e-4
"""By how much the losses of the first steps may differ, relative to losses above 1."""
COMPARED = 10
"""The first steps, whose losses are compared."""

WARM, STEPS = 3, 10
"""After a turn, steps that do not count, and steps that do."""


class Side(NamedTuple):
    """The median of a step, ms, and the peak of memory, MiB, of one side."""

    ms: float
    rss_mib: float


class StepCost(TypedDict):
    """What a step costs; the fields of torch are None where it was not measured.

    `load` is the machine's load average of the last minute: above 1, others had a share of it, and
    torch, whose threads wait by spinning, suffers more than it should.
    """

    model: str
    batch: int
    threads: int
    params: int
    ms: float
    rss_mib: float
    torch: str
    torch_ms: float | None
    torch_rss_mib: float | None
    ratio: float | None
    rss_ratio: float | None
    losses_differ_by: float | None
    load: float


def measure(
    model: str, *, batch: int = 16, threads: int = 2, loss: str | None = None, repeat: int = 15
) -> StepCost:
    """Train all of `model`, a recipe's name or an ONNX file, by momentum, and by torch beside it.

    Raises: EngineError when the losses do not agree; ConfigError, CompileError for a bad model.
    """
    if batch < 1 or threads < 1 or repeat < 1:
        raise ConfigError("expected batch, threads and repetitions from 1")
    load = os.getloadavg()[0]
    loss = loss or recipes.LOSSES.get(model, "cross_entropy")
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as place, ExitStack() as stack:
        folder = Path(place)
        bundle = _prepare(recipes.model(model), loss, batch, folder)
        ours = stack.enter_context(started("coordinator.bench.ours", folder, threads))
        first, peer, why = ours.run(COMPARED), None, "torch is not installed"
        if importlib.util.find_spec("torch"):
            peer = stack.enter_context(started("coordinator.bench.torch_peer", folder, threads))
            peer, differ, why = _agreed(peer, first["losses"])
        else:
            differ = None
        mine, theirs = _in_turn(ours, peer, repeat)
    return StepCost(
        model=Path(model).stem,
        batch=batch,
        threads=threads,
        params=count(bundle.shapes),
        ms=mine.ms,
        rss_mib=mine.rss_mib,
        torch=why or "measured",
        torch_ms=theirs.ms if theirs else None,
        torch_rss_mib=theirs.rss_mib if theirs else None,
        ratio=mine.ms / theirs.ms if theirs else None,
        rss_ratio=mine.rss_mib / theirs.rss_mib if theirs else None,
        losses_differ_by=differ,
        load=load,
    )


def _prepare(model: Any, loss: str, batch: int, folder: Path) -> Bundle:
    """Leave the bundle, the rival's plan and the batches in `folder`."""
    bundle = build(model, loss=loss, optimizer=momentum(DECAY, lr=LR))
    bundle.save(folder / "task.fedge")
    plan.write(model, loss, LR, DECAY, folder)
    x, y = recipes.examples(bundle, batch * BATCHES)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return bundle


def _agreed(peer: Child, ours: list[float]) -> tuple[Child | None, float | None, str]:
    """Train the rival as far as we are and compare; None when it cannot run the model."""
    try:
        theirs = peer.run(COMPARED)["losses"]
    except EngineError as error:
        return None, None, str(error)
    gaps = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)]
    if not all(gap <= AGREE for gap in gaps):  # NaN is no agreement
        raise EngineError(f"expected the same losses as torch within {AGREE}, got gaps of {gaps}")
    return peer, max(gaps), ""


def _in_turn(ours: Child, peer: Child | None, repeat: int) -> tuple[Side, Side | None]:
    """Measure both; the first steps after a switch do not count."""
    children = [child for child in (ours, peer) if child]
    times: list[list[float]] = [[] for _ in children]
    peaks = [0 for _ in children]
    for _ in range(repeat):
        for i, child in enumerate(children):
            said = child.run(WARM + STEPS)
            times[i] += said["ms"][WARM:]
            peaks[i] = said["peak_kib"]
    sides = [Side(statistics.median(t), p / 1024) for t, p in zip(times, peaks, strict=True)]
    return sides[0], sides[1] if peer else None
