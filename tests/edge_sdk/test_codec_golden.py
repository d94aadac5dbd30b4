# SPDX-License-Identifier: Apache-2.0
"""Bodies written once are read the same for ever, on every machine, with every numpy and zlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import codec
from edge_sdk.codec import body, hadamard
from edge_sdk.codec.steps import read_step

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "codec.json").read_text())
SHAPES = {name: tuple(shape) for name, shape in GOLDEN["shapes"]}


@pytest.mark.parametrize("vector", GOLDEN["vectors"], ids=lambda v: v["name"])
def test_a_body_means_what_it_meant_when_it_was_written(vector: dict[str, Any]) -> None:
    got = codec.lattice(bytes.fromhex(vector["body"]), SHAPES)
    where = None if got.positions is None else got.positions.tolist()
    assert where == vector["positions"]
    assert got.q.tolist() == vector["q"]
    assert got.step == float.fromhex(vector["step"])
    assert got.q.dtype == np.int32
    assert got.positions is None or got.positions.dtype == np.int64


def test_every_kind_and_coding_has_a_vector() -> None:
    bodies = [bytes.fromhex(v["body"]) for v in GOLDEN["vectors"]]
    assert {b[1] for b in bodies} == set(body.READERS)
    assert {b[12] for b in bodies if b[1] == body.LATTICE} == {0, 1, 2, 3, 4}


def test_restoring_signs_agrees_with_the_formula_written_out() -> None:
    """The second opinion: H is a matrix of +1 and -1, and D, E come from SHAKE-128."""
    import hashlib

    rng = np.random.default_rng(4)
    key, negative = rng.bytes(16), rng.random(128) < 0.5
    got = hadamard.restore(hadamard.Rotated(key, 1.0, np.array([3], np.int32), negative), 128)
    h = np.ones((1, 1), np.int64)
    for _ in range(7):
        h = np.block([[h, h], [h, -h]])
    stream = hashlib.shake_128(b"fedge-rotation-1\0" + key).digest(32)
    signs = 1 - 2 * np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little").astype(int)
    expected = (
        signs[:128] * (h @ (signs[128:] * (h @ np.where(negative, -1, 1)))) * 3 * (4096 // 128)
    )
    np.testing.assert_array_equal(got, expected)


def test_a_step_is_the_upper_half_of_a_float32() -> None:
    assert read_step(0x3F80) == 1.0
    assert read_step(0x3B12) == np.frombuffer(b"\0\0\x12\x3b", "<f4")[0]
