# SPDX-License-Identifier: Apache-2.0
"""A download that was cut off goes on where it was: hardly a byte comes twice."""

from __future__ import annotations

import hashlib
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand_bundles import mlp
from scripted_coordinator import TASK, FakeTraining, Scripted, until, weights_of

from edge_sdk import chunks, fetching, topics
from edge_sdk.device import Device
from edge_sdk.errors import MessageError
from edge_sdk.limits import Limits
from edge_sdk.messages import Part
from edge_sdk.partial import Partial
from edge_sdk.transport.memory import MemoryBroker

BUNDLE = mlp((40, 30, 10))
WEIGHTS = weights_of(BUNDLE, 0.25)
DIGEST = hashlib.sha256(WEIGHTS).digest()


class Scene:
    """A device whose link is cut once so many bytes of a model have come."""

    def __init__(self, folder: Path) -> None:
        self.broker = MemoryBroker(self.fate)
        self.coordinator = Scripted(self.broker.transport("coordinator"), BUNDLE)
        self.coordinator.start()
        self.folder = folder
        self.came: list[str] = []
        self.bytes, self.cut_at = 0, 0

    def fate(self, client: str, topic: str, payload: bytes) -> int:
        if "/model/" not in topic or client == "coordinator":
            return 1
        if self.cut_at and self.bytes + len(payload) > self.cut_at:
            self.cut_at = 0
            self.broker.cut(client)
            return 0  # it was on the way
        self.came.append(topic)
        self.bytes += len(payload)
        return 1

    def device(self, **options: Any) -> Device:
        options = {"bundle": BUNDLE, "trainer": FakeTraining()} | options
        return Device("m", task=TASK, state=self.folder, connect=self.broker.transport, **options)

    def publish(self, version: int = 1) -> int:
        """Retain the model in small parts; return the bytes of all of them."""
        self.coordinator.publish_model(version, WEIGHTS)
        self.broker.pump()
        kinds = ("/model/w/",)
        held = self.broker.retained.items()
        return sum(len(frame) for topic, frame in held if any(k in topic for k in kinds))

    def lose(self, device: str) -> None:
        """Let the broker forget what it holds for a device, as one does that has no sessions."""
        self.broker._sessions[device].waiting.clear()

    def until(self, claim: Callable[[], object]) -> None:
        until(claim, self.broker)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "state")


def test_this_model_has_many_parts(scene: Scene) -> None:
    assert scene.publish() > 6000
    assert len(chunks.parts("weights", WEIGHTS, DIGEST, 1, 700)) > 10


@pytest.mark.parametrize("keeps", [True, False], ids=["queue kept", "queue lost"])
def test_after_a_cut_in_mid_download_only_what_is_missing_comes(scene: Scene, keeps: bool) -> None:
    whole = scene.publish()
    scene.cut_at = whole // 2
    with scene.device() as device:
        scene.until(lambda: not scene.cut_at and not device.online)
        scene.until(lambda: not device._agent._fetching._asked)
        if not keeps:
            scene.lose(device.id)
        before = scene.bytes
        scene.broker.restore(device.id)
        scene.until(lambda: device.version == 1)
        assert before <= whole // 2
        assert scene.bytes - before <= 0.6 * whole
        assert scene.bytes <= whole  # not one part came twice
        assert sorted(set(scene.came)) == sorted(scene.came)
        assert not (scene.folder / "download").exists() or not any(
            (scene.folder / "download").iterdir()
        )
        filters = scene.broker._sessions[device.id].filters
        assert not any("/model/" in one for one in filters)


@pytest.mark.parametrize("keeps", [True, False], ids=["queue kept", "queue lost"])
def test_a_restart_in_mid_download_goes_on_from_disk(scene: Scene, keeps: bool) -> None:
    whole = scene.publish()
    scene.cut_at = whole // 2
    with scene.device(coordinator_key=scene.coordinator.key.public) as device:
        scene.until(lambda: not scene.cut_at and not device.online)
    if not keeps:
        scene.lose(device.id)
    with scene.device(coordinator_key=scene.coordinator.key.public) as device:
        scene.until(lambda: device.version == 1)
    assert scene.bytes <= whole


