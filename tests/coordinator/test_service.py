# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from fake_fleet import BUNDLE, FakeDevice, World, body, invited, play

import coordinator as coordinator_package
from coordinator import ledger, pacing, sums
from coordinator.aggregators import Report, Sums
from coordinator.pacing import Pace
from coordinator.service import Coordinator
from coordinator.strategy import fedadam, fedavg
from coordinator.task import Task
from coordinator.writer import ContradictionError
from edge_sdk import chunks, codec, messages, params, topics
from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.messages import Update
from edge_sdk.signing import DeviceKey


def pace(cohort: int = 4, quorum: int = 2, count: int | None = 3, deadline_s: float = 60) -> Pace:
    return pacing.rounds(cohort=cohort, quorum=quorum, deadline_s=deadline_s, count=count)


def task(name: str = "t", **changes: object) -> Task:
    options: dict[str, Any] = {"codec": "dense", "downlink": "dense"}
    return Task(name, BUNDLE, **(options | changes))


def answered(device: FakeDevice, count: int = 1) -> Callable[[], bool]:
    return lambda: len(device.receipts) >= count


async def all_report(world: World, devices: list[FakeDevice]) -> None:
    """Let each answer its newest invitation, and wait for the first result."""
    for device in devices:
        device.report()
    await world.until(lambda: world.results)


async def full_round(world: World, devices: list[FakeDevice], number: int) -> None:
    await world.until(invited(devices, number))
    for device in devices:
        device.report(number)
    await world.until(lambda: world.results and world.results[-1].number == number)


class FullDisk:
    """In place of a method of the store: takes nothing, and counts what it refused."""

    def __init__(self) -> None:
        self.refusals = 0

    async def __call__(self, *_: object) -> NoReturn:
        self.refusals += 1
        raise StoreError("cannot write the store: No space left on device")


def expected_mean(reports: list[tuple[int, int]], cap: int = 10_000) -> np.ndarray:
    """The weighted mean of (examples, seed) updates in float64, by the plain formula."""
    weights = [min(n, cap) for n, _ in reports]
    deltas = [
        params.flatten(codec.decode(body(s), BUNDLE.shapes), BUNDLE.shapes).astype(np.float64)
        for _, s in reports
    ]
    return np.average(deltas, axis=0, weights=weights)


def test_rounds_commit_the_weighted_mean_of_what_devices_report(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(), pace(count=2))) as coordinator:
            await full_round(world, devices, 1)
            first = await coordinator.params(task(), 1)
            got = params.flatten(first, BUNDLE.shapes) - params.flatten(
                BUNDLE.params(), BUNDLE.shapes
            )
            mean = expected_mean([(10 * i, 1000 + i) for i in (1, 2, 3, 4)])
            np.testing.assert_allclose(got, mean, rtol=1e-4, atol=1e-6)
            await full_round(world, devices, 2)
            await world.until(lambda: devices[0].offers["t"].state == "closed")
        r = world.results[0]
        assert (r.number, r.version, r.outcome) == (1, 1, "commit")
        assert r.reported == tuple(sorted(d.id for d in devices))
        assert r.metrics["loss"] == pytest.approx((10 + 20 / 2 + 30 / 3 + 40 / 4) / 100)
        assert r.metrics["bytes_up"] > 0
        assert [d.outcomes() for d in devices] == [["counted", "counted"]] * 4
        assert [x.version for x in world.results] == [1, 2]

    play(tmp_path, story)


