# SPDX-License-Identifier: Apache-2.0
"""Deltas to bytes and back: stages chained to a codec, all of which write one lattice format.

c = codec.ef(codec.chain(codec.deadzone(2.0)))
state = c.init(shapes, seed=device_seed)
blob, pending = c.encode(delta, state)
state = c.commit(pending, accepted=True)
"""

from __future__ import annotations

from edge_sdk.codec.body import Lattice, decode, lattice, norm
from edge_sdk.codec.chain import BiasedCodec, Codec, Pending, chain, ef
from edge_sdk.codec.presets import PRESETS, from_spec, preset
from edge_sdk.codec.residual import State
from edge_sdk.codec.stages import (
    Stage,
    deadzone,
    dense,
    grid,
    int8,
    rotate,
    sign1,
    stochastic,
    top_k,
)

__all__ = [
    "PRESETS",
    "BiasedCodec",
    "Codec",
    "Lattice",
    "Pending",
    "Stage",
    "State",
    "chain",
    "deadzone",
    "decode",
    "dense",
    "ef",
    "from_spec",
    "grid",
    "int8",
    "lattice",
    "norm",
    "preset",
    "rotate",
    "sign1",
    "stochastic",
    "top_k",
]
