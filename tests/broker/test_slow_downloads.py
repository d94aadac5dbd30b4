# SPDX-License-Identifier: Apache-2.0
"""A model comes down a link on which a packet takes seconds, and hardly a byte comes twice."""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hand_bundles import mlp
from scripted_coordinator import TASK, FakeTraining, Scripted, weights_of

from edge_sdk import chunks, topics
from edge_sdk.device import Device
from edge_sdk.transport.mqtt import Mqtt

pytestmark = [pytest.mark.broker, pytest.mark.slow]
BUNDLE = mlp((120, 120, 10))
WEIGHTS = weights_of(BUNDLE, 0.25)
DIGEST = hashlib.sha256(WEIGHTS).digest()
SEGMENT = 1400
STEP_S = 0.02


class Link(threading.Thread):
    """A relay to the broker: so many bytes a second each way, so late; it holds next to nothing.

    A lost segment is one that comes when TCP has sent it again. The link is cut once each number
    of `cuts` bytes went down.
    """

    def __init__(self, port: int, rate: float, delay_s: float = 0.0, loss: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.target, self.rate, self.delay_s, self.loss = port, rate, delay_s, loss
        self.server = socket.socket()
        self.server.bind(("127.0.0.1", 0))
        self.server.listen()
        self.port: int = self.server.getsockname()[1]
        self.rng = random.Random(1)  # noqa: S311 - loses segments, guards nothing
        self.cuts: deque[int] = deque()
        self.connections = self.down = 0
        self.is_done = threading.Event()

    def run(self) -> None:
        while not self.is_done.is_set():
            if select.select([self.server], [], [], 0.1)[0]:
                self.connections += 1
                device, _ = self.server.accept()
                broker = socket.socket()
                broker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                with device, broker, contextlib.suppress(OSError):
                    broker.connect(("127.0.0.1", self.target))  # it may be down just now
                    self._relay(device, broker)
        self.server.close()

    def _relay(self, device: socket.socket, broker: socket.socket) -> None:
        ways = [(broker, device, deque[tuple[float, bytes]]()), (device, broker, deque())]
        looked_at = time.monotonic()
        while not self.is_done.is_set():
            passed_s = min(time.monotonic() - looked_at, 0.2)  # a busy machine looks less often
            looked_at = time.monotonic()
            for source, sink, under_way in ways:
                if select.select([source], [], [], 0)[0]:
                    if not (data := source.recv(max(1, int(self.rate * passed_s)))):
                        return
                    under_way.append((self._due(under_way, len(data)), data))
                while under_way and under_way[0][0] <= time.monotonic():
                    data = under_way.popleft()[1]
                    sink.sendall(data)
                    self.down += len(data) if sink is device else 0
                if self.cuts and self.down >= self.cuts[0]:
                    self.cuts.popleft()
                    return
            time.sleep(STEP_S)

    def _due(self, under_way: deque[tuple[float, bytes]], size: int) -> float:
        due = time.monotonic() + self.delay_s
        if self.rng.random() < self.loss * size / SEGMENT:
            due += 2 * self.delay_s + 0.2  # until it is missed and sent again
        return max(due, under_way[-1][0] if under_way else 0.0)  # in order, as TCP has it


class Tapped:
    """The device's transport, with the bytes of model parts counted by topic."""

    def __init__(self, url: str, keepalive_s: int) -> None:
        self.url, self.keepalive_s = url, keepalive_s
        self.parts: list[tuple[str, int]] = []

    def __call__(self, client: str, will: tuple[str, bytes]) -> Mqtt:
        quick = {"keepalive_s": self.keepalive_s, "backoff_s": (0.1, 0.3)}
        mqtt = Mqtt(self.url, client, will=will, **quick)  # type: ignore[arg-type]
        start = mqtt.start

        def tap(on_message: Callable[[str, bytes], None], on_state: Any) -> None:
            def message(topic: str, payload: bytes) -> None:
                if "/model/" in topic:
                    self.parts.append((topic, len(payload)))
                on_message(topic, payload)

            start(message, on_state)

        mqtt.start = tap  # type: ignore[method-assign]
        return mqtt

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.parts)


