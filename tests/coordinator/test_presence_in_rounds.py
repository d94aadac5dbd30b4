# SPDX-License-Identifier: Apache-2.0
"""What devices say of presence, in real rounds: old frames, lost counts, reasons to decline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_fleet import BUNDLE, FakeDevice, World, invited, play

from coordinator import intake, ledger, pacing
from coordinator.cli import main
from coordinator.task import Task
from coordinator.why import why
from edge_sdk import topics
from edge_sdk.messages import Heard, Message
from edge_sdk.presence import Presence
from edge_sdk.settings import Settings
from edge_sdk.transport.memory import MemoryBroker

TASK = Task("t", BUNDLE, codec="dense", downlink="dense")
PACE = pacing.rounds(cohort=2, quorum=2, deadline_s=600)


class Numbered(FakeDevice):
    """A device that numbers what it says, as the product's does, and notes what it said."""

    def __init__(self, broker: MemoryBroker, index: int, boot: int = 1, start: int = 0) -> None:
        super().__init__(broker, index)
        settings = Settings(task="t", name=f"n{index}", sdk="s", boot=boot, start=start or 7)
        self.presence = Presence(self.key, settings)
        self.heard: list[Heard] = []
        self.said: list[tuple[str, bytes]] = []

    def start(self) -> None:
        self.transport = self.broker.transport(self.id, self.will)
        self.transport.subscribe(topics.down_filter("t", self.id), topics.offer("t"))
        self.transport.start(self._take, lambda is_up: self.here() if is_up else None)

    def will(self) -> tuple[str, bytes]:
        self.said.append(self.presence.will())
        return self.said[-1]

    def here(self) -> None:
        self.said.append(self.presence.here())
        self.transport.publish(*self.said[-1], retain=True)
        if self.offers:
            self.check_in()

    def check_in(self, task: str = "t", *, ready: bool = True, **more: Any) -> None:
        call = more.pop("call", None) or self.offers[task].call
        said = self.presence.check_in(call, ready=ready, examples=self.examples, **more)
        topic = topics.up(task, self.id, "checkin")
        self.said.append((topic, self.send(said, topic)))

    def _take(self, topic: str, payload: bytes) -> None:
        super()._take(topic, payload)
        if topics.parse(topic).kind == "heard":
            word: Message = _read(topic, payload)
            assert isinstance(word, Heard)
            self.heard.append(word)
            if self.presence.heard(word):
                self.here()


def _read(topic: str, payload: bytes) -> Message:
    from edge_sdk import messages

    return messages.decode(payload, topic)[0]


def fleet(world: World, count: int = 2, **options: Any) -> list[Numbered]:
    devices = [Numbered(world.broker, i, **options) for i in range(1, count + 1)]
    for device in devices:
        device.start()
    return devices


def played(world: World, said: list[tuple[str, bytes]]) -> None:
    """Say once more what was said, as somebody whom no access list keeps from it."""
    for topic, payload in said:
        world.broker.publish(topic, payload, retain="status" in topic)


