# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_fleet import BUNDLE, World, invited, play

from coordinator import ledger, pacing
from coordinator.cli import main
from coordinator.desk import Desk
from coordinator.docket import LETTERS_KEPT, Letter
from coordinator.letters import HEAD_BYTES, FileMarker, Letters, handled
from coordinator.store import Store
from coordinator.task import Task
from coordinator.testing import ManualClock
from edge_sdk import topics
from edge_sdk.errors import StoreError
from edge_sdk.messages import Update

PACE = pacing.rounds(cohort=3, quorum=2, deadline_s=60)
TASK = Task("t", BUNDLE, codec="dense", downlink="dense")
POISON = 666


def fails_in(method: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a desk's method fail on the poisonous update; return the list that grows each time."""
    whole, tries = getattr(Desk, method), list[int]()

    def poisoned(desk: Desk, *args: Any) -> Any:
        update = args[1] if method == "judge" else args[0]
        if update.steps == POISON:
            tries.append(update.round)
            raise ZeroDivisionError("a fault of ours")
        return whole(desk, *args)

    monkeypatch.setattr(Desk, method, poisoned)
    return tries


async def until_later(world: World, condition: Callable[[], object], seconds: float = 1.0) -> None:
    """Let the clock run until the condition holds."""

    def moved() -> bool:
        world.clock.advance(seconds)
        return bool(condition())

    await world.until(moved)


def test_an_update_that_makes_us_fail_is_tried_three_times_and_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = fails_in("judge", monkeypatch)

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            devices[0].report(1, steps=POISON)
            for device in devices[1:]:
                device.report(1)
            await world.until(lambda: all(d.outcomes() == ["counted"] for d in devices[1:]))
            assert tries == [1], "the next attempt comes after a pause"
            await until_later(world, lambda: devices[0].receipts)
            assert tries == [1, 1, 1]
            assert devices[0].outcomes() == ["refused"]
            assert "failed on this update" in devices[0].receipts[0].reason
            await world.until(lambda: world.results)
            assert coordinator.counters["dead"] == 1
        (letter,) = ledger.letters(world.folder)
        assert letter["attempts"] == 3
        assert letter["dead"]
        assert letter["topic"] == topics.up("t", devices[0].id, "update")
        assert letter["error"].startswith("ZeroDivisionError: a fault of ours (test_letters.py:")
        assert len(letter["head"]) == 2 * HEAD_BYTES
        async with world.coordinator((TASK, PACE)) as again:
            await world.until(lambda: len(again.fleet.ready("t")) == 3)
            devices[0].report(1, steps=POISON)
            await world.until(lambda: len(devices[0].receipts) == 2)
            assert len(tries) == 3, "also after a restart it is not tried again"
        main(["deadletters", "--store", str(world.folder)])
        assert "ZeroDivisionError" in capsys.readouterr().out
        main(["deadletters", "--store", str(world.folder), "--json"])
        assert json.loads(capsys.readouterr().out)[0]["dead"] is True

    play(tmp_path, story)


def test_a_message_that_fails_before_its_author_is_known_is_dropped_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = list[int]()

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            whole = coordinator._intake._check_in

            def poisoned(desk: Any, device: str, check_in: Any) -> None:
                if device == devices[0].id:
                    tries.append(1)
                    raise KeyError("a fault of ours")
                whole(desk, device, check_in)

            monkeypatch.setattr(coordinator._intake, "_check_in", poisoned)
            devices[0].check_in()
            await until_later(world, lambda: coordinator.counters["dead"] == 1)
            assert len(tries) == 3
            devices[0].check_in()
            await world.until(lambda: coordinator.counters["dead"] == 2)
            assert len(tries) == 3

    play(tmp_path, story)


def test_what_fails_once_and_works_then_is_counted_and_forgiven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tries = Desk.judge, list[int]()

    def flaky(desk: Desk, device: str, update: Update) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise MemoryError
        return whole(desk, device, update)

    monkeypatch.setattr(Desk, "judge", flaky)

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            devices[0].report(1)
            await until_later(world, lambda: devices[0].receipts)
            assert devices[0].outcomes() == ["counted"]
            assert len(ledger.letters(world.folder)) == 1
            await coordinator._warden.heed()
        assert ledger.letters(world.folder) == []

    play(tmp_path, story)


def test_many_poisonous_messages_do_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_in("judge", monkeypatch)

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            for loss in range(LETTERS_KEPT + 20):
                devices[0].report(1, steps=POISON, loss=float(loss))
            devices[1].report(1)
            devices[2].report(1)
            await world.until(lambda: all(d.outcomes() == ["counted"] for d in devices[1:]))
            dead = LETTERS_KEPT + 20
            await until_later(world, lambda: coordinator.counters["dead"] == dead)
        assert len(ledger.letters(world.folder)) == LETTERS_KEPT

    play(tmp_path, story)


def test_when_the_store_refuses_a_failure_ends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = fails_in("judge", monkeypatch)

    async def refuse(_work: object, *, urgent: bool = False) -> None:
        raise StoreError("the disk is full")

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            writer = coordinator._store._writer
            monkeypatch.setattr(writer, "run", refuse)
            devices[0].report(1, steps=POISON)
            await until_later(world, lambda: tries)
            await world.until(lambda: not coordinator._work)
            assert len(tries) == 1
            assert devices[0].receipts == []
            monkeypatch.delattr(writer, "run")
            devices[0].report(1, steps=POISON)
            await until_later(world, lambda: devices[0].receipts)
            assert devices[0].outcomes() == ["refused"]

    play(tmp_path, story)


def test_a_message_is_known_by_its_topic_its_length_and_its_ends() -> None:
    frame = bytes(range(256)) * 10
    name = handled("read", "a", frame).name
    others = [("judge", "a", frame), ("read", "b", frame), ("read", "a", frame[:-1])]
    others += [("read", "a", b"\1" + frame[1:]), ("read", "a", frame[:-1] + b"\0")]
    assert len({name, *(handled(*other).name for other in others)}) == 6
    assert handled("read", "a", frame).name == name
    assert len(handled("read", "a" * 500, b"").topic) == 128


def test_the_marker_tells_what_was_handled_when_the_process_ended(tmp_path: Path) -> None:
    path, message = tmp_path / "handling", handled("read", "topic/é", b"payload")
    marker = FileMarker(path)
    assert marker.left() is None
    marker.set(message)
    assert FileMarker(path).left() == message
    marker.set(None)
    assert FileMarker(path).left() is None
    marker.close()
    marker.close()
    path.write_bytes(b"\xff" * 30)  # whatever stands there
    assert FileMarker(path).left() is not None
    nowhere = FileMarker(tmp_path / "none" / "handling")
    nowhere.set(message)
    assert nowhere.left() is None
    nowhere.close()


def test_two_ends_of_the_process_are_forgiven_when_the_message_is_handled(tmp_path: Path) -> None:
    message = handled("read", "t", b"x")

    async def story() -> None:
        store = Store(tmp_path / "coordinator.db")
        for starts in (1, 2):
            marker = FileMarker(tmp_path / "handling")
            marker.set(message)  # and the process dies
            letters = Letters(store, ManualClock(), FileMarker(tmp_path / "handling"))
            await letters.load()
            assert not letters.dead
            assert [(x.attempts, x.error) for x in await store.letters()] == [
                (starts, "the process ended while it was handled")
            ]
        with letters.handling(message):
            pass
        await letters.forgive()
        assert await store.letters() == []
        store.close()

    asyncio.run(story())


def test_failures_that_are_remembered_are_bounded(tmp_path: Path) -> None:
    async def story() -> None:
        store = Store(tmp_path / "coordinator.db")
        first = Letter(b"d" * 16, "t", 1, b"", "x")
        await store.failed_on(first)
        assert [(x.attempts, x.is_dead) for x in await store.letters()] == [(1, False)]
        await asyncio.gather(
            *(
                store.failed_on(Letter(i.to_bytes(16, "big"), "t", 1, b"", "x"))
                for i in range(LETTERS_KEPT + 30)
            )
        )
        kept = await store.letters()
        assert len(kept) == LETTERS_KEPT
        assert kept[-1].name == (LETTERS_KEPT + 29).to_bytes(16, "big")
        assert first.name not in {x.name for x in kept}
        store.close()

    asyncio.run(story())


STORY = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from fake_fleet import World
    from test_letters import PACE, POISON, TASK, invited
    from coordinator.desk import Desk

    whole = Desk.judge

    def poisoned(desk, device, update):
        if update.steps == POISON:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel would, out of memory
        return whole(desk, device, update)

    Desk.judge = poisoned

    async def story():
        world = World(Path(sys.argv[1]))
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)):
            await world.until(invited(devices, 1))
            devices[0].report(1, steps=POISON)
            for device in devices[1:]:
                device.report(1)
            await world.until(lambda: world.results)
            print(devices[0].receipts[0].outcome, len(world.results[0].reported))

    asyncio.run(story())
"""


def test_a_message_that_takes_the_process_down_is_set_aside_after_three_restarts(
    tmp_path: Path,
) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent / "support"), *filter(None, sys.path)])
    command = [sys.executable, "-c", textwrap.dedent(STORY), str(tmp_path / "store")]
    ends = [
        subprocess.run(
            command, check=False, env=os.environ | {"PYTHONPATH": path}, capture_output=True
        )
        for _ in range(4)
    ]
    assert [end.returncode for end in ends] == [-signal.SIGKILL] * 3 + [0], ends[-1].stderr.decode()
    assert ends[-1].stdout.split() == [b"refused", b"2"]
    (letter,) = ledger.letters(tmp_path / "store")
    assert letter["error"] == "the process ended while it was handled"
    assert "/up/" in letter["topic"]
