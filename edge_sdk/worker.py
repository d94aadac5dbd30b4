# SPDX-License-Identifier: Apache-2.0
"""The training child, `python -m edge_sdk.worker`: a job a line on stdin, a JSON line for each out.

It reads a bundle, weights and examples and writes a delta; it ends with its input. It holds no
key, loads no network library and dies with its parent; when memory runs out the kernel takes it
before anything else.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

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
        line = " ".join(str(error).split())[:500]
        _say({"error": line or type(error).__name__})
        return 1
    _say(said)
    return 0


def train(request: Mapping[str, Any]) -> dict[str, Any]:
    """Train as asked and write the delta; returns what `TrainResult` holds.

    Raises: FedgeError or ValueError saying what is wrong with the job.
    """
    import numpy as np

    from edge_sdk import files, footprint
    from edge_sdk.bundle import Bundle
    from edge_sdk.engine import open_engine
    from edge_sdk.params import flatten, unflatten
    from edge_sdk.samples import Samples
    from edge_sdk.trainer import Trainer

    bundle = Bundle.load(request["bundle"])
    open_engine(bundle, request["engine"])
    footprint.hand_back()  # importing the runtime cost what running it does not
    trainer = Trainer(bundle, request["engine"], request["threads"], request["seed"])
    anchor = request["anchor"]
    trainer.load_params(
        unflatten(_weights(request["weights"], bundle.shapes), bundle.shapes),
        anchor and unflatten(_weights(anchor, bundle.shapes), bundle.shapes),
    )
    with Samples.open(request["samples"]) as samples:
        x, y = samples.arrays()
    done = trainer.fit(x, y, **request["budget"])
    delta = flatten(trainer.delta(), bundle.shapes)
    if not np.isfinite(delta).all():
        raise ValueError("training ended in weights that are not finite; lower the learning rate")
    files.write(Path(request["delta"]), delta.astype("<f4").data)
    return {**done, "examples": len(x), "peak_bytes": footprint.peak_kib() << 10}


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