def test_a_device_gets_all_it_needs_from_what_is_retained(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(epochs=2, lr=0.5, seed=9), pace())):
            await full_round(world, devices, 1)
            late_comer = FakeDevice(world.broker, 9)
            late_comer.start()
            await world.until(lambda: "t" in late_comer.offers)
            offer = late_comer.offers["t"]
            parts = late_comer.parts
            weights = b"".join(p.body for k, p in sorted(parts.items()) if k[1] == "weights")
            packed = b"".join(p.body for k, p in sorted(parts.items()) if k[1] == "bundle")
            bundle = zlib.decompress(packed)
            assert len(packed) < len(bundle)
            assert hashlib.sha256(weights).digest() == offer.model
            assert (len(weights), len(bundle)) == (offer.model_size, offer.bundle_size)
            assert bundle == BUNDLE.data
            assert offer.version == 1
        _, invite = devices[0].invites[0]
        assert (invite.epochs, invite.lr, invite.batch, invite.steps) == (2, 0.5, 32, None)
        assert invite.codec == [["dense"]]
        assert len({d.invites[0][1].seed for d in devices}) == 4

    play(tmp_path, story)


def test_the_deadline_commits_with_a_quorum_and_folds_the_straggler_next_time(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(), pace(count=2))) as coordinator:
            await world.until(invited(devices, 1))
            for device in devices[:3]:
                device.report()
            await world.until(lambda: coordinator.counters["counted"] == 3)
            world.clock.advance(61)
            await world.until(lambda: world.results)
            assert world.results[0].stragglers == (devices[3].id,)
            devices[3].report(1)
            await world.until(answered(devices[3]))
            assert devices[3].outcomes() == ["late"]
            await full_round(world, devices, 2)
            before = params.flatten(await coordinator.params(task(), 1), BUNDLE.shapes)
            after = params.flatten(await coordinator.params(task(), 2), BUNDLE.shapes)
        assert world.results[1].late == (devices[3].id,)
        weights = [10, 20, 30, 40, 40 * round(256 * 2**-0.5) / 256]
        seeds = [2001, 2002, 2003, 2004, 1004]
        deltas = [expected_mean([(1, s)]) for s in seeds]
        mean = np.average(deltas, axis=0, weights=weights)
        np.testing.assert_allclose(after - before, mean, rtol=1e-4, atol=1e-6)

    play(tmp_path, story)


def test_a_task_may_refuse_late_updates(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(late="refuse"), pace())) as coordinator:
            await world.until(invited(devices, 1))
            for device in devices[:3]:
                device.report()
            await world.until(lambda: coordinator.counters["counted"] == 3)
            world.clock.advance(61)
            await world.until(lambda: world.results)
            devices[3].report(1)
            await world.until(answered(devices[3]))
        assert devices[3].outcomes() == ["stale"]

    play(tmp_path, story)


def test_a_round_does_not_wait_for_devices_that_left_or_declined(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(), pace())):
            await world.until(invited(devices, 1))
            devices[0].report()
            devices[1].report()
            world.broker.cut(devices[2].id)
            devices[3].check_in(ready=False)
            await world.until(lambda: world.results)
        r = world.results[0]
        assert (r.outcome, r.left, r.declined) == ("commit", (devices[2].id,), (devices[3].id,))
        assert world.clock.monotonic() == 0

    play(tmp_path, story)


def test_without_a_quorum_the_round_aborts_and_what_was_counted_is_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(), pace(quorum=3, count=1))) as coordinator:
            await world.until(invited(devices, 1))
            devices[0].report()
            await world.until(answered(devices[0]))
            world.clock.advance(61)
            await world.until(lambda: world.results)
            r = world.results[0]
            assert (r.outcome, r.version, r.reason) == (
                "abort",
                0,
                "1 of 3 needed devices reported",
            )
            await world.until(lambda: coordinator.counters["messages"] > 0)
            world.clock.advance(6)
            await world.until(invited(devices, 2))
            for device in devices[1:]:
                device.report(2)
            await world.until(lambda: coordinator.counters["counted"] == 4)
            world.clock.advance(61)
            await world.until(lambda: len(world.results) == 2)
            got = params.flatten(await coordinator.params(task(), 1), BUNDLE.shapes)
        r = world.results[1]
        assert (r.number, r.version, r.outcome, r.late) == (2, 1, "commit", (devices[0].id,))
        mean = expected_mean([(10, 1001), (20, 2002), (30, 2003), (40, 2004)])
        start = params.flatten(BUNDLE.params(), BUNDLE.shapes)
        np.testing.assert_allclose(got - start, mean, rtol=1e-4, atol=1e-6)

    play(tmp_path, story)


