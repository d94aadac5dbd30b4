# SPDX-License-Identifier: Apache-2.0
"""`fedge device why`: each selection, refusal, lateness and receipt has its line and its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from device_scene import Scene
from hand_bundles import mlp
from scripted_coordinator import TASK, weights_of

from edge_sdk import conditions as when
from edge_sdk import device_cli, journal, session
from edge_sdk import events as ev
from edge_sdk.journal import Journal
from edge_sdk.session import Session, Unreceipted
from edge_sdk.transport import Counters
from edge_sdk.why import entries, line, reasons

BUNDLE = mlp(quantized=True)
OFFER = ev.Offered(1, 5, 3, b"b", b"m")
MODEL = ev.ModelReady(b"b", b"m", 3)


class Diary(Scene):
    """A device, and what its journal says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "state", BUNDLE)
        self.config = folder / "device.toml"
        self.config.write_text(f'broker = "mqtt://hub"\ntask = "{TASK}"\nstate = "state"')

    def told(self) -> list[dict[str, Any]]:
        return list(journal.read(self.state / "why"))

    def facts(self, *kinds: str) -> list[dict[str, Any]]:
        return [entry for entry in self.told() if entry["what"] in kinds]


@pytest.fixture
def scene(tmp_path: Path) -> Diary:
    return Diary(tmp_path)


def test_a_round_is_told_from_invitation_to_receipt_with_its_bytes(
    scene: Diary, capsys: pytest.CaptureFixture[str]
) -> None:
    with scene.device() as device:
        scene.ready(device)
        scene.coordinator.invite(device.id)
        scene.until(lambda: device.status()["receipts"] and not device.status()["outbox"])
        down = device.status()["bytes_down"]
    kinds = [entry["what"] for entry in scene.told() if entry.get("round") == 1]
    assert kinds == ["invited", "training", "trained", "sent", "receipt"]
    (receipt,) = scene.facts("receipt")
    assert receipt["outcome"] == "counted"
    assert 100 < receipt["bytes_up"] < 2000
    assert 100 < receipt["bytes_down"] < down
    assert device_cli.main(["why", "--config", str(scene.config), "--round", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert "round 1    invited: from version 0, within 60 s" in said[0]
    assert "trained 3 steps in 0.1 s, loss 0.25, stopped by epochs" in said[2]
    assert "receipt: counted: it is in the next version" in said[4]
    assert "bytes up" in said[4]
    command = ["why", "--config", str(scene.config), "--json", "--last", "2"]
    assert device_cli.main(command) == 0
    assert len([json.loads(one) for one in capsys.readouterr().out.splitlines()]) == 2


def test_a_decline_names_the_condition_that_did_not_hold(scene: Diary) -> None:
    holds = [True]
    with scene.device(conditions=when.Condition("shutter_is_open", lambda _: holds[0])) as device:
        scene.ready(device)
        holds[0] = False
        scene.coordinator.invite(device.id)
        scene.until(lambda: not scene.coordinator.checkins[-1].ready)
    (declined,) = scene.facts("declined")
    assert declined["reasons"] == ["shutter_is_open"]
    assert scene.facts("not ready")[-1]["reasons"] == ["shutter_is_open"]
    assert line(declined) == "declined: shutter_is_open"


def test_a_training_that_fails_and_a_refused_update_say_why(scene: Diary) -> None:
    with scene.device() as device:
        scene.ready(device)
        scene.training.fail = "no memory on tuesdays"
        scene.coordinator.invite(device.id)
        scene.until(lambda: not scene.coordinator.checkins[-1].ready)
        agent = device._agent
        agent._session = agent._session._replace(train_retry=session.Retry())
        device._agent.poke()
        scene.training.fail = ""
        scene.until(lambda: scene.coordinator.checkins[-1].ready)
        scene.coordinator.outcome = None
        scene.coordinator.invite(device.id)
        scene.until(lambda: scene.coordinator.updates)
        _, update = scene.coordinator.updates[-1]
        scene.coordinator.receipt(device.id, update, "refused", reason="its norm is 1e9")
        scene.until(lambda: device.status()["receipts"] and not device.status()["outbox"])
    assert scene.facts("training failed")[0]["reason"] == "no memory on tuesdays"
    assert scene.facts("declined")[0]["reasons"] == ["its training gave no update"]
    (receipt,) = scene.facts("receipt")
    assert line(receipt).startswith("receipt: refused: its norm is 1e9")


def test_switches_of_models_and_restarts_are_told(scene: Diary) -> None:
    with scene.device() as device:
        scene.ready(device)
        scene.coordinator.publish_model(1, weights_of(BUNDLE, 0.125))
        scene.until(lambda: device.version == 1)
    with scene.device() as device:
        scene.until(lambda: device.online)
    assert [entry["version"] for entry in scene.facts("model")][-1] == 1
    assert [entry["boot"] for entry in scene.facts("started")] == [1, 2]
    assert scene.facts("fetched")


# --- from steps of the session to facts ---------------------------------------------------------
def facts(state: Session, event: ev.Event) -> list[dict[str, Any]]:
    after, actions = session.step(state, event)
    return entries(state, event, after, actions)


def idle(**changes: Any) -> Session:
    known = {
        "now": 100.0,
        "is_online": True,
        "may_train": True,
        "examples": 10,
        "offer": OFFER,
        "model": MODEL,
        "bundle": b"b",
        "weights": b"m",
        "stands": ev.CheckIn(1, True, 10),  # noqa: FBT003 - as it is said
    }
    return Session(**(known | changes))


def test_a_round_that_went_by_without_a_ready_device_is_told() -> None:
    later = replace(OFFER, round=6)
    assert facts(idle(), later) == [{"what": "not invited", "round": 5}]
    assert facts(idle(sent_round=5), later) == []
    assert facts(idle(stands=None), later) == []
    assert facts(idle(), OFFER) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"may_train": False, "lapsed": ("on_mains",)}, "on_mains"),
        ({"examples": 3, "min_examples": 20}, "3 of 20 examples"),
        ({"train_retry": session.Retry(500.0)}, "a training failed a moment ago"),
        ({"refused": (b"m",)}, "the task's model does not work here"),
        ({"model": replace(MODEL, bundle=b"old")}, "the task's bundle is not here yet"),
        ({"model": None}, "the task's bundle is not here yet"),
    ],
)
def test_every_reason_to_decline_has_words(changes: dict[str, Any], reason: str) -> None:
    state = idle(**changes)
    assert not state.is_ready
    declined = facts(state, ev.Invited(6, 3, b"m", 60.0))[-1]
    assert declined == {"what": "declined", "round": 6, "reasons": [reason]}
    if reason != "the task's bundle is not here yet" or changes["model"] is None:
        return
    assert list(reasons(state._replace(refused_bundle=b"b"))) == [
        "the task's bundle is refused here"
    ]


