# SPDX-License-Identifier: Apache-2.0
"""What a codec remembers between updates: the residual, and how it is kept across a restart.

A residual is raw local information: whoever stores it keeps it on the device, readable by its owner
only.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import NamedTuple

import numpy as np

from edge_sdk import params
from edge_sdk.codec.body import Lattice, scaled
from edge_sdk.errors import CodecError
from edge_sdk.types import Array, Shapes

MAGIC = b"FDGR"
VERSION = 1
HEAD = struct.Struct("<4sHHqQ16sI")  # magic, version, has residual, seed, count, shapes, crc


class State(NamedTuple):
    """What a codec keeps for one model: shapes, seed, updates so far, and the residual if any."""

    shapes: Shapes
    seed: int
    updates: int
    residual: Array | None  # flat float32


def none(shapes: Shapes) -> Array:
    """Return the residual of a device that has sent nothing yet."""
    return np.zeros(params.count(shapes), np.float32)


def rest(flat: Array, sent: Lattice) -> Array:
    """Return what `sent` left of `flat`; exact in float32 wherever rounding alone made the gap."""
    left = flat.copy()
    where = slice(None) if sent.positions is None else sent.positions
    left[where] -= scaled(sent)
    return left


def dump(state: State) -> bytes:
    """Return a state as bytes, for storage on the device."""
    raw = b"" if state.residual is None else state.residual.astype("<f4").tobytes()
    crc = zlib.crc32(raw)
    has = int(state.residual is not None)
    return HEAD.pack(MAGIC, VERSION, has, state.seed, state.updates, _of(state.shapes), crc) + raw


def load(data: bytes, shapes: Shapes, *, feedback: bool) -> State:
    """Return the state that `dump` wrote, for a model of these shapes.

    A residual of other shapes, or one that the codec has no use for, is dropped; the seed and the
    count of updates stay. Raises: CodecError when the bytes are damaged.
    """
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise CodecError("expected a stored residual, got other bytes; delete it to start anew")
    _, version, has, seed, count, digest, crc = HEAD.unpack_from(data)
    raw = data[HEAD.size :]
    if version != VERSION or has > 1 or zlib.crc32(raw) != crc or len(raw) % 4:
        raise CodecError("expected an undamaged residual of version 1; delete it to start anew")
    fresh = State(dict(shapes), seed, count, none(shapes) if feedback else None)
    if not (feedback and has and digest == _of(shapes) and len(raw) == 4 * params.count(shapes)):
        return fresh
    return fresh._replace(residual=np.frombuffer(raw, "<f4").astype(np.float32))


def _of(shapes: Shapes) -> bytes:
    text = json.dumps([[name, list(shape)] for name, shape in shapes.items()])
    return hashlib.sha256(text.encode()).digest()[:16]
