# SPDX-License-Identifier: Apache-2.0
"""Everything that was ever said of presence and offers, played back: no device loses its round.

The broker gives the one who does it every right, as if there were no access list. What it plays is
real: each device has left and come back, so that wills of its are among it, and refused a round.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from live_rounds import TASK, Boards, Template, check_journal, daemon, digests, until

from coordinator import ledger
from edge_sdk import messages, topics
from edge_sdk.device import Device
from edge_sdk.lasting import LastingTrainer
from edge_sdk.messages import CheckIn, Offer, Status
from edge_sdk.training import TrainFailed
from edge_sdk.transport.mqtt import Mqtt

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]
DEVICES, ROUNDS, SEED = 3, 3, 13


class Recorder:
    """Hears all that is said of presence and offers, and plays it back."""

    def __init__(self, url: str) -> None:
        self.said: list[tuple[str, bytes]] = []
        self.seen = Counter[tuple[str, str]]()
        self._rng = random.Random(SEED)  # noqa: S311 - repeats by its seed
        self._known: set[bytes] = set()
        self._mqtt = Mqtt(url, "recorder", window=20)
        self._mqtt.subscribe(topics.status_filter(), topics.offer(TASK), topics.up_filter(TASK))
        self._mqtt.start(self._heard, lambda _is_up: None)

    def _heard(self, topic: str, payload: bytes) -> None:
        address = topics.parse(topic)
        if payload in self._known or address.kind not in {"status", "offer", "checkin"}:
            return
        self._known.add(payload)
        self.said.append((topic, payload))
        self.seen[address.device, _what(topic, payload)] += 1

    def play(self) -> None:
        """Play everything back three times, in orders of its own; retained what was retained."""
        for _ in range(3):
            for topic, payload in self._rng.sample(self.said, len(self.said)):
                retain = topics.parse(topic).kind != "checkin"
                self._mqtt.publish(topic, payload, retain=retain)

    def close(self) -> None:
        self._mqtt.close()


def _what(topic: str, payload: bytes) -> str:
    match messages.decode(payload, topic)[0]:
        case Status(online=online):
            return "here" if online else "gone"
        case CheckIn(ready=ready):
            return "ready" if ready else "not ready"
        case Offer():
            return "offer"
    return "other"


def cut(device: Device) -> None:
    """Break the connection of a device: the broker publishes its will, and it comes back."""
    link = getattr(device, "_transport")._link  # noqa: B009 - as a cable is pulled
    if link is not None and link.socket is not None:
        with contextlib.suppress(OSError):
            link.socket.shutdown(socket.SHUT_RDWR)


def test_a_round_under_way_loses_nobody_to_what_is_played_back_nor_does_one_after_a_restart(
    template: Template, trainer: LastingTrainer, quick: Path, start_mosquitto: Any
) -> None:
    may_go, held = threading.Semaphore(0), Counter[int]()

    def wait(index: int, cancel: threading.Event) -> None:
        held[index] += 1
        while not may_go.acquire(timeout=0.02):
            if cancel.is_set():
                raise TrainFailed("cancelled while it was held")

    broker = start_mosquitto("allow_anonymous true", "set_tcp_nodelay true")
    config, store = template.copy(quick / "run", broker.url), quick / "run" / "store"
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(contextlib.closing(Recorder(broker.url)))
        boards = Boards(quick / "run", [broker.url] * DEVICES, trainer, wait)
        stack.enter_context(contextlib.closing(boards))
        child = stack.enter_context(daemon(config))
        boards.start()

        def everybody_trains(number: int) -> bool:
            return len(held) == DEVICES and min(held.values()) >= number

        def let_them_go(number: int) -> None:
            for _ in range(DEVICES):
                may_go.release()
            until(
                lambda: len(ledger.models(store)) > number,
                f"version {number}, with everybody: {ledger.rounds(store)}, seed {SEED}",
                40.0,
            )

        until(lambda: everybody_trains(1), "round 1")

        def is_back(device: str, gone: int, ready: int) -> bool:
            return recorder.seen[device, "gone"] > gone and recorder.seen[device, "ready"] > ready

        for device in boards.devices * 2:  # one by one, for with nobody left the round would end
            before = recorder.seen[device.id, "gone"], recorder.seen[device.id, "ready"]
            cut(device)
            until(partial(is_back, device.id, *before), f"{device.id} back, {recorder.seen}", 20.0)
        recorder.play()
        let_them_go(1)

        until(lambda: everybody_trains(2), "round 2")
        child.kill()
        child.wait()
        recorder.play()  # nobody is there to see that what is retained is old
        child = stack.enter_context(daemon(config, "--exit-when-done"))
        calls = recorder.seen["", "offer"]
        until(lambda: recorder.seen["", "offer"] > calls, "the offer of a new call")
        recorder.play()
        let_them_go(2)

        until(lambda: everybody_trains(3), "round 3")
        recorder.play()
        let_them_go(3)
        assert child.wait(60) == 0
        passed_over = [device.status()["offers_passed_over"] for device in boards.devices]
    rounds = ledger.rounds(store)
    assert [r["outcome"] for r in rounds] == ["commit"] * ROUNDS, f"seed {SEED}: {rounds}"
    assert all(len(r["reported"]) == DEVICES for r in rounds), f"seed {SEED}: {rounds}"
    check_journal(config, template, boards.receipts)
    assert len(digests(config)) == ROUNDS + 1
    assert all(count > 0 for count in passed_over)
