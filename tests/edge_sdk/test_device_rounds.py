# SPDX-License-Identifier: Apache-2.0
"""A whole device over a broker in memory, against a coordinator that a test scripts."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_scene import Scene
from hand_bundles import examples, mlp
from scripted_coordinator import TASK, Scripted, weights_of

from edge_sdk import chunks, codec, messages, params, topics
from edge_sdk import conditions as when
from edge_sdk.device import Device
from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.local import NoModelError
from edge_sdk.model import Model
from edge_sdk.session import Retry
from edge_sdk.signing import DeviceKey
from edge_sdk.store import Residual

BUNDLE = mlp(quantized=True)
X, Y = examples(40)


PACKET = 320


@pytest.fixture
def small_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a broker's packets be smaller than any real one's, so that small updates are cut."""
    monkeypatch.setattr(chunks, "MIN_PACKET", PACKET)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "state", BUNDLE)


def test_a_device_predicts_with_its_bundle_before_any_broker_is_there(scene: Scene) -> None:
    scene.broker.is_up = False
    with scene.device() as device:
        assert device.version == 0
        assert not device.online
        assert device.state == "offline"
        batch = device.predict(X[:4])
        assert batch.dtype == np.int8
        assert batch.shape == (4, 3)
        np.testing.assert_array_equal(device.predict(X[0]), batch[0])
        raw = np.clip(np.rint(X / np.float32(0.05)) + 3, -128, 127).astype(np.int8)
        np.testing.assert_array_equal(device.predict(raw[:4]), batch)
    np.testing.assert_array_equal(device.predict(X[:4]), batch)


def test_without_a_model_predict_and_learn_say_what_to_do(scene: Scene) -> None:
    with scene.device(bundle=None) as device:
        assert device.version is None
        assert device.state == "waiting"
        with pytest.raises(NoModelError, match="pass bundle="):
            device.predict(X[0])
        with pytest.raises(NoModelError, match="wait for an offer"):
            device.learn(X[0], 1)


def test_a_device_without_a_bundle_takes_the_offered_one(scene: Scene) -> None:
    scene.coordinator.publish_model(3, weights_of(BUNDLE, 0.125))
    seen: list[Model] = []
    with scene.device(bundle=None) as device:
        device.when_updated = seen.append
        scene.until(lambda: device.version == 3)
        assert device.wait_for_model(0)
        device.predict(X)
        scene.until(lambda: seen)
        assert seen[0].version == 3
        assert seen[0].weights == hashlib.sha256(weights_of(BUNDLE, 0.125)).hexdigest()
    down = device.status()["bytes_down"]
    with scene.device(bundle=None) as device:  # and has it on disk from then on
        assert device.version == 3
        scene.until(lambda: device.online)
        scene.until(lambda: device.status()["bytes_down"] > 0)
        assert device.status()["bytes_down"] < down / 4


def test_a_round_from_invitation_to_receipt(scene: Scene) -> None:
    with scene.device() as device:
        scene.ready(device)
        assert scene.coordinator.statuses[-1].online
        scene.coordinator.invite(device.id)
        scene.until(lambda: device.status()["receipts"])
        update, _ = scene.coordinator.updates[0]
        assert (update.round, update.version, update.examples, update.steps) == (1, 0, 20, 3)
        delta = codec.decode(update.body, BUNDLE.shapes)
        np.testing.assert_allclose(params.flatten(delta, BUNDLE.shapes), 0.5)
        job = scene.training.jobs[0]
        assert (job.budget.epochs, job.budget.batch, job.seed) == (1, 8, 7)
        assert job.budget.seconds is not None
        assert 40 < job.budget.seconds <= 48  # in time for the deadline
        scene.until(lambda: device.status()["outbox"] == 0)
        assert device.status()["rounds"] == 1
        assert device.status()["last_receipt"] == {"round": 1, "outcome": "counted", "reason": ""}
    scene.until(lambda: not scene.coordinator.statuses[-1].online)
    assert len(scene.coordinator.updates) == 1
    status = json.loads((scene.state / "status.json").read_text())
    assert status["rounds"] == 1
    assert status["bytes_up"] > len(update.body)
    assert status["rss_peak_kib"] > 10_000
    assert status["child_rss_peak_kib"] == 1024