@pytest.fixture
def link(mosquitto: Any) -> Iterator[Callable[..., Link]]:
    made: list[Link] = []

    def make(**options: Any) -> Link:
        made.append(Link(mosquitto.port, **options))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.is_done.set()
        one.join(10)


@pytest.fixture
def coordinator(mosquitto: Any, until: Any) -> Iterator[Scripted]:
    transport = Mqtt(mosquitto.url, "coordinator")
    made = Scripted(transport, BUNDLE)
    made.start()
    until(lambda: transport.is_up, "the coordinator's connection")
    yield made
    transport.close()


def publish(coordinator: Scripted) -> int:
    """Retain the weights in the parts that a coordinator cuts, and the offer; return the bytes."""
    cut = chunks.parts("weights", WEIGHTS, DIGEST, 1)
    for part in cut:
        coordinator.send(part, topics.part(TASK, "weights", part.index))
    coordinator.version, coordinator.model = 1, WEIGHTS
    coordinator.offer()
    return len(WEIGHTS)


def fetch(folder: Path, tap: Tapped) -> Device:
    return Device("m", task=TASK, state=folder, connect=tap, bundle=BUNDLE, trainer=FakeTraining())


def test_60_kb_come_down_20_kbit_of_300_ms_and_loss_with_a_keepalive_of_10_s(
    coordinator: Scripted, link: Any, until: Any, tmp_path: Path, figure: Any
) -> None:
    whole = publish(coordinator)
    assert 55_000 < whole < 70_000
    slow = link(rate=2500.0, delay_s=0.15, loss=0.05)
    slow.cuts.append(whole // 2)
    tap, began = Tapped(f"mqtt://127.0.0.1:{slow.port}", 10), time.monotonic()
    with fetch(tmp_path / "state", tap) as device:
        until(lambda: device.version == 1, "the model over the slow link", 90.0)
    share = tap.bytes / whole
    figure("download over 20 kbit/s, cut at 50 %: bytes / the model's", share, "<= 1.1")
    figure("download over 20 kbit/s: seconds", time.monotonic() - began, "24 without any cut")
    assert slow.connections == 2  # the keepalive ended none
    assert share <= 1.1


def test_three_cuts_and_a_restart_cost_a_few_parts_in_all(
    coordinator: Scripted, link: Any, until: Any, tmp_path: Path, figure: Any
) -> None:
    whole = publish(coordinator)
    slow = link(rate=30_000.0)  # of a keepalive as many times shorter
    slow.cuts.extend(int(share * whole) for share in (0.2, 0.4))
    tap = Tapped(f"mqtt://127.0.0.1:{slow.port}", 1)
    with fetch(tmp_path / "state", tap) as device:
        until(lambda: len(tap.parts) >= 5, "half of the model", 30.0)
    with fetch(tmp_path / "state", tap) as device:
        until(lambda: device.version == 1, "the model", 30.0)
    share = tap.bytes / whole
    figure("download with two cuts and a restart: bytes / the model's", share, "<= 1.3")
    assert slow.connections >= 4
    assert share <= 1.3


def test_a_broker_that_forgets_its_sessions_costs_no_part_twice(
    mosquitto: Any, coordinator: Scripted, link: Any, until: Any, tmp_path: Path
) -> None:
    whole = publish(coordinator)
    slow = link(rate=30_000.0)
    tap = Tapped(f"mqtt://127.0.0.1:{slow.port}", 5)
    with fetch(tmp_path / "state", tap) as device:
        until(lambda: len(tap.parts) >= 4, "half of the model", 30.0)
        mosquitto.kill()  # its sessions and what it retained are gone
        until(lambda: not device.online, "the end of the connection", 30.0)
        mosquitto.start()
        until(lambda: coordinator.transport.is_up, "the coordinator's return", 30.0)  # type: ignore[attr-defined]
        publish(coordinator)
        until(lambda: device.version == 1, "the model", 30.0)
    assert tap.bytes <= 1.3 * whole
