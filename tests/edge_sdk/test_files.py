# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from edge_sdk import files
from edge_sdk.errors import StoreError


def test_a_file_is_replaced_whole_from_several_parts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, b"old")
    files.write(path, b"new", bytearray(b" and "), memoryview(b"whole"))
    assert path.read_bytes() == b"new and whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_is_private_unless_asked(tmp_path: Path) -> None:
    files.write(tmp_path / "key", b"")
    files.write(tmp_path / "open", b"", mode=0o644)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a"
    files.write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "replace":
        monkeypatch.setattr(Path, call, full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreError, match=r"cannot write .*/a: No space left on device; free"):
        files.write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_bytes_and_names_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        story.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def renamed(source: Path, target: Path) -> Path:
        story.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    files.write(tmp_path / "a", b"x")
    assert story == ["file", "rename", "folder"]


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
    files.write(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_remove_is_content_when_there_is_nothing(tmp_path: Path) -> None:
    files.write(tmp_path / "a", b"x")
    files.remove(tmp_path / "a")
    files.remove(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="cannot remove"):
        files.remove(tmp_path)


def test_sweep_takes_what_a_killed_write_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.123-456.tmp").write_bytes(b"half")
    (tmp_path / "kept.tmp").write_bytes(b"mine")
    files.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.tmp"]


def test_a_folder_is_made_private_with_its_parents(tmp_path: Path) -> None:
    made = files.folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert files.folder(made) == made
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot make folder"):
        files.folder(tmp_path / "file")


def test_threads_that_write_the_same_file_leave_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "a"
    texts = [bytes([i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=files.write, args=(path, t)) for t in texts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert path.read_bytes() in texts
    assert len(list(tmp_path.iterdir())) == 1
