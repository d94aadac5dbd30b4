# SPDX-License-Identifier: Apache-2.0
"""A device on a bad network and on a full disk: nothing is lost, nothing counted twice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from device_scene import Clock, Scene
from hand_bundles import examples, mlp
from scripted_coordinator import TASK, FakeTraining, Scripted, weights_of

from edge_sdk import files
from edge_sdk.device import Device
from edge_sdk.errors import StoreError
from edge_sdk.transport.memory import MemoryBroker

BUNDLE = mlp(quantized=True)
X, Y = examples(40)


def fill(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, BUNDLE)


@pytest.mark.parametrize("seed", range(12))
def test_on_a_network_that_loses_and_doubles_each_update_is_settled_and_counted_once(
    tmp_path: Path, seed: int
) -> None:
    rng, clock = np.random.default_rng(seed), Clock()
    calm = [False]

    def fate(_client: str, topic: str, _payload: bytes) -> int:
        return 1 if calm[0] or "status" in topic else int(rng.choice([0, 1, 1, 2]))

    broker = MemoryBroker(fate)
    coordinator = Scripted(broker.transport("coordinator"), BUNDLE)
    coordinator.start()
    training = FakeTraining()
    device = Device(
        "memory",
        task=TASK,
        state=tmp_path,
        bundle=BUNDLE,
        connect=broker.transport,
        trainer=training,
        clock=clock,
    )
    device.learn_many(X, Y)
    device._agent.begin()

    def live(claim: Callable[[], object], steps: int = 400) -> None:
        pause = threading.Event()
        for _ in range(steps):
            for _ in range(20):
                broker.pump()
                device._agent.turn(0)
            if claim():
                return
            clock.now += float(rng.uniform(0, 30))
            if not calm[0] and rng.random() < 0.1:
                broker.cut(device.id)
            elif rng.random() < 0.5:
                broker.restore(device.id)
            pause.wait(0.0005)
        pytest.fail("it did not come true")

    for version in range(1, 6):
        coordinator.publish_model(version, weights_of(BUNDLE, 0.01 * version))
        coordinator.invite(device.id)
        live(lambda: rng.random() < 0.3)
    calm[0] = True
    coordinator.publish_model(9, weights_of(BUNDLE, 0.5))
    live(lambda: device.version == 9 and device.online)
    coordinator.call += 1
    coordinator.offer()
    live(lambda: coordinator.checkins and coordinator.checkins[-1].call == 2)
    live(lambda: coordinator.checkins[-1].ready and device.state == "idle")
    live(lambda: device.status()["outbox"] == 0)
    coordinator.invite(device.id)
    live(lambda: any(u.round == coordinator.round for u, _ in coordinator.updates))
    live(lambda: device.status()["outbox"] == 0)
    rounds: dict[int, set[bytes]] = {}
    for update, name in coordinator.updates:
        rounds.setdefault(update.round, set()).add(name)
    assert all(len(names) == 1 for names in rounds.values())
    assert len(rounds) == device.status()["rounds"] == len(training.jobs)
    device.close()


def test_a_full_disk_stops_training_but_never_predictions(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, coordinator = Clock(), scene.coordinator
    with scene.device(clock=clock) as device:
        scene.ready(device)
        before = device.predict(X)
        with monkeypatch.context() as patch:
            fill(patch)
            coordinator.invite(device.id)
            scene.until(lambda: not scene.is_ready())
            coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
            scene.until(lambda: device._agent._session.fetch_retry.at > 0)
            np.testing.assert_array_equal(device.predict(X), before)
            assert coordinator.updates == []
        clock.now += 60
        device._agent.poke()
        scene.until(lambda: device.version == 1)
        scene.until(scene.is_ready)
        coordinator.invite(device.id)
        scene.until(lambda: device.status()["receipts"] == {"counted": 1})


def test_with_a_full_disk_a_known_device_starts_and_predicts(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene.device() as device:
        before = device.predict(X)
    fill(monkeypatch)
    with scene.device() as device:
        np.testing.assert_array_equal(device.predict(X), before)


def test_power_lost_between_residual_and_outbox_settles_the_same_update_once_more(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = scene.coordinator
    with scene.device() as device:
        scene.ready(device)

        def off(*_: object) -> None:
            raise StoreError("power lost")

        monkeypatch.setattr(device._agent._outbox, "remove", off)
        coordinator.invite(device.id, codec=[["ef"], ["deadzone", 2.0]])
        scene.until(lambda: device._store.residual() is not None)
        kept = device._store.residual()
    coordinator.outcome = None
    with scene.device() as device:
        scene.until(lambda: len(coordinator.updates) == 2)
        (_, first), (_, again) = coordinator.updates
        assert first == again
        coordinator.receipt(device.id, again, "duplicate", counted=first)
        scene.until(lambda: device.status()["outbox"] == 0)
        assert device._store.residual() == kept


def test_a_state_folder_that_cannot_be_written_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(StoreError, match="cannot write in"):
        Device("mqtt://localhost", task=TASK, state=tmp_path, bundle=BUNDLE)


def test_a_receipt_that_meets_a_full_disk_is_asked_for_again_once_there_is_room(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, coordinator = Clock(), scene.coordinator
    with scene.device(clock=clock) as device:
        scene.ready(device)
        coordinator.outcome = None
        coordinator.invite(device.id, codec=[["ef"], ["deadzone", 2.0]])
        scene.until(lambda: coordinator.updates)
        update = coordinator.updates[0][1]
        with monkeypatch.context() as patch:
            fill(patch)
            coordinator.receipt(device.id, update, "counted")
            scene.until(lambda: device.status()["receipts"] == {"counted": 1})
            scene.until(lambda: device._agent._session.unreceipted)
            assert device.status()["outbox"] == 1
        clock.now += 60
        device._agent.poke()
        scene.until(lambda: len(coordinator.updates) == 2)
        coordinator.receipt(device.id, update, "duplicate", counted=update)
        scene.until(lambda: device.status()["outbox"] == 0)
        assert device._store.residual() is not None
