# SPDX-License-Identifier: Apache-2.0
"""A residual outlives a restart, and nothing of it outlives the model that it belongs to."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk import codec
from edge_sdk.errors import CodecError
from edge_sdk.types import Shapes

SHAPES: Shapes = {"w": (20, 10), "b": (10,)}


def after_one_update() -> tuple[codec.Codec, codec.State]:
    c = codec.preset("default")
    rng = np.random.default_rng(0)
    delta = {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
    return c, c.commit(c.encode(delta, c.init(SHAPES, seed=2**60 + 7))[1])


def test_a_state_is_the_same_after_a_restart() -> None:
    c, state = after_one_update()
    again = c.load(c.dump(state), SHAPES)
    np.testing.assert_array_equal(again.residual, state.residual)
    assert again._replace(residual=None) == state._replace(residual=None)
    delta = {k: np.ones(s, np.float32) for k, s in SHAPES.items()}
    assert c.encode(delta, again)[0] == c.encode(delta, state)[0]


@pytest.mark.parametrize(
    "shapes",
    [
        {"w": (10, 20), "b": (10,)},
        {"b": (10,), "w": (20, 10)},
        {"w2": (20, 10), "b": (10,)},
        {"w": (3,)},
    ],
    ids=str,
)
def test_a_residual_is_dropped_when_the_model_changes(shapes: Shapes) -> None:
    c, state = after_one_update()
    again = c.load(c.dump(state), shapes)
    assert again.residual is not None
    assert not again.residual.any()
    assert again.shapes == shapes
    assert (again.seed, again.updates) == (state.seed, state.updates)


def test_any_integer_is_a_seed() -> None:
    c = codec.preset("stateless")
    for seed in (-1, 0, 2**200):
        state = c.init(SHAPES, seed=seed)
        assert c.load(c.dump(state), SHAPES) == state


def test_a_codec_without_feedback_takes_over_the_count_and_no_residual() -> None:
    c, state = after_one_update()
    again = codec.preset("stateless").load(c.dump(state), SHAPES)
    assert again.residual is None
    assert again.updates == 1
    back = c.load(codec.preset("stateless").dump(again), SHAPES)
    assert back.residual is not None
    assert not back.residual.any()


@pytest.mark.parametrize("at", [0, 4, 6, -1])
def test_a_damaged_residual_is_refused(at: int) -> None:
    c, state = after_one_update()
    data = bytearray(c.dump(state))
    data[at] ^= 0x41
    for damaged in (bytes(data), bytes(data)[:-1], b""):
        with pytest.raises(CodecError, match="delete it to start anew"):
            c.load(damaged, SHAPES)