def test_the_next_version_replaces_the_model_while_it_answers(scene: Scene) -> None:
    with scene.device() as device:
        scene.ready(device)
        before = device.predict(X)
        answers: list[Any] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(device.predict(X))

        asking = threading.Thread(target=ask)
        asking.start()
        scene.coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.version == 1)
        after = device.predict(X)
        stop.set()
        asking.join()
        assert not np.array_equal(before, after)
        assert all(np.array_equal(a, before) or np.array_equal(a, after) for a in answers)


def test_weights_that_are_not_finite_are_refused_and_the_last_model_stays(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    with scene.device() as device:
        scene.ready(device)
        before = device.predict(X)
        bad = np.frombuffer(weights_of(BUNDLE), "<f4").copy()
        bad[7] = np.nan
        scene.coordinator.publish_model(1, bad.tobytes())
        scene.until(lambda: "model refused version=1" in caplog.text)
        np.testing.assert_array_equal(before, device.predict(X))
        scene.coordinator.publish_model(2, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.version == 2)
        assert not np.array_equal(before, device.predict(X))
        assert device.status()["bad_frames"] == 0


def test_conditions_that_lapse_withdraw_the_check_in_and_stop_training(scene: Scene) -> None:
    scene.training.may_end.clear()
    held = [True]
    with scene.device(conditions=lambda: held[0]) as device:
        scene.ready(device)
        scene.coordinator.invite(device.id)
        scene.until(lambda: device.state == "training")
        held[0] = False
        device.learn(X[0], Y[0])
        scene.until(lambda: not scene.coordinator.checkins[-1].ready)
        scene.until(lambda: device.state == "idle")
        assert device.status()["conditions_lapsed"] == ["<lambda>"]
    assert scene.coordinator.updates == []


def test_too_few_examples_decline_and_enough_check_in(scene: Scene) -> None:
    with scene.device(min_examples=5) as device:
        scene.coordinator.publish_model(0, weights_of(BUNDLE))
        scene.until(lambda: scene.coordinator.statuses)
        scene.coordinator.invite(device.id)
        scene.until(lambda: scene.coordinator.checkins)
        assert not scene.coordinator.checkins[-1].ready
        for x, y in zip(X[:5], Y[:5], strict=True):
            device.learn(x, y)
        scene.until(lambda: scene.coordinator.checkins[-1].ready)
        assert scene.coordinator.checkins[-1].examples == 5


def test_a_failed_training_is_an_abort_notice_and_the_device_goes_on(scene: Scene) -> None:
    scene.training.fail = "killed by SIGKILL; is there enough memory?"
    with scene.device() as device:
        scene.ready(device)
        scene.coordinator.invite(device.id)
        scene.until(lambda: not scene.coordinator.checkins[-1].ready)
        assert device.state == "idle"
        device.predict(X)


def test_an_update_without_receipt_is_sent_again_after_a_restart(scene: Scene) -> None:
    scene.coordinator.outcome = None
    with scene.device() as device:
        scene.ready(device)
        scene.coordinator.invite(device.id)
        scene.until(lambda: scene.coordinator.updates)
    scene.coordinator.outcome = "late"
    with scene.device() as device:
        scene.until(lambda: device.status()["receipts"] == {"late": 1})
        scene.until(lambda: device.status()["outbox"] == 0)
    ids = [update for _, update in scene.coordinator.updates]
    assert len(ids) == 2
    assert ids[0] == ids[1]
    assert len(scene.training.jobs) == 1


def test_an_update_without_receipt_is_sent_again_at_reconnect(scene: Scene) -> None:
    scene.coordinator.outcome = None
    with scene.device() as device:
        scene.ready(device)
        scene.coordinator.invite(device.id)
        scene.until(lambda: scene.coordinator.updates)
        scene.broker.cut(device.id)
        scene.until(lambda: not device.online)
        scene.coordinator.outcome = "counted"
        scene.broker.restore(device.id)
        scene.until(lambda: device.status()["receipts"] == {"counted": 1})
        scene.until(lambda: scene.coordinator.checkins[-1].ready)


def send_in_chunks(scene: Scene, device: Device) -> None:
    """Get as far as an update that came over a broker of small packets."""
    device._agent._transport.max_packet = PACKET  # type: ignore[attr-defined]  # as a broker may say
    scene.ready(device)
    scene.coordinator.invite(device.id)
    scene.until(lambda: scene.coordinator.updates)


def cut_off(scene: Scene, device: Device) -> None:
    """Let the device lose its broker, note it, and find the broker again."""
    scene.broker.cut(device.id)
    scene.until(lambda: not device.online)
    scene.broker.restore(device.id)


def test_a_large_update_goes_in_chunks(scene: Scene, small_packets: None) -> None:
    with scene.device() as device:
        send_in_chunks(scene, device)
        scene.until(lambda: device.status()["receipts"])
        assert max(map(len, scene.coordinator.payloads)) <= PACKET
        assert len(scene.coordinator.chunks) > 2


def test_an_upload_that_was_cut_off_asks_what_is_missing_and_sends_that_alone(
    scene: Scene, small_packets: None
) -> None:
    scene.coordinator.outcome = None
    with scene.device() as device:
        send_in_chunks(scene, device)
        sent = scene.coordinator.chunks
        assert [c.index for c in sent] == list(range(sent[0].count))
        cut_off(scene, device)
        scene.until(lambda: scene.coordinator.chunks[-1].probe)
        first = scene.coordinator.chunks[0]
        wanted = messages.Missing(first.hash, first.count, [first.count - 1])
        before = len(scene.coordinator.chunks)
        scene.coordinator.send(wanted, topics.down(TASK, device.id, "missing"))
        scene.until(lambda: len(scene.coordinator.chunks) > before)
        assert [c.index for c in scene.coordinator.chunks[before:]] == [first.count - 1]
        other = messages.Missing(first.hash, first.count + 1, [0])  # cut for another size
        scene.coordinator.send(other, topics.down(TASK, device.id, "missing"))
        scene.until(lambda: len(scene.coordinator.updates) > 1)


def test_a_probe_that_is_not_answered_is_followed_by_the_whole(
    scene: Scene, small_packets: None
) -> None:
    scene.coordinator.outcome = None
    with scene.device() as device:
        send_in_chunks(scene, device)
        count = len(scene.coordinator.chunks)
        for wanted in (count + 1, 2 * count + 1):
            cut_off(scene, device)
            scene.until(lambda n=wanted: len(scene.coordinator.chunks) >= n)
        assert len(scene.coordinator.updates) == 2


def test_the_residual_moves_on_with_a_counted_receipt_only(scene: Scene) -> None:
    ef: list[object] = [["ef"], ["deadzone", 4.0]]
    scene.training.step = 0.5
    with scene.device() as device:
        scene.ready(device)
        before = device._store.residual()
        assert before is None
        scene.coordinator.outcome = "refused"
        scene.coordinator.invite(device.id, codec=ef)
        scene.until(lambda: device.status()["receipts"] == {"refused": 1})
        scene.until(lambda: device.status()["outbox"] == 0)
        refused = device._store.residual()
        assert refused is not None
        chain = codec.from_spec(ef)
        state = chain.load(refused.state, BUNDLE.shapes)
        assert state.residual is not None
        assert not state.residual.any()
        scene.coordinator.outcome = "counted"
        scene.coordinator.invite(device.id, codec=ef)
        scene.until(lambda: device.status()["receipts"].get("counted") == 1)
        scene.until(lambda: device.status()["outbox"] == 0)
        counted = device._store.residual()
        assert counted is not None
        assert counted.order == refused.order + 1
        sent = codec.decode(scene.coordinator.updates[-1][0].body, BUNDLE.shapes)
        left = chain.load(counted.state, BUNDLE.shapes).residual
        assert left is not None
        np.testing.assert_allclose(params.flatten(sent, BUNDLE.shapes) + left, 0.5, rtol=1e-5)


def test_two_updates_waiting_settle_in_any_order_without_moving_the_residual_back(
    scene: Scene,
) -> None:
    ef: list[object] = [["ef"], ["deadzone", 4.0]]
    scene.coordinator.outcome = None
    with scene.device() as device:
        scene.ready(device)
        for round_ in (1, 2):
            scene.coordinator.invite(device.id, codec=ef)
            scene.until(lambda round_=round_: len(scene.coordinator.updates) == round_)
        (_, first), (_, second) = scene.coordinator.updates
        scene.coordinator.receipt(device.id, second, "counted")
        scene.until(lambda: device.status()["outbox"] == 1)
        newest = device._store.residual()
        scene.coordinator.receipt(device.id, first, "counted")
        scene.until(lambda: device.status()["outbox"] == 0)
        assert newest is not None
        assert newest.order == 2
        assert device._store.residual() == newest


def test_frames_that_are_wrong_are_counted_and_nothing_else_happens(scene: Scene) -> None:
    forger = DeviceKey.from_seed(b"f" * 32)
    with scene.device() as device:
        scene.ready(device)
        coordinator = scene.coordinator
        coordinator.send(
            messages.Receipt(1, b"0" * 16, "counted"),
            topics.down(TASK, device.id, "receipt"),
            forger,
        )
        coordinator.offer(key=forger.public)
        other = Scripted(scene.broker.transport("other"), BUNDLE, forger)
        other.start()
        other.publish_model(9, weights_of(BUNDLE, 0.5))
        for junk in (b"", b"F", b"FDGE", b"\xff" * 2000, b"FDGE" + b"\0" * 200):
            coordinator.transport.publish(topics.down(TASK, device.id, "invite"), junk)
        scene.until(lambda: device.status()["bad_frames"] >= 7)  # nothing is no frame: a clearing
        assert device.version == 0
        coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.version == 1)