def test_wills_and_declines_that_are_played_back_take_nobody_out_of_a_round(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        devices = fleet(world)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            devices[0].check_in(ready=False, reason="conditions")
            devices[0].check_in()
            world.broker.cut(devices[0].id)
            await world.until(lambda: coordinator.fleet.has_left(devices[0].id))
            world.broker.resume()
            await world.until(lambda: len(coordinator.fleet.ready("t")) == 2)
            before = dict(coordinator.fleet.devices)
            said = [frame for device in devices for frame in device.said]
            will = devices[0].said.index(next(f for f in reversed(devices[0].said) if _is_will(f)))
            unheard = {devices[0].said[will], devices[1].said[0]}  # of connections that stand
            outdated = coordinator.counters["outdated"]
            played(world, [frame for frame in said if frame not in unheard] * 2)
            await world.until(lambda: not world.broker.pump() and coordinator.counters["outdated"])
            await world.until(lambda: coordinator.counters["outdated"] > outdated + 4)
            assert coordinator.fleet.devices == before
            for device in devices:
                device.report(1)
            await world.until(lambda: world.results)
        (result,) = world.results
        assert (result.outcome, result.left, result.declined) == ("commit", (), ())

    play(tmp_path, story)


def _is_will(frame: tuple[str, bytes]) -> bool:
    message = _read(*frame)
    return getattr(message, "online", True) is False


def test_after_a_restart_old_statuses_that_are_retained_hide_nobody(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = fleet(world)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
        old = [frame for device in devices for frame in device.said if _is_will(frame)]
        for device in devices:
            world.broker.cut(device.id)
        world.broker.resume()
        world.broker.pump()
        played(world, old)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(lambda: len(coordinator.fleet.ready("t")) == 2)

    play(tmp_path, story)


def test_a_device_whose_count_of_starts_is_lost_is_back_in_a_moment(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = fleet(world, boot=50)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            world.broker.cut(devices[0].id)
            again = Numbered(world.broker, 1, boot=1, start=8)
            again.start()
            await world.until(lambda: coordinator.fleet.devices[again.id].start == 8)
            assert [(w.boot, w.start) for w in again.heard] == [(50, 7)]
            assert coordinator.fleet.devices[again.id].boot == 51
            await world.until(lambda: again.id in coordinator.fleet.ready("t"))
            world.broker.cut(again.id)
            await world.until(lambda: coordinator.fleet.has_left(again.id))
        (row,) = [r for r in ledger.fleet(world.folder) if r["id"] == again.id]
        assert not row["online"]

    play(tmp_path, story)


def test_who_plays_frames_of_an_earlier_start_is_told_little_and_seldom(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = fleet(world, boot=50)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            old = Numbered(world.broker, 1, boot=3, start=9)
            frames = [old.presence.will()] + [old.presence.here()] * 20
            played(world, frames)
            await world.until(lambda: coordinator.counters["outdated"] >= 21)
            await world.until(lambda: devices[0].heard)
            world.clock.advance(intake.TELL_EVERY_S)
            played(world, frames)
            await world.until(lambda: coordinator.counters["outdated"] >= 42)
            await world.until(lambda: len(devices[0].heard) == 2)
            assert coordinator.fleet.is_online(devices[0].id)

    play(tmp_path, story)


def test_who_asks_is_told_which_offer_holds_and_it_is_said_again_seldom(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = fleet(world)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            world.clock.advance(intake.OFFER_EVERY_S)
            old = world.broker.retained[topics.offer("t")]
            world.broker.publish(topics.offer("t"), b"an old one", retain=True)
            world.broker.pump = _bearing(world)  # type: ignore[method-assign]  # the devices do not read it
            for _ in range(3):
                devices[0].check_in(call=99, asks=True)
            await world.until(lambda: len(devices[0].heard) == 3)
            await world.until(lambda: world.broker.retained[topics.offer("t")] == old)
            offer, last = devices[0].offers["t"], devices[0].heard[-1]
            assert [word.turn for word in devices[0].heard] == [2, 3, 4]
            assert (last.start, last.call, last.round) == (7, offer.call, offer.round)
            assert coordinator.fleet.ready("t") == {d.id for d in devices}

    play(tmp_path, story)


def _bearing(world: World) -> Any:
    """Return a `pump` under which a device bears a frame that is none."""
    from edge_sdk.errors import MessageError

    pump = type(world.broker).pump

    def bear() -> Any:
        while True:
            try:
                return pump(world.broker)
            except MessageError:
                continue

    return bear


def test_a_store_put_back_from_a_copy_answers_with_its_own_call(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = fleet(world)
        async with world.coordinator((TASK, PACE)):
            await world.until(invited(devices, 1))
        shutil.copytree(world.folder, tmp_path / "copy")
        for _ in range(3):
            async with world.coordinator((TASK, PACE)) as coordinator:
                await world.until(lambda c=coordinator: len(c.fleet.ready("t")) == 2)
        ahead = devices[0].offers["t"].call
        shutil.rmtree(world.folder)
        shutil.copytree(tmp_path / "copy", world.folder)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(lambda: devices[0].offers["t"].call < ahead)
            devices[0].check_in(call=ahead, asks=True)
            await world.until(lambda: devices[0].heard)
            assert devices[0].heard[-1].call == devices[0].offers["t"].call < ahead
            await world.until(lambda: len(coordinator.fleet.ready("t")) == 2)

    play(tmp_path, story)


def test_a_decline_is_of_the_round_that_it_names_and_of_no_other(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = fleet(world)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            for device in devices:
                device.report(1)
            await world.until(invited(devices, 2))
            devices[0].check_in(ready=False, reason="version", number=1)
            devices[0].check_in()
            devices[1].check_in(ready=False, reason="version", number=1)
            await world.until(lambda: "t" in coordinator.fleet.reasons)
            await world.until(lambda: coordinator.fleet.ready("t") == {devices[0].id})
            for device in devices:
                device.report(2)
            await world.until(lambda: len(world.results) == 2)
        assert [r.outcome for r in world.results] == ["commit"] * 2
        assert [r.declined for r in world.results] == [()] * 2

    play(tmp_path, story)


def test_why_a_device_declines_and_why_it_is_not_ready_is_kept_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(world: World) -> None:
        one, two, three = devices = fleet(world, 3)
        pace = pacing.rounds(cohort=3, quorum=1, deadline_s=600)
        async with world.coordinator((TASK, pace)) as coordinator:
            await world.until(invited(devices, 1))
            two.check_in(ready=False, reason="disk")
            three.check_in(ready=False, reason="a-later-word")
            one.report(1)
            await world.until(lambda: world.results)
            await world.until(lambda: world.clock.advance(1.0) or invited([one], 2)())
            assert coordinator.fleet.reasons["t"] == {two.id: "disk", three.id: "a-later-word"}
        assert world.results[0].reasons == {two.id: "disk", three.id: "a-later-word"}
        (task,) = why(world.folder, two.id)["tasks"]
        told = {
            row["round"]: (row["standing"], row["end"], row["reason"]) for row in task["rounds"]
        }
        assert told == {1: ("invited", "declined", "disk"), 2: ("not checked in", None, "disk")}
        (row,) = [row for row in ledger.fleet(world.folder) if row["id"] == three.id]
        assert row["declined"] == {"t": {"round": 1, "reason": "a-later-word"}}
        at = ("--store", str(world.folder))
        assert main(["why", two.id, *at]) == 0
        said = capsys.readouterr().out
        assert "invited; declined: its disk was full" in said
        assert "not checked in: its disk was full" in said
        assert main(["why", three.id, *at]) == 0
        assert "declined: a-later-word" in capsys.readouterr().out
        assert main(["fleet", *at]) == 0
        assert "t:round-1:disk" in capsys.readouterr().out

    play(tmp_path, story)
