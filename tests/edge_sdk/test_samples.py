# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import StoreError
from edge_sdk.samples import Samples

RECORD = 16 + 12 + 8
HEADER = 4096


def ring(path: Path, capacity: int = 5, **change: Any) -> Samples:
    layout = {"x_shape": (3,), "x_dtype": "float32", "y_shape": (), "y_dtype": "int64"}
    return Samples(path, **{**layout, "capacity": capacity, **change})


def labels(samples: Samples) -> list[int]:
    return samples.arrays()[1].tolist()


def fill(samples: Samples, *numbers: int) -> None:
    for n in numbers:
        samples.append(np.full(3, n, np.float32), n)


def test_examples_come_back_as_they_went_in_oldest_first(tmp_path: Path) -> None:
    with ring(tmp_path / "s") as samples:
        fill(samples, 1, 2, 3)
        x, y = samples.arrays()
    np.testing.assert_array_equal(x, np.float32([[1] * 3, [2] * 3, [3] * 3]))
    assert (x.dtype, y.dtype, y.tolist()) == (np.float32, np.int64, [1, 2, 3])


def test_the_oldest_make_room_and_the_file_stops_growing(tmp_path: Path) -> None:
    with ring(tmp_path / "s") as samples:
        fill(samples, *range(1, 13))
        assert labels(samples) == [8, 9, 10, 11, 12]
        assert (len(samples), samples.total) == (5, 12)
    assert (tmp_path / "s").stat().st_size == HEADER + 5 * RECORD


def test_a_ring_goes_on_where_it_was_after_a_restart(tmp_path: Path) -> None:
    with ring(tmp_path / "s") as samples:
        fill(samples, *range(1, 8))
    with ring(tmp_path / "s") as samples:
        fill(samples, 8)
        assert labels(samples) == [4, 5, 6, 7, 8]
        assert samples.total == 8


def test_a_batch_is_stored_with_one_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda handle: flushes.append(handle) or real(handle))
    with ring(tmp_path / "s", 100) as samples:
        samples.extend(np.zeros((40, 3)), np.arange(40))
        assert (labels(samples), len(flushes)) == (list(range(40)), 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 25), st.integers(0, 10_000))