def test_a_pinned_coordinator_is_the_only_one_obeyed(scene: Scene) -> None:
    pinned = DeviceKey.from_seed(b"p" * 32)
    with scene.device(coordinator_key=pinned.public.hex()) as device:
        scene.coordinator.publish_model(4, weights_of(BUNDLE, 0.5))
        scene.until(lambda: device.status()["bad_frames"])
        assert device.version == 0
        right = Scripted(scene.broker.transport("right"), BUNDLE, pinned)
        right.start()
        right.publish_model(5, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.version == 5)


def test_examples_never_leave_the_device(scene: Scene) -> None:
    canary = np.array([1234.5, -777.25, 31337.0, 0.015625, 4242.0, -9.0], np.float32)
    codecs: list[list[object]] = [[["dense"]], [["ef"], ["deadzone", 2.0]], [["stochastic", 0.5]]]
    with scene.device() as device:
        for _ in range(8):
            device.learn(canary, 2)
        scene.ready(device)
        for chosen in codecs:
            count = len(scene.coordinator.updates)
            scene.coordinator.invite(device.id, codec=chosen)
            scene.until(lambda count=count: len(scene.coordinator.updates) > count)
            scene.until(lambda: device.state == "idle")
    scene.until(lambda: not scene.coordinator.statuses[-1].online)
    assert len(scene.coordinator.payloads) >= 6
    planted = [canary.tobytes(), canary[:2].tobytes(), canary[2:4].tobytes()]
    planted += [value.tobytes() for value in canary[:3]] + [b"1234.5", b"31337"]
    for payload in scene.coordinator.payloads:
        assert not any(trace in payload for trace in planted)
    ring = next((scene.state / "samples").glob("*.ring"))
    assert canary.tobytes() in ring.read_bytes()  # the net would have caught it