def test_one_device_counts_once_a_round_whatever_it_sends(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(), pace())) as coordinator:
            await world.until(invited(devices, 1))
            frame = devices[0].report()
            await world.until(answered(devices[0]))
            devices[0].report(body=body(77))
            devices[0].transport.publish(topics.up("t", devices[0].id, "update"), frame)
            await world.until(answered(devices[0], 3))
            assert coordinator.counters["counted"] == 1
        first, second, third = devices[0].receipts
        assert first.outcome == "counted"
        assert second.outcome == third.outcome == "duplicate"
        assert second.counted == third.counted == first.update
        assert third.update == first.update

    play(tmp_path, story)


def test_an_update_in_chunks_counts_like_one_in_a_piece(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(), pace())):
            await world.until(invited(devices, 1))
            assert len(devices[0].report_in_chunks(512)) > 1
            await all_report(world, devices[1:])
        assert devices[0].outcomes() == ["counted"]
        assert len(world.results[0].reported) == 4

    play(tmp_path, story)


def _floats(value: float) -> bytes:
    """A dense body whose first number is `value`: forged, because an honest codec refuses it."""
    raw = bytearray(body(1))
    raw[-4:] = np.float32(value).tobytes()
    return bytes(raw)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body": _floats(float("nan"))}, ""),
        ({"body": _floats(float("inf"))}, ""),
        ({"body": body(1, scale=1e6)}, "norm"),
        ({"body": body(1)[:-3]}, ""),
        ({"body": b""}, "update body"),
        ({"body": b"\xff" * 500}, ""),
        ({"examples": 0}, "example"),
        ({"version": 7}, "version 0"),
        ({"round": 9}, "round 9"),
    ],
)
def test_a_bad_update_is_answered_with_the_reason_and_the_round_goes_on(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(), pace(count=1))):
            await world.until(invited(devices, 1))
            devices[0].report(**changes)
            await world.until(answered(devices[0]))
            receipt = devices[0].receipts[0]
            assert receipt.outcome == ("stale" if "round" in changes else "refused")
            assert reason in receipt.reason
            assert receipt.reason
            await all_report(world, devices)
        assert len(world.results[0].reported) == 4

    play(tmp_path, story)


