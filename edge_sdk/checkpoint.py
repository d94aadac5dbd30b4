# SPDX-License-Identifier: Apache-2.0
"""A training under way as one file: one that was killed goes on from it and ends in the same bits.

The file holds where the training stood, its parameters and its optimizer's state; it is replaced
whole, and is good for one job alone. Whatever is wrong with it, the training begins anew.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk import files
from edge_sdk.errors import StoreError
from edge_sdk.failpoints import Failpoints
from edge_sdk.samples import Samples
from edge_sdk.trainer import Progress
from edge_sdk.types import Array, Clock

_HEAD = struct.Struct("<8sII")  # magic, length of the JSON, crc32 of all that follows
_MAGIC = b"FDGECKP1"
_MOST_JSON = 1 << 16
FLASH_BYTES_PER_S = 256 << 10
"""What writing may take of a card on average: a large model is kept the less often for it."""


class Keeper:
    """Writes a training's checkpoints, `every_s` seconds or less often, and finds the last one.

    An `every_s` of 0 keeps each step, whatever it costs: for tests.
    `job` says what the training is of: a checkpoint of another job is not used.
    """

    def __init__(self, path: Path, every_s: float, job: str, clock: Clock = time) -> None:
        self._path, self._every_s, self._job, self._clock = path, every_s, job, clock
        self._failpoints = Failpoints.from_environment()
        self._due_s = clock.monotonic() + every_s
        self._examples: dict[str, Any] = {}

    def begin(
        self, samples: Samples, shapes: Sequence[tuple[int, ...]]
    ) -> tuple[Progress | None, NDArray[Any], NDArray[Any]]:
        """Return where this job stood, None to begin anew, and the examples to train on.

        They are those that it had. Should newer ones have pushed some out, it goes on with as many
        of the newest; with fewer than it had it begins anew. `shapes`: of parameters and optimizer.
        """
        found = self._found(shapes)
        progress, had = found or (None, {"last": None, "count": None})
        numbers, xs, ys = samples.numbered(had["last"], had["count"])
        if found and _described(numbers) != had:
            numbers, xs, ys = samples.numbered(most=had["count"])
            progress = progress if len(xs) == had["count"] else None
        self._examples = _described(numbers)
        return progress, xs, ys

    def _found(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Progress, dict[str, Any]] | None:
        try:
            job, progress, examples = _unpacked(self._path.read_bytes(), shapes)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _say(f"checkpoint not used: {error}")
            return None
        return (progress, examples) if job == self._job else None

    def on_step(self, progress: Callable[[], Progress]) -> None:
        """Keep where a training stands, if it is time to. A disk that refuses does not end it."""
        if self._clock.monotonic() < self._due_s:
            return
        parts = _packed(self._job, progress(), self._examples)
        try:
            files.write(self._path, *parts)
            self._failpoints.reach("checkpoint")
        except StoreError as error:
            _say(f"checkpoint not kept: {error}")
        fair_s = sum(len(part) for part in parts) / FLASH_BYTES_PER_S
        pause_s = max(self._every_s, fair_s) if self._every_s else 0.0
        self._due_s = self._clock.monotonic() + pause_s


def _described(numbers: NDArray[np.uint64]) -> dict[str, Any]:
    """Return which examples a training has: how many, the last, and a checksum of their numbers."""
    last = int(numbers.max()) if len(numbers) else 0
    return {"count": len(numbers), "last": last, "crc": zlib.crc32(numbers.tobytes())}


def job_id(fields: Mapping[str, Any]) -> str:
    """Return what stands for a job: the same fields, the same id."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _packed(job: str, progress: Progress, examples: dict[str, Any]) -> tuple[bytes, ...]:
    fields = {
        "job": job,
        "examples": examples,
        "steps": progress.steps,
        "seen": progress.seen,
        "loss": progress.loss,
        "seconds": progress.seconds,
        "at": progress.at,
        "shuffle": progress.shuffle,
        "shapes": [list(value.shape) for value in progress.state],
    }
    meta = json.dumps(fields).encode()
    parts = [meta, *(value.astype("<f4").tobytes() for value in progress.state)]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return (_HEAD.pack(_MAGIC, len(meta), crc), *parts)


def _unpacked(
    data: bytes, shapes: Sequence[tuple[int, ...]]
) -> tuple[str, Progress, dict[str, Any]]:
    if len(data) < _HEAD.size:
        raise ValueError(f"expected at least {_HEAD.size} bytes, got {len(data)}")
    magic, size, crc = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    if magic != _MAGIC or size > min(_MOST_JSON, len(body)) or zlib.crc32(body) != crc:
        raise ValueError("it is no checkpoint, or damaged")
    fields = json.loads(bytes(body[:size]))
    if [tuple(shape) for shape in fields["shapes"]] != list(shapes):
        raise ValueError("it is of another model")
    state, at = list[Array](), size
    for shape in shapes:
        value = np.frombuffer(body, "<f4", int(np.prod(shape, dtype=np.int64)), at)
        state.append(value.astype(np.float32).reshape(shape))
        at += value.nbytes
    progress = Progress(
        steps=int(fields["steps"]),
        seen=int(fields["seen"]),
        loss=float(fields["loss"]),
        seconds=float(fields["seconds"]),
        at=int(fields["at"]),
        shuffle=fields["shuffle"],
        state=state,
    )
    return fields["job"], progress, fields["examples"]


def _say(line: str) -> None:
    """Tell whoever reads the training process's noise."""
    sys.stderr.write(line + "\n")
