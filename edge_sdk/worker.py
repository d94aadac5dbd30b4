# SPDX-License-Identifier: Apache-2.0
"""The training child, `python -m edge_sdk.worker`: a job a line on stdin, a JSON line for each out.

It reads a bundle, weights and examples and writes a delta; it ends with its input. It holds no
key, loads no network library and dies with its parent; when memory runs out the kernel takes it
before anything else. A training that was killed goes on from its checkpoint, to the same bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk import footprint

if TYPE_CHECKING:
    from edge_sdk.bundle import Bundle
    from edge_sdk.checkpoint import Keeper
    from edge_sdk.trainer import Progress

SIGN_OF_LIFE_S = 1.0
_PR_SET_PDEATHSIG = 1
_FIRST_TO_GO = "1000"


def main() -> int:
    """Carry out the jobs on stdin; 0 when the last delta is on disk, 1 with the reason on stdout.

    Each job begins afresh, so a job has the same result whatever came before it.
    """
    _die_with_parent()
    code, is_modest = 1, False
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if os.getppid() != request["parent"]:
            return 1  # the parent went before we could tie ourselves to it
        if not is_modest:
            _be_modest(request["nice"])
            is_modest = True
        code = _carry_out(request)
    return code


def _carry_out(request: Mapping[str, Any]) -> int:
    try:
        said = train(request)
    except Exception as error:  # noqa: BLE001 - the parent reports it, whatever it is
        footprint.uncap()
        line = " ".join(str(error).split())[:500] or type(error).__name__
        is_memory = isinstance(error, MemoryError) or any(w in line for w in footprint.NO_MEMORY)
        _say({"error": line, "kind": "oom" if is_memory else "failed"})
        return 1
    footprint.uncap()
    _say(said)
    return 0


def train(request: Mapping[str, Any]) -> dict[str, Any]:
    """Train as asked and write the delta; returns what `TrainResult` holds.

    Raises: FedgeError, ValueError or MemoryError saying what is wrong with the job.
    """
    import numpy as np

    from edge_sdk import files
    from edge_sdk.bundle import Bundle
    from edge_sdk.engine import open_engine
    from edge_sdk.params import flatten, unflatten
    from edge_sdk.samples import Samples
    from edge_sdk.trainer import Trainer

    bundle = Bundle.load(request["bundle"])
    open_engine(bundle, request["engine"])
    footprint.hand_back()  # importing the runtime cost what running it does not
    _say({"at": 0})
    if request["memory"] is not None:
        footprint.cap_growth(request["memory"])
    trainer = Trainer(bundle, request["engine"], request["threads"], request["seed"])
    anchor = request["anchor"]
    trainer.load_params(
        unflatten(_weights(request["weights"], bundle.shapes), bundle.shapes),
        anchor and unflatten(_weights(anchor, bundle.shapes), bundle.shapes),
    )
    with Samples.open(request["samples"]) as samples:
        keeper, start = _keeper(request, bundle), None
        if keeper is None:
            x, y = samples.arrays()
        else:
            start, x, y = keeper.begin(samples, _state_shapes(bundle))
    done = trainer.fit(x, y, **_budget(request, start), start=start, on_step=_on_step(keeper))
    delta = flatten(trainer.delta(), bundle.shapes)
    if not np.isfinite(delta).all():
        raise ValueError("training ended in weights that are not finite; lower the learning rate")
    files.write(Path(request["delta"]), delta.astype("<f4").data)
    return {
        **done,
        "examples": len(x),
        "peak_bytes": footprint.peak_kib() << 10,
        "resumed_at": start.steps if start else 0,
    }


def _budget(request: Mapping[str, Any], start: Progress | None) -> dict[str, Any]:
    """Return a budget as `Trainer.fit` counts it: from the beginning of the first attempt."""
    budget = dict(request["budget"])
    in_all, seconds = budget.pop("seconds_in_all"), budget["seconds"]
    if seconds is not None and start is not None:
        seconds += start.seconds
    limits = [limit for limit in (in_all, seconds) if limit is not None]
    return budget | {"seconds": min(limits, default=None)}


def _keeper(request: Mapping[str, Any], bundle: Bundle) -> Keeper | None:
    from edge_sdk.checkpoint import Keeper, job_id
    from edge_sdk.engine import choose

    if request["checkpoint"] is None:
        return None
    files = [request["weights"], request["anchor"] or request["weights"]]
    fields = {
        "bundle": bundle.digest,
        "files": [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files],
        "engine": choose(bundle.manifest, request["engine"]).engine,
        "budget": {k: v for k, v in request["budget"].items() if not k.startswith("seconds")},
        **{name: request[name] for name in ("seed", "threads", "samples")},
    }
    return Keeper(Path(request["checkpoint"]), request["checkpoint_s"], job_id(fields))


def _state_shapes(bundle: Bundle) -> list[tuple[int, ...]]:
    slots = [tuple(slot["shape"]) for slot in bundle.manifest["slots"]]
    return [*bundle.shapes.values(), *slots]


def _on_step(keeper: Keeper | None) -> Callable[[Callable[[], Progress]], None]:
    """Give a sign of life now and then, and keep where the training stands."""
    told_s = time.monotonic()

    def on_step(progress: Callable[[], Progress]) -> None:
        nonlocal told_s
        if time.monotonic() >= told_s + SIGN_OF_LIFE_S:
            told_s = time.monotonic()
            _say({"at": told_s})
        if keeper is not None:
            keeper.on_step(progress)

    return on_step


def _weights(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    import numpy as np

    from edge_sdk.params import count

    expected, size = 4 * count(dict(shapes)), Path(path).stat().st_size
    if size != expected:
        raise ValueError(f"expected {expected} bytes of weights in {path}, got {size}")
    return np.fromfile(path, "<f4").astype(np.float32, copy=False)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _be_modest(nice: int) -> None:
    os.nice(nice)
    with suppress(OSError):  # not all kernels let us volunteer
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)


def _say(result: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
