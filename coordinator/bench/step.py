# SPDX-License-Identifier: Apache-2.0
"""A training step, ours and a rival's: same weights, batches, optimizer and threads, in turn.

Each runs in a process of its own, so that the peak of memory is honest. No time is given before the
losses of the first ten steps agree. Repetitions alternate, so that a busy machine is as unkind to
the one as to the other, and what is compared are medians.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypedDict

from coordinator.bench import rivals
from coordinator.bench.cases import MODES, Case, prepare
from coordinator.bench.child import Child, started
from coordinator.bench.rivals import Rival
from edge_sdk.engine import ENGINES
from edge_sdk.errors import ConfigError, EngineError

AGREE = 1e-4
"""By how much the losses of the first steps may differ, relative to losses above 1."""
ROUNDED = 0.01
"""The same for engines that run one int8 model: kernels of integers may round a level apart."""
COMPARED = 10
"""The first steps, whose losses are compared."""

WARM, STEPS = 3, 10
"""After a turn, steps that do not count, and steps that do."""

TWIN = "float32"
"""The rival of an int8 model: what it was quantized from."""

_MIB = 1 << 20


class Settings(NamedTuple):
    """How to measure, whatever the model."""

    batch: int = 16
    threads: int = 2
    repeat: int = 15
    engines: tuple[str, ...] = ("ort",)
    peers: tuple[str, ...] = (rivals.TORCH,)
    peer_python: str | None = None
    tflite_python: str | None = None


class Side(NamedTuple):
    """The median of a step, ms, and the peak of memory, MiB, whole and what training added."""

    ms: float
    rss_mib: float
    added_mib: float | None = None


class StepCost(TypedDict):
    """What a step costs; fields are None where nothing was measured, `note` says why.

    `mode` is what is trained (`cases.MODES`), `trained` how many numbers that is. `added_mib` is
    what training added to a process with numpy and the runtime loaded, `predicted_mib` what the
    bundle's cost table says it adds, and `off` by how much of the measured that is wrong. The rival
    of an int8 model is its float32 twin on the same engine. `load` is the machine's load average of
    the last minute: above 1, others had a share of it, and threads that wait by spinning, as
    torch's do, suffer more than they should.
    """

    model: str
    mode: str
    engine: str
    batch: int
    threads: int
    trained: int
    ms: float | None
    rss_mib: float | None
    predicted_mib: float | None
    added_mib: float | None
    off: float | None
    peer: str
    peer_ms: float | None
    peer_rss_mib: float | None
    ratio: float | None
    rss_ratio: float | None
    losses_differ_by: float | None
    load: float
    note: str


def measure(
    model: str, mode: str = "all", *, loss: str | None = None, settings: Settings | None = None
) -> list[StepCost]:
    """Train a recipe's model or an ONNX file on each engine, and on each rival beside them.

    Raises: EngineError when losses do not agree; ConfigError, CompileError for a bad model.
    """
    how = settings or Settings()
    if min(how.batch, how.threads, how.repeat) < 1:
        raise ConfigError("expected batch, threads and repetitions from 1")
    if mode not in MODES:
        raise ConfigError(f"expected a mode of {', '.join(MODES)}, got {mode!r}")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as place, ExitStack() as stack:
        formats = tuple(sorted({ENGINES[name].format for name in how.engines}))
        optimizer = "sgd" if rivals.ORT_TRAINING in how.peers else "momentum"
        case = prepare(
            model,
            mode,
            loss=loss,
            batch=how.batch,
            optimizer=optimizer,
            formats=formats,
            folder=Path(place),
        )
        ours = _engines(case, how, stack)
        theirs = _rivals(case, how, ours, stack)
        sides = _in_turn([*ours, *theirs], how.repeat)
    return [
        _row(case, how, (one, rival), sides, load)
        for one in ours
        for rival in theirs or [Rival(name="")]
        if rival.engine in {"", one.engine}
    ]


def _engines(case: Case, how: Settings, stack: ExitStack) -> list[Rival]:
    """Start our side on each engine; those whose losses are not the first one's stop it all."""
    found: list[Rival] = []
    for name in how.engines:
        why = case.lacks.get(ENGINES[name].format, "")
        child = None if why else _started(case.folder, name, how, stack)
        found.append(_tried(Rival(name, name, child, why), found, ROUNDED if case.twin else AGREE))
    return found