def test_frames_that_prove_nothing_are_counted_and_not_answered(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(), pace(count=1))) as coordinator:
            await world.until(invited(devices, 1))
            device = devices[0]
            topic = topics.up("t", device.id, "update")
            good = device.frame(device.update(), topic)
            flipped = bytearray(good)
            flipped[len(good) // 2] ^= 1
            other = DeviceKey.from_seed(b"x" * 32)
            bad = {
                "truncated": good[:-20],
                "bit-flipped": bytes(flipped),
                "oversized": good + b"\0" * messages.MAX_FRAME,
                "empty": b"",
                "another's signature": device.frame(device.update(), topic, other),
                "unsigned": good[:-64] + b"\0" * 64,
            }
            for payload in bad.values():
                device.transport.publish(topic, payload)
            device.transport.publish(topics.up("nobody", device.id, "update"), good)
            device.transport.publish(topics.up("t", other.id, "update"), good)
            device.transport.publish(topics.offer("t") + "/nonsense", b"hello")
            await world.until(
                lambda: coordinator.counters["malformed"] + coordinator.counters["forged"] >= 6
            )
            await all_report(world, devices)
            assert coordinator.counters["crashed"] == 0
            assert coordinator.counters["forged"] == 2
        assert devices[0].outcomes() == ["counted"]
        assert len(world.results[0].reported) == 4

    play(tmp_path, story)


def test_an_update_without_an_invitation_is_refused(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(5)
        async with world.coordinator((task(), pace())):
            await world.until(lambda: sum(bool(d.invites) for d in devices) == 4)
            out = next(d for d in devices if not d.invites)
            update = Update(1, 0, 10, 5, 0.1, 0.5, body(3))
            out.send(update, topics.up("t", out.id, "update"))
            await world.until(answered(out))
        assert out.outcomes() == ["refused"]
        assert "not invited" in out.receipts[0].reason

    play(tmp_path, story)


def test_the_examples_that_a_device_claims_are_capped(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        capped = task(max_examples=20)
        async with world.coordinator((capped, pace(2, 2, 1))) as coordinator:
            await world.until(invited(devices, 1))
            devices[0].report()
            devices[1].report(examples=4_000_000_000)
            await world.until(lambda: world.results)
            got = params.flatten(await coordinator.params(capped, 1), BUNDLE.shapes)
        mean = expected_mean([(10, 1001), (20, 1002)])
        start = params.flatten(BUNDLE.params(), BUNDLE.shapes)
        np.testing.assert_allclose(got - start, mean, rtol=1e-4, atol=1e-6)

    play(tmp_path, story)


@pytest.mark.parametrize("strategy", [fedavg(), fedadam(lr=0.05)])
def test_a_coordinator_killed_in_a_round_comes_to_the_same_model(
    tmp_path: Path, strategy: object
) -> None:
    async def undisturbed(world: World) -> None:
        devices = world.devices(4)
        async with world.coordinator((task(strategy=strategy), pace(count=3))):
            for number in (1, 2, 3):
                await full_round(world, devices, number)

    async def killed(world: World) -> None:
        devices = world.devices(4)
        again = (task(strategy=strategy), pace(count=3))
        async with world.coordinator(again):
            await full_round(world, devices, 1)
            await world.until(invited(devices, 2))
            devices[3].report(2)
            devices[1].report(2)
            await world.until(lambda: devices[1].outcomes(2) and devices[3].outcomes(2))
        before = [len(d.invites) for d in devices]
        async with world.coordinator(again):
            await world.until(lambda: len(devices[0].invites) > before[0])
            await world.until(lambda: len(devices[2].invites) > before[2])
            assert [len(d.invites) for d in devices] == [before[0] + 1, before[1], before[2] + 1, 2]
            for device in (devices[2], devices[1], devices[0]):
                device.report(2)
            await world.until(lambda: world.results[-1].number == 2)
            assert devices[1].outcomes(2) == ["counted", "duplicate"]
        async with world.coordinator(again):
            await full_round(world, devices[::-1], 3)
        calls = {d.offers["t"].call for d in devices}
        assert calls == {3}

    calm, rough = play(tmp_path / "a", undisturbed), play(tmp_path / "b", killed)
    assert [r.digest for r in calm.results] == [r.digest for r in rough.results]
    assert [r.version for r in rough.results] == [1, 2, 3]
    assert ledger.models(rough.folder)[-1]["digest"] == calm.results[-1].digest


def test_the_order_in_which_updates_arrive_changes_no_bit(tmp_path: Path) -> None:
    def run(folder: Path, order: list[int]) -> str:
        async def story(world: World) -> None:
            devices = world.devices(4)
            async with world.coordinator((task(), pace(count=1))):
                await world.until(invited(devices, 1))
                for i in order:
                    devices[i].report()
                    await world.until(answered(devices[i]))
                await world.until(lambda: world.results)

        return play(folder, story).results[0].digest

    digests = {run(tmp_path / str(o), list(o)) for o in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0))}
    assert len(digests) == 1


def test_two_tasks_train_at_once_on_one_connection(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3, ("one", "two"))
        both = [(task("one"), pace(3, count=2)), (task("two"), pace(3, count=1))]
        async with world.coordinator(*both):
            for number, name in ((1, "one"), (1, "two"), (2, "one")):
                await world.until(invited(devices, number, name))
                for device in devices:
                    device.report(number, name)
            await world.until(lambda: len(world.results) == 3)
        assert sorted((r.number, r.version) for r in world.results) == [(1, 1), (1, 1), (2, 2)]

    play(tmp_path, story)


def test_a_task_is_trained_by_one_loop_at_a_time(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        async with world.coordinator((task(), pace())) as coordinator:
            await world.until(lambda: topics.offer("t") in world.broker.retained)
            with pytest.raises(ConfigError, match="already"):
                await anext(coordinator.train(task(), pace()))

    play(tmp_path, story)


def test_a_finished_task_is_not_trained_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(2, count=1))) as coordinator:
            await full_round(world, devices, 1)
            await world.until(lambda: devices[0].offers["t"].state == "closed")
            assert [r async for r in coordinator.train(task(), pace(2, count=1))] == []
            assert ledger.rounds(world.folder)[0]["outcome"] == "commit"

    play(tmp_path, story)


