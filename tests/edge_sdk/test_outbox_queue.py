# SPDX-License-Identifier: Apache-2.0
"""The outbox keeps what it took until told otherwise, through any damage to its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edge_sdk import files
from edge_sdk.errors import StoreError
from edge_sdk.outbox import Entry, Outbox


def entry(number: int, size: int = 100) -> Entry:
    frame = bytes([number]) * size
    return Entry(hashlib.sha256(frame).digest()[:16], number, frame, b"yes%d" % number, b"no")


def test_what_is_appended_survives_a_restart_in_order_with_its_residuals(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    for number in (3, 1, 2):
        assert box.append(entry(number)) == ()
    again = Outbox(tmp_path)
    assert [waiting.round for waiting in again] == [3, 1, 2]
    assert again.entry(entry(1).update) == entry(1)
    assert again.size_bytes == box.size_bytes


def test_a_settled_update_is_gone_for_good_and_its_name_is_not_used_again(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.append(entry(1))
    box.append(entry(2))
    box.remove(entry(1).update)
    box.remove(entry(1).update)
    assert box.entry(entry(1).update) is None
    again = Outbox(tmp_path)
    again.append(entry(3))
    assert [waiting.round for waiting in again] == [2, 3]


def test_the_same_update_is_kept_once(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.append(entry(1))
    box.append(entry(1))
    assert len(box) == 1


def test_over_the_cap_the_oldest_goes(tmp_path: Path) -> None:
    box = Outbox(tmp_path, cap_bytes=500)
    for number in range(1, 4):
        box.append(entry(number))
    dropped = box.append(entry(4))
    assert dropped == (entry(1).update,)
    assert box.size_bytes <= 500
    assert [waiting.round for waiting in Outbox(tmp_path)] == [2, 3, 4]


def test_an_update_larger_than_the_cap_is_refused_and_nothing_is_dropped(tmp_path: Path) -> None:
    box = Outbox(tmp_path, cap_bytes=300)
    box.append(entry(1))
    with pytest.raises(StoreError, match="at most 300 bytes"):
        box.append(entry(2, size=400))
    assert len(box) == 1


def test_a_torn_or_flipped_file_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    for number in (1, 2, 3):
        box.append(entry(number))
    first, second, _ = sorted(tmp_path.glob("*.update"))
    first.write_bytes(first.read_bytes()[:-30])
    flipped = bytearray(second.read_bytes())
    flipped[60] ^= 1
    second.write_bytes(flipped)
    assert [waiting.round for waiting in Outbox(tmp_path)] == [3]
    assert len(list(tmp_path.iterdir())) == 1


def test_any_truncation_is_noticed(tmp_path: Path) -> None:
    Outbox(tmp_path).append(entry(1))
    (path,) = tmp_path.glob("*.update")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert len(Outbox(tmp_path)) == 0


def test_damage_while_running_is_noticed_when_the_update_is_read(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.append(entry(1))
    (path,) = tmp_path.glob("*.update")
    path.write_bytes(b"")
    assert box.entry(entry(1).update) is None
    assert len(box) == 0


def test_a_full_disk_is_a_store_error_and_the_queue_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox(tmp_path)
    box.append(entry(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(StoreError, match="No space left"):
        box.append(entry(2))
    monkeypatch.undo()
    assert [waiting.round for waiting in box] == [1]
    assert [waiting.round for waiting in Outbox(tmp_path)] == [1]