@pytest.mark.parametrize(
    "name",
    [
        "identity.key",
        "coordinator.key",
        "boot",
        "model.json",
        "residual.bin",
        "weights",
        "bundles",
        "samples",
        "outbox",
        "train/junk",
    ],
)
def test_whatever_is_damaged_the_device_starts_and_takes_part(scene: Scene, name: str) -> None:
    scene.coordinator.outcome = None
    with scene.device() as device:
        scene.ready(device)
        scene.coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.version == 1)
        scene.coordinator.invite(device.id, codec=[["ef"], ["deadzone", 2.0]])
        scene.until(lambda: scene.coordinator.updates)
    path = scene.state / name
    for file in path.iterdir() if path.is_dir() else [path]:
        file.write_bytes(b"\xff\x00damage" * 3)
    scene.coordinator.outcome = "counted"
    with scene.device() as device:
        device.predict(X)
        device.learn_many(X, Y)
        scene.until(lambda: device.version == 1)
        scene.until(lambda: scene.coordinator.checkins[-1].ready)
        seen = len(scene.coordinator.updates)
        scene.coordinator.invite(device.id)
        scene.until(lambda: len(scene.coordinator.updates) > seen)


def test_what_cannot_be_learned_is_a_value_error_and_nothing_is_stored(scene: Scene) -> None:
    with scene.device() as device:
        for x, y in ((X[0][:3], 1), (X[0], 3), (X[0], 0.5), (X[0] * np.nan, 1), ("x", 1)):
            with pytest.raises(ValueError, match=r"expected|convert"):
                device.learn(x, y)
        device.learn(X[0].tolist(), 2.0)
        device.learn_many(X[:0], Y[:0])
        assert device.examples == device.examples_ever == 1


