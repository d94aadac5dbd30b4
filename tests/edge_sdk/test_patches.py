# SPDX-License-Identifier: Apache-2.0
"""A device comes from version to version by patches, and by the weights where that is less."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hand_bundles import mlp
from hypothesis import given
from hypothesis import strategies as st
from scripted_coordinator import TASK, FakeTraining, Scripted, until, weights_of

from edge_sdk import chunks, codec, fetching, params, patches, topics
from edge_sdk.device import Device
from edge_sdk.transport.memory import MemoryBroker

BUNDLE = mlp()
COUNT = params.count(BUNDLE.shapes)
DOWN = codec.preset("default")


def start() -> np.ndarray:
    return params.flatten(BUNDLE.params(), BUNDLE.shapes)


def patch(seed: int) -> bytes:
    delta = np.random.default_rng(seed).standard_t(2, COUNT).astype(np.float32) * 0.01
    return DOWN.encode(params.unflatten(delta, BUNDLE.shapes), DOWN.init(BUNDLE.shapes))[0]


def test_a_patch_adds_what_it_decodes_to() -> None:
    one = patch(1)
    change = params.flatten(DOWN.decode(one, BUNDLE.shapes), BUNDLE.shapes)
    np.testing.assert_array_equal(patches.apply(start(), one, BUNDLE.shapes), start() + change)


@pytest.mark.parametrize("name", ["exact-ish", "lean", "stateless-lean"])
def test_a_patch_may_be_of_any_codec(name: str) -> None:
    chosen = codec.preset(name)
    delta = params.unflatten(np.linspace(-1, 1, COUNT, dtype=np.float32), BUNDLE.shapes)
    one, _ = chosen.encode(delta, chosen.init(BUNDLE.shapes))
    change = params.flatten(chosen.decode(one, BUNDLE.shapes), BUNDLE.shapes)
    got = patches.apply(start(), one, BUNDLE.shapes)
    np.testing.assert_allclose(got, start() + change, atol=1e-6)


def test_what_patches_lose_goes_into_the_next_one() -> None:
    """The weights follow the target: the gap stays as small as one patch leaves it."""
    rng, target, weights = np.random.default_rng(0), start(), start()
    gaps = []
    for _ in range(40):
        target = target + rng.standard_normal(COUNT).astype(np.float32) * 0.01
        delta = params.unflatten(target - weights, BUNDLE.shapes)
        one, _ = DOWN.encode(delta, DOWN.init(BUNDLE.shapes))
        weights = patches.apply(weights, one, BUNDLE.shapes)
        gaps.append(float(np.linalg.norm(target - weights)))
    assert max(gaps[20:]) < 2 * max(gaps[5:20])
    assert gaps[-1] < 0.3 * np.linalg.norm(target - start())


def test_the_way_is_that_which_costs_less() -> None:
    assert patches.route(3, 5, [10, 10, 10], 100) == range(4, 6)
    assert patches.route(2, 5, [10, 10, 10], 100) == range(3, 6)
    assert patches.route(1, 5, [10, 10, 10], 100) is None  # too far back
    assert patches.route(3, 5, [1, 50, 50], 100) is None  # as dear as the weights
    assert patches.route(5, 5, [10], 100) is None
    assert patches.route(6, 5, [10], 100) is None  # ahead: of another past
    assert patches.route(0, 1, [], 100) is None


@given(st.lists(st.integers(1, 50), max_size=32), st.integers(0, 40), st.integers(0, 40))
def test_patches_on_the_way_cost_less_than_the_weights(
    sizes: list[int], have: int, version: int
) -> None:
    way = patches.route(have, version, sizes, 200)
    if way is not None:
        assert [*way] == [*range(have + 1, version + 1)]
        assert sum(sizes[-len(way) :]) < 200


class Scene:
    """A device, and a coordinator that publishes patches when told to."""

    def __init__(self, folder: Path) -> None:
        self.broker = MemoryBroker()
        self.coordinator = Scripted(self.broker.transport("coordinator"), BUNDLE)
        self.coordinator.start()
        self.folder, self.weights, self.version = folder, start(), 0
        self.sizes: list[int] = []
        self.coordinator.publish_model(0, weights_of(BUNDLE))

    def device(self) -> Device:
        return Device(
            "memory",
            task=TASK,
            state=self.folder,
            connect=self.broker.transport,
            bundle=BUNDLE,
            trainer=FakeTraining(),
        )

    def advance(self, *, damage: bool = False, silent: bool = False) -> None:
        """Publish the next version, its patch before its weights."""
        self.version += 1
        one = patch(self.version)
        self.weights = patches.apply(self.weights, one, BUNDLE.shapes)
        data = self.weights.astype("<f4").tobytes()
        digest = hashlib.sha256(data).digest()
        sent = patch(99) if damage else one
        for part in [] if silent else chunks.parts("patch", sent, digest, self.version, 600):
            place = topics.part(TASK, "patch", part.index, self.version)
            self.coordinator.send(part, place)
        self.sizes.append(len(sent))
        self.coordinator.version, self.coordinator.model = self.version, data
        for part in chunks.parts("weights", data, digest, self.version, 700):
            self.coordinator.send(part, topics.part(TASK, "weights", part.index))
        self.coordinator.offer(patches=self.sizes[-32:])

    def until_there(self, device: Device) -> None:
        def is_there() -> bool:
            device._agent.poke()  # as time does
            return device.version == self.version

        until(is_there, self.broker)
        assert device.model is not None
        assert device.model.weights == hashlib.sha256(self.coordinator.model).hexdigest()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "state")


def test_a_device_follows_every_version_by_patches_and_never_takes_the_weights(
    scene: Scene,
) -> None:
    with scene.device() as device:
        for _ in range(5):
            scene.advance()
            scene.until_there(device)
        assert device.status()["bytes_down"] < 5 * (700 + max(scene.sizes) + 400)
        assert not any("/model/w/" in f for f in scene.broker._sessions[device.id].filters)


def test_who_missed_versions_takes_their_patches_together(scene: Scene) -> None:
    for _ in range(3):
        scene.advance()
    with scene.device() as device:
        scene.until_there(device)
    assert device.version == 3


def test_damaged_patches_are_found_out_by_the_hash_and_the_weights_taken(scene: Scene) -> None:
    with scene.device() as device:
        scene.advance(damage=True)
        scene.until_there(device)
        scene.advance()
        scene.until_there(device)


def test_patches_that_never_come_are_given_up_for_the_weights(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.05)
    with scene.device() as device:
        scene.advance(silent=True)
        scene.until_there(device)


def test_a_restart_goes_on_from_the_version_on_disk(scene: Scene) -> None:
    with scene.device() as device:
        scene.advance()
        scene.until_there(device)
    scene.advance()
    with scene.device() as device:
        scene.until_there(device)
        assert not any("/model/w/" in f for f in scene.broker._sessions[device.id].filters)
