# SPDX-License-Identifier: Apache-2.0
"""A device that was killed in a round goes on with it, or lets it go once and says so."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from device_scene import Clock
from hand_bundles import examples, mlp
from scripted_coordinator import TASK, FakeTraining, Scripted, until, weights_of

from edge_sdk.device import Device
from edge_sdk.failpoints import VARIABLE
from edge_sdk.setbacks import FIRST_PATIENCE, Setbacks
from edge_sdk.training import TrainFailed, TrainJob, TrainResult
from edge_sdk.transport.memory import MemoryBroker
from edge_sdk.underway import MOST_ATTEMPTS, UnderWay
from edge_sdk.usage import SANE_FROM_S, Instant

BUNDLE = mlp(quantized=True)
X, Y = examples(40)


class Life:
    """Lives of one device, driven by hand: `kill` ends one as SIGKILL does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.broker = folder, Clock(1000.0), MemoryBroker()
        self.coordinator = Scripted(self.broker.transport("coordinator"), BUNDLE)
        self.coordinator.start()
        self.training = FakeTraining()
        self.device = self.born()

    def born(self, **options: Any) -> Device:
        given = {"bundle": BUNDLE, "trainer": self.training, "clock": self.clock} | options
        self.device = Device(
            "memory", task=TASK, state=self.folder, connect=self.broker.transport, **given
        )
        self.device._agent.begin()
        return self.device

    def until(self, claim: Callable[[], object]) -> None:
        def turned() -> object:
            self.device._agent.turn(0)
            return claim()

        until(turned, self.broker)

    def calm(self, turns: int = 30) -> None:
        for _ in range(turns):
            self.broker.pump()
            self.device._agent.turn(0)

    def train(self, **invite: Any) -> None:
        """Get as far as a training under way."""
        self.training.may_end.clear()
        self.device.learn_many(X, Y)
        self.coordinator.publish_model(self.coordinator.version, self.coordinator.model)
        self.until(lambda: self.coordinator.checkins and self.coordinator.checkins[-1].ready)
        self.coordinator.invite(self.device.id, **invite)
        self.until(lambda: self.device.state == "training")
        self.until(lambda: self.training.jobs)

    def kill(self) -> None:
        """End the process: nothing is said, nothing tidied up; the child goes with it."""
        agent = self.device._agent
        agent._stint._later = lambda _: None
        agent._stint.cancel()
        agent._stint.join(5)
        self.broker.cut(self.device.id)
        self.device._local.close()
        self.device._store.close()
        self.broker.pump()

    @property
    def declined(self) -> int:
        """How often the coordinator heard no."""
        return sum(not checkin.ready for checkin in self.coordinator.checkins)


@pytest.fixture
def life(tmp_path: Path) -> Life:
    return Life(tmp_path)


def test_a_device_killed_while_it_trained_goes_on_with_the_same_job(life: Life) -> None:
    life.train()
    (first,) = life.training.jobs
    assert first.checkpoint == life.folder / "train" / "1.checkpoint"
    assert first.memory is not None
    first.checkpoint.write_bytes(b"where it stood")
    life.kill()
    life.training.may_end.set()
    life.born()
    life.until(lambda: life.device.status()["receipts"] == {"counted": 1})
    again = life.training.jobs[1]
    assert (again.seed, again.weights, again.checkpoint) == (7, first.weights, first.checkpoint)
    assert again.budget.epochs == first.budget.epochs
    assert [update.round for update, _ in life.coordinator.updates] == [1]
    life.calm()
    assert len(life.training.jobs) == 2
    assert not (life.folder / "round.json").exists()
    assert list((life.folder / "train").iterdir()) == []
    assert life.declined == 0


def test_a_device_that_was_stopped_in_training_goes_on_as_well(life: Life) -> None:
    life.train()
    life.device.close()
    life.training.may_end.set()
    life.born()
    life.until(lambda: life.device.status()["receipts"] == {"counted": 1})
    assert [job.seed for job in life.training.jobs] == [7, 7]
    assert life.declined == 0
    life.kill()


