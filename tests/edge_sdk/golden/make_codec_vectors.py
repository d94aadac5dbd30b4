# SPDX-License-Identifier: Apache-2.0
"""Writes codec.json: update bodies and the lattices that every machine must read from them.

Run it only for a new body version; the vectors of an old version are never changed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edge_sdk.codec import PRESETS, Lattice, body, from_spec, lattice, positions, symbols
from edge_sdk.codec.bits import deflate, pack_flags, pack_rice

SHAPES = {"conv": (4, 3, 3, 3), "empty": (0, 2), "w": (20, 33), "b": (20,)}
COUNT = 788


def coded(coding: int, where: bytes, q: np.ndarray) -> bytes:
    """Return a lattice body with this coding of positions."""
    levels = symbols.pack(np.abs(q).astype(np.int64) - 1)
    head = body.HEAD.pack(1, body.LATTICE, COUNT)
    head += body.LATTICE_HEAD.pack(0x3B12, q.size, coding, len(where), len(levels))
    return head + where + levels + pack_flags(q < 0)


def bodies() -> dict[str, bytes]:
    """Return a body of each kind and each coding of positions."""
    rng = np.random.default_rng(0)
    live = np.zeros(COUNT, np.bool_)
    live[108:768].reshape(20, 33)[::2, ::3] = True
    found = np.flatnonzero(live & (rng.random(COUNT) < 0.7))
    q = (rng.integers(1, 300, found.size) * rng.choice([-1, 1], found.size)).astype(np.int32)
    gaps = np.diff(found, prepend=-1) - 1
    table = positions.rows.pack(positions.rows.tabulate(found, SHAPES))
    made = {
        "rice": coded(positions.RICE, pack_rice(gaps, 2), q),
        "gaps": coded(positions.GAPS, positions._pack_gaps(gaps), q),
        "bitmap": coded(positions.BITMAP, deflate(positions._bitmap(found, COUNT)), q),
        "rows": coded(positions.ROWS, table, q),
        "nothing": body.write(Lattice(found[:0], q[:0], 1.0), SHAPES),
    }
    delta = {k: rng.standard_t(4, s).astype(np.float32) for k, s in SHAPES.items()}
    for name in PRESETS:
        c = from_spec(PRESETS[name])
        made[f"preset {name}"] = c.encode(delta, c.init(SHAPES, seed=5))[0]
    return made


def vector(name: str, blob: bytes) -> dict[str, object]:
    """Return a body beside what it means."""
    got = lattice(blob, SHAPES)
    where = None if got.positions is None else got.positions.tolist()
    return {
        "name": name,
        "body": blob.hex(),
        "positions": where,
        "q": got.q.tolist(),
        "step": float(got.step).hex(),
    }


if __name__ == "__main__":
    shapes = [[name, list(shape)] for name, shape in SHAPES.items()]
    vectors = [vector(name, blob) for name, blob in bodies().items()]
    text = json.dumps({"format": 1, "shapes": shapes, "vectors": vectors}, separators=(",", ":"))
    Path(__file__).with_name("codec.json").write_text(text.replace("},{", "},\n{") + "\n")
