# SPDX-License-Identifier: Apache-2.0
"""What a device's correction remembers moves with receipts, like the residual, and not before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hand_bundles import examples, mlp
from scripted_coordinator import TASK, FakeTraining, Scripted, until, weights_of

from edge_sdk import codec, params
from edge_sdk.correction import pack, unpack
from edge_sdk.device import Device
from edge_sdk.messages import Invite
from edge_sdk.store import Residual
from edge_sdk.transport.memory import MemoryBroker
from edge_sdk.types import Array, Spec
from edge_sdk.uploads import _terms

BUNDLE = mlp(proximal=True)
X, Y = examples(40)
COARSE: Spec = [["ef"], ["deadzone", 4.0]]
START = np.frombuffer(weights_of(BUNDLE), "<f4")


class Anchored(FakeTraining):
    """Notes what each job was pulled to; trains a delta of a few large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: list[Array | None] = []

    def train(self, job: object, cancel: object) -> object:  # type: ignore[override] # passed on
        at = job.anchor  # type: ignore[attr-defined] # a TrainJob
        self.anchors.append(None if at is None else np.fromfile(at, "<f4"))
        result = super().train(job, cancel)  # type: ignore[arg-type] # as they came
        drawn = np.random.default_rng(len(self.anchors)).standard_t(2, START.size)
        drawn.astype("<f4").tofile(result.delta)
        return result


class Scene:
    def __init__(self, folder: Path) -> None:
        self.folder, self.broker, self.training = folder, MemoryBroker(), Anchored()
        self.coordinator = Scripted(self.broker.transport("coordinator"), BUNDLE)
        self.coordinator.start()
        self.device = self.started()
        self.device.learn_many(X, Y)
        self.coordinator.publish_model(0, weights_of(BUNDLE))
        self.until_ready()

    def started(self) -> Device:
        device = Device(
            "memory",
            task=TASK,
            state=self.folder,
            connect=self.broker.transport,
            bundle=BUNDLE,
            trainer=self.training,
        )
        device.start()
        return device

    def until_ready(self) -> None:
        until(
            lambda: self.coordinator.checkins and self.coordinator.checkins[-1].ready, self.broker
        )

    def round(self, outcome: str | None, spec: Spec = COARSE, **invite: object) -> Array:
        """Have one round answered with `outcome`; return what its update decodes to."""
        before, known = len(self.coordinator.updates), self.device.status()["receipts"]
        self.coordinator.outcome = outcome
        said = {"codec": spec, "mu": 0.5, "correction": "feddyn"} | invite
        self.coordinator.invite(self.device.id, **said)
        until(lambda: len(self.coordinator.updates) > before, self.broker)
        if outcome:
            until(lambda: self.device.status()["receipts"] != known, self.broker)
            until(lambda: not self.device.status()["outbox"], self.broker)
        update, _ = self.coordinator.updates[-1]
        return params.flatten(codec.decode(update.body, BUNDLE.shapes), BUNDLE.shapes)

    @property
    def own(self) -> Array:
        """What is on disk."""
        found = self.device._store.residual()
        return np.frombuffer(found.own if found else b"", "<f4")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "state")
    yield made
    made.device.close()


def test_a_first_round_is_pulled_to_the_model_itself(scene: Scene) -> None:
    sent = scene.round("counted")
    np.testing.assert_array_equal(scene.training.anchors[0], START)
    assert scene.training.jobs[0].budget.mu == 0.5
    np.testing.assert_array_equal(scene.own, sent)


def test_what_was_decoded_is_what_counts_and_the_rest_waits_in_the_residual(scene: Scene) -> None:
    sent = [scene.round("counted"), scene.round("late")]
    drawn = np.fromiter(np.random.default_rng(1).standard_t(2, START.size), np.float32)
    assert np.abs(sent[0] - drawn).max() > 0.1  # the codec is coarse
    np.testing.assert_array_equal(scene.training.anchors[1], START - sent[0])
    np.testing.assert_array_equal(scene.own, sent[0] + sent[1])


@pytest.mark.parametrize("outcome", ["refused", "stale"])
def test_an_update_that_did_not_count_leaves_no_trace(scene: Scene, outcome: str) -> None:
    first = scene.round("counted")
    scene.round(outcome)
    np.testing.assert_array_equal(scene.own, first)
    scene.round("counted")
    np.testing.assert_array_equal(scene.training.anchors[2], START - first)