def test_a_device_that_comes_back_is_invited_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace(3, quorum=3, count=1))):
            await world.until(invited(devices, 1))
            world.broker.cut(devices[0].id)
            await world.until(lambda: True)
            world.broker.restore(devices[0].id)
            devices[0].send(devices[0].status(online=True), topics.status(devices[0].id))
            devices[0].check_in()
            await world.until(lambda: len(devices[0].invites) == 2)
            await all_report(world, devices)
        assert len(world.results[0].reported) == 3

    play(tmp_path, story)


def test_the_disk_failing_costs_a_receipt_but_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(2, 2, 1))) as coordinator:
            await world.until(invited(devices, 1))
            count = coordinator._store.count

            monkeypatch.setattr(coordinator._store, "count", FullDisk())
            frame = devices[0].report()
            await world.until(lambda: coordinator.counters["store"] == 1)
            assert not devices[0].receipts
            monkeypatch.setattr(coordinator._store, "count", count)
            devices[0].transport.publish(topics.up("t", devices[0].id, "update"), frame)
            devices[1].report()
            await world.until(lambda: world.results)
        assert devices[0].outcomes() == ["counted"]

    play(tmp_path, story)


def test_weights_that_would_not_be_finite_are_never_published(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        wild = task(strategy=fedavg(lr=3e38), max_norm=1e5)
        async with world.coordinator((wild, pace(2, 2, 1))):
            await world.until(invited(devices, 1))
            for device in devices:
                device.report(body=body(5, scale=1e3))
            await world.until(lambda: world.results)
        r = world.results[0]
        assert (r.outcome, r.version) == ("abort", 0)
        assert "finite" in r.reason

    play(tmp_path, story)


def test_a_dead_connection_ends_training_with_its_reason(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        class Dead:
            on_up = staticmethod(lambda: None)

            async def messages(self) -> AsyncIterator[Any]:
                raise ConfigError("the broker refuses us")
                yield

            async def subscribe(self, *filters: str) -> None: ...

            async def publish(
                self, topic: str, payload: bytes, *, retain: bool = False
            ) -> None: ...

        coordinator = Coordinator(store=world.folder, link=Dead(), clock=world.clock)
        async with coordinator:
            with pytest.raises(ConfigError, match="refuses"):
                await anext(coordinator.train(task(), pace()))

    play(tmp_path, story)


def test_a_resumed_round_does_not_wait_for_a_device_that_left_meanwhile(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        job = (task(), pace(3, quorum=2, count=1))
        async with world.coordinator(job):
            await world.until(invited(devices, 1))
        world.broker.cut(devices[0].id)
        async with world.coordinator(job):
            await world.until(lambda: all(len(d.invites) == 2 for d in devices[1:]))
            devices[1].report()
            devices[2].report()
            await world.until(lambda: world.results)
        assert world.results[0].left == (devices[0].id,)
        assert world.clock.monotonic() == 0

    play(tmp_path, story)


def test_a_message_that_breaks_the_code_is_counted_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(2, 2, 1))) as coordinator:
            await world.until(invited(devices, 1))
            desk = coordinator._intake.desks["t"]
            monkeypatch.setattr(type(desk), "judge", lambda *_: 1 / 0)
            for _ in range(3):
                devices[0].report()
            await world.until(lambda: coordinator.counters["crashed"] == 3)
            monkeypatch.undo()
            await all_report(world, devices)
        assert sum("ZeroDivisionError" in r.exc_text for r in caplog.records if r.exc_text) == 1
        assert all(body(1000)[10:30].hex() not in r.getMessage() for r in caplog.records)

    play(tmp_path, story)


def test_a_check_in_that_overtakes_its_status_is_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = FakeDevice(world.broker, 1)
        device.checks_in = False
        async with world.coordinator((task(), pace(1, 1, 1))) as coordinator:
            await world.until(lambda: topics.offer("t") in world.broker.retained)
            device.transport = world.broker.transport(device.id)
            device.transport.start(device._take, lambda _up: None)
            device.transport.subscribe(topics.offer("t"), topics.down_filter("t", device.id))
            await world.until(lambda: "t" in device.offers)
            device.check_in()
            await world.until(lambda: coordinator.counters["stranger"] == 1)
            device.send(device.status(online=True), topics.status(device.id), retain=True)
            await world.until(invited([device], 1))

    play(tmp_path, story)


def test_what_is_outdated_or_meant_for_nobody_changes_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2, ("t", "other"))
        async with world.coordinator((task(), pace(3, 2, 1))) as coordinator:
            await world.until(lambda: len(coordinator.fleet.ready("t")) == 2)
            device = devices[0]
            old = device.frame(
                messages.CheckIn(call=99, ready=False, examples=5),
                topics.up("t", device.id, "checkin"),
            )
            device.transport.publish(topics.up("t", device.id, "checkin"), old)
            other = topics.up("other", device.id, "checkin")
            check_in = messages.CheckIn(call=1, ready=True, examples=5)
            coordinator._intake.take(other, device.frame(check_in, other))
            device.boot = 0
            device.send(device.status(online=False), topics.status(device.id))
            await world.until(lambda: coordinator.counters["outdated"] == 2)
            await world.until(lambda: coordinator.counters["unknown_task"] == 1)
            assert len(coordinator.fleet.ready("t")) == 2

    play(tmp_path, story)


