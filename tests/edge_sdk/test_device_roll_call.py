# SPDX-License-Identifier: Apache-2.0
"""A whole device, and offers older than the newest: played back, or of a restored store."""

from __future__ import annotations

from pathlib import Path

import pytest
from device_scene import Scene
from hand_bundles import mlp
from scripted_coordinator import TASK, weights_of

from edge_sdk import newest, topics
from edge_sdk.messages import CheckIn, Heard

BUNDLE = mlp(quantized=True)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(newest, "ASK_AFTER_S", 0.0)
    monkeypatch.setattr(newest, "ASK_WITHIN_S", 0.0)
    return Scene(tmp_path / "state", BUNDLE)


def asked(scene: Scene) -> CheckIn | None:
    return next((said for said in reversed(scene.coordinator.checkins) if said.asks), None)


def answer(scene: Scene, device: str, call: int, round_: int) -> None:
    said = asked(scene)
    assert said is not None
    word = Heard(said.boot, said.start, said.turn, call, round_)
    scene.coordinator.send(word, topics.down(TASK, device, "heard"))


def test_an_older_offer_changes_nothing_until_the_coordinator_says_that_it_holds(
    scene: Scene,
) -> None:
    with scene.device() as device:
        scene.ready(device)
        scene.coordinator.call, scene.coordinator.round = 9, 5
        scene.coordinator.publish_model(3, weights_of(BUNDLE, 0.5))
        scene.until(lambda: device.version == 3)
        scene.coordinator.call, scene.coordinator.round = 4, 2
        scene.coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        scene.until(lambda: asked(scene))
        assert (device.version, device.status()["offers_passed_over"]) == (3, 1)
        answer(scene, device.id, 4, 2)
        scene.until(lambda: device.version == 1)
        scene.until(lambda: scene.coordinator.checkins[-1].call == 4 and scene.is_ready())


def test_a_new_start_knows_an_offer_of_an_older_version_and_asks_without_declining(
    scene: Scene,
) -> None:
    scene.coordinator.call = 9
    with scene.device() as device:
        scene.ready(device)
        scene.coordinator.publish_model(3, weights_of(BUNDLE, 0.5))
        scene.until(lambda: device.version == 3)
    scene.coordinator.checkins.clear()
    scene.coordinator.call = 4
    scene.coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
    with scene.device() as device:
        scene.until(lambda: asked(scene))
        assert device.version == 3
        answer(scene, device.id, 4, 0)
        scene.until(lambda: device.version == 1)


def test_a_device_that_is_stopped_says_so_unless_a_round_is_to_go_on(scene: Scene) -> None:
    with scene.device() as device:
        scene.ready(device)
    scene.until(lambda: scene.coordinator.checkins[-1].reason == "leaving")
    assert not scene.coordinator.checkins[-1].ready