def test_an_invitation_that_comes_too_late_is_declined_for_that() -> None:
    old = facts(idle(), ev.Invited(6, 2, b"w", 60.0))
    assert old[-1]["reasons"] == ["version 3 is current, the round trains version 2"]
    late = facts(idle(), ev.Invited(6, 3, b"m", 0.0))
    assert late[-1]["reasons"] == ["its deadline had passed"]


def test_lateness_and_silence_are_told() -> None:
    state = idle(unreceipted=(Unreceipted(b"u", 4, due_at=1e9),))
    (receipt,) = facts(state, ev.Receipted(b"u", "late", None, 30.0))
    assert receipt == {"what": "receipt", "round": 4, "outcome": "late", "rest_s": 30.0}
    assert "folded into a later version; not needed for 30 s" in line(receipt)
    assert facts(state, ev.Receipted(b"other", "late")) == []
    silent = idle(unreceipted=(Unreceipted(b"u", 4, due_at=50.0),))
    assert {"what": "sent again", "round": 4} in facts(silent, ev.Tick(101.0))


def test_what_fails_is_told_with_its_reason() -> None:
    fetching = ev.Fetch("weights", b"x", 10)
    for event, what in (
        (ev.FetchFailed("weights", b"x", "nothing came"), "fetch failed"),
        (ev.ModelRefused(b"b", b"x", "NaN"), "model refused"),
        (ev.SwitchFailed(b"b", b"x", "disk full"), "model not switched"),
        (ev.BundleRefused(b"z", "a Loop"), "bundle refused"),
    ):
        told = next(e for e in facts(idle(fetching=fetching), event) if e["what"] == what)
        assert line(told).endswith(told["reason"])
    assert facts(idle(refused_bundle=b"z"), ev.BundleRefused(b"z", "again")) == []