def test_a_waiting_update_is_taken_as_counted_and_given_back_if_it_was_not(scene: Scene) -> None:
    scene.round(None)
    assert not scene.own.size  # nothing before a receipt
    _, waiting = scene.coordinator.updates[-1]
    update, _ = scene.coordinator.updates[-1]
    first = params.flatten(codec.decode(update.body, BUNDLE.shapes), BUNDLE.shapes)
    scene.coordinator.outcome = None
    scene.coordinator.invite(scene.device.id, codec=COARSE, mu=0.5, correction="feddyn")
    until(lambda: len(scene.training.anchors) == 2, scene.broker)
    np.testing.assert_array_equal(scene.training.anchors[1], START - first)
    until(lambda: scene.device.status()["outbox"] == 2, scene.broker)
    scene.coordinator.receipt(scene.device.id, waiting, "refused", round=1)
    until(lambda: scene.device.status()["outbox"] == 1, scene.broker)
    np.testing.assert_array_equal(scene.own, np.zeros_like(START))


def test_it_outlives_the_process_and_ends_with_the_method_or_the_bundle(scene: Scene) -> None:
    first = scene.round("counted")
    scene.device.close()
    scene.coordinator.checkins.clear()
    scene.device = scene.started()
    scene.until_ready()
    second = scene.round("counted", [["dense"]])  # another codec: a fresh residual alone
    np.testing.assert_array_equal(scene.training.anchors[1], START - first)
    np.testing.assert_array_equal(scene.own, first + second)
    scene.round("counted", correction=None)
    assert scene.training.anchors[2] is None
    assert not scene.own.size
    kept = Residual(
        COARSE, "of-another-bundle", 9, b"", "feddyn", scene.training.anchors[1].tobytes()
    )
    scene.device._store.set_residual(kept)
    scene.round("counted")
    np.testing.assert_array_equal(scene.training.anchors[3], START)


def test_scaffold_steps_by_the_difference_to_all_devices(scene: Scene) -> None:
    rng, mu, lr = np.random.default_rng(5), 1e-4, 0.05
    body = pack(rng.normal(size=START.size).astype(np.float32))
    control = unpack(body, START.size)
    first = scene.round("counted", mu=mu, lr=lr, correction="scaffold")
    np.testing.assert_array_equal(scene.training.anchors[0], START)
    np.testing.assert_allclose(scene.own, first / 3)  # of three steps
    own = scene.own.copy()
    said = {"mu": mu, "lr": lr, "correction": "scaffold", "body": body}
    second = scene.round("counted", **said)
    wanted = START - (own - control) / np.float32(mu * lr)
    np.testing.assert_allclose(scene.training.anchors[1], wanted, rtol=1e-5)
    np.testing.assert_allclose(scene.own, own - control + second / 3, rtol=1e-5, atol=1e-6)


def test_steps_of_a_bundle_with_momentum_go_further() -> None:
    bundle = mlp(momentum=True, proximal=True)
    invite = Invite(1, 0, bytes(32), 60.0, COARSE, 1, *[None] * 4, 1e-4, 7, "scaffold")
    decay = bundle.manifest["optimizer"][0][1]["decay"]
    terms = _terms(invite, bundle, 3)
    assert terms.steps == pytest.approx(3 + 2 * decay + decay**2)
    assert (terms.mu, terms.lr) == (1e-4, bundle.manifest["lr"])


def test_a_control_of_another_model_is_declined_and_the_next_round_taken(scene: Scene) -> None:
    scene.coordinator.invite(
        scene.device.id, mu=1e-4, correction="scaffold", body=pack(np.ones(5, np.float32))
    )
    until(lambda: not scene.coordinator.checkins[-1].ready, scene.broker)
    assert not scene.training.jobs
    assert scene.device.status()["state"] == "idle"


def test_a_record_says_whose_memory_it_is_and_older_records_have_none() -> None:
    kept = Residual(COARSE, "b", 3, b"state\n", "feddyn", b"\n\0own")
    assert Residual.from_bytes(kept.to_bytes()) == kept
    plain = Residual(COARSE, "b", 3, b"state\n")
    assert Residual.from_bytes(plain.to_bytes()) == plain
    assert b"correction" not in plain.to_bytes()
