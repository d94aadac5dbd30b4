# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from forward_models import cnn, mlp
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from coordinator.compiler.wire import raw_data_places
from edge_sdk.errors import CompileError


def test_every_weight_is_found_where_its_bytes_are() -> None:
    for model in (mlp(), cnn()):
        data = model.SerializeToString(deterministic=True)
        places = raw_data_places(data)
        assert set(places) == {t.name for t in model.graph.initializer}
        for tensor in model.graph.initializer:
            at, size = places[tensor.name]
            assert data[at : at + size] == tensor.raw_data


def test_a_patched_place_changes_that_weight_alone() -> None:
    model = mlp()
    data = bytearray(model.SerializeToString(deterministic=True))
    at, size = raw_data_places(bytes(data))["head.bias"]
    data[at : at + size] = np.arange(3, dtype="<f4").tobytes()
    made = type(model).FromString(bytes(data))
    for before, after in zip(model.graph.initializer, made.graph.initializer, strict=True):
        assert (before == after) == (before.name != "head.bias")
    new = next(t for t in made.graph.initializer if t.name == "head.bias")
    np.testing.assert_array_equal(numpy_helper.to_array(new), [0, 1, 2])


@given(st.binary(max_size=200))
def test_any_bytes_are_places_inside_them_or_a_named_error(data: bytes) -> None:
    try:
        places = raw_data_places(data)
    except CompileError:
        return
    assert all(0 <= p.offset <= p.offset + p.size <= len(data) for p in places.values())


@given(st.integers(1, 500))
def test_a_model_cut_short_is_refused(cut: int) -> None:
    data = mlp().SerializeToString(deterministic=True)
    with pytest.raises(CompileError, match=r"ends? "):
        raw_data_places(data[: len(data) - 20 - cut])


def test_what_is_no_protobuf_is_refused() -> None:
    with pytest.raises(CompileError, match="wire type 7"):
        raw_data_places(b"\x07\x01\x02")
