# SPDX-License-Identifier: Apache-2.0
"""Constants told apart: every reader sees the same model, and the way back is exact."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tflite_models as made
from ai_edge_litert import schema_py_generated as schema
from tflite_oracle import compare, pack

from coordinator.compiler import build
from coordinator.compiler.tflite.unshare import restored, unshared
from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import TfliteFile, read

FOLDER = Path(__file__).with_name("models")
FILES = ["cnn_1d_int8", "lstm_float", "signatures", "text_dynamic", "tied_int8"]


def constants(file: TfliteFile) -> list[tuple[int, int]]:
    return [
        (s, t)
        for s, graph in enumerate(file.subgraphs)
        for t, tensor in enumerate(graph.tensors)
        if file.buffers[tensor.buffer].size
    ]


def test_no_tensors_no_change() -> None:
    data = made.twins_int8()
    assert unshared(data, []) == data
    assert restored(data) == data


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_tensors_get_bytes_of_their_own_and_the_way_back_is_exact(name: str, seed: int) -> None:
    data = (FOLDER / f"{name}.tflite").read_bytes()
    file = read(data)
    every = constants(file)
    rng = np.random.default_rng(seed)
    chosen = [every[i] for i in rng.permutation(len(every))[: 1 + seed * 5]]
    apart = unshared(data, chosen)
    assert restored(apart) == data
    found = read(apart)
    compare(apart, found)  # with LiteRT's own schema
    for s, t in every:
        before, after = (f.subgraphs[s].tensors[t] for f in (file, found))
        assert bytes(found.data(after.buffer)) == bytes(file.data(before.buffer))
        assert (after.name, after.shape, after.axis) == (before.name, before.shape, before.axis)
        if (s, t) in chosen:
            assert found.users(after.buffer) == ((s, t),)
            assert found.buffers[after.buffer].offset % 16 == 0
    assert len(apart) - len(data) < 1024 + 8 * len(file.buffers) + sum(
        found.buffers[found.subgraphs[s].tensors[t].buffer].size + 128 for s, t in chosen
    )


def test_litert_says_the_same() -> None:
    data = made.branches_int8()
    apart = unshared(data, constants(read(data)))
    x = np.random.default_rng(0).integers(-128, 128, (5, 8, 8, 1)).astype(np.int8)
    np.testing.assert_array_equal(made.litert(apart, x), made.litert(data, x))


def test_constants_behind_the_tables_are_refused() -> None:
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(made.twins_int8(), 0))
    kept = bytes(model.buffers[1].data)
    model.buffers[1].data, model.buffers[1].offset, model.buffers[1].size = None, 2**16, len(kept)
    data = pack(model)
    data = data.ljust(2**16, b"\0") + kept
    assert read(data).buffers[1].size == len(kept)
    with pytest.raises(CompileError, match="some lie behind them"):
        unshared(data, constants(read(data))[:1])


def test_one_table_that_is_two_tensors_is_refused() -> None:
    data = bytearray(made.twins_int8())
    first, second = (tensor_at(data, name) for name in ("w0", "w1"))
    struct.pack_into("<I", data, second, follow(data, first) - second)
    names = [t.name for t in read(made.twins_int8()).subgraphs[0].tensors]
    with pytest.raises(CompileError, match="'w0' to be listed once"):
        unshared(bytes(data), [(0, names.index("w0"))])


def test_scales_that_two_weights_share_are_refused_by_name() -> None:
    data = bytearray(made.twins_int8())
    places = [field(data, follow(data, tensor_at(data, name)), 4) for name in ("w0", "w1")]
    target = max(follow(data, at) for at in places)
    for at in places:
        struct.pack_into("<I", data, at, target - at)
    with pytest.raises(CompileError, match="scales of their own for 'w0', 'w1'"):
        build(bytes(data), loss="cross_entropy", train=["w1"])
    build(bytes(data), loss="cross_entropy", train=["w2"])


def field(data: bytearray, table: int, slot: int) -> int:
    """Return where a table's field stands."""
    slots = table - struct.unpack_from("<i", data, table)[0]
    return int(table + struct.unpack_from("<H", data, slots + 4 + 2 * slot)[0])


def follow(data: bytearray, at: int) -> int:
    return int(at + struct.unpack_from("<I", data, at)[0])


def tensor_at(data: bytearray, name: str) -> int:
    """Return where the list of tensors refers to one."""
    graph = follow(data, follow(data, field(data, follow(data, 0), 2)) + 4)
    names = [t.name for t in read(bytes(data)).subgraphs[0].tensors]
    return follow(data, field(data, graph, 0)) + 4 + 4 * names.index(name)