def test_a_training_that_must_stop_says_for_what() -> None:
    busy = session.Round(ev.Invited(6, 3, b"m", 60.0), 160.0, session.Phase.TRAINING)
    said = facts(idle(round=busy), ev.ConditionsChanged(False, 10, ("cooler_than(70)",)))  # noqa: FBT003 - as it is said
    assert {"what": "training stopped", "round": 6, "reasons": ["cooler_than(70)"]} in said


def test_a_quiet_moment_says_nothing() -> None:
    assert facts(idle(), ev.Tick(101.0)) == []
    assert facts(idle(), ev.ConditionsChanged(True, 11)) == []  # noqa: FBT003 - as it is said


def test_facts_of_another_version_still_have_a_line() -> None:
    assert line({"what": "danced"}) == "danced"
    assert line({"what": "trained"}) == "trained"
    assert line({"what": "receipt", "outcome": "lost"}) == "receipt: lost"
    assert line({}) == "?"


# --- on disk ------------------------------------------------------------------------------------
class Clock:
    def __init__(self, wall: float) -> None:
        self.wall = wall

    def monotonic(self) -> float:
        return 7.0

    def time(self) -> float:
        return self.wall


def book(folder: Path, wall: float = 1_790_000_000.0) -> Journal:
    return Journal(folder, Clock(wall), Counters(), 3)


def test_a_journal_stays_small_and_keeps_the_newest(tmp_path: Path) -> None:
    kept = book(tmp_path / "why")
    for number in range(20_000):
        kept.add({"what": "sent", "round": number})
        if number % 50 == 0:
            kept.flush()
    kept.flush()
    size = sum(path.stat().st_size for path in (tmp_path / "why").iterdir())
    assert size <= 16 * 8192 + 100
    told = [entry["round"] for entry in journal.read(tmp_path / "why")]
    assert told[-1] == 19_999
    assert told == sorted(told)
    assert len(told) > 500


def test_a_quiet_device_writes_nothing(tmp_path: Path) -> None:
    kept = book(tmp_path / "why")
    kept.flush()
    (file,) = (tmp_path / "why").iterdir()
    stamp = file.stat().st_mtime_ns
    kept.flush()
    kept.note(idle(), ev.Tick(5.0), idle(), ())
    kept.flush()
    assert file.stat().st_mtime_ns == stamp


def test_a_board_whose_clock_was_never_set_tells_times_since_its_boot(
    tmp_path: Path, scene: Diary, capsys: pytest.CaptureFixture[str]
) -> None:
    book(scene.state / "why", wall=90.0).flush()
    assert device_cli.main(["why", "--config", str(scene.config)]) == 0
    assert "start 3,       7 s" in capsys.readouterr().out


def test_damage_costs_what_is_damaged(tmp_path: Path) -> None:
    kept = book(tmp_path / "why")
    kept.add({"what": "online"})
    kept.flush()
    (file,) = (tmp_path / "why").iterdir()
    file.write_bytes(b'\xff{"what"\n[1]\n{}\n' + file.read_bytes() + b'{"what": "off')
    (tmp_path / "why/junk.jsonl").mkdir()
    assert [entry["what"] for entry in journal.read(tmp_path / "why")] == ["started", "online"]
    assert list(journal.read(tmp_path / "nowhere")) == []


def test_a_full_disk_costs_the_journal_alone(tmp_path: Path) -> None:
    (tmp_path / "why").write_text("a file where the folder should be")
    kept = book(tmp_path / "why")
    kept.flush()
    (tmp_path / "why").unlink()
    kept.flush()
    assert len(list(journal.read(tmp_path / "why"))) == 1


def test_nothing_told_is_said_so(scene: Diary, capsys: pytest.CaptureFixture[str]) -> None:
    assert device_cli.main(["why", "--config", str(scene.config)]) == 0
    assert "nothing to tell yet" in capsys.readouterr().out