def _started(folder: Path, engine: str, how: Settings, stack: ExitStack) -> Child:
    """Start our side on an engine; tflite-runtime may have a Python of its own."""
    own = how.tflite_python if engine == "tflite" else None
    module, python = "coordinator.bench.ours", own or sys.executable
    return stack.enter_context(started(module, folder, how.threads, engine, python=python))


def _rivals(case: Case, how: Settings, ours: Sequence[Rival], stack: ExitStack) -> list[Rival]:
    """Start the rivals of a case, each as far as the first of ours."""
    if case.twin is None:
        made = [rivals.start(p, case, how.threads, how.peer_python, stack) for p in how.peers]
        return [_tried(rival, ours) for rival in made]
    found: list[Rival] = []
    for one in (o for o in ours if o.child):
        child = _started(case.twin, one.engine, how, stack)
        found.append(_tried(Rival(TWIN, one.engine, child), []))
    return found


def _tried(one: Rival, others: Sequence[Rival], within: float = AGREE) -> Rival:
    """Train as far as the others are and compare; without a child where it cannot."""
    if one.child is None:
        return one
    try:
        losses = tuple(one.child.run(COMPARED)["losses"])
    except EngineError as error:
        return one._replace(child=None, why=str(error))
    first = next((other for other in others if other.losses), None)
    if first is None:
        return one._replace(losses=losses)
    gaps = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(first.losses, losses, strict=True)]
    if not all(gap <= within for gap in gaps):  # NaN is no agreement
        raise EngineError(
            f"expected the same losses of {first.name} and {one.name} within {within}, got gaps of "
            f"{gaps}"
        )
    return one._replace(losses=losses, differs=max(gaps))


def _in_turn(sides: Sequence[Rival], repeat: int) -> dict[int, Side]:
    """Measure all that run, by the id of their child; the first steps of a turn do not count."""
    children: list[Child] = [side.child for side in sides if side.child]
    times: list[list[float]] = [[] for _ in children]
    found: dict[int, Side] = {}
    for _ in range(repeat):
        for child, taken in zip(children, times, strict=True):
            said = child.run(WARM + STEPS)
            taken.extend(said["ms"][WARM:])
            added = None
            if said["runtime_kib"] is not None:
                added = (said["peak_kib"] - said["runtime_kib"]) / 1024
            found[id(child)] = Side(statistics.median(taken), said["peak_kib"] / 1024, added)
    return found


def _row(
    case: Case, how: Settings, pair: tuple[Rival, Rival], sides: dict[int, Side], load: float
) -> StepCost:
    one, rival = pair
    mine, theirs = sides.get(id(one.child)), sides.get(id(rival.child))
    both = (mine, theirs) if mine and theirs else None
    gaps = (one.differs, rival.differs)
    bytes_added = case.predicted(ENGINES[one.engine].format)
    predicted = None if bytes_added is None else bytes_added / _MIB
    added = mine.added_mib if mine else None
    return StepCost(
        model=case.name,
        mode=case.mode,
        engine=one.engine,
        batch=how.batch,
        threads=how.threads,
        trained=case.trained,
        ms=mine.ms if mine else None,
        rss_mib=mine.rss_mib if mine else None,
        predicted_mib=predicted,
        added_mib=added,
        off=predicted / added - 1 if predicted and added else None,
        peer=rival.name,
        peer_ms=theirs.ms if theirs else None,
        peer_rss_mib=theirs.rss_mib if theirs else None,
        ratio=both[0].ms / both[1].ms if both else None,
        rss_ratio=both[0].rss_mib / both[1].rss_mib if both else None,
        losses_differ_by=max((d for d in gaps if d is not None), default=None),
        load=load,
        note="; ".join(filter(None, (one.why, rival.why))),
    )
