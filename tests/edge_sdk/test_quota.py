# SPDX-License-Identifier: Apache-2.0
"""A device stays within its share of the disk; without room it answers on, and trains no more."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from device_scene import Clock, Scene
from hand_bundles import examples, mlp
from scripted_coordinator import weights_of

from edge_sdk.errors import StoreError
from edge_sdk.limits import Limits
from edge_sdk.outbox import STALE_ROUNDS, Entry, Outbox
from edge_sdk.quota import LEFT_TO_OTHERS, Quota

BUNDLE = mlp()
X, _ = examples(40)


def filled(folder: Path) -> Path:
    (folder / "why").mkdir()
    for name in ("why/1.jsonl", "why/2.jsonl", "model.json.damaged", "outbox.update"):
        (folder / name).write_bytes(b"x" * 1000)
    return folder


def test_all_files_count_and_a_ring_as_large_as_it_will_be(tmp_path: Path) -> None:
    quota = Quota(filled(tmp_path), 10_000)
    assert (quota.used, quota.left) == (4000, 6000)
    quota.speak_for(tmp_path / "ring", 5000)
    assert quota.left == 1000
    (tmp_path / "ring").write_bytes(b"x" * 2000)
    assert quota.left == 1000
    (tmp_path / "ring").write_bytes(b"x" * 5500)
    assert quota.left == 500


def test_what_nobody_needs_goes_first_and_no_more_of_it_than_must(tmp_path: Path) -> None:
    quota = Quota(filled(tmp_path), 5000)
    quota.make_room(1000)
    assert quota.used == 4000
    quota.make_room(2000)
    assert not (tmp_path / "model.json.damaged").exists()
    assert (tmp_path / "why" / "1.jsonl").exists()
    quota.make_room(3000)
    assert [page.name for page in (tmp_path / "why").iterdir()] == ["2.jsonl"]
    with pytest.raises(StoreError, match=r"room for 3001 bytes .* there is room for 3000; free"):
        quota.make_room(3001)
    assert (tmp_path / "outbox.update").exists()


def test_some_of_the_file_system_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = SimpleNamespace(f_bavail=100, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    assert Quota(tmp_path).left == 409_600 - LEFT_TO_OTHERS
    assert Quota(tmp_path, is_real=False).left == float("inf")


def test_updates_that_are_stale_for_certain_go_first_then_the_oldest(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, cap_bytes=5000)

    def put(name: int, round_: int, size: int = 1000) -> tuple[bytes, ...]:
        return outbox.append(Entry(bytes([name]) * 16, round_, b"f" * size))

    put(1, 400)  # of a coordinator that was set back to an earlier state
    put(2, 100)
    put(3, 350)
    assert put(4, 100 + STALE_ROUNDS) == (b"\2" * 16,)  # though there was room
    assert put(5, 360) == ()
    assert put(6, 361) == (b"\1" * 16,)
    assert [w.round for w in outbox] == [350, 356, 360, 361]


def test_an_update_for_which_the_disk_has_no_room_is_refused_whole(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, quota=Quota(tmp_path, 1000))
    outbox.append(Entry(b"1" * 16, 1, b"f" * 500))
    with pytest.raises(StoreError, match="max_disk_bytes"):
        outbox.append(Entry(b"2" * 16, 2, b"f" * 500))
    assert len(outbox) == len(list(tmp_path.iterdir())) == 1


def test_examples_take_half_of_what_is_allowed_at_the_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Scene(tmp_path, BUNDLE).device(limits=Limits(max_disk_bytes=40_000)) as device:
        device.learn_many(*examples(1000))
        assert device.examples == 20_000 // (16 + 24 + 8)
        assert "max_disk_bytes has no room for more" in caplog.text
        assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 40_000


def test_a_device_without_room_sits_out_answers_and_comes_back_by_itself(tmp_path: Path) -> None:
    scene, clock = Scene(tmp_path, BUNDLE), Clock()
    coordinator = scene.coordinator
    with scene.device(clock=clock, limits=Limits(max_disk_bytes=300_000)) as device:
        scene.ready(device)
        (tmp_path / "somebody.elses").write_bytes(b"x" * 280_000)
        clock.now += 20
        device._agent.poke()
        scene.until(lambda: not scene.is_ready())
        assert device.status()["conditions_lapsed"] == ["disk"]
        assert np.isfinite(device.predict(X)).all()
        (tmp_path / "somebody.elses").write_bytes(b"x" * 299_000)
        coordinator.publish_model(1, weights_of(BUNDLE, 0.5))
        scene.until(lambda: device._agent._session.fetch_retry.at > clock.now)
        assert device.version == 0
        (tmp_path / "somebody.elses").unlink()
        clock.now += 20
        device._agent.poke()
        scene.until(lambda: device.version == 1)
        scene.until(scene.is_ready)
        coordinator.invite(device.id)
        scene.until(lambda: device.status()["receipts"] == {"counted": 1})