def test_time_went_on_while_it_was_dead(life: Life) -> None:
    life.train(deadline_s=100.0)
    life.kill()
    life.clock.now += 40
    life.born()
    life.until(lambda: len(life.training.jobs) == 2)
    seconds = life.training.jobs[1].budget.seconds
    assert seconds == pytest.approx(0.8 * 60, abs=1)
    life.kill()


def test_a_round_whose_deadline_passed_is_let_go_once(life: Life) -> None:
    life.train(deadline_s=100.0)
    checkpoint = life.folder / "train" / "1.checkpoint"
    checkpoint.write_bytes(b"where it stood")
    life.kill()
    life.clock.now += 101
    life.born()
    life.until(lambda: life.declined)
    life.until(lambda: life.coordinator.checkins[-1].ready)
    assert not checkpoint.exists()
    assert not (life.folder / "round.json").exists()
    life.kill()
    life.born()
    life.calm()
    assert (life.declined, len(life.training.jobs)) == (1, 1)
    life.kill()


def test_a_round_whose_version_was_replaced_is_let_go_once(life: Life) -> None:
    life.train()
    life.kill()
    life.coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
    life.broker.pump()
    life.born()
    life.until(lambda: life.declined)
    life.until(lambda: life.device.version == 1)
    life.until(lambda: life.coordinator.checkins[-1].ready)
    assert (life.declined, len(life.training.jobs)) == (1, 1)
    assert not (life.folder / "round.json").exists()
    life.kill()


def test_out_of_reach_of_the_broker_it_trains_and_sends_later(life: Life) -> None:
    life.train(deadline_s=100.0)
    life.kill()
    life.broker.is_up = False
    life.training.may_end.set()
    life.born()
    life.calm()
    assert len(life.training.jobs) == 1  # it waits for the offer a while
    life.clock.now += 15
    life.until(lambda: life.device.status()["outbox"] == 1)
    assert len(life.training.jobs) == 2
    assert not (life.folder / "round.json").exists()
    life.kill()


def test_a_round_that_takes_the_process_with_it_each_time_is_let_go(life: Life) -> None:
    life.train(batch=16)
    for attempt in range(2, MOST_ATTEMPTS + 1):
        life.kill()
        life.born()
        life.until(lambda n=attempt: len(life.training.jobs) == n)
    life.kill()
    life.training.may_end.set()
    life.born()
    life.until(lambda: life.declined)
    assert len(life.training.jobs) == MOST_ATTEMPTS
    assert not life.device._agent._session.is_ready  # it waits before it tries again
    life.clock.now += 20
    life.until(lambda: life.coordinator.checkins[-1].ready)
    life.coordinator.invite(life.device.id, batch=16)
    life.until(lambda: life.device.status()["receipts"] == {"counted": 1})
    assert life.training.jobs[-1].budget.batch == 8
    life.kill()


