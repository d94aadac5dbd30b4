# SPDX-License-Identifier: Apache-2.0
"""A broker that comes back, and a fleet that comes back with it, all at once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from live_rounds import BUNDLE, CONFIG, TASK, Hosted, until

from edge_sdk import messages, topics
from edge_sdk.messages import CheckIn, Offer, Status
from edge_sdk.signing import DeviceKey
from edge_sdk.transport.mqtt import Mqtt

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]
FLEET = 300


class Caller:
    """A device that says hello and answers each roll call at once: the worst there could be."""

    def __init__(self, url: str, index: int) -> None:
        self.key = DeviceKey.from_seed(index.to_bytes(32, "little"))
        gone = self._status(online=False)
        backoff = (0.01, 0.05)
        self.mqtt = Mqtt(url, self.key.id, will=gone, keepalive_s=60, backoff_s=backoff)
        self.mqtt.subscribe(topics.offer(TASK))
        self.mqtt.start(self._heard, self._turned)

    def _status(self, *, online: bool) -> tuple[str, bytes]:
        topic, id_ = topics.status(self.key.id), self.key.id
        said = Status(id_, self.key.public, online, 1, id_, "test")
        return topic, messages.encode(said, self.key, topic)

    def _turned(self, is_up: bool) -> None:
        if is_up:
            self.mqtt.publish(*self._status(online=True), retain=True)

    def _heard(self, topic: str, payload: bytes) -> None:
        message, _ = messages.decode(payload, topic)
        assert isinstance(message, Offer)
        where = topics.up(TASK, self.key.id, "checkin")
        said = CheckIn(message.call, ready=True, examples=1)
        self.mqtt.publish(where, messages.encode(said, self.key, where))


@pytest.mark.slow
def test_hundreds_of_devices_that_reconnect_at_once_are_all_served(
    tmp_path: Path, start_mosquitto: Any
) -> None:
    broker = start_mosquitto("allow_anonymous true", "set_tcp_nodelay true")
    BUNDLE.save(tmp_path / "t.fedge")
    config = tmp_path / "coordinator.toml"
    config.write_text(
        CONFIG.format(broker=broker.url, codec='"dense"', cohort=FLEET + 1, count=1)
    )  # a cohort that is never whole: the roll is called, no round opens
    with contextlib.ExitStack() as stack:
        hosted = stack.enter_context(contextlib.closing(Hosted(config)))
        until(lambda: hosted.coordinator is not None, "the coordinator")
        fleet = [Caller(broker.url, i) for i in range(1, FLEET + 1)]
        for one in fleet:
            stack.callback(one.mqtt.close)

        def all_ready() -> bool:
            return all(hosted.is_ready(one.key.id) for one in fleet)

        until(all_ready, "the first roll call")
        assert hosted.coordinator is not None
        for _ in range(2):
            broker.kill()
            until(lambda: not any(one.mqtt.is_up for one in fleet), "everybody to be cut off")
            broker.start()
            until(lambda: all(one.mqtt.is_up for one in fleet), "every connection")
            until(all_ready, "the roll call after a storm")
        assert hosted.coordinator.counters["malformed"] == 0
        for one in fleet:  # a broker that goes first makes their farewells quick
            one.mqtt._closing.set()
        broker.kill()