def test_a_transfer_that_is_announced_too_large_is_refused_before_it_is_held(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(2, 2, 1))) as coordinator:
            await world.until(invited(devices, 1))
            size = 50 * 2**20
            chunk = messages.Chunk(b"h" * 32, 0, 500, size, body=b"x" * (size // 500))
            devices[0].send(chunk, topics.up("t", devices[0].id, "chunk"))
            await world.until(lambda: coordinator.counters["malformed"] == 1)
            assert coordinator._intake._assembler.bytes == 0
            topic = topics.up("t", devices[0].id, "chunk")
            forged = devices[0].frame(devices[0].update(), topics.up("t", devices[0].id, "update"))
            forged = forged[:-64] + bytes(64)
            for part in chunks.split(forged, 600):
                devices[0].send(part, topic)
            await world.until(lambda: coordinator.counters["forged"] == 1)

    play(tmp_path, story)


def test_a_commit_waits_for_the_disk_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(2, 2, 1))) as coordinator:
            await world.until(invited(devices, 1))
            full = FullDisk()
            with monkeypatch.context() as patch:
                patch.setattr(coordinator._store, "commit", full)
                for device in devices:
                    device.report()
                await world.until(lambda: full.refusals == 1)
                world.clock.advance(2)
                await world.until(lambda: full.refusals == 2)
            assert not world.results
            world.clock.advance(2)
            await world.until(lambda: world.results)
        assert world.results[0].version == 1

    play(tmp_path, story)


def test_a_broker_that_comes_back_while_the_disk_is_full_hears_all_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(2, 2, 1))) as coordinator:
            await world.until(invited(devices, 1))
            call, full = coordinator._intake.desks["t"].call, FullDisk()
            with monkeypatch.context() as patch:
                patch.setattr(coordinator._store, "next_call", full)
                coordinator._reconnected()
                await world.until(lambda: full.refusals == 1)
            world.clock.advance(2)
            await world.until(lambda: coordinator._intake.desks["t"].call == call + 1)
            await all_report(world, devices)

    play(tmp_path, story)