def test_many_cuts_cost_no_more_than_one(scene: Scene) -> None:
    whole = scene.publish()
    with scene.device() as device:
        for share in (0.2, 0.4, 0.6, 0.8):
            scene.cut_at = int(share * whole)
            scene.until(lambda: not scene.cut_at and not device.online)
            scene.until(lambda: not device._agent._fetching._asked)
            scene.lose(device.id)
            scene.broker.restore(device.id)
        scene.until(lambda: device.version == 1)
    assert scene.bytes <= whole


def test_a_bundle_and_patches_go_on_as_weights_do(scene: Scene) -> None:
    parts = chunks.parts("bundle", BUNDLE.data, bytes.fromhex(BUNDLE.digest), 0, 2000)
    for cut in (3, len(parts) - 1):
        scene.publish()
        before, scene.bytes, scene.came = scene.bytes, 0, []
        scene.cut_at = 2000 * cut
        with scene.device(bundle=None) as device:
            scene.until(lambda: not scene.cut_at and not device.online)
            scene.until(lambda: not device._agent._fetching._asked)
            scene.broker.restore(device.id)
            scene.until(lambda: device.version == 1)
        assert len(set(scene.came)) == len(scene.came)
        assert before >= 0
        device_files = [*scene.folder.rglob("*.fedge"), *scene.folder.rglob("*.bin")]
        for file in (*device_files, scene.folder / "model.json"):
            file.unlink(missing_ok=True)


def test_what_came_of_another_version_is_let_go(scene: Scene) -> None:
    whole = scene.publish()
    scene.cut_at = whole // 2
    with scene.device() as device:
        scene.until(lambda: not scene.cut_at and not device.online)
        scene.coordinator.publish_model(2, weights_of(BUNDLE, 0.5))
        scene.until(lambda: not device._agent._fetching._asked)
        scene.lose(device.id)
        scene.broker.restore(device.id)
        scene.until(lambda: device.version == 2)
    assert not list(scene.folder.glob("download/*.parts"))


def test_parts_on_disk_that_are_damaged_are_fetched_again(scene: Scene) -> None:
    whole = scene.publish()
    scene.cut_at = whole // 2
    with scene.device() as device:
        scene.until(lambda: not scene.cut_at and not device.online)
    scene.lose(device.id)
    (kept,) = scene.folder.glob("download/*.parts")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    with scene.device() as device:
        scene.until(lambda: device.version == 1)
    assert device.model is not None
    assert device.model.weights == DIGEST.hex()


def test_parts_that_do_not_make_up_the_whole_are_not_kept(scene: Scene) -> None:
    folder = Partial(scene.folder / "download")
    parts = chunks.parts("weights", WEIGHTS, DIGEST, 1, 700)
    forged = [
        Part("weights", DIGEST, 1, p.index, p.count, p.size, bytes(len(p.body))) for p in parts
    ]
    scene.folder.mkdir()
    assert folder.save(forged[:-1])
    scene.publish()
    with scene.device() as device:
        scene.until(lambda: device._agent._session.fetch_retry.at > 0)
        assert device.version == 0
        assert not list(scene.folder.glob("download/*.parts"))