def test_a_kill_between_outbox_and_forgetting_sends_the_update_and_trains_no_more(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.coordinator.outcome = None
    life.train()
    monkeypatch.setattr(life.device._agent._stint, "_forget", lambda: None)
    life.training.may_end.set()
    life.until(lambda: life.coordinator.updates)
    life.kill()
    assert (life.folder / "round.json").exists()
    life.coordinator.outcome = "counted"
    life.born()
    life.until(lambda: life.device.status()["receipts"] == {"counted": 1})
    assert len({name for _, name in life.coordinator.updates}) == len(life.training.jobs) == 1
    assert not (life.folder / "round.json").exists()
    life.kill()


class NoMemory(FakeTraining):
    """Has memory for so many rows."""

    def __init__(self, rows: int, kind: Any = "oom") -> None:
        super().__init__()
        self.rows, self.kind = rows, kind

    def train(self, job: TrainJob, cancel: threading.Event) -> TrainResult:
        done = super().train(job, cancel)
        if job.budget.batch > self.rows:
            raise TrainFailed("out of memory", self.kind)
        return done


def rounds(life: Life, count: int) -> None:
    for _ in range(count):
        life.clock.now += 700
        life.until(lambda: life.coordinator.checkins[-1].ready)
        known = len(life.training.jobs)
        life.coordinator.invite(life.device.id, batch=16)
        life.until(lambda n=known: len(life.training.jobs) > n)
        life.until(lambda: life.device.state == "idle")
        life.calm(5)


@pytest.mark.parametrize("kind", ["oom", "killed"])
def test_out_of_memory_halves_the_rows_over_a_restart_until_they_fit_and_grows_them_again(
    tmp_path: Path, kind: str
) -> None:
    life = Life(tmp_path)
    life.kill()
    life.training = NoMemory(4, kind)
    life.born()
    life.device.learn_many(X, Y)
    life.coordinator.publish_model(0, weights_of(BUNDLE))
    life.until(lambda: life.coordinator.checkins)
    rounds(life, 1)
    attempts = 1 if kind == "oom" else 2  # whoever was killed is tried once more at once
    assert [job.budget.batch for job in life.training.jobs] == [16] * attempts
    assert life.device.status()["training"]["failures"] == {kind: 1}
    assert life.declined == 1
    life.device.predict(X)
    life.kill()
    life.born()
    life.until(lambda: life.coordinator.checkins)
    rounds(life, 2)
    assert [job.budget.batch for job in life.training.jobs[attempts:]][-1] == 4
    assert life.device.status()["receipts"] == {"counted": 1}
    life.training.rows = 100
    known = len(life.training.jobs)
    rounds(life, 24)
    grown = [job.budget.batch for job in life.training.jobs[known:]]
    assert grown == sorted(grown)
    assert set(grown) == {4, 8, 16}
    assert life.device.status()["training"]["most_rows"] is None
    life.kill()


def test_a_full_disk_when_the_round_is_taken_up_is_a_no_and_nothing_stays(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_sdk import files

    life.device.learn_many(X, Y)
    life.coordinator.publish_model(0, weights_of(BUNDLE))
    life.until(lambda: life.coordinator.checkins and life.coordinator.checkins[-1].ready)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", full)
        life.coordinator.invite(life.device.id)
        life.until(lambda: life.declined)
    assert life.training.jobs == []
    assert not (life.folder / "round.json").exists()
    life.kill()


# --- what is written down -----------------------------------------------------------------------
def taken(at: Instant, left_s: float = 50.0) -> UnderWay:
    from edge_sdk.messages import Invite

    invite = Invite(
        3, 2, b"m" * 32, 60.0, [["ef"], ["deadzone", 2.0]], 1, None, None, 8, None, None, 7
    )
    return UnderWay(invite, "ab" * 32, left_s, at)


def test_what_was_taken_up_is_read_back_as_it_was() -> None:
    one = taken(Instant("boot", 5.0))
    assert UnderWay.from_bytes(one.to_bytes()) == one


@pytest.mark.parametrize(
    ("then", "now", "left_s"),
    [
        (Instant("a", 100.0), Instant("a", 130.0), 20.0),
        (Instant("a", 100.0), Instant("b", 3.0), 50.0),
        (Instant("", 100.0), Instant("", 130.0), 50.0),
        (Instant("a", 100.0, SANE_FROM_S), Instant("b", 3.0, SANE_FROM_S + 45), 5.0),
        (Instant("a", 100.0, SANE_FROM_S + 45), Instant("b", 3.0, SANE_FROM_S), 50.0),
        (Instant("a", 100.0), Instant("a", 90.0), 50.0),
    ],
)
def test_a_deadline_is_known_as_well_as_the_clocks_know_it(
    then: Instant, now: Instant, left_s: float
) -> None:
    assert taken(then).left(now) == pytest.approx(left_s)


@pytest.mark.parametrize(
    "change", [{"invite": {}}, {"at": {}}, {"left_s": "x"}, {"attempts": None}]
)
def test_what_does_not_add_up_is_not_read(change: dict[str, Any]) -> None:
    fields = json.loads(taken(Instant("a", 1.0)).to_bytes()) | change
    with pytest.raises((ValueError, KeyError, TypeError)):
        UnderWay.from_bytes(json.dumps(fields).encode())
    fields = json.loads(taken(Instant("a", 1.0)).to_bytes())
    fields["invite"]["model"] = "ab"
    with pytest.raises(ValueError, match="expected an invitation"):
        UnderWay.from_bytes(json.dumps(fields).encode())


def test_rows_are_halved_and_grow_the_more_slowly_the_more_often_it_went_wrong() -> None:
    known = Setbacks("a").out_of_memory(32)
    assert (known.batch, known.rows(32), known.rows(8), known.in_a_row) == (16, 16, 8, 1)
    assert known.of("a") == known
    assert known.of("b") == Setbacks("b")
    for _ in range(FIRST_PATIENCE):
        known = known.ended_well(64)
    assert (known.batch, known.in_a_row) == (32, 0)
    known = known.out_of_memory(32)
    assert known.patience == 2 * FIRST_PATIENCE
    assert Setbacks("a").out_of_memory(1).batch == 1
    assert Setbacks("a").ended_well(8) == Setbacks("a")


# --- real processes -----------------------------------------------------------------------------
APP = textwrap.dedent("""
    import hashlib, sys, threading
    from hand_bundles import examples, mlp
    from scripted_coordinator import TASK, Scripted, until, weights_of
    from edge_sdk.device import Device
    from edge_sdk.transport.memory import MemoryBroker
    broker, bundle = MemoryBroker(), mlp(momentum=True)
    coordinator = Scripted(broker.transport("coordinator"), bundle)
    coordinator.start()
    with Device("memory", task=TASK, state=sys.argv[1], bundle=bundle,
                connect=broker.transport, checkpoint_s=1e-6) as device:
        if device.examples == 0:
            device.learn_many(*examples(200))
        coordinator.publish_model(0, weights_of(bundle))
        until(lambda: coordinator.checkins and coordinator.checkins[-1].ready, broker, 60)
        coordinator.invite(device.id, epochs=4, batch=8, deadline_s=600.0)
        until(lambda: coordinator.updates, broker, 90)
        until(lambda: device.status()["outbox"] == 0, broker, 60)
        (update, _), = coordinator.updates
        print(hashlib.sha256(update.body).hexdigest(), update.steps, update.loss)
""")


def app(folder: Path, failpoints: str = "") -> subprocess.Popen[str]:
    paths = [str(Path(__file__).parents[1] / "support"), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), VARIABLE: failpoints}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", APP, str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_device_process_killed_in_training_ends_with_the_update_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    with app(tmp_path / "calm") as calm:
        expected, _ = calm.communicate(timeout=100)
    checkpoint = tmp_path / "killed" / "train" / "1.checkpoint"
    seen = set[bytes]()
    for _ in range(2):
        with app(tmp_path / "killed", "checkpoint:sleep=0.03") as killed:
            known = hashlib.sha256(checkpoint.read_bytes()).digest() if seen else b""
            until(lambda was=known: _digest(checkpoint) not in {b"", was}, None, 60)
            killed.send_signal(signal.SIGKILL)
        seen.add(_digest(checkpoint))
    assert len(seen) == 2, "it made headway in each life"
    with app(tmp_path / "killed") as last:
        found, _ = last.communicate(timeout=100)
    assert found == expected
    assert expected.split()[1] == "100"
    assert list((tmp_path / "killed" / "train").iterdir()) == []


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b""