def test_a_torn_tail_is_dropped_and_the_rest_is_whole(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, n: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("ring") / "s"
    with ring(path, capacity) as samples:
        fill(samples, *range(1, n + 1))
    size = path.stat().st_size
    end = HEADER + cut % (size - HEADER + 1)
    os.truncate(path, end)
    whole = {n for n in range(1, n + 1) if HEADER + (n % capacity + 1) * RECORD <= end}
    with ring(path, capacity) as samples:
        assert labels(samples) == sorted(whole)[-capacity:] or n > capacity
        assert set(labels(samples)) == {m for m in whole if m > n - capacity}
        fill(samples, 99)
        assert labels(samples)[-1] == 99


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5 * RECORD * 8 - 1))
def test_a_flipped_bit_costs_one_example_at_most(
    tmp_path_factory: pytest.TempPathFactory, bit: int
) -> None:
    path = tmp_path_factory.mktemp("ring") / "s"
    with ring(path) as samples:
        fill(samples, *range(1, 8))
    data = bytearray(path.read_bytes())
    data[HEADER + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with ring(path) as samples:
        assert len(samples) >= 4
        assert set(labels(samples)) <= {3, 4, 5, 6, 7}
        fill(samples, 8)
        assert labels(samples)[-1] == 8


def test_a_killed_writer_loses_at_most_the_example_in_hand(tmp_path: Path) -> None:
    script = (
        "import numpy as np, sys; from edge_sdk.samples import Samples\n"
        "s = Samples(sys.argv[1], x_shape=(1000,), x_dtype='float32', y_shape=(),"
        " y_dtype='int64', capacity=50)\n"
        "for i in range(10**9):\n"
        "    s.append(np.full(1000, i), i); print(i, flush=True)\n"
    )
    path = tmp_path / "s"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = [int(child.stdout.readline()) for _ in range(70)][-1]
        child.kill()
        acknowledged = max([acknowledged, *map(int, child.stdout.read().split("\n")[:-1])])
    with Samples.open(path) as samples:
        x, y = samples.arrays()
        assert y[-1] in {acknowledged, acknowledged + 1}
        assert y.tolist() == list(range(y[-1] - len(y) + 1, y[-1] + 1))
        assert (x == y[:, None]).all()


def test_a_reader_sees_whole_examples_while_the_owner_appends(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stop = threading.Event()
    with ring(path, 8, x_shape=(2000,)) as samples:
        samples.append(np.zeros(2000), 0)

        def write() -> None:
            n = 1
            while not stop.is_set():
                samples.append(np.full(2000, n), n)
                n += 1

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(60):
                with Samples.open(path) as reader:
                    x, y = reader.arrays()
                    assert (x == y[:, None]).all()
                    assert len(set(y.tolist())) == len(y) <= 8
        finally:
            stop.set()
            writer.join()


def test_a_second_owner_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    with ring(tmp_path / "s") as samples:
        fill(samples, 1)
        with pytest.raises(StoreError, match="another process"):
            ring(tmp_path / "s")
        with Samples.open(tmp_path / "s") as reader:
            assert labels(reader) == [1]
            with pytest.raises(StoreError, match="only its owner"):
                fill(reader, 2)
    ring(tmp_path / "s").close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x_shape": (4,)}, r"x_shape \(3,\), expected \(4,\)"),
        ({"x_dtype": "int8"}, r"x_dtype <f4, expected \|i1"),
        ({"y_shape": (2,)}, "y_shape"),
        ({"y_dtype": "float32"}, "y_dtype"),
    ],
    ids=str,
)
def test_examples_of_another_kind_are_a_clear_error(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    ring(tmp_path / "s").close()
    with pytest.raises(StoreError, match=said):
        ring(tmp_path / "s", **change)


@pytest.mark.parametrize("capacity", [3, 7, 20])
def test_another_capacity_keeps_the_newest_that_fit(tmp_path: Path, capacity: int) -> None:
    with ring(tmp_path / "s", 7) as samples:
        fill(samples, *range(1, 11))
    with ring(tmp_path / "s", capacity) as samples:
        assert labels(samples) == list(range(1, 11))[-min(capacity, 7) :]
        fill(samples, 11)
        assert labels(samples)[-2:] == [10, 11]
    with ring(tmp_path / "s", capacity) as samples:
        assert labels(samples)[-2:] == [10, 11]
        assert len(samples) == min(capacity, 8)


@pytest.mark.parametrize("damage", [b"", b"PK", b"\0" * 5000, b"FDGESMP1" + b"\xff" * 5000])
def test_what_is_not_ours_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "s").write_bytes(damage)
    with pytest.raises(StoreError, match="not a store of examples"):
        ring(tmp_path / "s")
    with pytest.raises(StoreError, match="cannot read"):
        Samples.open(tmp_path / "none")


def test_shapes_and_lossy_numbers_are_refused(tmp_path: Path) -> None:
    with ring(tmp_path / "s", x_dtype="int8") as samples:
        with pytest.raises(ValueError, match="x of shape"):
            samples.append(np.zeros(4), 0)
        with pytest.raises(ValueError, match="fit"):
            samples.append(np.full(3, 0.5), 0)
        with pytest.raises(ValueError, match="fit"):
            samples.append(np.full(3, 300), 0)
        with pytest.raises(ValueError, match="as many labels"):
            samples.extend(np.zeros((2, 3)), [1])
        assert len(samples) == 0
    for bad in ({"capacity": 0}, {"x_dtype": "object"}, {"x_shape": (1 << 30,)}):
        with pytest.raises(StoreError, match="expected"):
            ring(tmp_path / "t", **bad)


def test_a_full_disk_is_a_store_error_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ring(tmp_path / "s") as samples:
        fill(samples, 1, 2)

        def full(handle: int, data: bytes, at: int) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(StoreError, match="No space left on device; free"):
                fill(samples, 3)
            patch.setattr(os, "pwrite", lambda _handle, data, _at: len(data) - 1)
            with pytest.raises(StoreError, match="no space"):
                fill(samples, 3)
        fill(samples, 4)
        assert labels(samples) == [1, 2, 4]


def test_examples_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    ring(tmp_path / "s").close()
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_big_examples_take_several_blocks(tmp_path: Path) -> None:
    with ring(tmp_path / "s", 7, x_shape=(50_000,)) as samples:
        for n in range(10):
            samples.append(np.full(50_000, n), n)
        x, y = samples.arrays()
        assert y.tolist() == [3, 4, 5, 6, 7, 8, 9]
        assert (x == y[:, None]).all()