def test_a_fast_download_writes_no_part_to_disk(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[object] = []
    monkeypatch.setattr(Partial, "save", lambda _self, parts: saved.append(parts) or True)
    scene.publish()
    with scene.device() as device:
        scene.until(lambda: device.version == 1)
    assert saved == []


def test_a_slow_download_is_saved_now_and_then(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "SAVE_EVERY_S", 0.0)
    saved: list[int] = []
    real = Partial.save

    def save(self: Partial, parts: Any) -> bool:
        saved.append(len(parts))
        return real(self, parts)

    monkeypatch.setattr(Partial, "save", save)
    scene.publish()
    with scene.device() as device:
        scene.until(lambda: device.version == 1)
    assert sum(saved) > 10
    assert not list(scene.folder.glob("download/*.parts"))


def test_a_part_that_a_broker_lost_is_asked_for_by_itself(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "QUIET_S", 0.05)
    monkeypatch.setattr("edge_sdk.agent.CONDITIONS_POLL_S", 0.02)
    whole = scene.publish()
    lost = topics.part(TASK, "weights", 3)
    told = scene.fate

    def lossy(client: str, topic: str, payload: bytes) -> int:
        nonlocal lost
        if topic == lost and client != "coordinator":
            lost = ""
            return 0
        return told(client, topic, payload)

    scene.broker._fate = lossy
    with scene.device() as device:
        scene.until(lambda: device.version == 1)
    assert scene.bytes <= whole


def test_a_model_that_does_not_fit_the_day_is_not_fetched(scene: Scene) -> None:
    whole = scene.publish()
    with scene.device(limits=Limits(max_bytes_per_day=whole // 2)) as device:
        scene.until(lambda: device._agent._session.fetch_retry.at > 0)
        assert scene.came == []
        assert device.version == 0


def test_parts_are_small_and_never_more_than_a_broker_queues() -> None:
    for size in (1, 8000, 100_000, 3_000_000, 60_000_000):
        parts = chunks.parts("weights", bytes(size), bytes(32), 1)
        assert max(len(p.body) for p in parts) <= 120_000
        if size <= 25_000_000:
            assert len(parts) <= 300
        if size <= 2_000_000:
            assert max(len(p.body) for p in parts) <= 8192


def test_a_bundle_comes_as_its_zlib_stream_where_the_offer_says_so(scene: Scene) -> None:
    packed = zlib.compress(BUNDLE.data, 9)
    assert len(packed) < len(BUNDLE.data)
    scene.publish()
    for part in chunks.parts("bundle", packed, bytes.fromhex(BUNDLE.digest), 0, 2000):
        scene.coordinator.send(part, topics.part(TASK, "bundle", part.index))
    scene.coordinator.offer(bundle_packed=len(packed))
    with scene.device(bundle=None) as device:
        scene.until(lambda: device.version == 1)
        assert device._local.bundle is not None
        assert device._local.bundle.digest == BUNDLE.digest


@pytest.mark.parametrize(
    "stream",
    [
        zlib.compress(BUNDLE.data)[:-1],
        zlib.compress(BUNDLE.data) + b"x",
        zlib.compress(BUNDLE.data + b"x"),
        zlib.compress(BUNDLE.data[:-1]),
        bytes(100),
        b"",
    ],
    ids=["cut", "followed", "longer", "shorter", "damaged", "empty"],
)
def test_a_stream_that_is_not_of_the_bundles_bytes_is_refused(stream: bytes) -> None:
    with pytest.raises(MessageError, match="zlib stream"):
        fetching.unpacked(stream, len(BUNDLE.data))
    assert fetching.unpacked(zlib.compress(BUNDLE.data), len(BUNDLE.data)) == BUNDLE.data


def test_a_bomb_is_unpacked_no_further_than_the_offers_size() -> None:
    bomb = zlib.compress(bytes(256 << 20), 9)
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="of 60000 bytes"):
            fetching.unpacked(bomb, 60_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_bundle_that_says_it_is_too_large_is_refused_before_a_byte_comes(scene: Scene) -> None:
    scene.publish()
    with scene.device(bundle=None, limits=Limits(max_bundle_bytes=5000)) as device:
        scene.until(lambda: device.status()["refused"])
        assert "max_bundle_bytes=5000" in device.status()["refused"]["reason"]
        assert scene.came == []


def test_a_polite_stop_in_mid_download_keeps_what_had_come(scene: Scene) -> None:
    whole = scene.publish()
    with scene.device(coordinator_key=scene.coordinator.key.public) as device:
        scene.until(lambda: device.online)

        def is_half_here() -> bool:
            while scene.broker._tasks and scene.bytes < whole // 2:
                scene.broker._tasks.popleft()()
            return scene.bytes >= whole // 2

        until(is_half_here)  # and no further
    scene.lose(device.id)
    with scene.device(coordinator_key=scene.coordinator.key.public) as device:
        scene.until(lambda: device.version == 1)
    assert scene.bytes <= whole
