# SPDX-License-Identifier: Apache-2.0
"""An uplink so slow that a whole packet outlasts the keepalive."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from edge_sdk import chunks, messages, topics
from edge_sdk.chunks import Assembler
from edge_sdk.messages import Chunk, Update
from edge_sdk.signing import DeviceKey
from edge_sdk.transport.mqtt import Mqtt

pytestmark = [pytest.mark.broker, pytest.mark.slow]
KEY = DeviceKey.from_seed(bytes(32))
BYTES_PER_S = 4_000
STEP_S = 0.02


class Uplink(threading.Thread):
    """A relay to the broker that takes so many bytes a second and holds next to nothing."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.target = port
        self.server = socket.socket()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.server.bind(("127.0.0.1", 0))
        self.server.listen()
        self.port: int = self.server.getsockname()[1]
        self.connections = 0
        self.is_done = threading.Event()

    def run(self) -> None:
        while not self.is_done.is_set():
            if select.select([self.server], [], [], 0.1)[0]:
                self.connections += 1
                device, _ = self.server.accept()
                broker = socket.create_connection(("127.0.0.1", self.target))
                with device, broker, contextlib.suppress(OSError):
                    self._relay(device, broker)
        self.server.close()

    def _relay(self, device: socket.socket, broker: socket.socket) -> None:
        while not self.is_done.is_set():
            ready, _, _ = select.select([device, broker], [], [], STEP_S)
            if broker in ready:
                if not (down := broker.recv(65536)):
                    return
                device.sendall(down)
            if device in ready:
                if not (up := device.recv(int(BYTES_PER_S * STEP_S))):
                    return
                broker.sendall(up)
                time.sleep(STEP_S)


@pytest.fixture
def uplink(mosquitto: Any) -> Iterator[Uplink]:
    relay = Uplink(mosquitto.port)
    relay.start()
    yield relay
    relay.is_done.set()
    relay.join(10)


def test_an_update_gets_through_in_smaller_chunks(
    mosquitto: Any, uplink: Uplink, until: Any
) -> None:
    frames: list[bytes | None] = []
    assembler = Assembler()

    def gather(topic: str, payload: bytes) -> None:
        chunk, _ = messages.decode(payload, topic)
        assert isinstance(chunk, Chunk)
        frames.append(assembler.add(KEY.id, chunk))

    coordinator = Mqtt(mosquitto.url, "coordinator")
    coordinator.subscribe(topics.up_filter())
    coordinator.start(gather, lambda _is_up: None)

    update_topic, topic = (topics.up("pump", KEY.id, kind) for kind in ("update", "chunk"))
    update = Update(1, 2, 3, 4, 0.5, 1.0, bytes(range(256)) * 120)
    frame = messages.encode(update, KEY, update_topic)
    device = Mqtt(f"mqtt://127.0.0.1:{uplink.port}", KEY.id, keepalive_s=1, backoff_s=(0.1, 0.2))

    def send(is_up: bool) -> None:
        for chunk in chunks.split(frame, device.max_packet) if is_up else []:
            device.publish(topic, messages.encode(chunk, KEY, topic))

    device.start(lambda _topic, _payload: None, send)
    until(lambda: frame in frames, "the whole update", 30.0)
    assert uplink.connections > 1  # whole packets did not get through
    assert device.max_packet < messages.MAX_FRAME
    device.close()
    coordinator.close()