def test_a_condition_that_fails_does_not_hold_and_the_device_goes_on(scene: Scene) -> None:
    broken = [True]

    def mood() -> bool:
        if broken[0]:
            raise RuntimeError("the sensor is gone")
        return True

    with scene.device(conditions=mood) as device:
        device.learn_many(X, Y)
        scene.coordinator.publish_model(0, weights_of(BUNDLE))
        scene.until(lambda: device.status()["conditions_lapsed"] == ["failed"])
        broken[0] = False
        device.learn(X[0], Y[0])
        scene.until(lambda: scene.coordinator.checkins)


def test_a_delta_or_a_codec_that_cannot_be_encoded_declines_and_nothing_is_sent(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    with scene.device() as device:
        scene.ready(device)
        scene.training.step = float("nan")
        scene.coordinator.invite(device.id)
        scene.until(lambda: not scene.coordinator.checkins[-1].ready)
        assert "training diverged" in caplog.text
    scene.training.step = 0.5
    with scene.device() as device:
        scene.until(lambda: scene.coordinator.checkins[-1].ready)
        scene.coordinator.invite(device.id, codec=[["zip"]])
        scene.until(lambda: not scene.coordinator.checkins[-1].ready)
        assert "expected a stage among" in caplog.text
    assert scene.coordinator.updates == []


def test_more_frames_than_memory_allows_are_dropped_and_counted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_sdk.agent.MAX_QUEUED_BYTES", 300)
    with scene.device() as device:
        scene.coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.status()["bad_frames"])
        device.predict(X)


def test_a_fetch_for_which_nothing_comes_is_given_up_and_begun_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_sdk.fetching.PATIENCE_S", 0.05)
    monkeypatch.setattr("edge_sdk.agent.CONDITIONS_POLL_S", 0.05)
    monkeypatch.setattr("edge_sdk.session.RETRY_FIRST_S", 0.05)
    with scene.device() as device:
        scene.coordinator.model = weights_of(BUNDLE, 0.25)
        scene.coordinator.version = 1
        scene.coordinator.offer()  # before its parts
        scene.until(lambda: device._agent._session.fetch_retry.at > 0)
        scene.coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        device._agent._session = device._agent._session._replace(fetch_retry=Retry())
        scene.until(lambda: device.version == 1)


def test_a_bundle_that_is_not_the_offered_one_is_fetched_again_and_never_used(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    other = mlp(seed=5)
    with scene.device(bundle=None) as device:
        digest = bytes.fromhex(BUNDLE.digest)
        for part in chunks.parts("bundle", other.data, digest, 0, 2000):
            scene.coordinator.send(part, topics.part(TASK, "bundle", part.index))
        scene.coordinator.offer(bundle_size=len(other.data))
        scene.until(lambda: "fetch failed what=bundle" in caplog.text)
        assert device.version is None


def test_a_damaged_residual_begins_anew(scene: Scene) -> None:
    ef: list[object] = [["ef"], ["deadzone", 4.0]]
    with scene.device() as device:
        scene.ready(device)
        device._store.set_residual(Residual(ef, BUNDLE.digest, 3, b"junk"))
        scene.coordinator.invite(device.id, codec=ef)
        scene.until(lambda: device.status()["receipts"])
        scene.until(lambda: device.status()["outbox"] == 0)
        found = device._store.residual()
        assert found is not None
        assert found.order == 4


def test_an_app_whose_callback_fails_goes_on(scene: Scene) -> None:
    with scene.device() as device:
        device.when_updated = lambda _model: 1 / 0
        scene.ready(device)
        scene.coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.version == 1)
        scene.coordinator.publish_model(2, weights_of(BUNDLE, 0.5))
        scene.until(lambda: device.version == 2)


def test_a_wrong_setting_is_a_config_error_and_the_folder_is_free_again(scene: Scene) -> None:
    with pytest.raises(ConfigError, match="task"):
        Device("mqtt://localhost", task="No Task", state=scene.state)
    with pytest.raises(ConfigError, match="coordinator_key"):
        Device("mqtt://localhost", task=TASK, state=scene.state, coordinator_key="ab")
    with pytest.raises(ConfigError, match="broker"):
        Device("http://localhost", task=TASK, state=scene.state)
    with scene.device(), pytest.raises(StoreError, match="another process"), scene.device():
        pass
    with scene.device(conditions=when.never & when.idle):
        pass