def test_an_update_that_would_overflow_the_sum_goes_into_the_version_after(
    tmp_path: Path,
) -> None:
    calls = 0

    plain = fedavg()

    def add(state: Sums, update: codec.Lattice, report: Report) -> Sums:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise sums.AccumulatorFull("expected a sum below 2**63")
        return plain.aggregator.add(state, update, report)

    narrow = plain._replace(aggregator=plain.aggregator._replace(add=add))

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(strategy=narrow), pace(3, 3, 2))):
            await full_round(world, devices, 1)
            await full_round(world, devices, 2)
        assert [d.outcomes() for d in devices] == [["counted", "counted"]] * 3
        (late,) = world.results[1].late
        rows = {(u["round"], u["device"]): u["folded"] for u in ledger.updates(world.folder)}
        assert sorted(rows.values()) == [1, 1, 2, 2, 2, 2]
        assert rows[1, late] == 2

    play(tmp_path, story)


def test_meeting_the_goal_early_does_not_count_against_completion(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(6)
        eager = pacing.rounds(cohort=4, deadline_s=60, count=2, overselect=1.5)
        async with world.coordinator((task(), eager)) as coordinator:
            await world.until(invited(devices, 1))
            for device in devices[:4]:
                device.report()
            await world.until(lambda: world.results)
            assert coordinator.fleet.completion_of("t") == 1.0
            await world.until(invited(devices, 2))
            for device in devices[:3]:
                device.report(2)
            await world.until(lambda: coordinator.counters["counted"] == 7)
            world.clock.advance(61)
            await world.until(lambda: len(world.results) == 2)
            assert coordinator.fleet.completion_of("t") == pytest.approx(0.875)

    play(tmp_path, story)


def test_names_load_on_first_use() -> None:
    code = (
        "import sys, coordinator; assert 'numpy' not in sys.modules; "
        "from coordinator import Coordinator, Task, pacing, strategies; "
        "assert 'onnx' not in sys.modules and 'aiohttp' not in sys.modules; "
        "print(sorted(coordinator.__all__) == dir(coordinator))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = coordinator_package.Nonsense


@pytest.mark.parametrize("forgets", [False, True])
def test_a_broker_that_was_away_costs_a_roll_call_and_nothing_else(
    tmp_path: Path, forgets: bool
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace(3, 3, 1))) as coordinator:
            await world.until(invited(devices, 1))
            devices[0].report()
            await world.until(answered(devices[0]))
            devices[1].report()
            world.broker.stop(forget=forgets)
            world.broker.resume()
            for device in devices:  # as a device does when it is connected again
                device.send(device.status(online=True), topics.status(device.id), retain=True)
            await world.until(lambda: all(d.offers["t"].call == 2 for d in devices))
            await world.until(lambda: len(devices[2].invites) > 1)
            devices[2].report()
            await world.until(lambda: world.results)
            assert len(coordinator.fleet.ready("t")) == 3
        assert len(world.results[0].reported) == 3
        assert world.clock.monotonic() == 0

    play(tmp_path, story)


def test_a_round_is_not_opened_before_the_disk_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        async with world.coordinator((task(), pace(2, 2, 1))) as coordinator:
            full = FullDisk()
            with monkeypatch.context() as patch:
                patch.setattr(coordinator._store, "open_round", full)
                devices = world.devices(2)
                await world.until(lambda: full.refusals == 1)
                assert not devices[0].invites
            world.clock.advance(2)
            await world.until(invited(devices, 1))

    play(tmp_path, story)


def test_a_store_that_contradicts_us_stops_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        async with world.coordinator() as coordinator:
            world.devices(2)

            async def contradict(*_: object) -> None:
                raise ContradictionError("task t: round 1 is not open")

            monkeypatch.setattr(coordinator._store, "open_round", contradict)
            loop = asyncio.create_task(anext(coordinator.train(task(), pace(2, 2, 1))))
            await world.until(loop.done)
            with pytest.raises(ContradictionError):
                loop.result()

    play(tmp_path, story)
